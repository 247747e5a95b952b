"""What Megatron-LM's pickles hold besides tensors: the classes they name, and plain values for what is read of them."""

from __future__ import annotations

from typing import Any

from hf_megatron.checkpoint.torch_file import TENSOR_GLOBALS
from hf_megatron.checkpoint.unpickle import Call, Global, globals_in
from hf_megatron.errors import shown

_ENUMERATIONS = ("ModelType", "LayerType", "AttnType", "AttnMaskType", "AttnBackend", "PositionEmbeddingType")
_GRAPH_ENUMERATIONS = ("CudaGraphModule", "CudaGraphScope", "InferenceCudaGraphScope")  # the last since core 0.18
_DTYPES = ("float16", "bfloat16", "float32", "float64", "uint8", "int32", "int64", "half")
_NUMPY_DTYPES = ("Bool", "Int8", "UInt8", "Int16", "UInt16", "Int32", "UInt32", "Int64", "UInt64")
_NUMPY_FLOATS = ("Float16", "Float32", "Float64", "Str", "Object")
_SCALARS = (bool, int, float, str, type(None))
_MAX_ITEMS = 8

# None of it is looked up. Each is a class whose instances are data, or a function that makes such an instance.
MEGATRON_GLOBALS = frozenset[Global]().union(
    TENSOR_GLOBALS,
    globals_in("_codecs", "encode"),
    globals_in("argparse", "Namespace"),
    globals_in("builtins", "set", "frozenset", "bytearray"),
    globals_in("collections", "defaultdict"),
    globals_in("copyreg", "_reconstructor"),
    globals_in("datetime", "timedelta"),
    *(globals_in(module, "BytesIO") for module in ("_io", "io")),  # CPython pickles the first: Transformer Engine 1.x
    *(globals_in(module, "PosixPath", "PurePosixPath") for module in ("pathlib", "pathlib._local")),
    globals_in("signal", "Signals"),
    globals_in("types", "SimpleNamespace"),
    *(globals_in(f"numpy.{core}.multiarray", "_reconstruct", "scalar") for core in ("core", "_core")),
    *(globals_in(f"numpy.{core}.numeric", "_frombuffer") for core in ("core", "_core")),
    globals_in("numpy", "dtype", "ndarray"),
    globals_in("numpy.dtypes", *(f"{name}DType" for name in _NUMPY_DTYPES + _NUMPY_FLOATS)),
    globals_in("torch", "device", *_DTYPES),
    globals_in("torch._C", "Generator"),
    globals_in("torch._utils", "_rebuild_device_tensor_from_numpy"),
    # Enumerations in the arguments.
    *(
        globals_in(f"megatron.{module}", *_ENUMERATIONS)
        for module in ("enums", "model.enums", "legacy.model.enums", "core.enums", "core.transformer.enums")
    ),
    globals_in("megatron.core.transformer.enums", *_GRAPH_ENUMERATIONS),
    globals_in("megatron.core.enums", "Fp8Recipe", "Fp4Recipe"),
    globals_in("megatron.core.optimizer", "OptimizerConfig"),
    globals_in("megatron.core.optimizer.optimizer_config", "OptimizerConfig"),
    globals_in("megatron.core.rerun_state_machine", "RerunDiagnostic", "RerunMode", "RerunState"),
    # Loss scalers.
    *(
        globals_in(f"{package}.loss_scaler", "LossScaler", "DynamicLossScaler", "LossScalerBase")
        for package in ("fp16", "megatron.fp16", "megatron.fp16_deprecated", "deepspeed.runtime.fp16")
    ),
)


def plain(value: Any) -> Any:
    """A value of a pickle as something that can be compared and shown: a scalar, a short list of them, or a Global.

    What else there is becomes a text that says what it was.
    """
    if isinstance(value, (*_SCALARS, Global)):
        return value
    if isinstance(value, (list, tuple)) and len(value) <= _MAX_ITEMS and all(isinstance(v, _SCALARS) for v in value):
        return list(value)
    return Described(value_of(value))


def attributes(value: Any) -> dict[str, Any] | None:
    """The attributes of an instance, such as an ``argparse.Namespace``, or a dictionary's entries, as plain values."""
    state = value.state if isinstance(value, Call) else value
    if not isinstance(state, dict):
        return None
    return {key: plain(entry) for key, entry in state.items() if isinstance(key, str)}


class Described(str):
    """A text in place of a value that is none."""

    __slots__ = ()


def value_of(value: object) -> str:
    """A stored value, in a few words."""
    if isinstance(value, Described):
        return str(value)
    if isinstance(value, Call):
        return f"{value.function.name}({', '.join(shown(argument) for argument in value.arguments[:_MAX_ITEMS])})"[:80]
    return value.name if isinstance(value, Global) else shown(value)
