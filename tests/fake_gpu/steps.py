"""A step of training, phase by phase, and a decoded token, as the tests look at them."""

from collections import Counter
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from transformers.cache_utils import DynamicCache

from hf_megatron.models.forward_arguments import CACHE
from hf_megatron.training.local_step import clip_grad_norm_, step_on_shards
from tests.fake_gpu.tracing import DEVICE, Trace


@dataclass(frozen=True)
class Phase:
    """What one phase of a step does."""

    kernels: Counter[str]
    collectives: Counter[str]
    live: int  # bytes on the device when it ends
    peak: int


def train(
    trace: Trace, model: Any, batch: dict[str, torch.Tensor], *, autocast: torch.dtype | None = None
) -> dict[str, Phase]:
    """The phases of the second step: "before" it, "forward", "backward", "clipping" and "optimizer".

    The first step makes the optimizer's state. Clipping and the optimizer are those of MegatronTrainer; float16 has its
    loss scale.
    """
    optimizer = step_on_shards(torch.optim.AdamW(model.parameters(), fused=True))
    scaler = torch.amp.GradScaler("cuda", enabled=autocast is torch.float16)
    phases: dict[str, Phase] = {}

    def end(name: str) -> None:
        phases[name] = Phase(trace.kernels.copy(), trace.collectives.copy(), trace.live, trace.peak)
        trace.reset()

    for _ in range(2):
        end("before")
        with nullcontext() if autocast is None else torch.autocast("cuda", autocast):
            loss = loss_of(model(**batch))
        end("forward")
        scaler.scale(loss).backward()
        del loss
        end("backward")
        scaler.unscale_(optimizer)
        clip_grad_norm_(model.parameters(), 1.0)
        end("clipping")
        scaler.step(optimizer)
        scaler.update()
        end("optimizer")
        optimizer.zero_grad()
    return phases


def loss_of(outputs: Any) -> torch.Tensor:
    """The loss; of a base model, which has none, some function of what it gives."""
    if "loss" in outputs:
        loss: torch.Tensor = outputs.loss
        return loss
    total: torch.Tensor = outputs.last_hidden_state.float().sum()
    return total if outputs.get("pooler_output") is None else total + outputs.pooler_output.float().sum()


def decode(trace: Trace, model: Any, batch_size: int, prompt: int) -> Phase:
    """One token after a prompt, with a cache of keys and values."""
    model.eval()
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(input_ids=torch.zeros(batch_size, prompt, dtype=torch.long, device=DEVICE), **{CACHE: cache})
        trace.reset()
        model(input_ids=torch.zeros(batch_size, 1, dtype=torch.long, device=DEVICE), **{CACHE: cache})
    return Phase(trace.kernels.copy(), trace.collectives.copy(), trace.live, trace.peak)
