"""Strategies for distributed checkpoints of Megatron-core: of each the index, records, arguments or files are wrong.

Of the index both are changed: what it says, before it is pickled, and the pickle.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from copy import copy
from dataclasses import dataclass, replace
from functools import cache
from math import prod
from typing import Any

import torch
from hypothesis import strategies as st
from torch.distributed.checkpoint import metadata as dcp

from tests.conversion.megatron_core.generator import Content, Distributed, content_of, files_of, saved
from tests.conversion.megatron_lm.generator import FFN, HEADS, HIDDEN, POSITIONS, VOCAB, make_weights
from tests.fuzz import archives
from tests.fuzz.damages import wrong
from tests.fuzz.directories import SIDE_FILES, Files, torch_bytes
from tests.fuzz.documents import edited_yaml
from tests.fuzz.indices import MORE_NAMES, SHAPES, edit_index
from tests.fuzz.models import DTYPES, OBJECTS, content_edits, edited_content, wrong_tensor
from tests.fuzz.pickles import TEXTS, Draw, edited, pick, rarely, whole


@dataclass(frozen=True)
class Seed:
    """A checkpoint, the directory of its tensors, and of NeMo or Megatron-Bridge the file with its settings."""

    variant: Distributed
    place: str = "iter_0001000"
    settings: str | None = None


SEEDS = {
    "stacked": Seed(Distributed(layers=1)),
    "keys": Seed(Distributed(is_stacked=False, common="object", prefix="module.", tp=1)),
    "bert": Seed(Distributed(kind="bert", common="object")),
    "optimizer": Seed(Distributed(layers=1, tp=1, has_optimizer=True)),
    "bridge": Seed(Distributed(layers=1, common=None), settings="iter_0001000/run_config.yaml"),
    "nemo 2": Seed(Distributed(layers=1, common=None, prefix="module."), "weights", "context/model.yaml"),
    "nemo 1": Seed(Distributed(kind="bert", common=None, prefix="model."), "model_weights", "model_config.yaml"),
}
_BRIDGE_TRACKER = "latest_train_state.pt"
_COMMON_STATE = "common_state/shard_0_1"


def _settings(seed: Seed) -> dict[str, Any]:
    fields: dict[str, Any] = {
        "num_layers": seed.variant.layers,
        "hidden_size": HIDDEN,
        "ffn_hidden_size": FFN,
        "num_attention_heads": HEADS,
        "num_query_groups": None,
        "seq_length": POSITIONS,
        "max_position_embeddings": POSITIONS,
        "layernorm_epsilon": 1e-5,
        "normalization": "LayerNorm",
        "activation_func": {"_call_": False, "_target_": "torch._C._nn.gelu"},
        "bias_activation_fusion": True,
    }
    if seed.place == "model_weights":
        return fields
    return {"config": fields} if seed.place == "weights" else {"model": {**fields, "vocab_size": VOCAB}}


def _train_state(step: Any) -> bytes:
    return torch_bytes({"step": step, "do_train": torch.tensor(True)})


@cache
def content(name: str) -> Content:
    """What an undamaged checkpoint holds."""
    return content_of(SEEDS[name].variant, make_weights(SEEDS[name].variant))


def written(name: str, content: Content) -> Files:
    """The directory of a checkpoint that holds this."""
    seed = SEEDS[name]
    files: Files = {f"{seed.place}/{path}": data for path, data in files_of(content).items()}
    if seed.settings is not None:
        files[seed.settings] = json.dumps(_settings(seed)).encode()  # which is YAML
    if name == "bridge":
        files[_BRIDGE_TRACKER] = _train_state(torch.tensor(1000))
    elif seed.place.startswith("iter"):
        files["latest_checkpointed_iteration.txt"] = b"1000"
    return files


@cache
def core_seed(name: str) -> Files:
    """An undamaged checkpoint."""
    return written(name, content(name))


@st.composite
def core_directories(draw: Draw) -> Files:
    """A checkpoint with a wrong index, records, arguments, settings, files or places."""
    name = pick(draw, sorted(SEEDS))
    seed, files = SEEDS[name], core_seed(name)
    if is_edited := not rarely(draw, 4):
        copied = replace(content(name), **{field: copy(getattr(content(name), field)) for field in _COPIED})
        for _ in range(draw(st.integers(1, 2))):
            pick(draw, _EDITS)(draw, copied)
        files = written(name, copied)
    files = dict(files)
    index = f"{seed.place}/.metadata"
    if rarely(draw, 4):
        is_edited, old = True, files[index]
        assert isinstance(old, bytes)
        files[index] = edited(draw, old, most=4) if not rarely(draw, 8) else whole(draw)
    if seed.settings is not None and rarely(draw, 2):
        is_edited, files[seed.settings] = True, edited_yaml(draw, _settings(seed), _FIELDS)
    if name == "bridge" and rarely(draw, 4):
        is_edited, files[_BRIDGE_TRACKER] = True, _train_state(_step(draw))
    if rarely(draw, 4):
        files |= {"tokenizer.json": SIDE_FILES["tokenizer.json"]}
    return wrong(draw, files, 0 if is_edited else 1) if rarely(draw, 3) or not is_edited else files


_COPIED = ("shapes", "chunks", "objects", "common", "mark", "raw_records")
_FIELDS = [
    "swiglu",
    "num_moe_experts",
    "gated_linear_unit",
    "transformer",
    "activation",
    "openai_gelu",
    "bias",
    "num_query_groups",
]


def _step(draw: Draw) -> Any:
    steps = [torch.tensor(n, dtype=dtype) for n in (0, 100) for dtype in (torch.int32, torch.uint8, torch.float32)]
    steps += [torch.tensor([1000]), torch.tensor(-1), torch.tensor(2**62), torch.zeros(1).expand(2**20, 2**20)]
    return pick(draw, [*steps, *OBJECTS])


# --- Changes of what is stored, which the index tells as it is.

Edit = Callable[[Draw, Content], None]


def _some_tensor(draw: Draw, content: Content) -> str:
    return pick(draw, sorted(content.chunks) or ["x"])


def _rename(draw: Draw, content: Content) -> None:
    old, new = _some_tensor(draw, content), pick(draw, [*MORE_NAMES, draw(TEXTS)])
    if draw(st.booleans()):
        body, _, rest = old.partition("layers.")
        new = pick(
            draw, [f"{body}layers.{n}.{rest}" for n in (0, 1, 7, "x")] + [f"model.{old}", old + "x", old.upper()]
        )
    content.shapes[new], content.chunks[new] = content.shapes.get(old, (0,)), content.chunks.get(old, [])
    if draw(st.booleans()):
        content.shapes.pop(old, None)
        content.chunks.pop(old, None)


def _retype(draw: Draw, content: Content) -> None:
    names = [_some_tensor(draw, content)] if draw(st.booleans()) else list(content.chunks)
    dtype = pick(draw, DTYPES)
    for name in names:
        parts = content.chunks.get(name, [])
        content.chunks[name] = [(offset, part.to(dtype) if part.numel() < 10**6 else part) for offset, part in parts]


def _reshape(draw: Draw, content: Content) -> None:
    """Another shape, of one chunk or of none; enormous ones are one element again and again."""
    name = _some_tensor(draw, content)
    old = content.shapes.get(name, ())
    shape = pick(draw, [*(shape for shape in SHAPES if len(shape) <= 64), old[:-1], old[::-1]])
    count = pick(draw, [1, 1, 1, 200])
    for number in range(count):
        key = name if number == 0 else f"{'model.' * number}{name}"
        part = torch.zeros(()).expand(shape)
        content.shapes[key], content.chunks[key] = shape, [((0,) * len(shape), part)]
        content.raw_records[f"{key}/0"] = torch_bytes(part)


def _recut(draw: Draw, content: Content) -> None:
    """The same tensor in other chunks, as other ranks would have it."""
    name = _some_tensor(draw, content)
    shape = content.shapes.get(name, ())
    dim, step = draw(st.integers(0, 2)), pick(draw, [1, 3, 16])
    if dim < len(shape) and prod(shape) < 10**6 and shape[dim] < 10**3:
        content.chunks[name] = []
        for start in range(0, shape[dim], step):
            offset = [start if d == dim else 0 for d in range(len(shape))]
            part = torch.ones((*shape[:dim], min(step, shape[dim] - start), *shape[dim + 1 :]))
            content.chunks[name].append((tuple(offset), start * part))


def _drop(draw: Draw, content: Content) -> None:
    pick(draw, [content.chunks, content.objects]).pop(_some_tensor(draw, content), None)


def _record(draw: Draw, content: Content) -> None:
    """A record that is another file of torch.save than the index tells, a damaged one, or none."""
    name = _some_tensor(draw, content)
    chunks = content.chunks.get(name) or [((), torch.zeros(1))]
    number = draw(st.integers(0, min(len(chunks) - 1, 3)))
    part = chunks[number][1]
    small = part if part.numel() < 10**6 else torch.zeros(1)
    match pick(draw, ["archive", "archive", "archive", "tensor", "tensor", "padded", "legacy", "other"]):
        case "archive":
            data = archives.archive(draw, saved(small))
        case "tensor":
            data = torch_bytes(wrong_tensor(draw, small))
        case "padded":
            data = pick(draw, [b"\0", b"PK\3\4"]) + saved(small) if draw(st.booleans()) else saved(small) + b"\0" * 9
        case "legacy":
            data = torch_bytes(small, is_zip=False)
        case _:
            data = pick(draw, [b"", b"PK\5\6" + b"\0" * 18, saved([small]), saved({"a": small})])
    content.raw_records[f"{name}/{number}"] = data


def _object(draw: Draw, content: Content) -> None:
    name = pick(draw, sorted(content.objects) or ["x"])
    match pick(draw, ["archive", "archive", "value", "value", "drop", "add"]):
        case "archive":
            content.raw_records[name] = archives.archive(draw, saved([content.objects.get(name)]))
        case "value":
            content.raw_records[name] = torch_bytes(pick(draw, OBJECTS))
        case "drop":
            content.objects.pop(name, None)
        case "add":
            content.objects[pick(draw, [_COMMON_STATE, "a/shard_0_1", *MORE_NAMES, draw(TEXTS)])] = pick(draw, OBJECTS)


def _common(draw: Draw, content: Content) -> None:
    """Wrong arguments, wherever they are, or none."""
    old = content.common if content.common is not None else content.objects.get(_COMMON_STATE)
    new = pick(draw, OBJECTS)
    if isinstance(old, dict) and not rarely(draw, 8):
        arguments = [name for name in vars(old["args"])] if hasattr(old.get("args"), "__dict__") else ["num_layers"]
        new = edited_content(draw, old, content_edits(draw, arguments, ["checkpoint_version", "iteration", "args"]))
    if content.common is not None:
        content.common = new
    else:
        content.objects[_COMMON_STATE] = new


def _mark(draw: Draw, content: Content) -> None:
    values: list[Any] = ["zarr", "torch_dist\n", "x" * 10**5, None, True, 1.5, [], {}, "\x1b[31m", "\ud800"]
    content.mark[pick(draw, ["sharded_backend", "sharded_backend_version", "common_backend"])] = pick(draw, values)


def _index(draw: Draw, content: Content) -> None:
    """What the index says of it, at last."""
    before = content.change_metadata

    def change(metadata: dcp.Metadata) -> None:
        before(metadata)
        edit_index(draw, metadata)

    content.change_metadata = change


_EDITS: list[Edit] = [_index] * 12
_EDITS += [_rename, _retype, _reshape, _recut, _drop, _mark] + [_record] * 4
_EDITS += [_object, _object, _common, _common, _common]
