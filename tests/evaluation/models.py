"""A tokenizer and a small trained model for evaluations, made here, and slow loops to compare with."""

from pathlib import Path
from typing import Any

import torch
from tokenizers import ByteLevelBPETokenizer
from transformers import GPT2Config, GPT2LMHeadModel, GPT2TokenizerFast

from hf_megatron.paper.evaluation import detokenize_wikitext

WINDOW = 48  # positions of the model

# In the manner of a wiki.*.tokens file: spaces around punctuation, marks in numbers and compounds, headings.
_PARAGRAPH = (
    ' \n = The lighthouse = \n \n The keeper \'s house stood 1 @,@ 204 metres from the sea , which he named " near " . '
    "In 18 @.@ 5 years he had climbed the well @-@ worn stairs ( all 212 of them ) every evening ; nobody counted . \n"
)
TEXT = "".join(_PARAGRAPH.replace("212", str(200 + i)).replace("18", str(10 + 7 * i)) for i in range(12))
PASSAGES = [
    f"The keeper climbed the stairs and looked at the {thing} and then he looked at the {thing}"
    for thing in ("sea", "lamp", "well worn stairs", "lighthouse", "evening", "house that stood near the sea")
]


def save_model(directory: Path) -> Path:
    """A stock GPT-2 that has learned the text a little, with its tokenizer."""
    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(
        [detokenize_wikitext(TEXT), *PASSAGES], vocab_size=400, min_frequency=2, show_progress=False
    )
    (directory / "tokenizer").mkdir(parents=True)
    tokenizer.save_model(str(directory / "tokenizer"))
    fast = GPT2TokenizerFast.from_pretrained(directory / "tokenizer")
    fast.save_pretrained(directory)
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=len(fast), n_positions=WINDOW, n_embd=48, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=0
    )
    model = GPT2LMHeadModel(config).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    ids = torch.tensor(fast(detokenize_wikitext(TEXT) + " ".join(PASSAGES))["input_ids"])
    for _ in range(60):
        starts = torch.randint(len(ids) - WINDOW, (8,))
        batch = torch.stack([ids[start : start + WINDOW] for start in starts.tolist()])
        model(batch, labels=batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval().save_pretrained(directory)
    return directory


def load(directory: Path) -> tuple[GPT2LMHeadModel, Any]:
    """The stock model in evaluation mode, and the tokenizer."""
    model = GPT2LMHeadModel.from_pretrained(directory).eval()
    return model, GPT2TokenizerFast.from_pretrained(directory)


@torch.no_grad()
def slow_losses(model: GPT2LMHeadModel, ids: list[int], window: int, stride: int) -> list[float]:
    """Minus the log-probability of each token but the first, in float64: one window at a time, all logits."""
    losses: list[float] = []
    start = 0
    while len(losses) < len(ids) - 1:
        inputs = ids[start : start + window][: len(ids) - 1 - start]
        logits = model(torch.tensor([inputs])).logits[0].double().log_softmax(-1)
        for position, log_probabilities in enumerate(logits):
            if start + position == len(losses):  # the first window that reaches it
                losses.append(-float(log_probabilities[ids[start + position + 1]]))
        start += stride
    return losses
