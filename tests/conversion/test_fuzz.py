"""Damaged sources: whatever is wrong with them, a conversion ends in success or in an exception of ours.

Each case is a small checkpoint with one random mutation, which the number of the case decides. Never another exception,
and never a part of a destination. What hangs, pytest's timeout ends.
"""

from __future__ import annotations

import io
import json
import random
import shutil
import struct
import tracemalloc
import zipfile
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from hf_megatron.checkpoint.budgets import BudgetError
from hf_megatron.checkpoint.unpickle import UnpickleError, read_pickle
from hf_megatron.errors import HfMegatronError
from hf_megatron_conversion import convert
from hf_megatron_conversion.formats import read_model
from tests.conversion.checkpoints import save_stock
from tests.conversion.megatron_lm.generator import VOCAB, Variant, make_weights, write

# The kinds of checkpoint, and how many damaged ones of each are tried: 2400 in all.
_CASES = {"hub": 500, "sharded": 400, "bin": 300, "tp": 500, "megatron": 400, "megatron-legacy": 300}
_BATCHES = 10

Mutation = Callable[[Path, random.Random], None]


@pytest.fixture(scope="session")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One undamaged checkpoint of every kind."""
    root = tmp_path_factory.mktemp("pristine")
    hub = save_stock(root / "hub")
    save_stock(root / "sharded", max_shard_size="20KB")
    convert(hub, root / "tp", to="tp", tp_size=2)
    shutil.copytree(hub, root / "bin")
    torch.save(load_file(hub / "model.safetensors"), root / "bin/pytorch_model.bin")
    (root / "bin/model.safetensors").unlink()
    for name, variant in (("megatron", Variant()), ("megatron-legacy", Variant(kind="bert", is_zip=False))):
        write(root / name, variant, make_weights(variant))
    return {name: root / name for name in _CASES}


# --- Mutations.


def _pick(directory: Path, rng: random.Random, *suffixes: str) -> Path:
    """One of the files; with one of the suffixes, if there is such a file."""
    files = sorted(path for path in directory.rglob("*") if path.is_file())
    return rng.choice([path for path in files if path.suffix in suffixes] or files)


def _header_size(path: Path, content: bytes) -> int:
    """Bytes at the start of a file that are not weights."""
    if path.suffix == ".safetensors":
        return 8 + int(struct.unpack("<Q", content[:8])[0])
    return min(len(content), 6000) if path.suffix in (".pt", ".bin") else len(content)


def _flipped(content: bytes, rng: random.Random, counts: Sequence[int], first: int = 0, last: int = 0) -> bytes:
    """Some bytes from ``first`` to ``last`` changed; to the end if that is 0."""
    changed = bytearray(content)
    for _ in range(rng.choice(counts)):
        changed[rng.randrange(max(first, 0), last or len(changed))] = rng.randrange(256)
    return bytes(changed)


def truncate(directory: Path, rng: random.Random) -> None:
    path = _pick(directory, rng)
    content = path.read_bytes()
    limit = _header_size(path, content) if rng.random() < 0.7 else len(content)
    path.write_bytes(content[: rng.randrange(limit)])


def flip(directory: Path, rng: random.Random, is_at_the_end: bool = False) -> None:
    """At the end zip archives have their directory."""
    path = _pick(directory, rng)
    content = path.read_bytes()
    if is_at_the_end:
        path.write_bytes(_flipped(content, rng, [1, 3], first=len(content) - 2000))
    else:
        path.write_bytes(_flipped(content, rng, [1, 1, 2, 5, 20], last=_header_size(path, content)))


def _replace(put: Callable[[Path], object], directory: Path, rng: random.Random) -> None:
    path = _pick(directory, rng)
    path.unlink()
    put(path)


def replace_json(directory: Path, rng: random.Random) -> None:
    """JSON that is not an object, or not what is expected in it."""
    texts = ["[]", "3", '"x"', "null", "{}", "", "[" * 5000, '{"a": ' * 3000, "NaN"]
    _pick(directory, rng, ".json").write_text(rng.choice(texts))


_VALUES: list[Any] = [None, True, -1, 0, 3, 2**70, 1.5, float("inf"), "x", [], [1], {}, {"a": 1}, ["GPT2Model"]]


def change_config(directory: Path, rng: random.Random) -> None:
    path = directory / "config.json"
    config = json.loads(path.read_text()) if path.is_file() else {"model_type": "gpt2"}
    for _ in range(rng.choice([1, 2])):
        config[rng.choice(list(config))] = rng.choice(_VALUES)
    path.write_text(json.dumps(config))


def change_header(directory: Path, rng: random.Random) -> None:
    """Offsets that are negative, overlap or leave gaps, shapes and dtypes that do not fit: a valid header otherwise."""
    path = _pick(directory, rng, ".safetensors")
    if path.suffix != ".safetensors":
        change_config(directory, rng)
        return
    content = path.read_bytes()
    end = _header_size(path, content)
    header = json.loads(content[8:end])
    names = [name for name in header if name != "__metadata__"]
    name, metadata = rng.choice(names), header.get("__metadata__", {})
    entry = header.pop(name)
    first, last = entry["data_offsets"]
    key = "DCP_SHARDING_INFO" if "DCP_SHARDING_INFO" in metadata else "format"
    info: list[Any] = [{}, [], "x", {name: {"saved_offsets": [float("inf")]}}, {name: 3}]
    shapes = [[], [-1], entry["shape"][::-1], [2**40, 2**40], entry["shape"] + [1], "x", [1.0]]
    changes: list[dict[str, Any]] = [
        {name: {**entry, "data_offsets": [first + rng.choice([-8, -4, 4, 8]), last]}},
        {name: {**entry, "data_offsets": [-last, -first]}},
        {name: {**entry, "data_offsets": header.get(rng.choice(names), entry)["data_offsets"]}},
        {name: {**entry, "shape": rng.choice(shapes)}},
        {name: {**entry, "dtype": rng.choice(["F16", "I32", "F4", None, 3, "BOOL"])}},
        {name: rng.choice(_VALUES)},
        {name: entry, "__metadata__": {**metadata, key: json.dumps(rng.choice(info))}},
        {},
        {f"{name}x": entry},
    ]
    header |= rng.choice(changes)
    raw = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw)) + raw + content[end:])


def change_pickle(directory: Path, rng: random.Random) -> None:
    """Flip bytes of a pickle inside an archive whose checksums are right: what the unpickler gets to see."""
    path = _pick(directory, rng, ".pt", ".bin")
    if not zipfile.is_zipfile(path):
        flip(directory, rng)
        return
    with zipfile.ZipFile(path) as archive:
        entries = {info.filename: archive.read(info) for info in archive.infolist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in entries.items():
            if name.endswith("data.pkl"):
                content = _damaged_pickle(content, rng)
            archive.writestr(name, content)


def _damaged_pickle(content: bytes, rng: random.Random) -> bytes:
    changed = _flipped(content, rng, [1, 1, 2, 8])
    return changed[: rng.randrange(len(changed))] if rng.random() < 0.1 else changed


_PUTS: list[Callable[[Path], object]] = [Path.mkdir, lambda path: path.symlink_to(path), lambda path: None]
_MUTATIONS: list[Mutation] = [truncate, flip, flip, partial(flip, is_at_the_end=True)]
_MUTATIONS += [*(partial(_replace, put) for put in _PUTS)]
_MUTATIONS += [replace_json, change_config, change_header, change_header, change_pickle]


def _damaged(pristine: dict[str, Path], kind: str, case: int, directory: Path) -> Mutation:
    rng = random.Random(f"{kind} {case}")
    shutil.copytree(pristine[kind], directory, symlinks=True)
    mutation = rng.choice(_MUTATIONS)
    mutation(directory, rng)
    return mutation


def _options(kind: str, case: int) -> dict[str, Any]:
    options: dict[str, Any] = {"to": ["hub", "tp", "megatron-lm"][case % 3]}
    if options["to"] != "hub":
        options["tp_size"] = 2
    return {**options, "vocab_size": VOCAB} if kind.startswith("megatron") else options


@pytest.mark.slow
@pytest.mark.parametrize("batch", range(_BATCHES))
@pytest.mark.parametrize("kind", list(_CASES))
def test_damaged_sources(pristine: dict[str, Path], tmp_path: Path, kind: str, batch: int) -> None:
    """Catches tracebacks, hangs, endless memory and partial outputs, wherever a source may be damaged."""
    refused = 0
    for case in range(batch, _CASES[kind], _BATCHES):
        source, destination = tmp_path / f"{case}", tmp_path / "out"
        mutation = _damaged(pristine, kind, case, source)
        what = f"{kind}, case {case}: {mutation}"
        try:
            convert(source, destination, **_options(kind, case))
        except HfMegatronError:
            refused += 1
            assert not destination.exists(), what
        except Exception as error:
            raise AssertionError(what) from error
        else:
            # What was not noticed has to be a whole checkpoint.
            read_model(destination)
            shutil.rmtree(destination)
        shutil.rmtree(source)
        assert list(tmp_path.iterdir()) == [], what
    assert refused > 0


@pytest.mark.parametrize("batch", [0, *(pytest.param(batch, marks=pytest.mark.slow) for batch in range(1, 10))])
def test_damaged_pickles(batch: int, tmp_path: Path) -> None:
    """Catches an unpickler that a damaged length, memo index or nesting makes hang, or run out of memory."""
    variant = Variant(tp=1, layers=1)
    write(tmp_path, variant, make_weights(variant))
    with zipfile.ZipFile(tmp_path / "iter_0001000/mp_rank_00/model_optim_rng.pt") as archive:
        content = archive.read("model_optim_rng/data.pkl")
    for case in range(batch * 100, batch * 100 + 100):
        rng = random.Random(case)
        with suppress(UnpickleError, BudgetError):
            read_pickle(io.BytesIO(_damaged_pickle(content, rng)), lambda persistent_id: persistent_id)


@pytest.mark.parametrize(
    "content",
    [
        b"\x80\x02r\xff\xff\xff\x7f.",
        b"\x80\x02Nr\xff\xff\xff\x7f.",
        b"\x80\x02X\xff\xff\xff\x7f.",
        b"\x80\x04\x8e\xff\xff\xff\xff\xff\xff\xff\x7f.",
        b"\x80\x02\x8b\xff\xff\xff\x7f.",
        b"(" * 10000 + b".",
        b"\x80\x02}" + b"q\x00h\x00h\x00s" * 50 + b".",
        b"\x80\x02)" + b"2\x86" * 60 + b"}" + b"q\x00" + b".",
        b"\x80\x02}(" + b")" + b"2\x86" * 60 + b"K\x01u.",
        b"c" + b"x" * 10**6 + b"\n",
    ],
)
@pytest.mark.timeout(30)
def test_pickles_made_to_hurt(content: bytes) -> None:
    """Catches memory reserved for a memo, a string or a number that is not there, and hashing without an end."""
    tracemalloc.start()
    try:
        with suppress(UnpickleError, BudgetError):
            read_pickle(io.BytesIO(content))
        assert tracemalloc.get_traced_memory()[1] < 20e6
    finally:
        tracemalloc.stop()
