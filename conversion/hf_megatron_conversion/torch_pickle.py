"""Pickles of ``torch.save``, and of torch's classes, written without torch: importing what they name is slow.

Source: ``pickletools``, protocol 2; ``torch.serialization._save``, ``torch._utils._rebuild_tensor_v2``.
"""

from __future__ import annotations

import argparse
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any, NamedTuple

from hf_megatron.checkpoint.torch_file import STORAGES
from hf_megatron_conversion.tensors import Readable, Reshaped


class GlobalName(NamedTuple):
    """What a pickle refers to by its module and name."""

    module: str
    name: str


@dataclass(frozen=True, eq=False)
class Instance:
    """An object of a class, made without calling that, and its state."""

    of: GlobalName
    state: Any = None  # what the object is given; nothing if None


@dataclass(frozen=True, eq=False)
class Call:
    """What a function, or a class, returns."""

    function: GlobalName
    arguments: tuple[Any, ...]


def pickled(content: object) -> tuple[bytes, list[Readable | Reshaped]]:
    """The pickle of nested dictionaries, lists and tuples of tensors, plain values and the objects above.

    The second result is the tensors in the order of their keys.

    The data of the tensor whose key is ``n`` is expected in ``data/n``.
    """
    tensors: list[Readable | Reshaped] = []
    return b"\x80\x02" + _value(content, tensors) + b".", tensors


def _value(value: Any, tensors: list[Readable | Reshaped]) -> bytes:
    if value is None or isinstance(value, bool):
        return {None: b"N", True: b"\x88", False: b"\x89"}[value]
    if isinstance(value, int):
        data = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
        return b"\x8a" + bytes([len(data)]) + data  # LONG1
    if isinstance(value, float):
        return struct.pack(">cd", b"G", value)
    if isinstance(value, str):
        data = value.encode("utf-8", "surrogatepass")
        return struct.pack("<cI", b"X", len(data)) + data
    if isinstance(value, GlobalName):
        return f"c{value.module}\n{value.name}\n".encode()
    if isinstance(value, tuple):
        return b"(" + b"".join(_value(item, tensors) for item in value) + b"t"
    if isinstance(value, list):
        return b"](" + b"".join(_value(item, tensors) for item in value) + b"e"
    if isinstance(value, Mapping):
        items = b"".join(_value(part, tensors) for item in value.items() for part in item)
        return b"}(" + items + b"u"
    if isinstance(value, Call):
        return _value(value.function, tensors) + _value(value.arguments, tensors) + b"R"
    if isinstance(value, argparse.Namespace):
        value = Instance(GlobalName("argparse", "Namespace"), vars(value))
    if isinstance(value, Instance):
        state = b"" if value.state is None else _value(value.state, tensors) + b"b"
        return _value(value.of, tensors) + b")\x81" + state  # NEWOBJ, then BUILD
    assert hasattr(value, "dtype"), f"{type(value).__name__} is nothing that is written here"
    return _tensor(value, tensors)


def _tensor(tensor: Readable | Reshaped, tensors: list[Readable | Reshaped]) -> bytes:
    shape = tensor.shape
    storage_type = GlobalName("torch", STORAGES[tensor.dtype])
    storage = _value(("storage", storage_type, str(len(tensors)), "cpu", prod(shape)), tensors) + b"Q"  # BINPERSID
    tensors.append(tensor)
    strides = tuple(prod(shape[dim + 1 :]) for dim in range(len(shape)))
    hooks = _value(GlobalName("collections", "OrderedDict"), tensors) + b")R"
    rest = b"".join(_value(part, tensors) for part in (0, shape, strides, False))
    rebuild = _value(GlobalName("torch._utils", "_rebuild_tensor_v2"), tensors)
    return rebuild + b"(" + storage + rest + hooks + b"tR"
