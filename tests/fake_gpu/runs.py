"""Training runs of the paper's models: what the planner says of them, and what a trace of a step shows."""

from collections import Counter
from dataclasses import dataclass, replace
from typing import Any, NamedTuple
from unittest import mock

import torch

from hf_megatron import MegatronBertConfig, MegatronBertForPreTraining, MegatronGPT2Config, MegatronGPT2LMHeadModel
from hf_megatron.planning import PRECISIONS, ModelShape, Run, plan_memory
from hf_megatron.planning import memory as planning_memory
from hf_megatron.planning.activation_memory import kept_by_layer, kept_by_loss
from hf_megatron.planning.traffic import collectives
from tests.fake_gpu.steps import Phase, train
from tests.fake_gpu.tracing import DEVICE, build, fake_gpu

_CLASSES: dict[str, tuple[Any, Any]] = {
    "gpt2": (MegatronGPT2Config, MegatronGPT2LMHeadModel),
    "bert": (MegatronBertConfig, MegatronBertForPreTraining),
}
_PLANNED = planning_memory._second_embedding_gradient
_DROPOUTS = ("attn_pdrop", "resid_pdrop", "embd_pdrop", "attention_probs_dropout_prob", "hidden_dropout_prob")


@dataclass(frozen=True)
class Case:
    """A training run."""

    preset: str
    tp_size: int = 1
    precision: str = "bf16"
    recompute: str = "none"
    attention: str = "sdpa"
    dropout: float = 0.1
    sequence_parallel: bool = False
    layers: int | None = None  # instead of the preset's
    micro_batch: int = 2

    def __str__(self) -> str:
        changed = {name: value for name, value in vars(self).items() if value != getattr(Case(self.preset), name)}
        return " ".join((self.preset, *(f"{name}={value}" for name, value in changed.items())))

    @property
    def is_bert(self) -> bool:
        return self.preset.startswith("bert")

    @property
    def run(self) -> Run:
        options: dict[str, Any] = {"recompute": self.recompute, "attention": self.attention}
        return Run(
            micro_batch=self.micro_batch,
            sequence_length=512 if self.is_bert else 1024,
            tp_size=self.tp_size,
            sequence_parallel=self.sequence_parallel,
            precision=PRECISIONS[self.precision],
            dropout=self.dropout > 0,
            **options,
        )

    def config(self) -> Any:
        config_class, model_class = _CLASSES[self.preset[:4]]
        config = config_class.from_preset(self.preset)
        for name in _DROPOUTS:
            if hasattr(config, name):
                setattr(config, name, self.dropout)
        config.num_hidden_layers = self.layers or config.num_hidden_layers
        config._attn_implementation = self.attention
        config.architectures = [model_class.__name__]
        return config

    def batch(self) -> dict[str, torch.Tensor]:
        """Ids and labels; of BERT's positions 15% have one."""
        rows, length = self.micro_batch, self.run.sequence_length
        sizes = {"input_ids": (rows, length), "labels": (rows, length)}
        if self.is_bert:
            sizes |= {"masked_positions": (rows, round(0.15 * length)), "sentence_order_label": (rows,)}  # type: ignore[dict-item]
        return {name: torch.zeros(size, dtype=torch.long, device=DEVICE) for name, size in sizes.items()}


class Found(NamedTuple):
    """What a trace shows, or what the planner says: bytes by kind, and collectives by name."""

    bytes: dict[str, int]
    collectives: dict[str, int]


def trace(case: Case) -> tuple[Found, dict[str, Phase]]:
    """What a step of this run does, and its phases."""
    _, model_class = _CLASSES[case.preset[:4]]
    dtype = torch.bfloat16 if case.precision == "bf16" else torch.float32
    with fake_gpu(case.tp_size) as device:
        options: dict[str, Any] = {"sequence_parallel": case.sequence_parallel, "recompute": case.recompute}
        model = build(device, model_class, case.config(), dtype=dtype, **options)
        buffers = sum(buffer.numel() * buffer.element_size() for buffer in model.buffers())
        loaded = device.live
        batch = case.batch()
        inputs = device.live - loaded
        phases = train(device, model, batch, autocast=torch.bfloat16 if case.precision == "amp" else None)
    before = phases["before"].live  # weights, buffers, inputs and the optimizer's state
    of_kinds = {
        "parameters": loaded - buffers,
        "gradients": phases["optimizer"].live - before,
        "optimizer": before - inputs - loaded,
        "activations": phases["forward"].live - before,
        "peak": max(phase.peak for phase in phases.values()) - buffers,
    }
    return Found(of_kinds, dict(phases["forward"].collectives + phases["backward"].collectives)), phases


def plan(case: Case) -> Found:
    """What the planner says of it."""
    run, shape = case.run, ModelShape.from_config(case.config().to_dict())
    with mock.patch.object(planning_memory, "_second_embedding_gradient", _second_embedding_gradient):
        memory = plan_memory(shape, run)
    # What autograd holds after the forward pass; what is recomputed is there in the backward pass only.
    kept = memory.activations + sum(tensor.bytes for tensor in kept_by_loss(shape, run))
    if run.recompute != "none":
        whole, stored = (sum(t.bytes for t in kept_by_layer(shape, r)) for r in (replace(run, recompute="none"), run))
        kept -= whole if run.recompute == "full" else whole - stored
    of_kinds = {name: getattr(memory, name) for name in ("parameters", "gradients", "optimizer", "peak")}
    counts: Counter[str] = Counter()
    for collective in collectives(shape, run):
        counts[collective.operation] += collective.count
    return Found({**of_kinds, "activations": kept}, dict(counts))


def _second_embedding_gradient(shape: ModelShape, run: Run) -> int:
    """As planned; autograd adds fake tensors, like DTensors, out of place, so here one process has a third one too."""
    return _PLANNED(shape, run) * (2 if run.tp_size == 1 else 1)


def difference(found: Found, planned: Found) -> str:
    """Where the two are apart by more than 5%, and by how much; empty if nowhere. Collectives must be equal."""
    apart = [
        f"{kind}: {measured / 1e6:.1f} MB, planned {planned.bytes[kind] / 1e6:.1f}"
        for kind, measured in found.bytes.items()
        if abs(measured - planned.bytes[kind]) > 0.05 * planned.bytes[kind]
    ]
    if found.collectives != planned.collectives:
        apart.append(f"collectives: {found.collectives}, planned {planned.collectives}")
    return "; ".join(apart)
