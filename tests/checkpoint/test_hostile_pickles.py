"""Pickles that run code where they are loaded: each is refused, by the name of what it would run."""

from __future__ import annotations

import io
import pickle
import struct
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from hf_megatron.checkpoint.torch_file import TENSOR_GLOBALS, open_torch_file
from hf_megatron.checkpoint.unpickle import Global, UnpickleError, globals_in, read_pickle
from hf_megatron.errors import CheckpointError, CheckpointFormatError, CheckpointIncompleteError
from hf_megatron_conversion.formats.megatron_lm.pickled import MEGATRON_GLOBALS
from tests.checkpoint.hostile import EVIL, LEGACY_START, SYSTEM, legacy, named, storage_id, tensor, with_pickle, zipped


@pytest.mark.parametrize("place", ["system", "content", "keys"])
def test_each_pickle_of_a_legacy_file_is_judged(tmp_path: Path, place: str) -> None:
    """Catches code in another pickle than the one with the tensors."""
    path = legacy(tmp_path / "x.bin", **{place: EVIL})
    with pytest.raises(CheckpointFormatError, match=r"asks for os\.system, and loading it elsewhere could run"):
        open_torch_file(path)


@pytest.mark.parametrize("which", [0, 1])
def test_the_first_two_pickles_of_a_legacy_file_are_the_only_ones_possible(tmp_path: Path, which: int) -> None:
    """Catches a magic number or a version that a pickle computes."""
    first = [pickle.dumps(0x1950A86A20F9469CFC6C, 2), pickle.dumps(1001, 2)]
    number = first[which][2:-1]
    first[which] = b"\x80\x02cos\nsystem\n(X\x04\x00\x00\x00truetR0" + number + b"."
    (tmp_path / "x.bin").write_bytes(b"".join(first) + SYSTEM + b"}." + b"].")
    with pytest.raises(CheckpointFormatError, match="does not start as one"):
        open_torch_file(tmp_path / "x.bin")


def _stack_global(module: str, attribute: str) -> bytes:
    names = b"".join(b"\x8c" + bytes([len(name)]) + name.encode() for name in (module, attribute))
    return b"\x80\x04" + names + b"\x93."


@pytest.mark.parametrize(
    ("module", "attribute"),
    [
        ("megatron.core._rank_utils", "os.system"),
        ("megatron.core.enums", "os.system"),
        ("megatron.core", "enums.ModelType"),
        ("megatron", "core.enums.ModelType"),
        ("torch", "cuda.FloatStorage"),
        ("collections", "OrderedDict.fromkeys"),
        ("megatron.core.enums", "subprocess"),
        ("megatron.data.dataset_utils", "compile_helper"),
        ("megatron", "Popen"),
        ("", "collections.OrderedDict"),
        ("collections.OrderedDict", ""),
        ("torch.storage", "_load_from_bytes"),
        ("torch._tensor", "_rebuild_from_type_v2"),
    ],
)
def test_module_and_attribute_are_judged_apart(module: str, attribute: str) -> None:
    """Catches names that only together are allowed, attributes of attributes, and functions of a known package."""
    for allowed in (TENSOR_GLOBALS, MEGATRON_GLOBALS):
        assert read_pickle(io.BytesIO(_stack_global(module, attribute))).refused(allowed)
        old = b"c" + module.encode() + b"\n" + attribute.encode() + b"\n."
        assert read_pickle(io.BytesIO(old)).refused(allowed)
    assert not any("." in name.attribute for name in MEGATRON_GLOBALS)


@pytest.mark.parametrize(
    "data",
    [b"c__builtin__\nset\n.", b"\x80\x02c__builtin__\nset\n.", b"(c__builtin__\nset\no.", b"(i__builtin__\nset\n."],
)
def test_names_of_python_2(data: bytes) -> None:
    """Catches old names refused where Python translates them."""
    assert read_pickle(io.BytesIO(data)).names == (Global("builtins", "set"),)


def test_old_names_in_a_new_protocol_are_not_translated() -> None:
    """Catches a module StringIO, which may lie in the working directory, taken for io."""
    assert read_pickle(io.BytesIO(_stack_global("StringIO", "BytesIO"))).names == (Global("StringIO", "BytesIO"),)


def test_names_are_read_as_python_reads_them() -> None:
    """Catches escapes decoded in a name, and a module's name split at a space, which Python does not do."""
    assert read_pickle(io.BytesIO(b"ccollectio\\x6es\nOrderedDict\n.")).names[0].module == "collectio\\x6es"
    assert read_pickle(io.BytesIO(b"ca b\nc d\n.")).names == (Global("a b", "c d"),)


@pytest.mark.parametrize(
    "data",
    [
        b"I0x10\n.",
        b"I010\n.",
        b"L0o7L\n.",
        b"I1_0\n.",
        b"\x80\x06N.",
        b"\x82\x01.",
        b"N\x97.",
        b"0.",
        b"(0(\x85.",
        b"(q\x00.",
    ],
)
def test_what_readers_read_differently_is_refused(data: bytes) -> None:
    """Catches numbers of other bases, unknown protocols, registered extensions, and marks taken for values."""
    with pytest.raises(UnpickleError):
        read_pickle(io.BytesIO(data))


def test_what_the_interpreter_reads_is_what_pickle_reads() -> None:
    """Catches a memo, a mark or a framed argument that this interpreter places elsewhere than Python does."""
    value = {"a": [1, 2.5, "x" * 300, b"y" * 300], "b": [None, True, ()], "c": {"d": [[]] * 3}}
    for protocol in range(3, 6):
        for data in (pickle.dumps(value, protocol), pickle.dumps([value, value["a"], value], protocol)):
            assert read_pickle(io.BytesIO(data)).value == pickle.loads(data)


def test_a_tar_archive_that_is_a_legacy_file_too(tmp_path: Path) -> None:
    """Catches files of torch 0.1, which torch tries first, hidden in a file that is also of the next format."""
    start = LEGACY_START + SYSTEM + b"}." + b"]."
    info = tarfile.TarInfo(start[:30].decode("latin-1"))
    block = bytearray(info.tobuf(tarfile.USTAR_FORMAT, "latin-1", "strict"))
    block[: len(start)] = start
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    path = tmp_path / "x.bin"
    path.write_bytes(bytes(block) + bytes(1024))
    tarfile.open(path, "r:").close()
    with pytest.raises(CheckpointFormatError, match="it is a tar archive too"):
        open_torch_file(path)


def test_a_zip_archive_that_is_a_legacy_file_too(tmp_path: Path) -> None:
    """Catches bytes behind a legacy file that another reader takes for the file."""
    zipped(tmp_path / "x.zip", [("x/data.pkl", EVIL)])
    for middle in (b"", b"\0" * 100):
        path = legacy(tmp_path / "x.bin", data=middle + (tmp_path / "x.zip").read_bytes())
        with pytest.raises(CheckpointFormatError, match="it is a zip archive too"):
            open_torch_file(path)
    legacy(path, data=b"more")
    with pytest.raises(CheckpointIncompleteError, match="its last tensor ends at byte"):
        open_torch_file(path)


_VIEWS: dict[str, tuple[bytes, str]] = {
    "negative offset": (tensor((2,), (1,), storage_id(6, view=("v", -50, 2), is_legacy=True)), "view beyond"),
    "view beyond": (tensor((2,), (1,), storage_id(6, view=("v", 5, 2), is_legacy=True)), "view beyond"),
    "tensor beyond its view": (tensor((4,), (1,), storage_id(6, view=("v", 2, 2), is_legacy=True)), "larger than its"),
    "negative tensor offset": (tensor((2,), (1,), storage_id(6, is_legacy=True), -1), "offset -1"),
    "two sizes": (
        tensor((2,), (1,), storage_id(6, is_legacy=True)) + b"0" + tensor((99,), (1,), storage_id(99, is_legacy=True)),
        "two sizes or types",
    ),
}


@pytest.mark.parametrize(("content", "message"), _VIEWS.values(), ids=_VIEWS)
def test_views_out_of_their_storage(tmp_path: Path, content: bytes, message: str) -> None:
    """Catches bytes of the pickle, or of another tensor, given as weights."""
    data = struct.pack("<q6f", 6, *range(6))
    path = legacy(tmp_path / "x.bin", named(x=content), keys=pickle.dumps(["0"], 2), data=data)
    with pytest.raises(CheckpointError, match=message):
        open_torch_file(path)


def test_a_view_within_its_storage(tmp_path: Path) -> None:
    """Catches views of torch 0.3 refused, or read from the start of their storage."""
    content = named(x=tensor((2,), (1,), storage_id(6, view=("v", 2, 3), is_legacy=True), 1))
    path = legacy(tmp_path / "x.bin", content, keys=pickle.dumps(["0"], 2), data=struct.pack("<q6f", 6, *range(6)))
    assert open_torch_file(path)["x"].lazy("x").read().tolist() == [3.0, 4.0]


_REPEATS = {"stride 0": ((10**6, 6), (0, 1)), "overlapping rows": ((5, 2), (1, 1)), "one element": ((7,), (0,))}


@pytest.mark.parametrize(("shape", "strides"), _REPEATS.values(), ids=_REPEATS)
def test_tensors_larger_than_their_storage(tmp_path: Path, shape: tuple[int, ...], strides: tuple[int, ...]) -> None:
    """Catches a file of kilobytes that a conversion makes gigabytes of."""
    path = with_pickle(tmp_path / "x.bin", named(x=tensor(shape, strides, storage_id(6))))
    with pytest.raises(CheckpointFormatError, match="repeats its values"):
        open_torch_file(path)


_HOOKS = b"\x89ccollections\nOrderedDict\n)R"
_OTHER_VALUES: dict[str, Callable[[bytes], bytes]] = {
    "negated": lambda data: data.replace(_HOOKS, _HOOKS + b"}X\x03\x00\x00\x00neg\x88s"),
    "with a state": lambda data: data[:-2] + b"(K\x01K\x02K\x03K\x04tbs.",
}


@pytest.mark.parametrize("change", _OTHER_VALUES.values(), ids=_OTHER_VALUES)
def test_tensors_with_other_values_than_their_storage(tmp_path: Path, change: Callable[[bytes], bytes]) -> None:
    """Catches a tensor that torch negates, or whose storage a state replaces, read without that."""
    data = named(x=tensor((2, 3), (3, 1), storage_id(6)))
    stored = open_torch_file(with_pickle(tmp_path / "x.bin", data))["x"]
    assert torch.equal(stored.lazy("x").read(), torch.arange(6.0).reshape(2, 3))
    with pytest.raises(CheckpointError, match=r"a tensor with more than torch\.save stores of one"):
        open_torch_file(with_pickle(tmp_path / "x.bin", change(data)))


_OTHER_DATA = [b"}X\4\0\0\0data\x88s", b"(X\1\0\0\0xt", b"]N\x61"]


@pytest.mark.parametrize("state", _OTHER_DATA, ids=range(len(_OTHER_DATA)))
def test_parameters_with_other_values_than_their_tensor(tmp_path: Path, state: bytes) -> None:
    """Catches a parameter whose state gives it other data in torch, read without that."""
    inner = tensor((2, 3), (3, 1), storage_id(6))
    start = b"ctorch._utils\n_rebuild_parameter_with_state\n(" + inner + b"\x89ccollections\nOrderedDict\n)R"
    stored = open_torch_file(with_pickle(tmp_path / "x.bin", named(x=start + b"}tR")))["x"]
    assert torch.equal(stored.lazy("x").read(), torch.arange(6.0).reshape(2, 3))
    for pickled in (start + state + b"tR", start + b"}tR" + state + b"b"):
        with pytest.raises(CheckpointError, match=r"a parameter with more than torch\.save stores of one"):
            open_torch_file(with_pickle(tmp_path / "x.bin", named(x=pickled)))


def test_lists_of_names() -> None:
    """Catches a pair that is allowed by its dotted name."""
    assert globals_in("a", "b.c").isdisjoint(globals_in("a.b", "c"))
