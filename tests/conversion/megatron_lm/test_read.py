"""Megatron-LM checkpoints of every layout become stock models that compute what Megatron-LM computed."""

from __future__ import annotations

import json
from dataclasses import replace
from fnmatch import fnmatch
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file

import hf_megatron
from hf_megatron.errors import CheckpointError
from hf_megatron_conversion import convert, inspect
from tests.conversion.checkpoints import read_config
from tests.conversion.megatron_lm.generator import (
    FFN,
    HEADS,
    HIDDEN,
    LAYERS,
    POSITIONS,
    VOCAB,
    Tensors,
    Variant,
    content_of,
    forward,
    inputs,
    make_weights,
    save,
    write,
)

# Both sides compute in float64. Beyond rounding, their tanh gelus differ by 1e-9, in the constant's last digit.
TOLERANCE = 1e-7

_KINDS: dict[str, dict[str, Any]] = {
    "gpt": {"kind": "gpt"},
    "bert-pre": {"kind": "bert"},
    "bert-post": {"kind": "bert", "is_post": True},
}
_SAVED = [
    # checkpoint_version, names, and whether torch before 1.6 wrote it: what existed together.
    (None, "first", False),
    (0, "first", True),
    (1, "first", True),
    (1.0, "first", False),
    (2.0, "first", True),
    (3.0, "first", True),
    (3.0, "second", True),
]


def assert_converts(
    tmp_path: Path, variant: Variant, weights: Tensors | None = None, source: Path | None = None, **options: Any
) -> None:
    """Write, if there is no source, convert to a hub directory, run that, and compare with the equations."""
    weights = make_weights(variant) if weights is None else weights
    source = source or write(tmp_path / "source", variant, weights)
    convert(source, tmp_path / "hub", to="hub", **{"vocab_size": VOCAB, **options})
    ids, mask, types = inputs(variant)
    expected = forward(variant, weights, ids, mask, types)
    config = read_config(tmp_path / "hub")
    assert config["vocab_size"] == VOCAB
    assert config["dtype"] == str(variant.dtype).removeprefix("torch.")
    class_name = config["architectures"][0]
    model_class: Any = getattr(transformers, class_name)
    if "prediction_head_act" in config:
        # The stock classes cannot express it; ours read the same directory.
        model_class = getattr(hf_megatron, "Megatron" + class_name.removeprefix("Megatron"))
    model = model_class.from_pretrained(tmp_path / "hub", dtype=torch.float64).eval()
    arguments = {"attention_mask": mask, "token_type_ids": types} if variant.is_bert else {}
    with torch.no_grad():
        outputs = model(ids, **arguments).to_tuple()
    assert outputs[0].shape == expected[0].shape
    assert (outputs[0] - expected[0])[mask.bool()].abs().max() < TOLERANCE
    assert not variant.is_bert or len(outputs) == len(expected)
    if len(expected) > 1:
        assert (outputs[1] - expected[1]).abs().max() < TOLERANCE


@pytest.mark.parametrize(("version", "names", "is_zip"), _SAVED)
@pytest.mark.parametrize("tp", [pytest.param(1, marks=pytest.mark.slow), 2, pytest.param(4, marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", list(_KINDS))
def test_every_version_and_degree(
    tmp_path: Path, kind: str, tp: int, version: float | None, names: str, is_zip: bool
) -> None:
    """Catches queries, keys and values in the order of another version, or reordered after the ranks were joined."""
    assert_converts(tmp_path, Variant(**_KINDS[kind], version=version, names=names, tp=tp, is_zip=is_zip))


def _asked(gelu: str, **arguments: Any) -> Variant:
    return Variant(kind="bert", gelu=gelu, extra_arguments=tuple(arguments.items()))


# What each group of variants catches.
_VARIANTS = {
    "one activation of a stock BERT used where Megatron-LM had two, or the tanh form taken for the exact one": [
        Variant(**kind, gelu=gelu) for kind in _KINDS.values() for gelu in ("fused", "openai")
    ],
    "one version's precedence of the switches applied to another's files": [
        # As v2.5: the fused kernel wins over what was asked for.
        _asked("fused", bias_gelu_fusion=True, onnx_safe=True),
        # As 23.06: what was asked for wins over the fused kernel.
        _asked("erf", bias_gelu_fusion=True, onnx_safe=True, squared_relu=False),
        _asked("openai", bias_gelu_fusion=True, openai_gelu=True, squared_relu=False),
        _asked("erf", onnx_safe=True),
    ],
    "the names of Megatron-core, or of its transformer-engine layers, not known": [
        Variant(**kind, gelu=gelu, names=names)
        for kind in (_KINDS["gpt"], _KINDS["bert-pre"])
        for gelu in ("fused", "erf")
        for names in ("core", "te")
    ],
    "layers counted from zero in every stage, or the last stage's copy of the embedding taken for a head": [
        Variant(pp=2, version=2.0, names="first"),
        Variant(pp=2, layers=4, is_untied=True),
        Variant(kind="bert", pp=2),
        Variant(kind="bert", pp=2, names="core"),
        Variant(pp=2, names="core"),
        Variant(pp=2, layers=4, chunks=2),
    ],
    "a head of its own dropped in favour of the embedding, or its padding kept": [
        Variant(is_untied=True),
        Variant(is_untied=True, names="core"),
    ],
    "token types added where Megatron-LM had none, and a head that is looked for in vain": [
        Variant(kind="bert", has_binary_head=False, version=version, names=names, is_post=is_post)
        for version, names in ((None, "first"), (3.0, "second"))
        for is_post in (False, True)
    ],
    "the stock class's default of eps in place of what the model was trained with": [
        Variant(**kind, eps=eps) for kind in _KINDS.values() for eps in (1e-12, 1e-3)
    ],
    "weights read in another dtype than they are stored in": [
        Variant(dtype=torch.float16),
        Variant(dtype=torch.bfloat16),
    ],
}


@pytest.mark.parametrize(("caught", "variant"), [(caught, v) for caught, group in _VARIANTS.items() for v in group])
def test_every_variant(tmp_path: Path, caught: str, variant: Variant) -> None:
    """Catches what the keys of the table say, each as a difference to the equations."""
    assert_converts(tmp_path, variant)


def test_core_calls_eps_otherwise(tmp_path: Path) -> None:
    """Catches the newer name of the argument overlooked, so that the default stands."""
    variant = Variant(names="core", eps=0.01, tp=1)
    content = content_of(variant, make_weights(variant), 0, 0)
    del content["args"].layernorm_epsilon
    content["args"].norm_epsilon = 0.01
    save(tmp_path / "source/iter_0000001/mp_rank_00/model_optim_rng.pt", content)
    convert(tmp_path / "source", tmp_path / "hub", to="hub", vocab_size=VOCAB)
    assert read_config(tmp_path / "hub")["layer_norm_epsilon"] == 0.01


@pytest.mark.parametrize("kind", list(_KINDS))
def test_without_arguments(tmp_path: Path, kind: str) -> None:
    """Catches files from before v1.0, which do not say how the model was trained, that cannot be converted at all."""
    is_gpt = kind == "gpt"
    # The names, and the activation, of the versions without arguments.
    names, gelu = ("flat", "openai") if is_gpt else ("first", "erf")
    variant = Variant(**_KINDS[kind], version=None, names=names, gelu=gelu, has_arguments=False, is_zip=False)
    config: dict[str, Any] = {"model_type": {"gpt": "gpt2", "bert-pre": "megatron-bert", "bert-post": "bert"}[kind]}
    config["n_head" if is_gpt else "num_attention_heads"] = HEADS
    if kind == "bert-post":
        config["layer_norm_eps"] = 1e-5
    file = tmp_path / "config.json"
    file.write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="how many attention heads"):
        assert_converts(tmp_path, variant)
    assert_converts(tmp_path, variant, config=file)


def test_the_stock_default_of_eps_is_no_choice(tmp_path: Path) -> None:
    """Catches 1e-12 taken from a config.json that transformers wrote, which such models were not trained with."""
    sizes = {"vocab_size": VOCAB, "hidden_size": HIDDEN, "num_hidden_layers": LAYERS, "intermediate_size": FFN}
    config = transformers.MegatronBertConfig(**sizes, num_attention_heads=HEADS, max_position_embeddings=POSITIONS)
    config.save_pretrained(tmp_path)
    variant = Variant(kind="bert", version=None, names="first", has_arguments=False)
    assert_converts(tmp_path, variant, config=tmp_path / "config.json")


def test_other_ways_to_save_the_same(tmp_path: Path) -> None:
    """Catches the names of wrappers, and a shard that was saved as a view read as if its columns were all there are."""
    plain, nested, flat, views = (
        content_of(Variant(tp=1, names=names), make_weights(Variant(tp=1)), 0, 0)
        for names in ("second", "second", "core", "second")
    )
    nested["model"] = {"module": {"module": nested["model"]}}
    flat["model"] = {f"module.{name}": tensor for name, tensor in flat["model"].items()}
    layers = views["model"]["language_model"]["encoder"]
    for name, tensor in layers.items():
        if tensor.dim() == 2:
            wide = torch.full((tensor.shape[0], tensor.shape[1] + 5), 9.0)
            wide[:, 3:-2] = tensor
            layers[name] = wide[:, 3:-2]
    found = set()
    for number, content in enumerate((plain, nested, flat, views)):
        save(tmp_path / f"{number}/release/mp_rank_00/model_optim_rng.pt", content)
        convert(tmp_path / f"{number}", tmp_path / f"hub-{number}", to="hub", vocab_size=VOCAB)
        found.add((tmp_path / f"hub-{number}/model.safetensors").read_bytes())
    assert len(found) == 1


@pytest.mark.parametrize("style", ["grouped", "spaced"])
def test_layers_that_share_parameters(tmp_path: Path, style: str) -> None:
    """Catches a model of 2020 whose four layers have the parameters of two, taken for one of two layers."""
    stored = Variant(version=2.0, names="first", tp=1)
    weights = make_weights(stored)
    order = [0, 1, 0, 1] if style == "grouped" else [0, 0, 1, 1]
    full = {name: tensor for name, tensor in weights.items() if not name[0].isdigit()}
    for layer, shared in enumerate(order):
        full |= {f"{layer}{name[1:]}": weights[name] for name in weights if name.startswith(f"{shared}.")}
    arguments = {"num_layers": 4, "num_unique_layers": 2, "param_sharing_style": style}
    source = write(tmp_path / "source", replace(stored, extra_arguments=tuple(arguments.items())), weights)
    assert_converts(tmp_path, replace(stored, layers=4), full, source)


def test_config_says_what_the_arguments_say(tmp_path: Path) -> None:
    """Catches positions, dropout or the scale of initialisation lost, and special tokens made up."""
    convert(write(tmp_path / "gpt", Variant()), tmp_path / "gpt-hub", to="hub", vocab_size=VOCAB)
    config = transformers.AutoConfig.from_pretrained(tmp_path / "gpt-hub")
    assert (config.n_positions, config.n_inner, config.initializer_range) == (POSITIONS, FFN, 0.01)
    assert (config.resid_pdrop, config.embd_pdrop, config.attn_pdrop) == (0.125, 0.125, 0.0625)
    assert config.eos_token_id is None
    assert transformers.GenerationConfig.from_pretrained(tmp_path / "gpt-hub").eos_token_id is None
    convert(write(tmp_path / "bert", Variant(kind="bert")), tmp_path / "bert-hub", to="hub", vocab_size=VOCAB)
    config = transformers.AutoConfig.from_pretrained(tmp_path / "bert-hub")
    assert (config.max_position_embeddings, config.intermediate_size) == (POSITIONS, FFN)
    assert (config.hidden_dropout_prob, config.attention_probs_dropout_prob) == (0.125, 0.0625)


def test_where_a_checkpoint_may_lie(tmp_path: Path) -> None:
    """Catches directories that are Megatron-LM's and are not recognised, or the wrong iteration taken."""
    variant = Variant()
    new, old = make_weights(variant), make_weights(variant, seed=1)
    source = write(tmp_path / "source", variant, new, iteration=2000)
    write(source, variant, old, iteration=1000)
    (source / "latest_checkpointed_iteration.txt").write_text("2000\n")
    release = tmp_path / "release"
    release.mkdir()
    (source / "iter_0002000").rename(release / "release")
    (release / "latest_checkpointed_iteration.txt").write_text("release")
    with pytest.raises(CheckpointError, match=r"iter_0002000 is missing"):
        inspect(source)
    (source / "latest_checkpointed_iteration.txt").unlink()
    # Optimizer states of data-parallel ranks beside the weights, as distributed optimizers left them for a while.
    parallel = tmp_path / "parallel/iter_0000001"
    for tp, dp in product(range(2), range(2)):
        save(parallel / f"mp_rank_{tp:02d}_{dp:03d}/model_rng.pt", content_of(variant, old, tp, 0))
        save(parallel / f"mp_rank_{tp:02d}_{dp:03d}/optim.pt", {})
    with pytest.raises(CheckpointError, match="is the part of one rank; give the directory that holds those of all"):
        inspect(source / "iter_0001000/mp_rank_00")
    expected = {"release": new, "release/release": new, "source": old, "source/iter_0001000": old, "parallel": old}
    for place, weights in expected.items():
        destination = tmp_path / "out" / place.replace("/", "-")
        convert(tmp_path / place, destination, to="hub", vocab_size=VOCAB)
        stored = load_file(destination / "model.safetensors")
        assert torch.equal(stored["transformer.wte.weight"], weights["words"])


def test_a_repository_on_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a repository of Megatron-LM's files refused for want of a config.json, or fetched in part."""
    snapshot = write(tmp_path / "snapshot", Variant())
    fetched: list[str] = []

    def snapshot_download(repository: str, allow_patterns: list[str]) -> str:
        fetched.extend(allow_patterns)
        return str(snapshot)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    convert("some/megatron", tmp_path / "hub", to="hub", vocab_size=VOCAB)
    assert (tmp_path / "hub/model.safetensors").is_file()
    for path in snapshot.rglob("*.*"):
        assert any(fnmatch(str(path.relative_to(snapshot)), pattern) for pattern in fetched)


def test_padding_of_the_vocabulary(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Catches padding taken for words without a word about it, and a tokenizer or arguments not asked."""
    variant = Variant(kind="bert")
    source = write(tmp_path / "source", variant)

    def words(source: Path, name: str, **options: Any) -> int:
        convert(source, tmp_path / name, to="hub", **options)
        tensors = load_file(tmp_path / name / "model.safetensors")
        rows = len(tensors["bert.embeddings.word_embeddings.weight"])
        assert len(tensors["cls.predictions.bias"]) == rows
        return rows

    assert words(source, "kept") == 128
    assert "how much of the vocabulary of 128 is padding" in caplog.text
    tokenizer = tmp_path / "tokenizer"
    tokenizer.mkdir()
    (tokenizer / "vocab.txt").write_text("".join(f"word\u2028{i}\n" for i in range(VOCAB)), encoding="utf-8")
    assert words(source, "cut", tokenizer=tokenizer) == VOCAB
    assert (tmp_path / "cut/vocab.txt").is_file()
    stated = write(tmp_path / "stated", replace(variant, extra_arguments=(("orig_vocab_size", VOCAB),)))
    assert words(stated, "from-arguments") == VOCAB
    with pytest.raises(CheckpointError, match="the given vocab_size is 129, but the word embedding has 128 rows"):
        words(source, "more", vocab_size=129)


def test_gpt_knows_the_token_that_ends_a_text(tmp_path: Path) -> None:
    """Catches a model that generates on and on, or stops at an id of the padding."""
    source = write(tmp_path / "source", Variant())
    tokens = {f"t{i}": i for i in range(VOCAB - 1)} | {"<|endoftext|>": VOCAB - 1}
    (source / "vocab.json").write_text(json.dumps(tokens))
    (source / "merges.txt").write_text("#version: 0.2\n")
    convert(source, tmp_path / "hub", to="hub")
    assert json.loads((tmp_path / "hub/generation_config.json").read_text())["eos_token_id"] == VOCAB - 1
    assert transformers.AutoConfig.from_pretrained(tmp_path / "hub").eos_token_id == VOCAB - 1
    assert (tmp_path / "hub/merges.txt").is_file()


def test_inspect(tmp_path: Path) -> None:
    """Catches a description of the wrong ranks, version or placement, and files without arguments that have none."""
    described = inspect(write(tmp_path / "bert", Variant(kind="bert", is_post=True, tp=4)))
    assert (described.format, described.architecture, described.layernorm_placement) == ("megatron-lm", "bert", "post")
    assert (described.tp_size, described.checkpoint_version, described.vocab_size) == (4, 3.0, 128)
    old = Variant(version=None, names="flat", has_arguments=False, is_zip=False)
    described = inspect(write(tmp_path / "old", old))
    assert (described.architecture, described.checkpoint_version, described.tp_size) == ("gpt2", 0.0, 2)
