"""What cannot be converted is refused before anything is written, in one message that names all of it."""

from __future__ import annotations

import builtins
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from hf_megatron.errors import CheckpointError, CheckpointIncompleteError, HfMegatronError
from hf_megatron_conversion import convert
from tests.conversion.commands import Commands
from tests.conversion.megatron_lm.generator import (
    HEADS,
    HIDDEN,
    VOCAB,
    Tensors,
    Variant,
    content_of,
    foreign,
    make_weights,
    save,
    save_foreign,
    write,
)

FILE = "iter_0001000/mp_rank_{:02d}/model_optim_rng.pt"


@pytest.fixture(scope="module")
def weights() -> Tensors:
    return make_weights(Variant())


@pytest.fixture
def source(tmp_path: Path, weights: Tensors) -> Path:
    return write(tmp_path / "source", Variant(), weights)


def _change(source: Path, rank: int, change: Callable[[dict[str, Any]], None]) -> None:
    """Change one rank's file."""
    path = source / FILE.format(rank)
    content = torch.load(path, weights_only=False)
    change(content)
    save(path, content)


def _refusal(source: Path, tmp_path: Path) -> str:
    with pytest.raises(HfMegatronError) as error:
        convert(source, tmp_path / "out", to="hub", vocab_size=VOCAB)
    assert not (tmp_path / "out").exists()
    return str(error.value)


@pytest.mark.parametrize(
    "arguments",
    [
        {"swiglu": True},
        {"squared_relu": True},
        {"use_rotary_position_embeddings": True},
        {"position_embedding_type": "rope"},
        {"group_query_attention": True, "num_query_groups": 2},
        {"num_experts": 8},
        {"normalization": "RMSNorm"},
        {"apply_layernorm_1p": True},
        {"add_bias_linear": False},
        {"kv_channels": 16},
        {"multi_latent_attention": True},
        {"apply_residual_connection_post_layernorm": True},
    ],
    ids=lambda arguments: next(iter(arguments)),
)
def test_models_that_are_none_of_ours(tmp_path: Path, weights: Tensors, arguments: dict[str, Any]) -> None:
    """Catches a model whose tensors fit and whose function is another one."""
    variant = Variant(extra_arguments=tuple(arguments.items()))
    assert next(iter(arguments)) in _refusal(write(tmp_path / "source", variant, weights), tmp_path)


def test_what_is_switched_off_is_no_reason(tmp_path: Path, weights: Tensors) -> None:
    """Catches arguments refused for being there: newer files have all of them, with these values."""
    arguments: dict[str, Any] = {"swiglu": False, "num_experts": None, "rotary_percent": 1.0, "window_size": None}
    arguments |= {"group_query_attention": False, "num_query_groups": 1, "kv_channels": HIDDEN // HEADS}
    arguments |= {"normalization": "LayerNorm", "position_embedding_type": "learned_absolute"}
    source = write(tmp_path / "source", Variant(extra_arguments=tuple(arguments.items())), weights)
    convert(source, tmp_path / "out", to="hub", vocab_size=VOCAB)


@pytest.mark.parametrize("version", [0.5, 2.5, 4.0, "3.0", [3]])
def test_unknown_versions(tmp_path: Path, source: Path, version: Any) -> None:
    """Catches a guess at the order of queries, keys and values."""
    for rank in range(2):
        _change(source, rank, lambda content: content.update(checkpoint_version=version))
    assert f"checkpoint_version={version!r} is not known" in _refusal(source, tmp_path)


@pytest.mark.parametrize(
    ("variant", "lost", "told"),
    [
        (Variant(tp=4), ["01", "03"], ["of 4 x 1 ranks and stages, missing in", ": rank 1, rank 3"]),
        (
            Variant(tp=4, has_arguments=False),
            ["01", "03"],
            ["of 3 x 1 ranks and stages, missing in", "24 rows on each of 3 ranks, where 96 are needed"],
        ),
        # Without the layers of a stage the model would only be less deep.
        (Variant(pp=2, layers=4), ["01_001"], ["of 2 x 2 ranks and stages, missing in", ": rank 1 stage 1"]),
        (Variant(pp=2, layers=4), ["00_001", "01_001"], [": rank 0 stage 1, rank 1 stage 1"]),
    ],
)
def test_missing_ranks_and_stages(tmp_path: Path, variant: Variant, lost: list[str], told: list[str]) -> None:
    """Catches a model made of the ranks, or of the stages, that happen to be there."""
    source = write(tmp_path / "source", variant)
    for name in lost:
        shutil.rmtree(source / f"iter_0001000/mp_rank_{name}")
    message = _refusal(source, tmp_path)
    assert [part for part in told if part not in message] == []


def test_ranks_of_different_degrees(tmp_path: Path, weights: Tensors) -> None:
    """Catches ranks of another degree left behind."""
    source = write(tmp_path / "source", Variant(tp=4), weights)
    write(source, Variant(tp=2), weights)
    assert "tensor_model_parallel_size is 2 and 4" in _refusal(source, tmp_path)


def test_everything_is_said_at_once(tmp_path: Path, weights: Tensors, command: Commands) -> None:
    """Catches a user sent from one error to the next, and a model of tensors that are of different saves, of different
    sizes, unknown or not there."""
    arguments = {"swiglu": True, "use_rotary_position_embeddings": True, "normalization": "RMSNorm", "num_experts": 4}
    variant = Variant(tp=4, version=7.0, extra_arguments=tuple(arguments.items()))
    source = write(tmp_path / "source", variant, weights)
    _change(source, 2, lambda content: content["model"].update({f"adapter{i}": torch.zeros(1) for i in range(30)}))
    name = "layers.1.mlp.dense_4h_to_h.weight"
    _change(source, 1, lambda content: content["model"]["language_model"]["encoder"].update({name: torch.zeros(3, 3)}))
    _change(source, 1, lambda content: content.update(iteration=5))
    _change(source, 0, lambda content: content["model"]["language_model"]["encoder"].pop("final_layernorm.bias"))
    shutil.rmtree(source / "iter_0001000/mp_rank_03")
    message = command.refusal("convert", source, tmp_path / "out", "--to", "hub")
    assert not (tmp_path / "out").exists()
    told = [
        "rank 3",
        "iteration is",
        "checkpoint_version=7.0",
        "30 stored names are not known: adapter0, adapter1, ",
        "layers.1.mlp.dense_4h_to_h.weight is float32 [32, 12] on rank 0, float32 [3, 3] on rank 1",
        "missing in rank 0: final_layernorm.bias",
    ]
    assert [part for part in [*told, *arguments] if part not in message] == []


def test_sizes_that_contradict_each_other(tmp_path: Path, source: Path, weights: Tensors) -> None:
    """Catches heads, or a depth, that the tensors do not have: their number shows in no shape."""
    deeper = write(tmp_path / "deeper", Variant(extra_arguments=(("num_layers", 5),)), weights)
    assert "num_layers is 2 in the tensors, 5 in the arguments" in _refusal(deeper, tmp_path)
    for config, told in (
        ('{"model_type": "gpt2", "n_head": 4}', r"8 in the arguments, 4 in the given config\.json"),
        ('{"model_type": "bert"}', r"config\.json is for bert.*the checkpoint is gpt2"),
    ):
        (tmp_path / "config.json").write_text(config)
        with pytest.raises(CheckpointError, match=told):
            convert(source, tmp_path / "out", to="hub", config=tmp_path / "config.json")


def test_a_copy_of_the_embedding_that_differs(tmp_path: Path) -> None:
    """Catches a head that was trained apart from the embedding thrown away as its copy."""
    source = write(tmp_path / "source", Variant(pp=2))
    for rank, row in ((1, -1), (0, 3)):
        # Padding may differ.
        convert(source, tmp_path / f"whole-{rank}", to="hub", vocab_size=VOCAB)
        path = source / f"iter_0001000/mp_rank_{rank:02d}_001/model_optim_rng.pt"
        content = torch.load(path, weights_only=False)
        content["model"]["word_embeddings_for_head"]["weight"][row, 3] += 1
        save(path, content)
    assert "word_embeddings_for_head.weight should be a copy" in _refusal(source, tmp_path)


# --- Pickles.


class Calls:
    """What a malicious pickle holds: loading it calls a function."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self._function, self._arguments = function, arguments

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return self._function, self._arguments

    def __call__(self) -> None:
        """The pickler asks for a callable."""


def _malicious(marker: Path) -> dict[str, tuple[Any, str]]:
    command = f"touch {marker}"
    return {
        "os.system": (Calls(os.system, command), "os.system"),
        "eval": (Calls(builtins.eval, f"open({str(marker)!r}, 'w').close()"), "builtins.eval"),
        "nested": (
            Calls(Calls(builtins.getattr, Calls(builtins.__import__, "os"), "system"), command),
            "a callable that the pickle computes, builtins.__import__, builtins.getattr",
        ),
        "unknown": (foreign("somewhere.Unknown", x=1), "somewhere.Unknown"),
    }


@pytest.mark.parametrize("is_zip", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("which", ["os.system", "eval", "nested", "unknown"])
@pytest.mark.parametrize("where", ["args", "model", "beside"])
def test_unsafe_pickles(
    tmp_path: Path, weights: Tensors, monkeypatch: pytest.MonkeyPatch, which: str, where: str, is_zip: bool
) -> None:
    """Catches code that runs while a file is opened, wherever in it, also where torch is told not to check."""
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    marker = tmp_path / "ran"
    value, name = _malicious(marker)[which]
    content = content_of(Variant(tp=1), weights, 0, 0)
    if where == "args":
        content["args"].x = value
    elif where == "model":
        content["model"]["language_model"]["encoder"]["layers.0.x"] = value
    else:
        content["zzz"] = [value]
    save_foreign(tmp_path / "source/release/mp_rank_00/model_optim_rng.pt", content, is_zip, value)
    message = _refusal(tmp_path / "source", tmp_path)
    assert (name in message, "is refused" in message) == (True, True)
    assert not marker.exists()


@pytest.mark.parametrize("is_zip", [True, False], ids=["zip", "legacy"])
def test_what_megatron_lm_saves_is_harmless(tmp_path: Path, weights: Tensors, is_zip: bool) -> None:
    """Catches genuine files refused, or loaded only where Megatron-LM is installed."""
    model_type = foreign("megatron.core.enums.ModelType", _value_=1)
    scaler = foreign("fp16.loss_scaler.DynamicLossScaler", cur_scale=65536.0, cur_iter=3)
    newer = foreign("megatron.fp16_deprecated.loss_scaler.DynamicLossScaler", cur_scale=1.0)
    content = content_of(Variant(tp=1), weights, 0, 0)
    scope = foreign("megatron.core.transformer.enums.InferenceCudaGraphScope", _value_=1)
    content["args"].model_type = model_type
    content["args"].inference_cuda_graph_scope = scope
    content["args"].path = Path("somewhere")
    content["args"].sizes = {1, 2}
    content["optimizer"] = {"loss_scaler": scaler, "newer": newer, "state": {0: {"exp_avg": torch.zeros(3)}}}
    content["rng_state"] = [{"np_rng_state": content["np_rng_state"]}]
    path = tmp_path / "source/release/mp_rank_00/model_optim_rng.pt"
    save_foreign(path, content, is_zip, model_type, scaler, newer, scope)
    convert(tmp_path / "source", tmp_path / "out", to="hub", vocab_size=VOCAB)


def test_truncated_files(tmp_path: Path, weights: Tensors) -> None:
    """Catches a torn copy that loads up to where it was torn."""
    for is_zip in (True, False):
        source = write(tmp_path / f"{is_zip}", Variant(is_zip=is_zip), weights)
        file = source / FILE.format(1)
        whole = file.read_bytes()
        for size in (0, 3, 100, len(whole) // 2, len(whole) - 1):
            file.write_bytes(whole[:size])
            with pytest.raises(CheckpointIncompleteError, match=r"mp_rank_01|rank 1"):
                convert(source, tmp_path / "out", to="hub", vocab_size=VOCAB)
