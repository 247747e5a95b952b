"""What may be wrong with the files of a directory, their names and places."""

from __future__ import annotations

import json
from typing import Any

from hypothesis import strategies as st

from tests.fuzz import archives
from tests.fuzz.directories import Files, Special
from tests.fuzz.documents import edited_json, edited_safetensors, edited_yaml, large_json
from tests.fuzz.pickles import Draw, edited, pick, rarely, whole

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
NAMES = [
    "a" * 255,
    "\x1b[31mred.json",
    "\udcff.json",
    "new\nline.bin",
    "pytorch_model.bin",
    "model.safetensors",
    " ",
    "-rf",
]
NAMES += ["shard-00001-model-00001-of-00001.safetensors", "shard-99999-model-00001-of-00001.safetensors", ".metadata"]
NAMES += ["model.safetensors.index.json", "vocab.json", "vocab.txt", "added_tokens.json", "NOTICE", "checksums.json"]
NAMES += [
    "iter_0001000/mp_rank_02/model_optim_rng.pt",
    "mp_rank_00/model_optim_rng.pt",
    "release/mp_rank_00/model_rng.pt",
]
NAMES += [
    f"iter_0001000/mp_rank_{n}/model_optim_rng.pt" for n in ("9" * 30, "00_001", "00_000_001", "\u0661\u0662", "00\n")
]
NAMES += ["iter_" + "9" * 100 + "/x", "iter_0001000/.metadata", "iter_0001000/common.pt", "adapter_config.json"]
NAMES += ["metadata.json", "run_config.yaml", "context/model.yaml", "model_config.yaml", "latest_train_state.pt"]
NAMES += [
    f"{place}/{name}" for place in ("iter_0001000", "weights", "release") for name in (".metadata", "metadata.json")
]
NAMES += ["iter_0001000/__0_7.distcp", "iter_0001000/__0_0.distcp", "iter_0001000/run_config.yaml", "__0_0.distcp"]
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
SPECIALS = [
    Special("fifo"),
    Special("directory"),
    Special("zeros", size=2**30),
    Special("zeros", size=2**60),
    Special("zeros"),
]
SPECIALS += [
    Special("link", target) for target in (".", "..", "loop", "nowhere", "/dev/zero", "/dev/null", "../secret")
]


def wrong(draw: Draw, files: Files, least: int) -> Files:
    """The directory with one to three things wrong."""
    result = dict(files)
    for _ in range(draw(st.integers(least, 3))):
        name = pick(draw, sorted(result) or ["config.json"])
        content = result.get(name, b"")
        match pick(draw, ["content"] * 6 + ["special", "delete", "rename", "add", "truncate", "config", "index"]):
            case "content" if isinstance(content, bytes):
                result[name] = _wrong_content(draw, name, content)
            case "special":
                result[name] = pick(draw, SPECIALS)
            case "delete":
                result.pop(name, None)
            case "rename":
                result[pick(draw, NAMES)] = result.pop(name, b"")
            case "add":
                result[pick(draw, NAMES)] = pick(draw, [content, b"{}", b"", *SPECIALS])
            case "truncate" if isinstance(content, bytes) and content:
                result[name] = content[: draw(st.integers(0, len(content) - 1))]
            case "config":
                config = _object(result.get("config.json"))
                result["config.json"] = edited_json(draw, config, _CONFIG_KEYS, most=2)
            case "index":
                _wrong_index(draw, result)
    return result


def flipped(draw: Draw, content: bytes) -> bytes:
    """A file of the same length with some of its bytes changed."""
    result = bytearray(content)
    for _ in range(draw(st.integers(1, 3))):
        at, new = (
            draw(st.integers(0, max(len(result) - 1, 0))),
            pick(draw, [b"\0", b"\xff", b"PK\5\6", b"PK\1\2", b"\0" * 99]),
        )
        result[at : at + len(new)] = new[: len(result) - at]
    return bytes(result)


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
        known = index.get("weight_map")
        weight_map = (
            known if known and isinstance(known, dict) else {"wte.weight": "x"}
        )  # it may have been changed before
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
        if name.endswith(".yaml"):
            return edited_yaml(draw, _object(content))
        if name.endswith(".metadata"):
            return edited(draw, content) if not rarely(draw, 6) else whole(draw)
        if name.endswith(".distcp"):
            return flipped(draw, content)
        if name.endswith((".bin", ".pt")):
            return archives.archive(draw, content) if content.startswith(b"PK") else archives.legacy(draw, content)
    except Exception:
        return content[: len(content) // 2]  # it has been changed before
    if name.endswith("iteration.txt"):
        return pick(draw, _TRACKERS)
    return content + pick(
        draw, [b"\xff\xfe", b"\x00", b"\n" * 1000, b"<!-- hf-megatron convert: begin -->", b"a" * 10**6]
    )
