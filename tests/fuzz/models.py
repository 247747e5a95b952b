"""Strategies for directories whose model is wrong: tensors, configurations and arguments, besides files and places."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import Any

import safetensors.torch
import torch
from hypothesis import strategies as st

from tests.checkpoint.directories import BERT_CONFIG, CONFIG, Tensors, model_tensors
from tests.conversion.megatron_lm.generator import arguments_of
from tests.fuzz.damages import wrong
from tests.fuzz.directories import SIDE_FILES, VARIANTS, Files, contents, hub_seeds, megatron_seed, torch_bytes
from tests.fuzz.pickles import TEXTS, Draw, pick, rarely

OBJECTS: list[Any] = [
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
OBJECTS += ["", "x", "\ud800", "\x1b[31m", "gelu", "learned_absolute", "rope", b"x", [], {}, (), [1], {"a": 1}, {1, 2}]
OBJECTS += [torch.float16, torch.Size([1]), 1j, [[[[]]]], {"a": {"b": 10**5000}}, {(1, 2): 3}, range(3), "a" * 100000]
_SHARED: Any = ()
for _ in range(60):
    _SHARED = (_SHARED, _SHARED)
OBJECTS.append(_SHARED)
DTYPES = [
    torch.float64,
    torch.float16,
    torch.bfloat16,
    torch.int64,
    torch.int16,
    torch.uint8,
    torch.bool,
    torch.uint16,
]
DTYPES += [torch.float8_e4m3fn, torch.float8_e5m2, torch.complex64, torch.uint64, torch.int8, torch.float8_e8m0fnu]
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
_KEYS = ["checkpoint_version", "iteration", "args", "model", "model1", "tensors", "tensors"]  # of a rank's file
_MORE_ARGUMENTS += ["position_embedding_type", "tensor_model_parallel_size", "ffn_hidden_size", "params_dtype"]


def wrong_tensor(draw: Draw, tensor: torch.Tensor) -> Any:
    """The tensor in another dtype, shape or layout, or something else."""
    match pick(draw, ["dtype", "dtype", "shape", "expand", "view", "object", "huge", "special"]):
        case "dtype":
            return tensor.to(pick(draw, DTYPES)) if tensor.numel() < 2**20 else tensor  # of those that were expanded
        case "shape":
            shapes = [tensor.shape[:-1], (*tensor.shape, 1), (0, *tensor.shape[1:]), (), tensor.shape[::-1]]
            return torch.zeros(pick(draw, shapes))
        case "expand":
            return torch.zeros(()).expand(tensor.shape)
        case "view":
            return torch.cat([tensor, tensor])[::2] if tensor.dim() and tensor.numel() < 2**20 else tensor
        case "huge":
            return torch.zeros(1).expand(2**20, 2**20)
        case "special":
            return pick(draw, [torch.zeros(0), torch.nn.Parameter(torch.zeros(3)), torch.tensor(float("nan"))])
        case _:
            return pick(draw, OBJECTS)


def _wrong_tensors(draw: Draw, tensors: dict[str, Any]) -> dict[str, Any]:
    """A model that lacks a tensor, has another one, or one that is not as it should be."""
    result = dict(tensors)
    for _ in range(draw(st.integers(1, 2))):
        name = pick(draw, sorted(tensors))
        match pick(draw, ["tensor", "tensor", "drop", "name", "copy", "all"]):
            case "tensor" if isinstance(tensors[name], torch.Tensor):
                result[name] = wrong_tensor(draw, tensors[name])
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
                dtype = pick(draw, DTYPES)
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
    return wrong(draw, files, 0 if rarely(draw, 6) else 1)


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
        ranks = contents(name)
        which = [pick(draw, sorted(ranks))] if draw(st.booleans()) else sorted(ranks)
        edits = content_edits(draw, vars(arguments_of(VARIANTS[name])), _KEYS)
        for rank in which:
            changed = edited_content(draw, ranks[rank], edits)
            files[f"iter_0001000/{rank}/model_optim_rng.pt"] = torch_bytes(changed, is_zip=VARIANTS[name].is_zip)
    if draw(st.booleans()):
        files |= {"tokenizer.json": SIDE_FILES["tokenizer.json"], "config.json": json.dumps(CONFIG).encode()}
    return wrong(draw, files, 0 if draw(st.booleans()) else 1)


def content_edits(draw: Draw, arguments: Iterable[str], keys: Sequence[str]) -> list[tuple[str, Any]]:
    """What to set in a file with arguments: (argument or key, value)."""
    names = sorted(arguments) + _MORE_ARGUMENTS
    kinds = draw(st.lists(st.sampled_from(["argument", "argument", "key"]), min_size=1, max_size=3))
    return [
        (f"args.{pick(draw, names)}" if kind == "argument" else pick(draw, keys), pick(draw, OBJECTS)) for kind in kinds
    ]


def edited_content(draw: Draw, content: dict[str, Any], edits: list[tuple[str, Any]]) -> dict[str, Any]:
    """The content of such a file with these set."""
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
