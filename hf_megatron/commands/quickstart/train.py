"""What the quickstart trains on, and what its ranks run: train a small GPT-2, let it write, save it.

    torchrun --nproc-per-node 2 -m hf_megatron.commands.quickstart.train DIRECTORY STEPS

It is also the shortest complete example of training with this package and nothing but PyTorch around it.
"""

from __future__ import annotations

import json
import math
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.optim.lr_scheduler import LambdaLR
from tqdm import tqdm
from transformers import AutoTokenizer, GPT2TokenizerFast
from transformers.distributed import DistributedConfig
from transformers.utils import logging

from hf_megatron import MegatronGPT2Config, MegatronGPT2LMHeadModel
from hf_megatron.errors import HfMegatronError, UnsupportedError

END_OF_TEXT = "<|endoftext|>"
VOCAB_SIZE = 1009  # odd on purpose: shards of a vocabulary need not be equal
HELD_OUT_EVERY = 12  # every twelfth topic, about 8% of the text, is kept for evaluation
BATCH = 16
LENGTH = 64
WARM_UP = 10
PEAK_LEARNING_RATE = 5e-3
PROMPT = "The with statement"
NEW_TOKENS = 48
SEED = 1909


def read_corpus() -> tuple[list[str], list[str]]:
    """The help topics of Python's reference, the text behind ``help("with")``, to train and to evaluate on.

    UnsupportedError if there are none, as in some minimal distributions.
    """
    try:
        topics: dict[str, str] = import_module("pydoc_data.topics").topics
    except ImportError as error:
        raise UnsupportedError(
            "this Python has no pydoc_data.topics, the text the quickstart trains on; install the full standard "
            "library (python.org, or your distribution's python3 package rather than its minimal one)."
        ) from error
    documents = [topics[name] for name in sorted(topics)]
    return [text for i, text in enumerate(documents) if i % HELD_OUT_EVERY], documents[::HELD_OUT_EVERY]


def train_tokenizer(documents: list[str], directory: Path) -> Any:
    """Train a byte-level BPE like GPT-2's, save it in the Hub's format and return it."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    special = dict.fromkeys(("bos_token", "eos_token", "unk_token"), END_OF_TEXT)
    fast = GPT2TokenizerFast(tokenizer_object=tokenizer, **special)
    fast.save_pretrained(directory)
    return fast


def pack(tokenizer: Any, documents: list[str]) -> torch.Tensor:
    """[N, LENGTH] token ids: documents joined by the end-of-text token, and cut; a shorter rest is dropped."""
    ids = [token for text in documents for token in (*tokenizer(text)["input_ids"], tokenizer.eos_token_id)]
    return torch.tensor(ids[: len(ids) // LENGTH * LENGTH]).view(-1, LENGTH)


def configuration(tokenizer: Any, tp_size: int) -> MegatronGPT2Config:
    """A GPT-2 of about half a million parameters whose number of heads the degree divides.

    It sees its text about once and needs no dropout; it is narrow, so that weights as small as GPT-2's would learn
    slowly.
    """
    num_heads = tp_size * math.ceil(4 / tp_size)
    return MegatronGPT2Config(
        vocab_size=len(tokenizer),
        n_positions=LENGTH,
        n_embd=32 * num_heads,
        n_layer=2,
        n_head=num_heads,
        initializer_range=0.06,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        resid_pdrop=0.0,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )


def learning_rate(step: int, num_steps: int) -> float:
    """Linear warm-up, then cosine to a tenth, as a share of the peak."""
    if step < WARM_UP:
        return (step + 1) / WARM_UP
    progress = (step - WARM_UP) / max(1, num_steps - WARM_UP)
    return 0.1 + 0.45 * (1 + math.cos(math.pi * progress))


def train(
    model: MegatronGPT2LMHeadModel, sequences: torch.Tensor, num_steps: int, *, show_progress: bool
) -> list[float]:
    """Train on random batches; every rank draws the same ones. Returns the loss of each step."""
    decayed = [p for p in model.parameters() if p.dim() > 1]
    others = [p for p in model.parameters() if p.dim() == 1]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.01}, {"params": others, "weight_decay": 0.0}], lr=PEAK_LEARNING_RATE
    )
    schedule = LambdaLR(optimizer, lambda step: learning_rate(step, num_steps))
    order = torch.Generator().manual_seed(SEED)
    losses = []
    with tqdm(total=num_steps, desc="training", unit="step", disable=not show_progress) as bar:
        for _ in range(num_steps):
            batch = sequences[torch.randint(len(sequences), (BATCH,), generator=order)]
            loss = model(batch, labels=batch).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            losses.append(float(loss.detach()))
            bar.set_postfix(loss=f"{losses[-1]:.3f}")
            bar.update()
    return losses


@torch.no_grad()
def perplexity(model: MegatronGPT2LMHeadModel, sequences: torch.Tensor) -> float:
    """``exp`` of the mean loss per predicted token; every sequence predicts LENGTH - 1 tokens."""
    losses = [float(model(batch, labels=batch).loss) * len(batch) for batch in sequences.split(BATCH)]
    return math.exp(sum(losses) / len(sequences))


def write(model: MegatronGPT2LMHeadModel, prompt: Any) -> torch.Tensor:
    """The greedy continuation [1, S] of a prompt, the same on all ranks; changes the model's dtype to float64."""
    # In float64 no two tokens are equally likely.
    ids: torch.Tensor = model.double().generate(**prompt, max_new_tokens=NEW_TOKENS, do_sample=False, pad_token_id=0)
    written: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(written, ids)
    if not all(torch.equal(ids, other) for other in written):
        raise HfMegatronError("the ranks wrote different continuations; the caches or the logits differ between them.")
    return ids


def main(directory: Path, num_steps: int) -> None:
    """Train, evaluate, write and save into ``directory``, where the tokenizer already lies."""
    torch.set_num_threads(1)  # the ranks share the machine's cores
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    dist.init_process_group("gloo")
    try:
        is_first = dist.get_rank() == 0
        tp_size = dist.get_world_size()
        tokenizer = AutoTokenizer.from_pretrained(directory / "tokenizer")
        documents, held_out_documents = read_corpus()
        model = MegatronGPT2LMHeadModel.from_config(
            configuration(tokenizer, tp_size), distributed_config=DistributedConfig(tp_size=tp_size), seed=SEED
        )
        losses = train(model, pack(tokenizer, documents), num_steps, show_progress=is_first)
        model.eval()
        held_out = pack(tokenizer, held_out_documents)
        prompt = tokenizer(PROMPT, return_tensors="pt")
        torch.manual_seed(SEED)
        sample = model.generate(**prompt, max_new_tokens=NEW_TOKENS, do_sample=True, top_k=20, pad_token_id=0)
        result = {
            "tp_size": tp_size,
            "steps": num_steps,
            "num_parameters": model.num_parameters(),
            "loss_first": losses[0],
            "loss_last": sum(losses[-10:]) / len(losses[-10:]),
            "perplexity": perplexity(model, held_out),
            "sample": tokenizer.decode(sample[0]),
        }
        with torch.no_grad():
            logits = model(held_out[:4]).logits
        model.save_pretrained(directory / "tp", distributed_checkpoint=True)
        continuation = write(model, prompt)
        if is_first:
            tokenizer.save_pretrained(directory / "tp")
            torch.save(
                {"input_ids": held_out[:4], "logits": logits, "prompt": dict(prompt), "continuation": continuation},
                directory / "expected.pt",
            )
            (directory / "result.json").write_text(json.dumps(result), encoding="utf-8")
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
