"""What the host does for a training step on two ranks, next to the same step of plain tensors; kernels of a layer.

    python -m benchmarks.bench_host_time            # writes results/host_time.{json,md}
    python -m benchmarks.bench_host_time --quick    # two layers, to see that it runs

**Time.** GPT-2 with 48 layers, narrow enough that products cost next to nothing, in a process group that does nothing.
The peer is the same model with its shards as plain parameters. Measured in turns, in processor seconds of the thread;
of each the shortest of all rounds, since other processes can only add to it. The optimizer is torch's fused AdamW;
clipping is ours, and on the plain tensors torch's own.

**Kernels.** Operations of one GPT-2 layer, forward and backward, in bfloat16 with dropout and fused attention, on the
meta device; those that only change a tensor's shape, or allocate, are no kernels. The input needs a gradient, as that
of every layer but the first does.
"""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any
from unittest import mock

os.environ["HF_MEGATRON_CPU_TUNING"] = "0"  # what GPUs do not have

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import GPT2LMHeadModel
from transformers.distributed import DistributedConfig

from benchmarks import records
from benchmarks.command_line import make_parser, parse
from hf_megatron import MegatronGPT2Config, MegatronGPT2LMHeadModel
from hf_megatron.training.local_step import clip_grad_norm_, step_on_shards

NAME = "host_time"
SIZES = {"n_embd": 64, "n_head": 4, "vocab_size": 512, "n_positions": 64, "bos_token_id": 0, "eos_token_id": 0}
NO_DROPOUT = {"attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0}
NO_KERNEL = {
    *("_unsafe_view", "alias", "as_strided", "detach", "empty", "empty_like", "empty_strided", "expand", "narrow"),
    *("new_empty", "permute", "select", "slice", "split", "split_with_sizes", "squeeze", "t", "transpose", "unbind"),
    *("unsqueeze", "view", "wait_tensor"),
}


class _Kernels(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented
        name = function._schema.name.split("::")[1]
        self.names.update([name] if name not in NO_KERNEL else [])
        return function(*args, **(kwargs or {}))


def _model(layers: int, tp_size: int, **changes: Any) -> Any:
    config = MegatronGPT2Config(**{**SIZES, "n_layer": layers, **changes})
    split = DistributedConfig(tp_size=tp_size) if tp_size > 1 else None
    return MegatronGPT2LMHeadModel.from_config(config, distributed_config=split, seed=0).train()


def _map_parameters(module: nn.Module, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
    for child in module.modules():
        for name, parameter in child._parameters.items():
            if parameter is not None:
                child._parameters[name] = nn.Parameter(function(parameter))


def _shortest(actions: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Seconds of each action, measured in turns."""
    found = dict.fromkeys(actions, float("inf"))
    for _ in range(rounds):
        for name, action in actions.items():
            started = time.thread_time()
            action()
            found[name] = min(found[name], time.thread_time() - started)
    return found


def host_time(layers: int, rounds: int) -> dict[str, dict[str, float]]:
    """Seconds with DTensors and with plain tensors, of a layer, a step of the optimizer, and clipping."""
    models = {"dtensor": _model(layers, 2, **NO_DROPOUT), "plain": _model(layers, 2, **NO_DROPOUT)}
    _map_parameters(models["plain"], lambda parameter: getattr(parameter, "_local_tensor", parameter).clone())
    hidden = torch.zeros(1, 8, SIZES["n_embd"], requires_grad=True)
    ids = torch.zeros(1, 8, dtype=torch.long)

    def layer_of(model: Any) -> Callable[[], None]:
        def step() -> None:
            for block in model.transformer.h:
                for parameter in block.parameters():
                    parameter.grad = None
                block(hidden).sum().backward()

        return step

    layer = _shortest({name: layer_of(model) for name, model in models.items()}, rounds)
    optimizers = {name: torch.optim.AdamW(model.parameters(), fused=True) for name, model in models.items()}
    step_on_shards(optimizers["dtensor"])
    for model in models.values():
        model(input_ids=ids, labels=ids).loss.backward()
    norms = {
        "dtensor": lambda: clip_grad_norm_(models["dtensor"].parameters(), 1.0),
        "plain": lambda: nn.utils.clip_grad_norm_(models["plain"].parameters(), 1.0),
    }
    return {
        "a layer, forward and backward": {name: seconds / layers for name, seconds in layer.items()},
        "a step of fused AdamW": _shortest({name: optimizer.step for name, optimizer in optimizers.items()}, rounds),
        "clipping": _shortest(norms, rounds),
    }


@contextmanager
def _as_on_a_gpu() -> Iterator[None]:
    """The meta device with the fused kernels that a GPU has for attention and dropout."""

    def attention(
        query: Any, key: Any, value: Any, *_: Any, dropout_p: float = 0.0, is_causal: bool = False, **options: Any
    ) -> Any:
        flash = torch.ops.aten._scaled_dot_product_flash_attention
        return flash(query, key, value, dropout_p, is_causal, scale=options.get("scale"))[0]

    def dropout(x: torch.Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> torch.Tensor:
        dropped: torch.Tensor = torch.ops.aten.native_dropout(x, p, True)[0] if training and p else x
        return dropped

    functional = torch.nn.functional
    with (
        mock.patch.object(functional, "scaled_dot_product_attention", attention),
        mock.patch.object(functional, "dropout", dropout),
        mock.patch.object(torch, "is_autocast_enabled", return_value=False),
        mock.patch("hf_megatron.models.attention.private_stream", return_value=nullcontext()),
    ):
        yield


def kernels(model: Any) -> dict[str, dict[str, int]]:
    """The kernels of a model's second layer, by name."""
    block = model.to(torch.bfloat16).train().transformer.h[1]
    _map_parameters(block, _on_meta)
    hidden = torch.empty(2, 16, SIZES["n_embd"], device="meta", dtype=torch.bfloat16, requires_grad=True)
    with _as_on_a_gpu(), _Kernels() as forward:
        output = block(hidden)
    output = output if isinstance(output, torch.Tensor) else output[0]
    gradient = torch.empty_like(output)
    with _as_on_a_gpu(), _Kernels() as backward:
        output.backward(gradient)
    return {"forward": dict(forward.names), "backward": dict(backward.names)}


def _on_meta(parameter: torch.Tensor) -> torch.Tensor:
    if not isinstance(parameter, DTensor):
        return parameter.to("meta")
    return DTensor(parameter._local_tensor.to("meta"), parameter._spec, requires_grad=False)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    given, file = parse(make_parser(__doc__, "quick"), arguments, NAME)
    torch.set_num_threads(1)
    dist.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
    try:
        times = host_time(*(2, 2) if given.quick else (48, 40))
        activation = {"activation_function": "gelu_pytorch_tanh"}
        stock = GPT2LMHeadModel(MegatronGPT2Config(**SIZES, **activation, n_layer=2))
        counts = {"transformers": kernels(stock)}
        counts |= {f"ours, TP={size}": kernels(_model(2, size, **activation)) for size in (1, 2)}
    finally:
        dist.destroy_process_group()
    record = {"times": times, "kernels": counts, "environment": records.environment("torch", "transformers")}
    records.write(file, record)
    lines = ["| host time on two ranks, ms | plain tensors | ours | ratio |", "| --- | ---: | ---: | ---: |"]
    for what, seconds in times.items():
        plain, ours = 1e3 * seconds["plain"], 1e3 * seconds["dtensor"]
        lines.append(f"| {what} | {plain:.2f} | {ours:.2f} | {ours / plain:.2f} |")
    lines += ["", "| kernels of a layer | forward | backward |", "| --- | ---: | ---: |"]
    for who, of_passes in counts.items():
        forward, backward = (sum(of_passes[name].values()) for name in ("forward", "backward"))
        lines.append(f"| {who} | {forward} | {backward} |")
    text = "\n".join(lines)
    file.with_suffix(".md").write_text(f"{text}\n", encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
