from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from hf_megatron.architectures import GPT2
from hf_megatron.checkpoint import canonicalise, model_class_of, open_checkpoint, require_complete
from hf_megatron.checkpoint.spelling import CanonicalTensors
from hf_megatron.errors import CheckpointFormatError, CheckpointIncompleteError
from tests.checkpoint.directories import CONFIG, Tensors, model_tensors, write_hub

PREFIX = "transformer."
EMBEDDING = "transformer.wte.weight"
UNTIED = {**CONFIG, "tie_word_embeddings": False}
CLASSES = [model_class.stock for model_class in GPT2.classes]


def config_of(name: str) -> dict[str, Any]:
    return {**CONFIG, "architectures": [name]}


def canonical(directory: Path, tensors: Tensors, config: dict[str, Any] = CONFIG) -> CanonicalTensors:
    checkpoint = open_checkpoint(write_hub(directory, tensors, config))
    return canonicalise(checkpoint.tensors, GPT2, config, model_class_of(GPT2, config))


def assert_is(result: CanonicalTensors, tensors: Tensors) -> None:
    """The result is complete and holds exactly these tensors under the model's names."""
    require_complete(result)
    assert list(result.tensors) == list(tensors)
    assert all(torch.equal(result.tensors[name].read(), tensor) for name, tensor in tensors.items())


def old(name: str) -> str:
    """The name in a checkpoint of 2019."""
    return name.replace(".weight", ".gamma").replace(".bias", ".beta") if ".ln_" in name else name


# Spellings of the names of a language model, or of the base model.
SPELLINGS: dict[str, Callable[[str], str]] = {
    "prefix": lambda name: PREFIX + name.removeprefix(PREFIX),
    "no prefix": lambda name: name.removeprefix(PREFIX),
    "half": lambda name: name if ".1." in name else name.removeprefix(PREFIX),
    "old": lambda name: old(PREFIX + name.removeprefix(PREFIX)),
}


@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.parametrize("spelling", SPELLINGS)
def test_spellings_of_every_class(tmp_path: Path, name: str, spelling: str) -> None:
    """Catches a directory refused, or its weights random, for its names; a prefix before a head's own parameters."""
    config = config_of(name)
    tensors = model_tensors(config)
    head = {rule.name for rule in GPT2.model_class(name).head}
    respell = SPELLINGS[spelling]
    stored = {key if key in head else respell(key): tensor for key, tensor in tensors.items()}
    assert sum(key.endswith((".gamma", ".beta")) for key in stored) == (10 if spelling == "old" else 0)
    result = canonical(tmp_path, stored, config)
    assert_is(result, tensors)
    assert result.dropped == ()


@pytest.mark.parametrize("spelling", ["prefix", "no prefix"])
def test_obsolete_buffers_are_dropped_by_name(tmp_path: Path, spelling: str) -> None:
    """Catches the causal mask of old checkpoints refused as unknown, or ``attn.bias`` taken for a parameter."""
    tensors, respell = model_tensors(), SPELLINGS[spelling]
    buffers: Tensors = {}
    for layer in range(2):
        buffers[respell(f"transformer.h.{layer}.attn.bias")] = torch.ones(1, 1, 16, 16, dtype=torch.uint8)
        buffers[respell(f"transformer.h.{layer}.attn.masked_bias")] = torch.tensor(-1e4)
    result = canonical(tmp_path, {**{respell(name): tensor for name, tensor in tensors.items()}, **buffers})
    assert_is(result, tensors)
    assert set(result.dropped) == set(buffers)


@pytest.mark.parametrize("value", [0.0, float("nan")])
@pytest.mark.parametrize("block", [1000, 2**24])
def test_an_equal_copy_of_the_tied_head_is_dropped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: float, block: int
) -> None:
    """Catches the copy of transformers' own sharded save refused as unknown, also block by block or for a NaN in it."""
    monkeypatch.setattr("hf_megatron.checkpoint.spelling._COMPARED_BYTES", block)
    tensors = model_tensors()
    tensors[EMBEDDING][5, 5] = value
    result = canonical(tmp_path, {**tensors, "lm_head.weight": tensors[EMBEDDING].clone()})
    assert list(result.tensors) == list(tensors)
    assert result.dropped == ("lm_head.weight",)


def _add_one(element: int) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda tensor: tensor.reshape(-1).index_add(0, torch.tensor([element]), torch.ones(1)).view(tensor.shape)


@pytest.mark.parametrize(
    "change",
    [
        _add_one(0),
        _add_one(600),
        _add_one(1047),
        lambda tensor: tensor.view(torch.int32).clone(),
        lambda tensor: tensor[1:].clone(),
        lambda tensor: torch.tensor(1.0),
    ],
    ids=["first", "middle", "last", "dtype", "rows", "scalar"],
)
@pytest.mark.parametrize("is_scalar", [False, True])
def test_a_different_tied_head_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: Callable[[torch.Tensor], torch.Tensor], is_scalar: bool
) -> None:
    """Catches a comparison of the first block only, one that broadcasts or casts, and an untied model loaded as tied.

    Also one that goes row by row through an embedding that has no rows.
    """
    monkeypatch.setattr("hf_megatron.checkpoint.spelling._COMPARED_BYTES", 1000)
    tensors = model_tensors()
    head = change(tensors[EMBEDDING])
    if is_scalar:
        tensors[EMBEDDING] = torch.tensor(1.0)
    with pytest.raises(
        CheckpointFormatError, match=r"lm_head\.weight and transformer\.wte\.weight.*different"
    ) as error:
        canonical(tmp_path, {**tensors, "lm_head.weight": head})
    assert '"tie_word_embeddings": false' in str(error.value)


def test_the_head_stands_in_for_a_missing_tied_embedding(tmp_path: Path) -> None:
    """Catches a checkpoint refused because safetensors kept the head's name for the shared tensor."""
    tensors = model_tensors()
    stored = dict(tensors)
    stored["lm_head.weight"] = stored.pop("transformer.wte.weight")
    assert_is(canonical(tmp_path, stored), tensors)


def test_an_untied_head_is_a_tensor_of_its_own(tmp_path: Path) -> None:
    """Catches the head of an untied model dropped, or not missed where it is missing."""
    tensors = model_tensors(UNTIED)
    assert "lm_head.weight" in tensors
    assert_is(canonical(tmp_path, tensors, UNTIED), tensors)
    del tensors["lm_head.weight"]
    assert canonical(tmp_path, tensors, UNTIED).missing == ("lm_head.weight",)


def test_the_head_of_another_class_is_unknown(tmp_path: Path) -> None:
    """Catches a language model read as a classifier without a word about the two heads."""
    tensors = model_tensors()
    tensors["lm_head.weight"] = tensors["transformer.wte.weight"].clone()
    result = canonical(tmp_path, tensors, config_of("GPT2ForSequenceClassification"))
    assert (result.unknown, result.missing) == (("lm_head.weight",), ("score.weight",))


def test_a_tensor_under_two_spellings_is_refused(tmp_path: Path) -> None:
    """Catches the order of the names deciding which of two values a parameter gets."""
    with pytest.raises(CheckpointFormatError, match=r"twice, as ln_f\.beta and as transformer\.ln_f\.bias"):
        canonical(tmp_path, {**model_tensors(), "ln_f.beta": torch.zeros(8)})


def test_everything_wrong_is_listed_at_once(tmp_path: Path) -> None:
    """Catches a report that stops at the first problem, so that users fix one name per attempt."""
    tensors = model_tensors()
    del tensors["transformer.wpe.weight"], tensors["transformer.h.1.ln_2.bias"]
    tensors["transformer.h.0.attn.rotary.freqs"] = torch.zeros(2)
    tensors["h.2.ln_1.weight"] = torch.zeros(8)
    tensors["transformer.wte.weight"] = torch.zeros(130, 8)
    result = canonical(tmp_path, tensors)
    with pytest.raises(CheckpointIncompleteError) as error:
        require_complete(result)
    assert [line.strip() for line in str(error.value).splitlines()[1:]] == [
        "missing: transformer.wpe.weight, transformer.h.1.ln_2.bias",
        "unknown: h.2.ln_1.weight, transformer.h.0.attn.rotary.freqs",
        "wrong shape: transformer.wte.weight is [130, 8], expected [131, 8]",
    ]


def test_what_is_only_too_much_is_no_incomplete_checkpoint(tmp_path: Path) -> None:
    """Catches the wrong exception for a checkpoint that holds more than the model."""
    with pytest.raises(CheckpointFormatError, match="unknown: extra"):
        require_complete(canonical(tmp_path, {**model_tensors(), "extra": torch.zeros(1)}))


def test_long_lists_are_cut_short(tmp_path: Path) -> None:
    """Catches a message of a thousand lines for a checkpoint of another model."""
    config = {**CONFIG, "n_layer": 48}
    result = canonical(tmp_path, model_tensors(), config)
    with pytest.raises(CheckpointIncompleteError, match=r"and 532 more$"):
        require_complete(result)
    assert len(result.missing) == 46 * 12


def test_the_class_of_a_directory() -> None:
    """Catches a class guessed where config.json names one."""
    assert model_class_of(GPT2, {"architectures": None}) is model_class_of(GPT2, {}) is GPT2.classes[0]
    assert model_class_of(GPT2, {"architectures": [GPT2.classes[1].ours]}) is GPT2.classes[1]
