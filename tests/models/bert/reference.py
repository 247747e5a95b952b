"""Stock BERTs of both placements, tiny, what they are fed, and the comparison of one of them with ours."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import BertConfig, PreTrainedModel
from transformers import MegatronBertConfig as StockMegatronBertConfig

import hf_megatron
from tests.models.reference import assert_agrees, full, make_batch

# A function from placement, head and variant to a directory that the stock class saved; not to be written to.
BertDir = Callable[..., Path]
Tensors = dict[str, torch.Tensor]

PLACEMENTS = ("pre", "post")
HEADS = (
    "Model",
    "ForPreTraining",
    "ForMaskedLM",
    "ForSequenceClassification",
    "ForMultipleChoice",
    "ForTokenClassification",
    "ForQuestionAnswering",
)
MASKED_LM_HEADS = ("ForPreTraining", "ForMaskedLM")

# 12 heads can be cut over 2, 3, 4 and 6 ranks; vocabulary and inner size over few of them evenly.
TINY: dict[str, Any] = {
    "vocab_size": 131,
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 12,
    "intermediate_size": 70,
    "max_position_embeddings": 32,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}
LAST_TOKEN = TINY["vocab_size"] - 1

VARIANTS: dict[str, dict[str, Any]] = {
    "base": {},
    "untied": {"tie_word_embeddings": False},
    "padding_at_the_end": {"pad_token_id": LAST_TOKEN},
    "no_padding": {"pad_token_id": None},
    "chunked": {"chunk_size_feed_forward": 3},
    "other_functions": {"hidden_act": "relu", "layer_norm_eps": 0.01, "type_vocab_size": 3},
    # Published sizes; 4 ranks hold rows of the first unevenly, 3 ranks rows of the second.
    "uncased_vocabulary": {"vocab_size": 30522, "num_hidden_layers": 1},
    "cased_vocabulary": {"vocab_size": 28996, "num_hidden_layers": 1},
}


def stock_config(placement: str, **changes: Any) -> BertConfig | StockMegatronBertConfig:
    config_class = {"pre": StockMegatronBertConfig, "post": BertConfig}[placement]
    return config_class(**{**TINY, **changes})


def stock_class(placement: str, head: str) -> type[PreTrainedModel]:
    prefix = {"pre": "MegatronBert", "post": "Bert"}[placement]
    model_class: type[PreTrainedModel] = getattr(transformers, f"{prefix}{head}")
    return model_class


def our_class(head: str) -> type[PreTrainedModel]:
    model_class: type[PreTrainedModel] = getattr(hf_megatron, f"MegatronBert{head}")
    return model_class


def auto_class(head: str) -> str:
    """Name of the Auto class that finds the models with a head."""
    return "AutoModel" if head == "Model" else f"AutoModel{head}"


def save_stock_bert(directory: Path, placement: str, head: str, **changes: Any) -> Path:
    """Save a stock model whose biases and norms are not the zeros and ones of a fresh one."""
    # Of the heads with a choice of their number of labels, question answering alone needs two of them.
    labels = {} if head == "ForQuestionAnswering" else {"num_labels": 3}
    model = stock_class(placement, head)(stock_config(placement, **{**labels, **changes}))
    randomise(model)
    model.save_pretrained(directory)
    return directory


@torch.no_grad()
def randomise(model: nn.Module) -> None:
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        parameter.normal_(0.0, 0.2, generator=generator)
        if name.endswith(("ln.weight", "LayerNorm.weight")):
            parameter.add_(1.0)


def make_inputs(head: str, padding: str = "right", pad_token_id: int | None = 0, vocab_size: int = 131) -> Tensors:
    """Ids and token types [3, 9], for multiple choice [3, 2, 9], and a mask where there is padding."""
    inputs = make_batch(padding, vocab_size)
    labels = inputs.pop("labels")
    inputs["token_type_ids"] = (torch.arange(9) > torch.tensor([[3], [4], [5]])).long()
    if pad_token_id is not None:
        inputs["input_ids"] = inputs["input_ids"].masked_fill(labels == -100, pad_token_id)
    if head == "ForMultipleChoice":
        inputs = {name: torch.stack([value, value.roll(1, 0)], dim=1) for name, value in inputs.items()}
    return inputs


def make_labels(head: str, padding: str = "right", vocab_size: int = 131) -> Tensors:
    """What a head is trained on: every third token for a masked-LM head, -100 elsewhere."""
    labels = make_batch(padding, vocab_size)["labels"]
    masked = labels.masked_fill(torch.arange(27).view(3, 9) % 3 != 1, -100)
    all_labels: dict[str, Tensors] = {
        "Model": {},
        "ForPreTraining": {"labels": masked, "next_sentence_label": torch.tensor([0, 1, 1])},
        "ForMaskedLM": {"labels": masked},
        "ForSequenceClassification": {"labels": torch.tensor([0, 2, 1])},
        "ForMultipleChoice": {"labels": torch.tensor([0, 1, 1])},
        "ForTokenClassification": {"labels": torch.where(labels == -100, -100, labels % 3)},
        # The position behind the last one means that there is no answer.
        "ForQuestionAnswering": {
            "start_positions": torch.tensor([1, 9, 2]),
            "end_positions": torch.tensor([3, 9, 3]),
        },
    }
    return all_labels[head]


def loss_of(outputs: Any, valid: torch.Tensor) -> torch.Tensor:
    """The loss; of a base model, which has none, some function of all it gives."""
    loss: torch.Tensor
    if "loss" in outputs:
        loss = outputs.loss
    else:
        loss = outputs.last_hidden_state[valid].square().mean() + outputs.pooler_output.square().mean()
    return loss


def gradients(model: nn.Module) -> Tensors:
    """Whole gradients of the parameters that have one, by module: weight and bias in one vector.

    Some biases have a gradient that is zero but for rounding: a key's bias moves all scores of a query alike, and one
    before a softmax over positions or choices all of those. Their weights show how large rounding may be.
    """
    found: dict[str, list[torch.Tensor]] = {}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            found.setdefault(name.rpartition(".")[0], []).append(full(parameter.grad).flatten())
    return {module: torch.cat(parts) for module, parts in found.items()}


def outputs_of(outputs: Any, valid: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor but the loss, at the positions [B, S] that are not padding."""
    for name, value in outputs.items():
        if name in ("loss", "cross_attentions"):
            continue
        for i, tensor in enumerate(value if isinstance(value, tuple) else (value,)):
            by_position = tensor.movedim(2, 1) if name == "attentions" else tensor
            is_per_token = by_position.shape[:2] == valid.shape
            yield f"{name}[{i}]", by_position[valid] if is_per_token else by_position


def assert_outputs_agree(context: str, actual: Any, expected: Any, valid: torch.Tensor) -> None:
    tensors, reference = dict(outputs_of(actual, valid)), dict(outputs_of(expected, valid))
    assert list(tensors) == list(reference), f"{context}: {list(tensors)} instead of {list(reference)}"
    for name, value in reference.items():
        assert_agrees(f"{context}: {name}", tensors[name], value)
