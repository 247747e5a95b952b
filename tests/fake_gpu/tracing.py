"""A training step on a GPU that is not there.

Fake tensors have a shape and a device and no data; every operation on them runs through, in seconds at any size, and
so does every collective of the fake process group. Meanwhile :class:`Trace` counts what the GPU would do, follows the
bytes that are alive on it, and raises where the host would wait for it.
"""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock
from weakref import finalize

import torch
import torch.distributed as dist
from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from hf_megatron.models.pretrained import MegatronModelMixin
from hf_megatron.tensor_parallel import TensorParallelGroup
from hf_megatron.tensor_parallel.placement import parallelize_module

DEVICE = torch.device("cuda", 0)
aten = torch.ops.aten

_COPIES = {aten._to_copy.default, aten.copy_.default}
# What launches no kernel, besides views.
_NO_KERNEL = {aten.empty, aten.empty_like, aten.empty_strided, aten.new_empty, aten.new_empty_strided}
_NO_KERNEL |= {aten._unsafe_view, aten.detach, aten.lift_fresh}
# By the planner's names.
_COLLECTIVES = {
    "allreduce_": "all-reduce",
    "_allgather_base_": "all-gather",
    "_reduce_scatter_base_": "reduce-scatter",
    "alltoall_base_": "exchange",
    "all_reduce": "all-reduce",  # DTensor's own, as of the next two
    "all_gather_into_tensor": "all-gather",
    "reduce_scatter_tensor": "reduce-scatter",
}


class WaitError(Exception):
    """The host would wait for the device."""


class Trace(TorchDispatchMode):
    """What the operations under this mode do; nothing of what is called for DTensors rather than their shards."""

    def __init__(self) -> None:
        super().__init__()
        self.kernels: Counter[str] = Counter()
        self.collectives: Counter[str] = Counter()
        self.mesh: DeviceMesh | None = None  # of the tensor-parallel ranks, if there are several
        self.live = self.peak = 0  # bytes on the device; of the peak since `reset`
        self._known: Any = WeakIdKeyDictionary()  # storages

    def reset(self) -> None:
        """Begin to count anew."""
        self.kernels.clear()
        self.collectives.clear()
        self.peak = self.live

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # so that DTensor takes it apart, under this mode
        inputs = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        if func is aten._local_scalar_dense.default and inputs[0].device.type == "cpu":
            return 1  # of the host's own, such as a seed: nobody waits
        try:
            result = func(*args, **kwargs)
        except (DataDependentOutputException, DynamicOutputShapeException) as error:
            raise WaitError(f"{func}: its result is needed on the host.") from error
        outputs = [x for x in tree_leaves(result) if isinstance(x, torch.Tensor)]
        if func in _COPIES and _waits(func, args, kwargs, inputs, outputs):
            raise WaitError(f"{func}: from {inputs[-1].device} to {outputs[0].device}, {list(outputs[0].shape)}.")
        self._count(func, [*inputs, *outputs])
        for tensor in outputs:
            self._follow(tensor)
        return result

    def _count(self, func: Any, tensors: list[torch.Tensor]) -> None:
        name = func._schema.name.partition("::")[2]
        if func.namespace in ("c10d", "_c10d_functional"):
            if name in _COLLECTIVES:
                self.collectives[_COLLECTIVES[name]] += 1
        elif func.namespace != "prim" and not func.is_view and func.overloadpacket not in _NO_KERNEL:
            self.kernels[name] += any(tensor.device == DEVICE for tensor in tensors)

    def _follow(self, tensor: torch.Tensor) -> None:
        if tensor.device != DEVICE or isinstance(tensor, DTensor):
            return
        storage = tensor.untyped_storage()
        if storage not in self._known:
            self._known[storage] = size = storage.nbytes()
            self.live += size
            self.peak = max(self.peak, self.live)
            finalize(storage, self._free, size)

    def _free(self, size: int) -> None:
        self.live -= size


def _waits(func: Any, args: Any, kwargs: Any, inputs: list[torch.Tensor], outputs: list[torch.Tensor]) -> bool:
    """Whether the host waits for a copy: one of some elements between devices, unless it is asked not to."""
    is_async = kwargs.get("non_blocking") or (func is aten.copy_.default and len(args) > 2 and args[2])
    return inputs[-1].device != outputs[0].device and outputs[0].numel() > 0 and not is_async


@contextmanager
def fake_gpu(tp_size: int = 1) -> Iterator[Trace]:
    """The first of ``tp_size`` GPUs. What is traced on it draws no random numbers and computes nothing."""
    torch.cuda.init()
    dist.init_process_group("fake", rank=0, world_size=tp_size, store=FakeStore())
    with (
        # Where transformers asks whether it is traced, it would leave out what waits and what chooses a kernel.
        mock.patch("transformers.utils.import_utils.is_fake_tensor", return_value=False),
        # Nothing real may be made on the device and then called fake: there is no device.
        mock.patch.object(FakeTensorMode, "avoid_device_init", True),
    ):
        try:
            trace = Trace()
            trace.mesh = init_device_mesh("cuda", (tp_size,)) if tp_size > 1 else None
            with FakeTensorMode(allow_non_fake_inputs=True), trace:
                yield trace
        finally:
            dist.destroy_process_group()


def build(
    trace: Trace,
    model_class: Any,
    config: Any,
    *,
    dtype: torch.dtype = torch.float32,
    sequence_parallel: bool = False,
    recompute: str = "none",
) -> Any:
    """A model in training mode on the fake GPU, as :meth:`from_config` makes it, less the numbers."""
    usual = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device("meta"):
            model = model_class(config)
    finally:
        torch.set_default_dtype(usual)
    if trace.mesh is not None:
        parallelize_module(model, trace.mesh)
        for module in model.modules():
            if isinstance(module, MegatronModelMixin):
                module.tp_group = TensorParallelGroup.from_mesh(trace.mesh)
                module.sequence_parallel = sequence_parallel
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[name] = nn.Parameter(_on_device(parameter))
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = _on_device(buffer)
    if recompute != "none":
        model.activation_checkpointing_enable({"recompute": recompute})
    return model.train()


def _on_device(tensor: torch.Tensor) -> torch.Tensor:
    if isinstance(tensor, DTensor):
        return DTensor(_on_device(tensor._local_tensor), tensor._spec, requires_grad=False)
    return torch.empty(tensor.shape, dtype=tensor.dtype, device=DEVICE)
