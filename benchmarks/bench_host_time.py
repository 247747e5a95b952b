"""What the host does for a training step on two ranks, next to the same step of plain tensors; kernels of a layer.

    python -m benchmarks.bench_host_time            # writes results/host_time.{json,md}
    python -m benchmarks.bench_host_time --kernels  # count again, and keep the times
    python -m benchmarks.bench_host_time --quick    # two layers, to see that it runs

**Time.** GPT-2 with 48 layers, narrow enough that products cost next to nothing, in a process group that does nothing.
The peer is the same model with its shards as plain parameters. Measured in turns, in processor seconds of the thread;
of each the shortest of all rounds, since other processes can only add to it. The optimizer is torch's fused AdamW;
clipping is ours, and on the plain tensors torch's own.

**Kernels.** Operations of one GPT-2 layer, forward and backward, in bfloat16 with dropout and fused attention, on the
meta device; those that only change a tensor's shape, or allocate, are no kernels. The input needs a gradient, as that
of every layer but the first does. With ``--megatron-core`` its layers are counted too; what it has ``torch.compile``
fuse is one kernel each, as far as it is forward or has a backward function of its own. Of compiled layers those in the
code that ``torch.compile`` generates for a CPU, in float32 and without dropout of attention, which a CPU's fused kernel
lacks; this needs a C++ compiler.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import re
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import wraps
from pathlib import Path
from typing import Any
from unittest import mock

os.environ["HF_MEGATRON_CPU_TUNING"] = "0"  # what GPUs do not have

import torch
import torch.distributed as dist
from torch import nn
from torch._inductor.utils import run_and_get_code
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode
from transformers import GPT2LMHeadModel
from transformers.distributed import DistributedConfig

from benchmarks.command_line import make_parser, parse
from benchmarks.peers.workload import Workload
from benchmarks.records import environment, read, write
from hf_megatron import MegatronGPT2Config, MegatronGPT2LMHeadModel
from hf_megatron.training.local_step import clip_grad_norm_, step_on_shards

NAME = "host_time"
SIZES = {"n_embd": 64, "n_head": 4, "vocab_size": 512, "n_positions": 64, "bos_token_id": 0, "eos_token_id": 0}
NO_DROPOUT = {"attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0}
NOTE = """megatron-core {} has its local modules, without Transformer Engine or Apex. Their attention is separate
operations; with fused attention, as Transformer Engine has it, it is one. What megatron-core has `torch.compile` fuse
(bias and GELU; bias, dropout and residual) counts as one kernel."""
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


def kernels(block: nn.Module, shape: Sequence[int] = (2, 16), **inputs: Any) -> dict[str, dict[str, int]]:
    """The kernels of a layer, by name; ``shape`` is that of its tokens."""
    _map_parameters(block.to(torch.bfloat16).train(), _on_meta)
    hidden = torch.empty(*shape, SIZES["n_embd"], device="meta", dtype=torch.bfloat16, requires_grad=True)
    with _as_on_a_gpu(), _Kernels() as forward:
        output = block(hidden, **inputs)
    output = output if isinstance(output, torch.Tensor) else output[0]
    gradient = torch.empty_like(output)
    with _as_on_a_gpu(), _Kernels() as backward:
        output.backward(gradient)
    return {"forward": dict(forward.names), "backward": dict(backward.names)}


def _on_meta(parameter: torch.Tensor) -> torch.Tensor:
    if not isinstance(parameter, DTensor):
        return parameter.to("meta")
    return DTensor(parameter._local_tensor.to("meta"), parameter._spec, requires_grad=False)


def _one_kernel(function: Callable[..., Any]) -> Callable[..., Any]:
    """In place of ``torch.compile``: whatever the function does counts as one kernel."""

    @wraps(function)
    def counted(*args: Any, **kwargs: Any) -> Any:
        mode = _get_current_dispatch_mode()
        assert isinstance(mode, _Kernels)
        before = Counter(mode.names)
        result = function(*args, **kwargs)
        mode.names = before + Counter([function.__name__])
        return result

    return counted


def _fused_attention(_: Any, query: Any, key: Any, value: Any, *__: Any, **___: Any) -> torch.Tensor:
    """In place of megatron-core's own: [S, B, heads, head size] each to [S, B, H]."""
    query, key, value = (tensor.permute(1, 2, 0, 3) for tensor in (query, key, value))
    context = torch.nn.functional.scaled_dot_product_attention(query, key, value, dropout_p=0.1, is_causal=True)
    return context.permute(2, 0, 1, 3).flatten(2)


def kernels_of_megatron_core() -> dict[str, dict[str, dict[str, int]]]:
    """The kernels of a GPT layer of megatron-core's own modules, by degree; with its attention and with a fused one."""
    with mock.patch.object(torch, "compile", _one_kernel):
        peer = importlib.import_module("benchmarks.peers.megatron_core")
    attention = importlib.import_module("megatron.core.transformer.dot_product_attention").DotProductAttention
    workload = Workload("gpt2", 2, SIZES["n_embd"], SIZES["n_head"], SIZES["vocab_size"], SIZES["n_positions"])
    workload = replace(workload, dtype="bfloat16", dropout=0.1)
    mask = torch.empty(1, 1, 16, 16, device="meta", dtype=torch.bool)
    counts = {}
    for kind, forward in (("", attention.forward), (" with fused attention", _fused_attention)):
        for tp_size in (1, 2):
            peer.over_ranks(tp_size)
            block = peer.make_model(workload, tp_size, fused=True).decoder.layers[1]
            with (
                mock.patch.object(torch.cuda, "current_device", return_value="meta"),  # where it allocates
                mock.patch.object(attention, "forward", forward),
            ):
                counts[f"megatron-core{kind}, TP={tp_size}"] = kernels(block, (16, 2), attention_mask=mask)
    return counts


def compiled_kernels(block: nn.Module) -> dict[str, dict[str, int]]:
    """The kernels of a compiled layer, by name; those that the compiler made are ``fused``."""
    hidden = torch.zeros(2, 16, SIZES["n_embd"], requires_grad=True)

    def step() -> None:
        output = torch.compile(block, fullgraph=True)(hidden)
        (output if isinstance(output, torch.Tensor) else output[0]).sum().backward()

    torch.compiler.reset()
    _, (forward, backward) = run_and_get_code(step)
    return {"forward": _called(forward), "backward": _called(backward)}


def _called(code: str) -> dict[str, int]:
    body = code[code.index("def call(") :]
    names = re.findall(r"\bcpp_(fused)\w*\(|extern_kernels\.(\w+)\(|torch\.ops\.\w+\.(\w+)\.\w+\(", body)
    return dict(Counter(name for name in map("".join, names) if name not in NO_KERNEL))


def count_kernels(*, is_compiled: bool) -> dict[str, dict[str, dict[str, int]]]:
    """The kernels of a layer of stock transformers, of ours, and of megatron-core where that is installed."""

    def layers(**changes: Any) -> dict[str, nn.Module]:
        changes["activation_function"] = "gelu_pytorch_tanh"
        stock = GPT2LMHeadModel(MegatronGPT2Config(**SIZES, **changes, n_layer=2)).train()
        ours = {f"ours, TP={size}": _model(2, size, **changes).transformer.h[1] for size in (1, 2)}
        return {"transformers": stock.transformer.h[1], **ours}

    counts = {name: kernels(layer) for name, layer in layers().items()}
    if is_compiled:
        counts |= {f"{name}, compiled": compiled_kernels(layer) for name, layer in layers(attn_pdrop=0.0).items()}
    return counts | (kernels_of_megatron_core() if importlib.util.find_spec("megatron") else {})


def markdown(record: dict[str, Any]) -> str:
    """Both tables."""
    lines = ["| host time on two ranks, ms | plain tensors | ours | ratio |", "| --- | ---: | ---: | ---: |"]
    for what, seconds in record["times"].items():
        plain, ours = 1e3 * seconds["plain"], 1e3 * seconds["dtensor"]
        lines.append(f"| {what} | {plain:.2f} | {ours:.2f} | {ours / plain:.2f} |")
    lines += ["", "| kernels of a layer | forward | backward |", "| --- | ---: | ---: |"]
    for who, of_passes in record["kernels"].items():
        forward, backward = (sum(of_passes[name].values()) for name in ("forward", "backward"))
        lines.append(f"| {who} | {forward} | {backward} |")
    if version := record["environment"]["versions"].get("megatron-core"):
        lines += ["", NOTE.format(version)]
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = make_parser(__doc__, "quick")
    parser.add_argument("--kernels", action="store_true", help="count kernels only; times that are there stay")
    parser.add_argument("--megatron-core", type=Path, metavar="DIR", help="unpacked wheels of megatron-core and triton")
    given, file = parse(parser, arguments, NAME)
    sys.path += [str(given.megatron_core)] if given.megatron_core else []
    torch.set_num_threads(1)
    dist.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
    try:
        record = read(file) if given.kernels else {}
        if not record:
            record["times"] = host_time(*(2, 2) if given.quick else (48, 40))
            record["environment"] = environment("torch", "transformers")
        record["kernels"] = count_kernels(is_compiled=not given.quick)
    finally:
        dist.destroy_process_group()
    if importlib.util.find_spec("megatron"):
        record["environment"]["versions"] |= environment("megatron-core")["versions"]
    write(file, record)
    text = markdown(record)
    file.with_suffix(".md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
