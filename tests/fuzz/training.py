"""Training checkpoints and adapters to damage, and the small models that load them."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any

import torch
from hypothesis import strategies as st
from peft import LoraConfig

from hf_megatron import MegatronGPT2Config, MegatronGPT2LMHeadModel
from hf_megatron.checkpoint.checksums import compute_checksums, write_checksums
from hf_megatron.checkpoint.distributed import METADATA_GLOBALS
from hf_megatron.checkpoint.unpickle import Global
from hf_megatron.peft import get_peft_model
from hf_megatron.training.optimizer_state import save_optimizer
from hf_megatron.training.training_state import TRAINER_STATE_NAME, save_random_state
from tests.checkpoint.directories import CONFIG
from tests.fuzz import archives
from tests.fuzz.damages import NAMES, SPECIALS
from tests.fuzz.directories import Files, read, torch_bytes
from tests.fuzz.documents import edited_json, edited_safetensors
from tests.fuzz.pickles import Draw, edited, pick, rarely, whole


def fresh() -> SimpleNamespace:
    """A module with an optimizer that has made a step, and its scheduler."""
    model = torch.nn.Linear(3, 4)
    optimizer = torch.optim.AdamW(model.parameters())
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    model(torch.ones(3)).sum().backward()
    optimizer.step()
    scheduler.step()
    return SimpleNamespace(model=model, optimizer=optimizer, scheduler=scheduler)


def small_model() -> Any:
    """A model of ours, to be adapted."""
    torch.manual_seed(0)
    return MegatronGPT2LMHeadModel(MegatronGPT2Config(**{k: v for k, v in CONFIG.items() if k[:2] in ("n_", "vo")}))


@cache
def _checkpoint() -> Files:
    with TemporaryDirectory() as root:
        directory, state = Path(root), fresh()
        save_optimizer(state.model, state.optimizer, directory)
        save_random_state(directory, 0)
        (directory / "scheduler.pt").write_bytes(torch_bytes(state.scheduler.state_dict()))
        (directory / TRAINER_STATE_NAME).write_text(json.dumps({"global_step": 1, "log_history": []}))
        write_checksums(directory, compute_checksums(directory))
        return read(directory)


@cache
def _adapter() -> Files:
    with TemporaryDirectory() as root:
        config = LoraConfig(r=2, target_modules=["c_attn"], task_type="CAUSAL_LM")
        get_peft_model(small_model(), config).save_pretrained(f"{root}/adapter")
        return read(Path(root) / "adapter")


def healthy(kind: str) -> Files:
    """An undamaged checkpoint, or adapter."""
    return _checkpoint() if kind == "checkpoint" else _adapter()


def is_allowed(module: str, name: str) -> bool:
    """Whether torch may look up a name of a distributed checkpoint."""
    return Global(module, name) in METADATA_GLOBALS and "." not in name


@st.composite
def checkpoints(draw: Draw) -> Files:
    """A training checkpoint with wrong files, and with the checksums of the right ones or none."""
    files = dict(_checkpoint())
    for _ in range(draw(st.integers(1, 2))):
        name = pick(draw, sorted(_checkpoint()))
        content = files.get(name)
        if rarely(draw, 8) or not isinstance(content, bytes):
            files[name] = pick(draw, SPECIALS)
        else:
            files[name] = _changed(draw, name, content)
    if draw(st.booleans()):
        files.pop("checksums.json", None)
    return files


@st.composite
def adapters(draw: Draw) -> Files:
    """An adapter with wrong files."""
    files = dict(_adapter())
    for name in draw(st.lists(st.sampled_from(sorted(files)), min_size=1, max_size=2)):
        content = files[name]
        if rarely(draw, 8) or not isinstance(content, bytes):
            files[name] = pick(draw, SPECIALS)
        elif rarely(draw, 8):
            files[pick(draw, NAMES)] = files.pop(name)
            return files
        else:
            files[name] = _changed(draw, name, content)
    return files


def _changed(draw: Draw, name: str, content: bytes) -> bytes:
    """A file with something wrong in it, by its kind."""
    try:
        if name.endswith(".safetensors"):
            return edited_safetensors(draw, content)
        if name.endswith(".json"):
            return edited_json(draw, json.loads(content), ["global_step", "r", "peft_type", "target_modules", "bias"])
        if name.endswith((".pt", ".distcp")):
            return archives.archive(draw, content)
        if name.endswith(".metadata"):
            return edited(draw, content) if not rarely(draw, 6) else whole(draw)
    except Exception:
        pass  # it has been changed before
    return content + b"\xff"
