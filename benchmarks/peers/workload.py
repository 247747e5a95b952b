"""What is computed: a model with generated weights, and a batch. The same for every competitor.

Shapes: B batch, S sequence, H hidden, L layers, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

__all__ = [
    "GPU_WORKLOADS",
    "TINY_WORKLOADS",
    "WORKLOADS",
    "Batch",
    "Workload",
    "batch_of",
    "generate",
    "training_flops",
]

Batch = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class Workload:
    """A model's sizes and those of its batch.

    Args:
        model: ``gpt2``, ``bert`` (the paper's, which is stock MegatronBert) or ``llama``.
        layers: L.
        hidden: H; the MLP is four times as wide.
        heads: Attention heads.
        vocab: V.
        sequence: S, tokens.
        batch: B, sequences.
        dtype: Of weights and arithmetic.
        autocast: Dtype of the matrix products, if it is another.
        labelled: Share of the positions that a BERT has to predict.
        dropout: Probability, everywhere. With it no two competitors compute the same.
    """

    model: str
    layers: int = 4
    hidden: int = 1024
    heads: int = 16
    vocab: int = 50304
    sequence: int = 256
    batch: int = 1
    dtype: str = "float32"
    autocast: str | None = None
    labelled: float = 0.15
    dropout: float = 0.0

    @property
    def torch_dtype(self) -> torch.dtype:
        """``dtype`` as torch has it."""
        dtype: torch.dtype = getattr(torch, self.dtype)
        return dtype

    @property
    def product_dtype(self) -> str:
        """Of the matrix products."""
        return self.autocast or self.dtype

    @property
    def tokens(self) -> int:
        """Tokens of a batch."""
        return self.batch * self.sequence

    @property
    def intermediate(self) -> int:
        """Width of the MLP: 4H; of Llama's, which has three matrices, what gives as many weights with two ranks."""
        return -(-8 * self.hidden // 3 // 16) * 16 if self.model == "llama" else 4 * self.hidden

    def stock_config(self) -> Any:
        """The stock configuration."""
        from transformers import GPT2Config, LlamaConfig, MegatronBertConfig

        common = {"vocab_size": self.vocab, "dtype": self.dtype}
        if self.model == "gpt2":
            return GPT2Config(
                n_positions=self.sequence,
                n_embd=self.hidden,
                n_layer=self.layers,
                n_head=self.heads,
                resid_pdrop=self.dropout,
                embd_pdrop=self.dropout,
                attn_pdrop=self.dropout,
                bos_token_id=None,
                eos_token_id=None,  # so that generation goes on to the length asked for
                **common,
            )
        common |= {
            "hidden_size": self.hidden,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "intermediate_size": self.intermediate,
            "max_position_embeddings": self.sequence,
        }
        if self.model == "llama":
            return LlamaConfig(tie_word_embeddings=True, bos_token_id=None, eos_token_id=None, **common)
        dropout = {"hidden_dropout_prob": self.dropout, "attention_probs_dropout_prob": self.dropout}
        return MegatronBertConfig(**dropout, **common)

    def stock_class(self) -> Any:
        """The stock class with the language-modeling head."""
        from transformers import GPT2LMHeadModel, LlamaForCausalLM, MegatronBertForMaskedLM

        return {"gpt2": GPT2LMHeadModel, "bert": MegatronBertForMaskedLM, "llama": LlamaForCausalLM}[self.model]


# The setting in which peers were first measured on two CPU cores.
WORKLOADS = {
    "gpt2-fp32": Workload("gpt2"),
    "gpt2-bf16": Workload("gpt2", dtype="bfloat16"),
    "gpt2-fp32-200k": Workload("gpt2", vocab=201216),
    "bert-fp32": Workload("bert", vocab=30528),
    "bert-bf16": Workload("bert", vocab=30528, dtype="bfloat16"),
}
# Sizes of the paper (tables 2 and 4 of arXiv:1909.08053), with the sequences it trains on. Vocabularies are multiples
# of 64, as the others need them. A card of 80 GB takes these batches with every competitor.
GPU_WORKLOADS = {
    "gpt2-355m": Workload("gpt2", 24, 1024, 16, sequence=1024, batch=16, dtype="bfloat16"),
    "gpt2-1.2b": Workload("gpt2", 40, 1536, 16, sequence=1024, batch=8, dtype="bfloat16"),
    "gpt2-2.5b": Workload("gpt2", 54, 1920, 20, sequence=1024, batch=4, dtype="bfloat16"),
    "bert-336m": Workload("bert", 24, 1024, 16, vocab=30528, sequence=512, batch=32, dtype="bfloat16"),
    "bert-1.3b": Workload("bert", 24, 2048, 32, vocab=30528, sequence=512, batch=16, dtype="bfloat16"),
}
TINY_WORKLOADS = {
    "gpt2-tiny": Workload("gpt2", 2, 32, 4, vocab=128, sequence=16),
    "bert-tiny": Workload("bert", 2, 32, 4, vocab=128, sequence=16),
}


def generate(workload: Workload, directory: Path, seed: int = 0) -> Path:
    """Write a stock checkpoint of the workload's dtype; every tensor depends on its shape and place and on the seed."""
    with torch.device("meta"):
        model = workload.stock_class()(workload.stock_config())
    model = model.to(workload.torch_dtype).to_empty(device="cpu")
    model.tie_weights()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(0.0, 0.02, generator=generator)  # biases too: one that is lost has to show
            if parameter.ndim == 1 and name.endswith("weight"):  # of a norm
                parameter.add_(1.0)
    model.save_pretrained(directory, max_shard_size="1TB")
    return directory


def batch_of(
    workload: Workload, device: torch.device, seed: int = 7, positions: bool = False
) -> dict[str, torch.Tensor]:
    """``input_ids`` and ``labels`` [B, S]; a GPT-2 predicts every next token, a BERT a share of its positions.

    With ``positions`` a BERT gets them as our data collator gives them: ``masked_positions`` [B, M].
    """
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, workload.vocab, (workload.batch, workload.sequence), generator=generator)
    labels, given = ids.clone(), {}
    if workload.model == "bert":
        chosen = torch.randperm(workload.tokens, generator=generator)[
            : max(1, round(workload.labelled * workload.tokens))
        ]
        labels = torch.full_like(ids, -100)
        labels.view(-1)[chosen] = ids.view(-1)[chosen]
        if positions:  # found here, since reading labels from a GPU would be a wait
            most = int((labels != -100).sum(1).max())
            given["masked_positions"] = (labels == -100).int().argsort(dim=1, stable=True)[:, :most]
    return {name: tensor.to(device) for name, tensor in {"input_ids": ids, "labels": labels, **given}.items()}


def training_flops(workload: Workload) -> float:
    """Floating-point operations that forward and backward of one batch need, on all ranks together.

    Matrix products only, 2 operations per multiplication, backward twice the forward. Counted is what the mathematics
    needs, which is less than the usual formulas have: of causal attention the half below the diagonal, of BERT's head
    the labelled positions. (With all of causal attention, as in Narayanan et al. 2021, arXiv:2104.04473, a GPT-2 of
    hidden size 1536 at 1024 tokens would count 5% more.)
    """
    hidden, tokens, causal = workload.hidden, workload.tokens, workload.model != "bert"
    layer = 2.0 * tokens * (4 * hidden**2 + 2 * hidden * 4 * hidden)
    layer += 4.0 * tokens * workload.sequence * hidden * (0.5 if causal else 1.0)
    predicted = tokens if causal else max(1, round(workload.labelled * tokens))
    head = 2.0 * predicted * hidden * workload.vocab
    if not causal:
        head += 2.0 * predicted * hidden**2  # the transform before the decoder
    return 3.0 * (workload.layers * layer + head)
