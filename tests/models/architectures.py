"""The architectures under test. A further one takes a further entry in ``ARCHITECTURES``; the tests go over that list.

Models are tiny, with weights that make every mistake visible.
"""

import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import transformers
from torch import nn

from hf_megatron.architectures import BERT_POST, BERT_PRE, Architecture
from hf_megatron.architectures import GPT2 as GPT2_TABLE
from tests.models.reference import Batch, layout, loss_of, rank, reference_loss

# 12 heads can be cut over 2, 3, 4 and 6 ranks; the vocabulary, a prime, over none of them evenly.
B, S, H, V, LAYERS = 3, 9, 48, 131, 2
SIZES = {
    "vocab_size": V,
    "hidden_size": H,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 12,
    "max_position_embeddings": 32,
}
_SHARED_VARIANTS: dict[str, dict[str, Any]] = {
    "base": {},
    "untied": {"tie_word_embeddings": False},
    "shared_heads": {"num_attention_heads": 5, "hidden_size": 40},  # over 2, 3 and 4 ranks a cut runs through a head
}


@dataclass(frozen=True, eq=False)
class ModelCase:
    """A case of the tests; it travels to the ranks by name."""

    name: str
    table: Architecture  # how it is cut, and which classes there are
    sizes: Mapping[str, Any]  # what its tiny configuration says beyond SIZES
    variants: Mapping[str, dict[str, Any]]  # changes of the configuration that each take a path of their own
    language_model: str  # the head with a vocabulary and no other loss
    dropouts: tuple[str, ...]  # names in the configuration: of attention's dropout, then of the others'
    embedding_dropout: str  # the module with the dropout of the embeddings, in the base model
    is_causal: bool = False  # whether labels are shifted, and later positions hidden
    ends_with_norm: bool = False  # whether a layer does so; else one norm follows the last layer
    shared_bias: int = 0  # rows of H in the biases of Q, K and V that all ranks hold whole
    has_token_types: bool = True

    @property
    def __name__(self) -> str:
        """For the names of tests."""
        return self.name

    def __reduce__(self) -> Any:
        return named, (self.name,)

    @property
    def heads(self) -> tuple[str, ...]:
        """Ends of the names of its classes, the main one first."""
        return tuple(pair.stock.removeprefix(self._prefix(ours=False)) for pair in self.table.classes)

    @property
    def embedding(self) -> str:
        """The word embedding, in a model with a head."""
        return f"{self.table.base_prefix}.{self.table.word_embedding}"

    @property
    def tied(self) -> dict[str, str]:
        """Parameters of the main head that are not stored when tied, and what they are tied to."""
        pairs = self.table.classes[0].tied.items()
        return {name: self.embedding if other == self.table.word_embedding else other for name, other in pairs}

    def unused(self, *, is_tied: bool) -> set[str]:
        """What the stock classes keep and do not use: an untied decoder has a bias of its own."""
        return set() if is_tied else set(self.tied.values()) - {self.embedding}

    def _prefix(self, *, ours: bool) -> str:
        (base,) = (pair for pair in self.table.classes if not pair.has_prefix)
        return (base.ours if ours else base.stock).removesuffix("Model")

    def stock(self, head: str | None = None) -> Any:
        """The class of transformers; without a head the main one."""
        return getattr(transformers, self._prefix(ours=False) + (head or self.heads[0]))

    def ours(self, head: str | None = None) -> Any:
        return getattr(importlib.import_module("hf_megatron"), self._prefix(ours=True) + (head or self.heads[0]))

    def auto(self, head: str) -> Any:
        """The Auto class that finds a head."""
        suffix = {"Model": "", "LMHeadModel": "ForCausalLM"}.get(head, head)
        return getattr(transformers, f"AutoModel{suffix}")

    def dropout(self, attention: float, hidden: float) -> dict[str, Any]:
        return {name: hidden if number else attention for number, name in enumerate(self.dropouts)}

    def changes(self, **changes: Any) -> dict[str, Any]:
        """All that a tiny configuration is given."""
        return {**SIZES, **self.dropout(0.0, 0.0), **self.sizes, **changes}

    def stock_config(self, **changes: Any) -> Any:
        return self.stock().config_class(**self.changes(**changes))

    def config(self, **changes: Any) -> Any:
        return self.ours().config_class(**self.changes(**{**self.table.own_config, **changes}))

    def save_stock(self, directory: Path, head: str | None = None, **changes: Any) -> Path:
        """Save a stock model whose biases and norms are not the zeros and ones of a fresh one."""
        # Of the heads with a choice of their number of labels, question answering alone needs two of them.
        labels = {} if head == "ForQuestionAnswering" else {"num_labels": 3}
        model = self.stock(head)(self.stock_config(**{**labels, **changes}))
        randomise(model)
        model.save_pretrained(directory)
        return directory

    def load_stock(self, directory: Path, head: str | None = None, *, attention: str = "eager", **options: Any) -> Any:
        """The stock model, in training mode, with another attention than eager if it has any."""
        model_class = self.stock(head)
        attention = attention if model_class._supports_sdpa else "eager"
        return model_class.from_pretrained(directory, attn_implementation=attention, **options).train()

    def load(self, directory: Path, tp_size: int = 1, head: str | None = None, **options: Any) -> Any:
        """Our model, cut over the ranks of this call; an option may be one of :func:`layout`."""
        split = layout(
            tp_size, **{name: options.pop(name) for name in options.keys() & {"fsdp_size", "sequence_parallel"}}
        )
        return self.ours(head).from_pretrained(directory, distributed_config=split, **options)

    def build(
        self, tp_size: int = 1, fsdp_size: int = 1, head: str | None = None, *, config: Any, **options: Any
    ) -> Any:
        """Our model from scratch, cut over the ranks of this call."""
        return self.ours(head).from_config(config, distributed_config=layout(tp_size, fsdp_size), **options)

    def save_distributed(self, source: Path, directory: Path, tp_size: int) -> None:
        """Load a directory on this many ranks and save it as a tp directory."""
        self.load(source, tp_size).save_pretrained(directory, distributed_checkpoint=True)

    def inputs(
        self, head: str | None = None, padding: str = "right", *, vocab_size: int = V, pad_token_id: int | None = 0
    ) -> Batch:
        """Ids [3, 9], for multiple choice [3, 2, 9], token types, and a mask where there is padding."""
        inputs = make_batch(padding, vocab_size)
        labels = inputs.pop("labels")
        if pad_token_id is not None:
            inputs["input_ids"] = inputs["input_ids"].masked_fill(labels == -100, pad_token_id)
        if self.has_token_types:
            inputs["token_type_ids"] = (torch.arange(S) > torch.tensor([[3], [4], [5]])).long()
        if head == "ForMultipleChoice":
            inputs = {name: torch.stack([value, value.roll(1, 0)], dim=1) for name, value in inputs.items()}
        return inputs

    def labels(self, head: str | None = None, padding: str = "right", *, vocab_size: int = V) -> Batch:
        """What a head is trained on: every third token for a masked-LM head, -100 elsewhere."""
        labels = make_batch(padding, vocab_size)["labels"]
        masked = labels.masked_fill(torch.arange(B * S).view(B, S) % 3 != 1, -100)
        of_heads: dict[str, Batch] = {
            "Model": {},
            "LMHeadModel": {"labels": labels},
            "ForPreTraining": {"labels": masked, "next_sentence_label": torch.tensor([0, 1, 1])},
            "ForMaskedLM": {"labels": masked},
            "ForSequenceClassification": {"labels": torch.tensor([0, 2, 1])},
            "ForMultipleChoice": {"labels": torch.tensor([0, 1, 1])},
            "ForTokenClassification": {"labels": torch.where(labels == -100, -100, labels % 3)},
            # The position behind the last one means that there is no answer.
            "ForQuestionAnswering": dict(
                zip(("start_positions", "end_positions"), torch.tensor([[1, 9, 2], [3, 9, 3]]), strict=True)
            ),
        }
        return of_heads[head or self.heads[0]]

    def batch(self, head: str | None = None, padding: str = "right", length: int = S, **tokens: Any) -> Batch:
        """Inputs and labels, cut to the first positions; of `tokens` see :meth:`inputs`."""
        batch = self.inputs(head, padding, **tokens)
        batch |= self.labels(head, padding, vocab_size=tokens.get("vocab_size", V))
        return {name: x[..., :length].contiguous() if x.shape[-1] == S else x for name, x in batch.items()}

    def stock_step(self, model: Any, batch: Batch, **options: Any) -> tuple[Any, torch.Tensor]:
        """Outputs and loss of a stock model, the loss in the dtype of the model; see :func:`reference_loss`."""
        valid = positions(batch)
        if not self.is_causal or not model.config.architectures[0].endswith(self.language_model):
            outputs = model(**batch, **options)
            return outputs, loss_of(outputs, valid)
        outputs = model(**{**batch, "labels": None}, **options)
        return outputs, reference_loss(outputs.logits, batch["labels"])


def token_ids(batch_size: int = B, length: int = S, vocab_size: int = V, seed: int = 0) -> torch.Tensor:
    return torch.randint(1, vocab_size, (batch_size, length), generator=torch.Generator().manual_seed(seed))


def make_batch(padding: str = "none", vocab_size: int = V) -> Batch:
    """Ids [3, 9] and labels; with ``"left"`` or ``"right"`` padding also a mask, and labels of -100."""
    ids = token_ids(vocab_size=vocab_size)
    if padding == "none":
        return {"input_ids": ids, "labels": ids.clone()}
    mask = torch.ones_like(ids)
    for row, count in enumerate((0, 2, 5)):
        mask[row, :count] = 0
    if padding == "right":
        mask = mask.flip(1)
    labels = ids.masked_fill(mask == 0, -100)
    labels[0, 4] = -100
    return {"input_ids": ids.masked_fill(mask == 0, 0), "attention_mask": mask, "labels": labels}


def positions(batch: Batch) -> torch.Tensor:
    """Which positions [B, S] are no padding."""
    return batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool().flatten(0, -2)


@dataclass(frozen=True)
class StockDir:
    """From an architecture, a head and a variant to a directory that stock saved; not to be written to.

    It travels to the ranks, which have to ask for the same ones.
    """

    root: Path

    def __call__(self, case: ModelCase | None = None, head: str | None = None, variant: str = "base") -> Path:
        case = case or GPT2
        path = self.root / f"{case.name}-{head or ''}-{variant}"
        if rank() == 0 and not path.is_dir():
            with torch.random.fork_rng(devices=[]):
                case.save_stock(path, head, **case.variants[variant])
        if dist.is_initialized():
            dist.barrier()
        return path


@torch.no_grad()
def randomise(model: nn.Module) -> None:
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        parameter.normal_(0.0, 0.2, generator=generator)
        if name.endswith(".weight") and parameter.dim() == 1:  # a norm
            parameter.add_(1.0)


_BERT: dict[str, Any] = {
    "sizes": {"intermediate_size": 70},
    "variants": {
        **_SHARED_VARIANTS,
        "padding_at_the_end": {"pad_token_id": V - 1},
        "no_padding": {"pad_token_id": None},
        "chunked": {"chunk_size_feed_forward": 3},
        "other_functions": {"hidden_act": "relu", "layer_norm_eps": 0.01, "type_vocab_size": 3},
        # Published sizes; 4 ranks hold rows of the first unevenly, 3 ranks rows of the second.
        "uncased_vocabulary": {"vocab_size": 30522, "num_hidden_layers": 1},
        "cased_vocabulary": {"vocab_size": 28996, "num_hidden_layers": 1},
    },
    "language_model": "ForMaskedLM",
    "dropouts": ("attention_probs_dropout_prob", "hidden_dropout_prob"),
    "embedding_dropout": "embeddings.dropout",
}
GPT2 = ModelCase(
    "gpt2",
    GPT2_TABLE,
    sizes={"bos_token_id": 0, "eos_token_id": V - 1, "pad_token_id": 0, "classifier_dropout": 0.0},
    variants={
        **_SHARED_VARIANTS,
        "n_inner": {"n_inner": 100},
        "uneven_n_inner": {"n_inner": 101},
        "inverse_layer_scaling": {"scale_attn_by_inverse_layer_idx": True},
        "upcast": {"reorder_and_upcast_attn": True},
        "unscaled": {"scale_attn_weights": False},
        "published_vocabulary": {"vocab_size": 50257, "num_hidden_layers": 1},
    },
    language_model="LMHeadModel",
    dropouts=("attn_pdrop", "resid_pdrop", "embd_pdrop"),
    embedding_dropout="drop",
    is_causal=True,
    shared_bias=3,
    has_token_types=False,
)
PRE = ModelCase("bert-pre", BERT_PRE, **_BERT)
POST = ModelCase("bert-post", BERT_POST, ends_with_norm=True, **_BERT)
BERTS = (PRE, POST)
ARCHITECTURES = (GPT2, *BERTS)


def named(name: str) -> ModelCase:
    return next(case for case in ARCHITECTURES if case.name == name)
