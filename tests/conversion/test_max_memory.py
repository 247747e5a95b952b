"""--max-memory: how it is divided, and that it is kept to."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.bench_conversion import generate
from hf_megatron.architectures import GPT2
from hf_megatron.architectures.presets import Preset
from hf_megatron.errors import UnsupportedError
from hf_megatron_conversion import convert, memory
from tests.repository import environment


def test_memory_is_divided(tied: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches --max-memory that is only checked: threads and slices have to become fewer and smaller."""
    used, limits = 10**8, (10**9, 160 * 10**6, 110 * 10**6, 105 * 10**6)
    monkeypatch.setattr(memory, "peak_rss_bytes", lambda: used)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(64))
    hows = [memory.writing_within(limit, [], 0o666) for limit in limits]
    assert [how.threads for how in hows] == [4, 4, 2, 1]
    for how, limit in zip(hows, limits, strict=True):
        assert used + how.threads * (how.slice_bytes + 3 * 2**20) <= limit
    with pytest.raises(UnsupportedError, match=r"give at least 106MB"):
        memory.writing_within(102 * 10**6, [], 0o666)
    assert convert(tied, tmp_path / "tp", to="tp", tp_size=4, max_memory="200MB").bytes_written > 0


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A hub, a tp and a megatron-lm directory whose largest shards are slices of the largest size."""
    directory = tmp_path_factory.mktemp("models")
    sizes = {"n_layer": 1, "n_embd": 128, "n_head": 4, "vocab_size": 2**16, "n_positions": 32}
    hub = generate(directory / "hub", Preset("wide", GPT2, sizes, is_of_paper=False), is_sparse=True)
    convert(hub, directory / "tp", to="tp", tp_size=2)
    convert(hub, directory / "megatron-lm", to="megatron-lm", tp_size=2)
    return directory


def _converted(source: Path, destination: Path, *options: str) -> dict[str, Any]:
    """What ``convert --json`` says, in a process of its own."""
    command = [sys.executable, "-m", "hf_megatron", "convert", str(source), str(destination), "--overwrite", "--json"]
    command += options
    done = subprocess.run(command, env=environment(), check=False, stdout=subprocess.PIPE)
    result: dict[str, Any] = json.loads(done.stdout)
    return result


@pytest.mark.parametrize("dtype", [(), pytest.param(("--dtype", "bfloat16"), marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("source", "options"),
    [
        ("hub", ("--to", "tp", "--tp", "2")),
        ("megatron-lm", ("--to", "hub")),
        pytest.param("tp", ("--to", "hub"), marks=pytest.mark.slow),
        pytest.param("hub", ("--to", "megatron-lm", "--tp", "2"), marks=pytest.mark.slow),
    ],
)
def test_memory_is_kept_to(
    source: str, options: tuple[str, ...], dtype: tuple[str, ...], models: Path, tmp_path: Path
) -> None:
    """Catches memory beside the slices that nobody counts, and a refusal that names a size that is refused again."""
    convert_to: tuple[Any, ...] = (models / source, tmp_path / "out", *options, *dtype)
    refused = _converted(*convert_to, "--max-memory", "1MB")
    assert refused["error_type"] == "UnsupportedError"
    named = re.search(r"([\d,]+) bytes are in use.*give at least (\d+)MB", refused["error"])
    assert named is not None
    used, least = int(named[1].replace(",", "")), int(named[2]) * 10**6
    assert used < least < used + 15 * 10**6
    assert used < _converted(*convert_to, "--max-memory", str(least))["peak_rss_bytes"] <= least
    assert _converted(*convert_to)["peak_rss_bytes"] > least
