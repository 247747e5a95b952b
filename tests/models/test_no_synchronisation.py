"""No operation of a training step or of a decoded token makes the host wait for an accelerator.

The models run on the meta device, which takes the paths of an accelerator and has no values to read, with a process
group that does nothing. What a GPU alone has, fused kernels and their random state, is in ``tests/fake_gpu``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DynamicCache, StaticCache

from hf_megatron.models.forward_arguments import CACHE
from hf_megatron.models.pretrained import MegatronModelMixin
from hf_megatron.tensor_parallel import TensorParallelGroup, parallelize_module
from hf_megatron.training.local_step import clip_grad_norm_, step_on_shards
from tests.models.architectures import ARCHITECTURES, GPT2, B, ModelCase, S
from tests.models.reference import Batch, loss_of

_WAITS = ("_local_scalar_dense", "nonzero", "is_nonzero", "equal", "masked_select", "_unique2", "unique_dim")


_ALL: Any = slice(None)  # positions


class WaitsError(AssertionError):
    """An operation would wait for the device."""


class NeverWait(TorchDispatchMode):
    """Raises on every operation that reads something back from a tensor on the meta device."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented
        name, kwargs = function._schema.name.split("::")[1], kwargs or {}
        tensors = [arg for arg in torch.utils._pytree.tree_leaves((args, kwargs)) if isinstance(arg, torch.Tensor)]
        is_on_device = any(tensor.is_meta for tensor in tensors)
        by_mask = name in ("index", "index_put_") and any(tensor.dtype == torch.bool for tensor in tensors[1:])
        device = kwargs.get("device")
        to_cpu = name == "_to_copy" and device is not None and torch.device(device).type == "cpu"
        to_cpu |= name == "copy_" and args[0].is_cpu
        if is_on_device and (name in _WAITS or by_mask or (to_cpu and not kwargs.get("non_blocking"))):
            raise WaitsError(f"{function} waits for the device")
        return function(*args, **kwargs)


@contextmanager
def _device() -> Iterator[None]:
    """The meta device as an accelerator: it has no autocast of its own, and no random state."""
    never = mock.patch.object(torch, "is_autocast_enabled", return_value=False)
    stream = mock.patch("hf_megatron.models.attention.private_stream", return_value=nullcontext())
    autocast = mock.patch.object(torch, "autocast", return_value=nullcontext())
    with never, autocast, stream, NeverWait():
        yield


@pytest.fixture
def two_ranks() -> Iterator[DeviceMesh]:
    """A world of two ranks, of which this process is the second, that exchange nothing."""
    dist.init_process_group("fake", store=FakeStore(), rank=1, world_size=2)
    yield init_device_mesh("cpu", (2,))
    dist.destroy_process_group()


def _model(case: ModelCase, head: str, mesh: DeviceMesh | None, dtype: torch.dtype, splits: bool = False) -> Any:
    # With the dropout of attention in training: without a fused kernel, on several ranks its masks come from the CPU.
    config = case.config(**case.dropout(0.1 if mesh is None else 0.0, 0.1))
    model = case.ours(head)(config).to(dtype)
    if mesh is not None:
        parallelize_module(model, mesh)
    for module in model.modules():
        if isinstance(module, MegatronModelMixin) and mesh is not None:
            module.tp_group, module.sequence_parallel = TensorParallelGroup.from_mesh(mesh), splits
        for name, parameter in module._parameters.items():
            if isinstance(parameter, DTensor):  # `to` would keep the shard where it is
                shard = parameter._local_tensor.to("meta")
                module._parameters[name] = nn.Parameter(DTensor(shard, parameter._spec, requires_grad=False))
    return model.to("meta").train()


def _batch(case: ModelCase, head: str) -> Batch:
    batch = case.batch(head)
    if head in ("ForPreTraining", "ForMaskedLM"):
        most = int((batch["labels"] != -100).sum(1).max())
        batch["masked_positions"] = (batch["labels"] == -100).int().argsort(dim=1, stable=True)[:, :most]
    return {name: tensor.to("meta") for name, tensor in batch.items()}


def _train(model: nn.Module, batch: Batch) -> None:
    optimizer = step_on_shards(torch.optim.AdamW(model.parameters(), lr=0.1, foreach=True))
    for _ in range(2):
        outputs = model(**batch)
        loss_of(outputs, _ALL).backward()
        clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()


_HEADS = [(case, head) for case in ARCHITECTURES for head in case.heads]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("case", "head"), _HEADS)
def test_a_step_in_one_process(case: ModelCase, head: str, dtype: torch.dtype) -> None:
    """Catches losses, norms, masks and labels that are read, or counted, on the way through forward and backward."""
    with _device():
        _train(_model(case, head, None, dtype), _batch(case, head))


@pytest.mark.parametrize("splits", [False, True])
@pytest.mark.parametrize(("case", "head"), _HEADS)
def test_a_step_on_two_ranks(two_ranks: DeviceMesh, case: ModelCase, head: str, splits: bool) -> None:
    """The same, and ids that are compared with this rank's part of the vocabulary."""
    with _device():
        _train(_model(case, head, two_ranks, torch.bfloat16, splits), _batch(case, head))


@pytest.mark.parametrize("make_cache", [DynamicCache, partial(StaticCache, max_cache_len=16)])
@pytest.mark.parametrize("size", [1, 2])
def test_a_decoded_token(request: pytest.FixtureRequest, size: int, make_cache: Any) -> None:
    """Catches a mask or a position that is read to see whether it matters, once for each token."""
    mesh = None if size == 1 else request.getfixturevalue("two_ranks")
    with _device(), torch.no_grad():
        model = _model(GPT2, "LMHeadModel", mesh, torch.bfloat16).eval()
        cache, mask = make_cache(config=model.config), torch.ones(B, S + 2, dtype=torch.long, device="meta")
        for start, stop in ((0, S), (S, S + 1), (S + 1, S + 2)):
            ids = torch.zeros(B, stop - start, dtype=torch.long, device="meta")
            model(input_ids=ids, attention_mask=mask[:, :stop], use_cache=True, **{CACHE: cache})


_PLANTED: dict[str, Callable[[torch.Tensor], Any]] = {
    "item": lambda x: x.sum().item(),
    "bool": lambda x: bool(x.any()),
    "nonzero": lambda x: x.nonzero(),
    "mask": lambda x: x[x > 0],
    "mask that is written to": lambda x: x.clone().masked_fill_(x > 0, 0)[x > 0],
    "copy": lambda x: x.cpu(),
    "other copy": lambda x: torch.empty(x.shape).copy_(x),
}


@pytest.mark.parametrize("planted", _PLANTED)
def test_what_waits_is_found(planted: str) -> None:
    """Catches a mode that lets through what it is for."""
    model = _model(GPT2, "LMHeadModel", None, torch.float32)
    model.transformer.h[1].register_forward_pre_hook(lambda _, args: _PLANTED[planted](args[0]) and None)
    with _device(), pytest.raises((WaitsError, NotImplementedError)):
        _train(model, _batch(GPT2, "LMHeadModel"))
