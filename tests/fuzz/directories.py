"""Strategies for whole directories: checkpoints of every format, in which files, places or the model itself are wrong.

A directory is a dictionary from relative paths to bytes, or to a :class:`Special` for what is no ordinary file.
"""

from __future__ import annotations

import io
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import safetensors.torch
import torch
from hypothesis import strategies as st

from tests.checkpoint.directories import (
    BERT_CONFIG,
    CONFIG,
    Tensors,
    model_tensors,
    write_hub,
    write_hub_files,
    write_pickle,
    write_tp,
)
from tests.conversion.megatron_lm.generator import Variant, arguments_of, content_of, make_weights
from tests.fuzz import archives
from tests.fuzz.documents import edited_json, edited_safetensors, large_json
from tests.fuzz.pickles import TEXTS, Draw, pick, rarely

SECRET = b"of another directory, and of no checkpoint"
SIDE_FILES: dict[str, bytes] = {
    "generation_config.json": b'{"eos_token_id": 0}',
    "tokenizer.json": json.dumps(
        {
            "model": {"type": "BPE", "vocab": {"a": 0, "b": 130}, "merges": []},
            "added_tokens": [{"id": 5, "content": "c"}],
        }
    ).encode(),
    "tokenizer_config.json": b'{"tokenizer_class": "GPT2Tokenizer"}',
    "README.md": b"---\nlicense: mit\n---\n# A model\n",
    "LICENSE": b"Free.\n",
}
VARIANTS = {
    "megatron": Variant(layers=1),
    "megatron-pipeline": Variant(pp=2, version=3.0),
    "megatron-core": Variant(names="core", tp=1, layers=1),
    "megatron-bert": Variant(kind="bert", is_zip=False, layers=1),
    "megatron-old": Variant(version=None, names="flat", tp=1, layers=1, has_arguments=False, is_zip=False),
}


@dataclass(frozen=True)
class Special:
    """What stands in the place of a file: a FIFO, a directory, a link to ``target``, or ``size`` zeros."""

    kind: str
    target: str = ""
    size: int = 0


Files = dict[str, bytes | Special]


def write(files: Files, directory: Path) -> None:
    """Write a directory; what cannot be written, such as a file in the place of a directory, is left out."""
    directory.mkdir()
    for name, content in files.items():
        path = directory / name
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            if isinstance(content, bytes):
                path.write_bytes(content)
            elif content.kind == "fifo":
                os.mkfifo(path)
            elif content.kind == "directory":
                path.mkdir()
            elif content.kind == "link":
                path.symlink_to(content.target)
            else:
                with path.open("wb") as file:
                    file.truncate(content.size)
        except (OSError, ValueError):
            continue


def _read(directory: Path) -> Files:
    paths = sorted(path for path in directory.rglob("*") if path.is_file())
    return {path.relative_to(directory).as_posix(): path.read_bytes() for path in paths}


@cache
def hub_seeds() -> dict[str, Files]:
    """Undamaged directories of the formats that are transformers' own."""
    with TemporaryDirectory() as root:
        base, gpt2 = Path(root), model_tensors()
        write_hub(base / "hub", gpt2)
        write_hub(base / "hub-bert", model_tensors(BERT_CONFIG), BERT_CONFIG)
        write_pickle(base / "bin", gpt2)
        write_pickle(base / "bin-legacy", gpt2, is_zip=False)
        write_hub_files(base / "hub-files", gpt2, "safetensors")
        write_hub_files(base / "bin-files", gpt2, "bin")
        write_tp(base / "tp", gpt2, 2)
        write_tp(base / "tp-bert", model_tensors(BERT_CONFIG), 2, BERT_CONFIG)
        return {path.name: {**_read(path), **SIDE_FILES} for path in sorted(base.iterdir())}


@cache
def _contents(name: str) -> dict[str, dict[str, Any]]:
    """The ranks' objects of a Megatron-LM checkpoint, by directory."""
    variant, found = VARIANTS[name], {}
    weights = make_weights(variant)
    for tp in range(variant.tp):
        for pp in range(variant.pp):
            rank = f"mp_rank_{tp:02d}" if variant.pp == 1 else f"mp_rank_{tp:02d}_{pp:03d}"
            found[rank] = content_of(variant, weights, tp, pp)
    return found


def torch_bytes(content: Any, *, is_zip: bool = True) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer, _use_new_zipfile_serialization=is_zip)
    return buffer.getvalue()


@cache
def megatron_seed(name: str) -> Files:
    """An undamaged Megatron-LM checkpoint."""
    ranks = {rank: torch_bytes(content, is_zip=VARIANTS[name].is_zip) for rank, content in _contents(name).items()}
    files: Files = {f"iter_0001000/{rank}/model_optim_rng.pt": content for rank, content in ranks.items()}
    return {**files, "latest_checkpointed_iteration.txt": b"1000"}


# --- What the model itself may be.

_OBJECTS: list[Any] = [
    None,
    True,
    0,
    -1,
    1,
    2,
    3,
    4,
    2**31,
    2**63,
    2**70,
    10**5000,
    0.5,
    float("nan"),
    float("inf"),
    1e308,
]
_OBJECTS += ["", "x", "\ud800", "\x1b[31m", "gelu", "learned_absolute", "rope", b"x", [], {}, (), [1], {"a": 1}, {1, 2}]
_OBJECTS += [torch.float16, torch.Size([1]), 1j, [[[[]]]], {"a": {"b": 10**5000}}, {(1, 2): 3}, range(3), "a" * 100000]
_SHARED: Any = ()
for _ in range(60):
    _SHARED = (_SHARED, _SHARED)
_OBJECTS.append(_SHARED)
_DTYPES = [
    torch.float64,
    torch.float16,
    torch.bfloat16,
    torch.int64,
    torch.int16,
    torch.uint8,
    torch.bool,
    torch.uint16,
]
_DTYPES += [torch.float8_e4m3fn, torch.float8_e5m2, torch.complex64, torch.uint64, torch.int8, torch.float8_e8m0fnu]
_MORE_ARGUMENTS = [
    "swiglu",
    "num_experts",
    "num_query_groups",
    "group_query_attention",
    "window_size",
    "num_unique_layers",
]
_MORE_ARGUMENTS += [
    "param_sharing_style",
    "orig_vocab_size",
    "onnx_safe",
    "tokenizer_type",
    "normalization",
    "eod_token",
]
_MORE_ARGUMENTS += ["position_embedding_type", "tensor_model_parallel_size", "ffn_hidden_size", "params_dtype"]


def _tensor(draw: Draw, tensor: torch.Tensor) -> Any:
    """The tensor in another dtype, shape or layout, or something else."""
    match pick(draw, ["dtype", "dtype", "shape", "expand", "view", "object", "huge", "special"]):
        case "dtype":
            return tensor.to(pick(draw, _DTYPES))
        case "shape":
            shapes = [tensor.shape[:-1], (*tensor.shape, 1), (0, *tensor.shape[1:]), (), tensor.shape[::-1]]
            return torch.zeros(pick(draw, shapes))
        case "expand":
            return torch.zeros(1).expand(tensor.shape)
        case "view":
            return torch.cat([tensor, tensor])[::2] if tensor.dim() else tensor.clone()
        case "huge":
            return torch.zeros(1).expand(2**20, 2**20)
        case "special":
            return pick(draw, [torch.zeros(0), torch.nn.Parameter(torch.zeros(3)), torch.tensor(float("nan"))])
        case _:
            return pick(draw, _OBJECTS)


def _wrong_tensors(draw: Draw, tensors: dict[str, Any]) -> dict[str, Any]:
    """A model that lacks a tensor, has another one, or one that is not as it should be."""
    result = dict(tensors)
    for _ in range(draw(st.integers(1, 2))):
        name = pick(draw, sorted(tensors))
        match pick(draw, ["tensor", "tensor", "drop", "name", "copy", "all"]):
            case "tensor" if isinstance(tensors[name], torch.Tensor):
                result[name] = _tensor(draw, tensors[name])
            case "drop":
                result.pop(name, None)
            case "name":
                result[draw(TEXTS)] = result.pop(name, None)
            case "copy":
                copies = [
                    f"transformer.{name}",
                    name.removeprefix("transformer."),
                    "lm_head.weight",
                    f"{name}x",
                    f"module.{name}",
                ]
                result[pick(draw, copies)] = tensors[name]
            case "all":
                dtype = pick(draw, _DTYPES)
                result = {key: value.to(dtype) if _fits(key, value) else value for key, value in result.items()}
    return result


def _huge_model(draw: Draw) -> tuple[dict[str, Any], Tensors]:
    """A configuration of enormous sizes, and tensors of these sizes in a few bytes: one element, again and again."""
    sizes = [("vocab_size", 2**28), ("n_inner", 2**28), ("n_positions", 2**30), ("n_layer", 20000), ("n_head", 2**30)]
    name, size = pick(draw, sizes)
    config = {**CONFIG, "n_layer": 1, "n_inner": 4, name: pick(draw, [size, size // 64])}
    if name in ("n_layer", "n_head"):
        return config, model_tensors()
    small = model_tensors({**CONFIG, "n_layer": 1, "n_inner": 4})
    old = {"vocab_size": CONFIG["vocab_size"], "n_inner": 4, "n_positions": CONFIG["n_positions"]}[name]
    is_concerned = {"vocab_size": "wte", "n_inner": "mlp", "n_positions": "wpe"}[name]
    return config, {
        key: torch.zeros(1).expand(
            [config[name] if part == old and is_concerned in key else part for part in value.shape]
        )
        for key, value in small.items()
    }


_CLASSES = ["GPT2Model", "GPT2ForSequenceClassification", "GPT2ForTokenClassification", "GPT2ForQuestionAnswering"]
_BERT_CLASSES = ["BertModel", "BertForMaskedLM", "BertForSequenceClassification", "BertForMultipleChoice"]


@st.composite
def hub_directories(draw: Draw, kinds: Sequence[str] = ("hub", "bin", "tp")) -> Files:
    """A hub or tp directory with a model that may be wrong, and wrong files or places."""
    seeds = hub_seeds()
    files = dict(seeds[pick(draw, [name for name in seeds if name.startswith(tuple(kinds))])])
    match draw(st.integers(0, 9)):
        case 0:
            config, tensors = _huge_model(draw)
            files = {"config.json": json.dumps(config).encode(), "pytorch_model.bin": torch_bytes(tensors)}
        case 1 | 2 | 3:
            is_bert = draw(st.booleans())
            config = {**(BERT_CONFIG if is_bert else CONFIG)}
            if draw(st.booleans()):
                config["architectures"] = [pick(draw, _BERT_CLASSES if is_bert else _CLASSES)]
            files = _with_model(draw, config, draw(st.booleans()))
    return _wrong(draw, files, 0 if rarely(draw, 6) else 1)


def _with_model(draw: Draw, config: dict[str, Any], is_pickled: bool) -> Files:
    tensors: dict[str, Any] = dict(model_tensors(config))
    if not rarely(draw, 5):
        tensors = _wrong_tensors(draw, tensors)
    files: Files = {"config.json": json.dumps(config).encode(), **SIDE_FILES}
    if is_pickled:
        return {**files, "pytorch_model.bin": torch_bytes(tensors, is_zip=draw(st.booleans()))}
    ordinary = {name: value.contiguous().clone() for name, value in tensors.items() if _fits(name, value)}
    return {**files, "model.safetensors": safetensors.torch.save(ordinary, {"format": "pt"})}


def _fits(name: str, value: Any) -> bool:
    """Whether safetensors can store it."""
    return torch.is_tensor(value) and value.numel() < 10**6 and "\ud800" not in name


@st.composite
def megatron_directories(draw: Draw) -> Files:
    """A Megatron-LM checkpoint with wrong arguments, tensors, files or places."""
    name = pick(draw, sorted(VARIANTS))
    files = dict(megatron_seed(name))
    if not rarely(draw, 4):
        contents = _contents(name)
        which = [pick(draw, sorted(contents))] if draw(st.booleans()) else sorted(contents)
        edits = _content_edits(draw, VARIANTS[name])
        for rank in which:
            changed = _edited_content(draw, contents[rank], edits)
            files[f"iter_0001000/{rank}/model_optim_rng.pt"] = torch_bytes(changed, is_zip=VARIANTS[name].is_zip)
    if draw(st.booleans()):
        files |= {"tokenizer.json": SIDE_FILES["tokenizer.json"], "config.json": json.dumps(CONFIG).encode()}
    return _wrong(draw, files, 0 if draw(st.booleans()) else 1)


def _content_edits(draw: Draw, variant: Variant) -> list[tuple[str, Any]]:
    """What to set in a rank's file: (argument or key, value)."""
    names = sorted(vars(arguments_of(variant))) + _MORE_ARGUMENTS
    keys = ["checkpoint_version", "iteration", "args", "model", "model1", "tensors", "tensors"]
    kinds = draw(st.lists(st.sampled_from(["argument", "argument", "key"]), min_size=1, max_size=3))
    return [
        (f"args.{pick(draw, names)}" if kind == "argument" else pick(draw, keys), pick(draw, _OBJECTS))
        for kind in kinds
    ]


def _edited_content(draw: Draw, content: dict[str, Any], edits: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(content)
    for key, value in edits:
        if key.startswith("args.") and hasattr(result.get("args"), "__dict__"):
            result["args"] = type(result["args"])(**{**vars(result["args"]), key.removeprefix("args."): value})
        elif key == "tensors" and isinstance(result.get("model"), dict):
            result["model"] = _edited_model(draw, result["model"])
        else:
            result[key] = value
    return result


def _edited_model(draw: Draw, model: dict[str, Any]) -> dict[str, Any]:
    """Nested dictionaries of tensors, one of the innermost of which is changed."""
    inner = sorted(key for key, value in model.items() if isinstance(value, dict) and value)
    if not inner:
        return _wrong_tensors(draw, model) if model else model
    key = pick(draw, inner)
    return {**model, key: _edited_model(draw, model[key])}


# --- What may be wrong with files and places.

_CONFIG_KEYS = [
    "n_inner",
    "attn_pdrop",
    "resid_pdrop",
    "embd_pdrop",
    "activation_function",
    "layer_norm_epsilon",
    "model_type",
]
_CONFIG_KEYS += ["architectures", "tie_word_embeddings", "torch_dtype", "dtype", "id2label", "num_labels", "auto_map"]
_CONFIG_KEYS += [
    "quantization_config",
    "is_decoder",
    "add_cross_attention",
    "scale_attn_by_inverse_layer_idx",
    "hidden_act",
]
_CONFIG_KEYS += [
    "type_vocab_size",
    "initializer_range",
    "position_embedding_type",
    "reorder_and_upcast_attn",
    "pad_token_id",
]
_NAMES = [
    "a" * 255,
    "\x1b[31mred.json",
    "\udcff.json",
    "new\nline.bin",
    "pytorch_model.bin",
    "model.safetensors",
    " ",
    "-rf",
]
_NAMES += ["shard-00001-model-00001-of-00001.safetensors", "shard-99999-model-00001-of-00001.safetensors", ".metadata"]
_NAMES += ["model.safetensors.index.json", "vocab.json", "vocab.txt", "added_tokens.json", "NOTICE", "checksums.json"]
_NAMES += [
    "iter_0001000/mp_rank_02/model_optim_rng.pt",
    "mp_rank_00/model_optim_rng.pt",
    "release/mp_rank_00/model_rng.pt",
]
_NAMES += [
    f"iter_0001000/mp_rank_{n}/model_optim_rng.pt" for n in ("9" * 30, "00_001", "00_000_001", "\u0661\u0662", "00\n")
]
_NAMES += ["iter_" + "9" * 100 + "/x", "iter_0001000/.metadata", "iter_0001000/common.pt", "adapter_config.json"]
_TRACKERS = [
    b"",
    b"release",
    b"999999",
    b"-1",
    b"1" * 5000,
    b"\xff\xfe",
    b"\xd9\xa1",
    b"1000\n",
    b"../x",
    b"1e3",
    b"0" * 10**7,
]
_SPECIALS = [
    Special("fifo"),
    Special("directory"),
    Special("zeros", size=2**30),
    Special("zeros", size=2**60),
    Special("zeros"),
]
_SPECIALS += [
    Special("link", target) for target in (".", "..", "loop", "nowhere", "/dev/zero", "/dev/null", "../secret")
]


def _wrong(draw: Draw, files: Files, least: int) -> Files:
    """The directory with one to three things wrong."""
    result = dict(files)
    for _ in range(draw(st.integers(least, 3))):
        name = pick(draw, sorted(result) or ["config.json"])
        content = result.get(name, b"")
        match pick(draw, ["content"] * 6 + ["special", "delete", "rename", "add", "truncate", "config", "index"]):
            case "content" if isinstance(content, bytes):
                result[name] = _wrong_content(draw, name, content)
            case "special":
                result[name] = pick(draw, _SPECIALS)
            case "delete":
                result.pop(name, None)
            case "rename":
                result[pick(draw, _NAMES)] = result.pop(name, b"")
            case "add":
                result[pick(draw, _NAMES)] = pick(draw, [content, b"{}", b"", *_SPECIALS])
            case "truncate" if isinstance(content, bytes) and content:
                result[name] = content[: draw(st.integers(0, len(content) - 1))]
            case "config":
                config = _object(result.get("config.json"))
                result["config.json"] = edited_json(draw, config, _CONFIG_KEYS, most=2)
            case "index":
                _wrong_index(draw, result)
    return result


def _object(content: bytes | Special | None) -> dict[str, Any]:
    try:
        found = json.loads(content) if isinstance(content, bytes) else None
    except (ValueError, RecursionError):
        found = None
    return found if isinstance(found, dict) else {"model_type": "gpt2"}


def _wrong_index(draw: Draw, files: Files) -> None:
    """Names of files in the index that lead elsewhere, or are too long or odd to be one."""
    for name in [name for name in files if name.endswith(".index.json")]:
        index = _object(files[name])
        weight_map = dict(index.get("weight_map") or {"wte.weight": "x"})
        suffix = pick(draw, [".safetensors", ".bin", ""])
        odd = [
            "../secret",
            "a" * 300,
            "a" * 5000,
            "\x1b[31m",
            "\ud800",
            "\x00",
            "..",
            "a\\..\\b",
            "model",
            "\udcff",
            "LICENSE",
        ]
        key = pick(draw, sorted(weight_map))
        files[name] = json.dumps({**index, "weight_map": {**weight_map, key: pick(draw, odd) + suffix}}).encode()


def _wrong_content(draw: Draw, name: str, content: bytes) -> bytes:
    """A file of the same kind, with something wrong in it."""
    if rarely(draw, 400):
        return large_json(draw)
    if name.endswith(".json"):
        return edited_json(draw, _object(content), _CONFIG_KEYS if name == "config.json" else ())
    try:
        if name.endswith(".safetensors"):
            return edited_safetensors(draw, content)
        if name.endswith((".bin", ".pt")):
            return archives.archive(draw, content) if content.startswith(b"PK") else archives.legacy(draw, content)
    except Exception:
        return content[: len(content) // 2]  # it has been changed before
    if name.endswith("iteration.txt"):
        return pick(draw, _TRACKERS)
    return content + pick(
        draw, [b"\xff\xfe", b"\x00", b"\n" * 1000, b"<!-- hf-megatron convert: begin -->", b"a" * 10**6]
    )
