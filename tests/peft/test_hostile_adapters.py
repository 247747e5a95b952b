"""Adapters whose files are not what they should be: an error of ours, before peft reads them."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from hf_megatron.errors import HfMegatronError
from hf_megatron.peft import load_adapter
from tests.checkpoint.hostile import EVIL, with_pickle
from tests.peft.adapters import Case, our_base, our_model


def _config(**changes: object) -> Callable[[Path], None]:
    def change(directory: Path) -> None:
        path = directory / "adapter_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return change


def _pipe(directory: Path) -> None:
    (directory / "adapter_model.safetensors").unlink()
    os.mkfifo(directory / "adapter_model.safetensors")


def _evil(directory: Path) -> None:
    (directory / "adapter_model.safetensors").unlink()
    with_pickle(directory / "adapter_model.bin", EVIL)


_CHANGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "pipe": (_pipe, "adapter_model.safetensors is a pipe"),
    "evil": (_evil, r"asks for os\.system"),
    "no config": (lambda d: (d / "adapter_config.json").unlink(), "holds no adapter_config.json"),
    "no JSON": (lambda d: (d / "adapter_config.json").write_text("{"), "is not valid JSON"),
    "no header": (lambda d: (d / "adapter_model.safetensors").write_bytes(bytes(9)), "is not a safetensors file"),
    "no rank": (_config(r=None), r"LoraConfig\(r=None\)"),
    "other rank": (_config(r=2, rank_pattern={}), "holds no adapter for this model: .*size mismatch"),
    "huge rank": (_config(r=2**61), "holds no adapter for this model"),
    "no bias": (_config(bias=""), "holds no adapter for this model: .*bias"),
    "other type": (_config(velora_config=3), "holds no adapter for this model"),
}


@pytest.mark.timeout(60)
@pytest.mark.parametrize("case", ["gpt2"], indirect=True)
@pytest.mark.parametrize(("change", "message"), _CHANGES.values(), ids=_CHANGES)
def test_adapters_that_are_refused(tmp_path: Path, case: Case, change: Callable[[Path], object], message: str) -> None:
    """Catches code in an adapter, a pipe that is waited for, and errors of peft that name no file."""
    our_model(case).save_pretrained(tmp_path)
    change(tmp_path)
    with pytest.raises(HfMegatronError, match=message):
        load_adapter(our_base(case), tmp_path)
