"""The paper's models on a GPU: bytes by kind and at the peak, and collectives, are what the planner says."""

from collections import Counter
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch

from hf_megatron import MegatronBertConfig, MegatronBertForPreTraining, MegatronGPT2Config, MegatronGPT2LMHeadModel
from hf_megatron.planning import PRECISIONS, ModelShape, Run, plan_memory
from hf_megatron.planning.activation_memory import kept_by_layer, kept_by_loss
from hf_megatron.planning.traffic import collectives
from tests.fake_gpu.steps import train
from tests.fake_gpu.tracing import DEVICE, build, fake_gpu

_CLASSES: dict[str, tuple[Any, Any]] = {
    "gpt2": (MegatronGPT2Config, MegatronGPT2LMHeadModel),
    "bert": (MegatronBertConfig, MegatronBertForPreTraining),
}


@dataclass(frozen=True)
class Case:
    """One training run."""

    preset: str
    tp_size: int = 1
    micro_batch: int = 2
    precision: str = "bf16"
    recompute: str = "none"
    attention: str = "sdpa"
    dropout: float = 0.1
    sequence_parallel: bool = False
    layers: int | None = None  # instead of the preset's

    def __str__(self) -> str:
        defaults = Case(self.preset)
        changed = [f"{name}={value}" for name, value in vars(self).items() if value != getattr(defaults, name)]
        return " ".join((self.preset, *changed))

    @property
    def run(self) -> Run:
        return Run(
            micro_batch=self.micro_batch,
            sequence_length=512 if self.preset.startswith("bert") else 1024,
            tp_size=self.tp_size,
            sequence_parallel=self.sequence_parallel,
            recompute=self.recompute,  # type: ignore[arg-type]
            attention=self.attention,  # type: ignore[arg-type]
            precision=PRECISIONS[self.precision],
            dropout=self.dropout > 0,
        )

    def config(self) -> Any:
        config_class, _ = _CLASSES[self.preset[:4]]
        config = config_class.from_preset(self.preset)
        names = ("attn_pdrop", "resid_pdrop", "embd_pdrop")
        if self.preset.startswith("bert"):
            names = ("attention_probs_dropout_prob", "hidden_dropout_prob")  # type: ignore[assignment]
        for name in names:
            setattr(config, name, self.dropout)
        config.num_hidden_layers = self.layers or config.num_hidden_layers
        config._attn_implementation = self.attention
        return config

    def batch(self) -> dict[str, torch.Tensor]:
        size = (self.micro_batch, self.run.sequence_length)
        ids = torch.zeros(size, dtype=torch.long, device=DEVICE)
        if not self.preset.startswith("bert"):
            return {"input_ids": ids, "labels": ids.clone()}
        labelled = torch.zeros(self.micro_batch, round(0.15 * size[1]), dtype=torch.long, device=DEVICE)
        order = torch.zeros(self.micro_batch, dtype=torch.long, device=DEVICE)
        return {"input_ids": ids, "labels": ids.clone(), "masked_positions": labelled, "sentence_order_label": order}


_SMALL = [
    Case(
        preset,
        layers=4,
        tp_size=tp_size,
        recompute=recompute,
        attention=attention,
        precision=precision,
        dropout=dropout,
    )
    for preset in ("gpt2-1.2b", "bert-1.3b")
    for tp_size, precision, recompute, attention, dropout in (
        (1, "bf16", "none", "sdpa", 0.1),
        (1, "amp", "none", "sdpa", 0.1),
        (1, "fp32", "none", "sdpa", 0.0),
        (1, "bf16", "full", "sdpa", 0.1),
        (1, "bf16", "none", "eager", 0.1),
        (8, "bf16", "none", "sdpa", 0.1),
        (8, "amp", "none", "sdpa", 0.0),
        (8, "bf16", "selective", "eager", 0.1),
        (8, "amp", "selective", "eager", 0.1),
        (8, "fp32", "full", "eager", 0.0),
    )
]
_SPLIT = [replace(case, sequence_parallel=True) for case in _SMALL if case.tp_size > 1 and case.precision != "fp32"]
_WHOLE = [
    Case("gpt2-1.2b"),
    Case("bert-1.3b"),
    Case("gpt2-8.3b", tp_size=8),
    Case("gpt2-8.3b", tp_size=8, precision="amp", recompute="full", sequence_parallel=True),
]


@pytest.mark.parametrize("case", [*_SMALL, *_SPLIT, *_WHOLE], ids=str)
def test_a_step(case: Case) -> None:
    """Catches a wait at full size, a tensor that the plan does not know of or that lives too long, and a collective
    that is not in the plan."""
    _, model_class = _CLASSES[case.preset[:4]]
    config = case.config()
    shape = ModelShape.from_config({**config.to_dict(), "architectures": [model_class.__name__]})
    planned = plan_memory(shape, case.run)
    dtype = torch.bfloat16 if case.precision == "bf16" else torch.float32
    with fake_gpu(case.tp_size) as trace:
        model = build(
            trace,
            model_class,
            config,
            dtype=dtype,
            sequence_parallel=case.sequence_parallel,
            recompute=case.recompute,
        )
        weights = trace.live
        batch = case.batch()
        inputs = trace.live - weights
        phases = train(trace, model, batch, autocast=case.precision == "amp")
    rest = phases["before"].live  # weights, optimizer and inputs
    measured = {
        "parameters": weights - sum(b.numel() * b.element_size() for b in model.buffers()),
        "gradients": phases["optimizer"].live - rest,
        "optimizer": rest - weights - inputs,
        "activations": phases["forward"].live - rest,
        "peak": max(phase.peak for phase in phases.values()),
    }
    expected = {
        "parameters": planned.parameters,
        "gradients": planned.gradients,
        "optimizer": planned.optimizer,
        "activations": _kept(shape, case.run, planned.activations),
        "peak": planned.peak,
    }
    print(
        case,
        {
            n: (f"{measured[n] / 1e6:.1f}", f"{expected[n] / 1e6:.1f}", f"{measured[n] / expected[n]:.3f}")
            for n in measured
        },
    )
    seen = sum((phases[name].collectives for name in ("forward", "backward")), Counter())
    plan = Counter[str]()
    for collective in collectives(shape, case.run):
        plan[collective.operation] += collective.count
    print(dict(seen), dict(plan))
    assert measured == pytest.approx(expected, rel=0.05)
    assert seen == plan


def _kept(shape: ModelShape, run: Run, activations: int) -> int:
    """What autograd holds after the forward pass; what is recomputed is there in the backward pass only."""
    total = activations + sum(kept.bytes for kept in kept_by_loss(shape, run))
    if run.recompute == "none":
        return total
    layer, kept = (sum(t.bytes for t in kept_by_layer(shape, r)) for r in (replace(run, recompute="none"), run))
    return total - (layer if run.recompute == "full" else layer - kept)
