"""Sources made to take memory or time without an end: refused within 20 seconds of CPU time and 1 GB of addresses."""

from __future__ import annotations

import json
import os
import re
import socket
import struct
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.checkpoint.hostile import named, storage_id, tensor, zipped
from tests.conversion.commands import Commands
from tests.conversion.megatron_core.generator import Distributed, content_of, write_content
from tests.conversion.megatron_lm.generator import make_weights
from tests.repository import ROOT

_LIMITED = """
import resource, sys
resource.setrlimit(resource.RLIMIT_AS, (2**30, 2**30))
resource.setrlimit(resource.RLIMIT_CPU, (20, 20))
from hf_megatron.commands import cli
sys.exit(cli.run(sys.argv[1:]))
"""
_CONFIG = {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "n_layer": 1, "n_head": 2, "n_embd": 4}
_CONFIG |= {"n_positions": 4, "vocab_size": 8}


def _source(directory: Path, name: str, data: bytes, **config: object) -> Path:
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps({**_CONFIG, **config}))
    (directory / name).write_bytes(data)
    return directory


def _pickled(directory: Path, data: bytes) -> Path:
    """A directory with an archive of this pickle."""
    _source(directory, "unused.txt", b"")
    zipped(directory / "pytorch_model.bin", [("x/data.pkl", data), ("x/data/0", struct.pack("<6f", *range(6)))])
    return directory


def _refused(command: list[object]) -> str:
    """What is said when a command ends with exit code 2; it must say so within the limits."""
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'conversion'}"}
    arguments = [sys.executable, "-c", _LIMITED, *map(str, command)]
    ended = subprocess.run(arguments, capture_output=True, text=True, timeout=120, env=environment, check=False)
    assert ended.returncode == 2, ended.stderr[-2000:]
    assert "Traceback" not in ended.stderr
    assert "defect" not in ended.stderr
    assert len(ended.stderr) < 3000
    assert ended.stderr.replace("\n", "").isprintable()
    return ended.stderr


def _shared_tuples(depth: int) -> bytes:
    """A tuple of a tuple of ..., each twice in the next one."""
    return b")" + b"2\x86" * depth


def _colliding(directory: Path) -> Path:
    keys = b"".join(b"\x8a\x09" + (number << 40).to_bytes(9, "little") + b"N" for number in range(200_000))
    return _pickled(directory, b"\x80\x02}(" + keys + b"u.")


def _bzip2(directory: Path) -> Path:
    _source(directory, "unused.txt", b"")
    with zipfile.ZipFile(directory / "pytorch_model.bin", "w") as archive:
        archive.writestr("x/data.pkl", b"}.")
        archive.writestr("x/byteorder", bytes(20_000_000), zipfile.ZIP_BZIP2)
    return directory


def _entries(directory: Path) -> Path:
    """An archive whose directory is large."""
    _source(directory, "unused.txt", b"")
    count, name = 200_000, b"x/data/%06d"
    entries = b"".join(
        struct.pack("<4s6H3L5H2L", b"PK\x01\x02", 20, 20, 0, 0, 0, 33, 0, 0, 0, 13, 0, 0, 0, 0, 0, 0) + name % number
        for number in range(count)
    )
    start = struct.pack("<4s5H3L2H", b"PK\x03\x04", 20, 0, 0, 0, 33, 0, 0, 0, 13, 0) + name % 0
    long_end = struct.pack("<4sQ2H2L4Q", b"PK\x06\x06", 44, 45, 45, 0, 0, count, count, len(entries), len(start))
    locator = struct.pack("<4sLQL", b"PK\x06\x07", 0, len(start) + len(entries), 1)
    end = struct.pack("<4s4H2LH", b"PK\x05\x06", 0, 0, 0xFFFF, 0xFFFF, len(entries), len(start), 0)
    (directory / "pytorch_model.bin").write_bytes(start + entries + long_end + locator + end)
    return directory


def _leaves(directory: Path) -> Path:
    """A Megatron-LM rank with dictionaries in each other, each many times, under long names."""
    name = b"X" + struct.pack("<I", 900)
    inner = b"}"
    for level in range(5):
        keys = b"".join(name + b"%01d%02d" % (level, n) + b"k" * 897 + b"h\x00" for n in range(20))
        inner += b"q\x000}(" + keys + b"u"
    path = directory / "release" / "mp_rank_00"
    path.mkdir(parents=True)
    (directory / "latest_checkpointed_iteration.txt").write_text("release")
    data = b"\x80\x02}X\x05\x00\x00\x00model" + inner + b"s."
    zipped(path / "model_optim_rng.pt", [("x/data.pkl", data)])
    return directory


def _json(text: bytes) -> Callable[[Path], Path]:
    def make(directory: Path) -> Path:
        _source(directory, "unused.txt", b"")
        (directory / "config.json").write_bytes(text)
        return directory

    return make


def _large_json(directory: Path) -> Path:
    _source(directory, "unused.txt", b"")
    os.truncate(directory / "config.json", 180_000_000)
    return directory


def _header(directory: Path, count: int = 1_999_998) -> Path:
    raw = b'{"a":[' + b"[]," * count + b"[]]}"
    return _source(directory, "model.safetensors", struct.pack("<Q", len(raw)) + raw)


def _full_header(directory: Path) -> Path:
    return _header(directory, 5 * 2**20)


def _large_header(directory: Path) -> Path:
    _source(directory, "model.safetensors", struct.pack("<Q", 99_000_000))
    os.truncate(directory / "model.safetensors", 99_000_008)
    return directory


def _distributed(data: bytes) -> Callable[[Path], Path]:
    """A distributed checkpoint of Megatron-core with this index."""

    def make(directory: Path) -> Path:
        _source(directory, ".metadata", data)
        (directory / "metadata.json").write_text('{"sharded_backend": "torch_dist"}')
        return directory

    return make


def _settings(text: str) -> Callable[[Path], Path]:
    """A distributed checkpoint of Megatron-Bridge with these settings of the model."""

    def make(directory: Path) -> Path:
        write_content(directory, content_of(Distributed(common=None), make_weights(Distributed())))
        (directory / "run_config.yaml").write_text(text)
        return directory

    return make


def _config(name: str, value: object) -> Callable[[Path], Path]:
    """A directory with an empty file of weights, and one field of config.json."""
    return lambda directory: _source(directory, "model.safetensors", b"\2\0\0\0\0\0\0\0{}", **{name: value})


def _special(kind: str, name: str) -> Callable[[Path], Path]:
    """A directory in which a file is none."""

    def make(directory: Path) -> Path:
        path = _source(directory, "model.safetensors", b"\2\0\0\0\0\0\0\0{}") / name
        path.unlink(missing_ok=True)
        if name == "pytorch_model.bin":
            (directory / "model.safetensors").unlink()
        if kind == "pipe":
            os.mkfifo(path)
        elif kind == "device":
            path.symlink_to("/dev/zero")
        elif kind == "directory":
            path.mkdir()
        else:
            with socket.socket(socket.AF_UNIX) as server, pytest.MonkeyPatch.context() as patched:
                patched.chdir(directory)  # a socket's path is short
                server.bind(name)
        return directory

    return make


_LONG = b"\x80\x02\x8b\xff\xff\x00\x00" + b"\1" * 0xFFFF + b"."
_SOURCES: dict[str, tuple[Callable[[Path], Path], str]] = {
    "tuple keys": (lambda d: _pickled(d, b"\x80\x02}(" + _shared_tuples(60) + b"K\x01u."), "a Key is a int"),
    "shared tuples": (lambda d: _pickled(d, named(x=_shared_tuples(60))), "'x' is a tuple"),
    "integer": (lambda d: _pickled(d, _LONG), "an integer of 524280 bits"),
    "decimal": (lambda d: _pickled(d, b"L" + b"9" * 4000 + b"L\n."), "an integer of 4000 digits"),
    "stride 0": (lambda d: _pickled(d, named(x=tensor((2**40, 6), (0, 1), storage_id(6)))), "larger than its|repeats"),
    "strides": (lambda d: _pickled(d, named(x=tensor((2,), (2**63,), storage_id(6)))), "larger than its data"),
    "dimensions": (lambda d: _pickled(d, named(x=tensor((2**62,) * 99, (1,) * 99, storage_id(6)))), "99 dimensions"),
    "nested JSON": (_json(b'{"a":' * 10**6), "nested more than 127|is not valid JSON|levels of nesting"),
    "nested lists": (_json(b'{"a":' + b"[" * 128 + b"]" * 128 + b"}"), "it has 128 levels of nesting"),
    "integer in JSON": (_json(b'{"n_head":' + b"9" * 10**6 + b"}"), "an integer of 1000000 digits"),
    "name twice": (_json(b'{"n_head": 2, "n_head": 3}'), "'n_head' occurs twice"),
    "UTF-16": (_json('{"n_head": 2}'.encode("utf-16")), "is not UTF-8"),
    "mark of byte order": (_json(b"\xef\xbb\xbf{}"), "is not valid JSON"),
    "half a character": (_json(b'{"n_head": "\\ud800"}'), "is not UTF-8"),
    **{
        f"{name} {value}": (_config(name, value), re.escape(f"{name}={shown}"))
        for name, value, shown in [
            ("n_head", 2**30, "1073741824 in the configuration is more than 65536"),
            ("n_layer", 2**30, "1073741824 in the configuration is more than 10000"),
            ("n_embd", 2**40, "1099511627776 in the configuration is more than 1073741824"),
            ("n_head", True, "True in the configuration is not a positive integer"),
            ("n_head", [[[1]]], "a list in the configuration is not a positive integer"),
            ("architectures", "x" * 10**5, "'" + "x" * 80 + "'..."),
            ("num_labels", -1, "-1 in the configuration is not a number of labels"),
        ]
    },
    **{
        f"{name} is a {kind}": (_special(kind, name), message)
        for kind, message in [("pipe", "is a pipe"), ("socket", "is a socket"), ("device", "is a device")]
        for name in ("config.json", "model.safetensors", "pytorch_model.bin")
    },
    "weights are a directory": (_special("directory", "model.safetensors"), "is a directory, not a file"),
}


@pytest.mark.timeout(60)
@pytest.mark.parametrize(("make", "message"), _SOURCES.values(), ids=_SOURCES)
def test_sources_that_are_refused(
    tmp_path: Path, command: Commands, make: Callable[[Path], Path], message: str
) -> None:
    """Catches a hang, an exception that is not ours, or a value of gigabytes in a message."""
    source = make(tmp_path / "source")
    for arguments in (["inspect", source], ["convert", source, tmp_path / "out", "--to", "tp", "--tp", "1"]):
        said = command.refusal(*arguments)
        assert re.search(message, said), said
        assert len(said) < 3000
        assert said.replace("\n", "").isprintable()
    assert not (tmp_path / "out").exists()


_MERGES = "".join(f"a{n}: &a{n} {{<<: [*a{n - 1}, *a{n - 1}]}}\n" for n in range(1, 60))
_HEAVY: dict[str, tuple[Callable[[Path], Path], str]] = {
    "bzip2": (_bzip2, "'x/byteorder' is compressed"),
    "dictionaries": (lambda d: _pickled(d, b"}" * (2 * 2**20) + b"."), "more than 1,000,000 objects"),
    "marks": (lambda d: _pickled(d, b"N" + b"(1" * (2 * 2**20) + b"."), "more than 4,000,000 instructions"),
    "memo": (lambda d: _pickled(d, b"\x80\x04N" + b"\x94" * (4 * 2**20) + b"."), "more than 4,000,000 instructions"),
    "calls": (lambda d: _pickled(d, b"\x80\x02cx\ny\nq\x000" + b"h\x00)R" * 400_000 + b"."), "more than 1,000,000 obj"),
    "integer keys": (_colliding, "a Key is a NoneType"),
    "leaves": (_leaves, "more than 100,000 tensors"),
    "entries": (_entries, "entries in its directory|bytes in its directory"),
    "large header": (_large_header, "99000000 bytes long, and the limit is 16777216"),
    "large JSON": (_large_json, "bytes, and the limit is 16,777,216"),
    "values of JSON": (_json(b'{"a":[' + b"{}," * 1_999_998 + b"{}]}"), "holds no weights"),
    "16 MB of JSON": (_json(b'{"a":[' + b"{}," * (5 * 2**20) + b"{}]}"), "brackets, and the limit is 4,000,000"),
    "16 MB of header": (_full_header, "brackets, and the limit is 4,000,000"),
    "values of a header": (_header, "'a' does not have one dtype"),
    "objects of an index": (_distributed(b"N0" * (2 * 2**20) + b"N."), "more than 2,000,000 objects"),
    "memo of an index": (_distributed(b"N" + b"\x94" * (8 * 2**20) + b"."), "more than 8,000,000 instructions"),
    "bytes of an index": (_distributed(b"X" + struct.pack("<I", 2**27) + b"x" * 2**27 + b"."), "limit is 67,108,864"),
    "aliases in YAML": (
        _settings(
            "a0: &a0 [1]\n" + "".join(f"a{n}: &a{n} [*a{n - 1}, *a{n - 1}]\n" for n in range(1, 60)) + "model: *a59"
        ),
        "has no 'model'",
    ),
    "merges in YAML": (_settings("a0: &a0 {x: 1}\n" + _MERGES + "other: {<<: *a59}"), "has no 'model'"),
    "256 KB of YAML": (_settings("model: " + "[" * 50_000 + "]" * 50_000), "is not valid YAML"),
    "brackets in YAML": (_settings("other: [" + "[]," * 80_000 + "]"), "has no 'model'"),
    "more YAML": (_settings("x" * 2**19), "and the limit is 262,144"),
}
_SLOW = (
    "marks",
    "memo",
    "values of JSON",
    "values of a header",
    "objects of an index",
    "memo of an index",
    "brackets in YAML",
)


@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    ("make", "message"),
    [pytest.param(*_HEAVY[name], id=name, marks=[pytest.mark.slow] if name in _SLOW else []) for name in _HEAVY],
)
def test_within_memory_and_time(tmp_path: Path, make: Callable[[Path], Path], message: str) -> None:
    """Catches memory or time that grows with what a file says, and not with what is needed."""
    said = _refused(["inspect", make(tmp_path / "source")])
    assert re.search(message, said), said
