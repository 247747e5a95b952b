"""Conversion changes where bytes lie, and never the bytes."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.distributed import DistributedConfig

from hf_megatron import MegatronGPT2LMHeadModel
from hf_megatron.architectures import TABLES, Architecture
from hf_megatron.checkpoint import read_header
from hf_megatron_conversion import convert, inspect, verify
from tests.conversion.checkpoints import (
    directory_bytes,
    hub_bytes,
    read_config,
    read_tensors,
    save_stock,
    there_and_back,
    tp_entries,
    write_hub,
)
from tests.distributed import RankPool


def test_hub_tp4_tp2_tp3_hub(stock: Path, tmp_path: Path) -> None:
    """Catches a tensor cut or joined at the wrong place, a fused tensor taken for a plain one, a head lost or doubled.

    The file that comes out equals the one that went in to the last byte, header included.
    """
    *cut, hub = there_and_back(stock, tmp_path, 4, 2, 3)
    assert [inspect(step).tp_size for step in cut] == [4, 2, 3]
    assert (hub / "model.safetensors").read_bytes() == (stock / "model.safetensors").read_bytes()
    assert read_config(hub) == read_config(stock)


def _save_by_ranks(source: str, destination: str, tp_size: int, fsdp_size: int) -> None:
    config = DistributedConfig(tp_size=tp_size, fsdp_size=fsdp_size)
    model = MegatronGPT2LMHeadModel.from_pretrained(source, distributed_config=config)
    model.save_pretrained(destination, distributed_checkpoint=True)


def test_tp_equals_what_ranks_save(stock: Path, tmp_path: Path, pool: Callable[[int], RankPool]) -> None:
    """Catches boxes, names, dtypes or metadata that differ from a distributed save's, and a tied head stored twice."""
    pool(2).run(_save_by_ranks, str(stock), str(tmp_path / "ranks"), 2, 1)
    convert(stock, tmp_path / "converted", to="tp", tp_size=2)
    assert tp_entries(tmp_path / "converted") == tp_entries(tmp_path / "ranks")
    assert read_config(tmp_path / "converted") == read_config(tmp_path / "ranks")


def test_a_rank_s_weights_can_stay_in_its_file(stock: Path, tmp_path: Path) -> None:
    """Catches tensors at addresses where a loaded model has to copy them."""
    convert(stock, tmp_path / "tp", to="tp", tp_size=2)
    for file in (tmp_path / "tp").glob("shard-*.safetensors"):
        assert min(start for _, _, start, _ in read_header(file).tensors.values()) % 64 == 0


def test_tp_with_fsdp_converts(tied: Path, tmp_path: Path, pool: Callable[[int], RankPool]) -> None:
    """Catches readers that expect pieces along one dimension; TP x FSDP cuts along two."""
    pool(4).run(_save_by_ranks, str(tied), str(tmp_path / "ranks"), 2, 2)
    offsets = [offset for _, offset, *_ in tp_entries(tmp_path / "ranks")]
    assert any(len(offset) == 2 and all(offset) for offset in offsets)
    convert(tmp_path / "ranks", tmp_path / "hub", to="hub")
    assert hub_bytes(tmp_path / "hub") == hub_bytes(tied)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float64"])
def test_each_tensor_keeps_its_own_dtype(dtype: str, tied: Path, tmp_path: Path) -> None:
    """Catches a detour through float32, or one dtype for all: a checkpoint may keep its norms in another one."""
    tensors = read_tensors(tied).items()
    mixed = {name: tensor if "ln_" in name else tensor.to(getattr(torch, dtype)) for name, tensor in tensors}
    source = write_hub(tmp_path / "mixed", mixed, read_config(tied))
    tp, hub = there_and_back(source, tmp_path, 4)
    assert (hub / "model.safetensors").read_bytes() == (source / "model.safetensors").read_bytes()
    assert inspect(tp).dtype == f"{dtype}, float32"


def test_dtype_is_cast_when_asked(tied: Path, tmp_path: Path) -> None:
    """Catches a cast that rounds otherwise than torch, or that config.json does not tell."""
    conversion = convert(tied, tmp_path / "hub", to="hub", dtype="bfloat16", verify=True)
    found = read_tensors(tmp_path / "hub")
    assert all(torch.equal(found[name], tensor.bfloat16()) for name, tensor in read_tensors(tied).items())
    assert read_config(tmp_path / "hub")["dtype"] == "bfloat16"
    assert conversion.verified is True


@pytest.mark.parametrize("max_shard_size", ["40KB", "100KB"])
def test_shards_are_those_of_save_pretrained(max_shard_size: str, tied: Path, tmp_path: Path) -> None:
    """Catches other cuts, another index, or a wrong total_size than stock transformers writes."""
    expected = save_stock(tmp_path / "stock", max_shard_size=max_shard_size)
    convert(tied, tmp_path / "hub", to="hub", max_shard_size=max_shard_size)
    written = directory_bytes(tmp_path / "hub")
    for name, content in directory_bytes(expected).items():
        assert written[name] == content, name
    assert len(list(expected.glob("*.safetensors"))) > 2


@pytest.mark.parametrize(
    ("table", "stock_name", "own_name"),
    [
        pytest.param(table, model_class.stock, model_class.ours, id=model_class.stock)
        for table in TABLES
        for model_class in table.classes
    ],
)
def test_every_class_converts(table: Architecture, stock_name: str, own_name: str, tmp_path: Path) -> None:
    """Catches names that hold for one class only: base models have no prefix, other heads other names and ties."""
    source = save_stock(tmp_path / "stock", model_class=getattr(transformers, stock_name))
    tp, hub = there_and_back(source, tmp_path, 3)
    assert read_config(tp)["architectures"] == [own_name]
    found = inspect(tp)
    assert (found.architecture, found.tp_size, found.model_class) == (table.name, 3, stock_name)
    assert found.layernorm_placement == table.norms
    assert hub_bytes(hub) == hub_bytes(source)
    assert read_config(hub) == read_config(source)
    assert verify(tp, source, logits=True).max_logit_diff == 0.0


@pytest.mark.parametrize("kind", ["bin", "safetensors"])
def test_old_spellings_convert(kind: str, tied: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Catches a converter that knows today's names only, or takes files with old ones over. What it drops it says."""
    tensors = {
        name.removeprefix("transformer.").replace("ln_f.weight", "ln_f.gamma"): tensor
        for name, tensor in read_tensors(tied).items()
    }
    tensors["h.0.attn.bias"] = torch.ones(1, 1, 32, 32)
    tensors["lm_head.weight"] = tensors["wte.weight"].clone()
    source = write_hub(tmp_path / "old", tensors, read_config(tied))
    if kind == "bin":
        (source / "model.safetensors").unlink()
        torch.save(tensors, source / "pytorch_model.bin")
    with caplog.at_level("INFO"):
        conversion = convert(source, tmp_path / "tp", to="tp", tp_size=2)
    assert sorted(conversion.dropped) == ["h.0.attn.bias", "lm_head.weight"]
    assert "h.0.attn.bias" in caplog.text
    for step in (source, tmp_path / "tp"):
        convert(step, tmp_path / "hub", to="hub", overwrite=True)
        assert hub_bytes(tmp_path / "hub") == hub_bytes(tied)


def test_model_type_follows_the_format_unless_asked(tied: Path, tmp_path: Path) -> None:
    """Catches a hub directory that stock transformers cannot load, or a tp directory that AutoModel reads as stock."""
    hub: dict[str, Any] = {"to": "hub"}
    tp: dict[str, Any] = {"to": "tp", "tp_size": 2}
    before = read_config(tied)
    ours = {**before, "model_type": "megatron_gpt2", "architectures": ["MegatronGPT2LMHeadModel"]}
    cases: list[Any] = [(hub, None, before), (hub, "megatron", ours), (tp, "stock", before), (tp, None, ours)]
    for number, (options, model_type, expected) in enumerate(cases):
        convert(tied, tmp_path / f"{number}", model_type=model_type, **options)
        assert read_config(tmp_path / f"{number}") == expected


@pytest.mark.parametrize("to", ["hub", "tp"])
def test_changing_the_type_takes_weight_files_over(to: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches weights decoded and written anew, or shared so that saving into the copy would change the source."""
    source = save_stock(tmp_path / "stock", max_shard_size="100KB")
    if to == "tp":
        source, _ = there_and_back(source, tmp_path, 3)
    monkeypatch.setattr("hf_megatron.checkpoint.LazyTensor.read", None)
    convert(source, tmp_path / "typed", to=to, model_type="megatron")  # type: ignore[arg-type]
    assert read_config(tmp_path / "typed")["model_type"] == "megatron_gpt2"
    weights = sorted(path.name for path in source.iterdir() if "safetensors" in path.name)
    for name in weights:
        assert (tmp_path / "typed" / name).read_bytes() == (source / name).read_bytes()
        assert not (tmp_path / "typed" / name).samefile(source / name)
    assert sorted(path.name for path in (tmp_path / "typed").iterdir() if "safetensors" in path.name) == weights


def test_side_files_come_along(tied: Path, tmp_path: Path) -> None:
    """Catches a model that arrives without its tokenizer or licence, or with another model's state."""
    source = tmp_path / "source"
    shutil.copytree(tied, source)
    (source / "tokenizer.json").write_text("{}")
    (source / "LICENSE").write_text("MIT")
    (source / "optimizer.pt").write_text("large")
    (source / "README.md").write_text("---\nlicense: mit\n---\n\n# A model\n\nIts story.\n")
    there_and_back(source, tmp_path, 2, verify=True)
    names = {"LICENSE", "README.md", "config.json", "generation_config.json", "model.safetensors", "tokenizer.json"}
    names |= {"SHA256SUMS"}
    assert {path.name for path in (tmp_path / "hub").iterdir()} == names
    card = (tmp_path / "hub/README.md").read_text()
    assert card.startswith("---\nlicense: mit\n---\n\n# A model\n\nIts story.\n")
    assert card.count("## Conversion") == 1
    assert "`tp2-0` (tp, tensor-parallel degree 2)" in card
    assert "every tensor was read back" in card


def test_what_is_given_takes_the_place_of_the_sources(tied: Path, tmp_path: Path) -> None:
    """Catches a mixture of two tokenizers' files, and a --config that is read but not used.

    Without architectures in it the first class is assumed.
    """
    source, tokenizer = tmp_path / "source", tmp_path / "tokenizer"
    shutil.copytree(tied, source, ignore=shutil.ignore_patterns("*.json"))
    (source / "vocab.json").write_text("{}")
    tokenizer.mkdir()
    (tokenizer / "tokenizer.json").write_text("{}")
    config = {**read_config(tied), "architectures": None, "layer_norm_epsilon": 0.25}
    (tmp_path / "other.json").write_text(json.dumps(config))
    convert(source, tmp_path / "tp", to="tp", tp_size=2, config=tmp_path / "other.json", tokenizer=tokenizer)
    assert (tmp_path / "tp/tokenizer.json").is_file()
    assert not (tmp_path / "tp/vocab.json").exists()
    assert read_config(tmp_path / "tp")["layer_norm_epsilon"] == 0.25
    assert read_config(tmp_path / "tp")["architectures"] == ["MegatronGPT2LMHeadModel"]


def test_snapshot_of_the_hub_cache(tied: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches paths that only hold for plain directories: the cache keeps links to blobs of other names.

    Also that safetensors are preferred to pickles, which are not even fetched, and that config.json comes first.
    """
    snapshot, blobs = tmp_path / "cache/snapshots/0", tmp_path / "cache/blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, path in enumerate(tied.iterdir()):
        (blobs / str(number)).write_bytes(path.read_bytes())
        (snapshot / path.name).symlink_to(blobs / str(number))
    fetched: list[list[str]] = []

    def snapshot_download(repository: str, allow_patterns: list[str]) -> str:
        assert repository == "some/gpt2"
        fetched.append(allow_patterns)
        return str(snapshot)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    convert("some/gpt2", tmp_path / "hub", to="hub")
    assert hub_bytes(tmp_path / "hub") == hub_bytes(tied)
    assert not any(path.is_symlink() for path in (tmp_path / "hub").iterdir())
    assert fetched[0] == ["config.json", "latest_checkpointed_iteration.txt", "latest_train_state.pt", "*metadata.json"]
    assert not any("bin" in pattern for patterns in fetched for pattern in patterns)
    assert "`some/gpt2` (hub)" in (tmp_path / "hub/README.md").read_text()


def test_memory_does_not_grow_with_the_model(tied: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a tensor, or a file, read whole: with a small bound every read stays below it."""
    monkeypatch.setattr("hf_megatron_conversion.tensors.SLICE_BYTES", 4096)
    progress = MagicMock()
    convert(tied, tmp_path / "tp", to="tp", tp_size=2, verify=True, progress=progress)
    assert 0 < max(call.args[0] for call in progress.advance.call_args_list) <= 8192  # headers included
    assert verify(tied, tmp_path / "tp").equal


def test_what_the_named_class_lacks_is_kept(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Catches the published BERT refused, or its pooler and second head lost on the way, or kept without a word."""
    source = save_stock(tmp_path / "stock", model_class=transformers.BertForPreTraining)
    write_hub(source, read_tensors(source), {**read_config(source), "architectures": ["BertForMaskedLM"]})
    assert inspect(source).model_class == "BertForPreTraining"
    with caplog.at_level("WARNING", logger="hf_megatron_conversion"):
        tp, hub = there_and_back(source, tmp_path, 2)
    assert "taken for a BertForPreTraining" in caplog.text
    assert "BertForMaskedLM" in caplog.text
    assert read_config(tp)["architectures"] == ["MegatronBertForPreTraining"]
    assert read_config(hub)["architectures"] == ["BertForPreTraining"]
    assert hub_bytes(hub) == hub_bytes(source)
    assert verify(source, tp, logits=True).equal


# In a process that ignores PYTHONPATH and the current directory, and refuses to import this package besides.
_LOAD = """
import json, sys
sys.modules["hf_megatron"] = sys.modules["hf_megatron_conversion"] = None
import torch
from transformers import AutoModelForCausalLM
ids = torch.arange(20).unsqueeze(0)
report = []
for path in sys.argv[1:]:
    model, info = AutoModelForCausalLM.from_pretrained(path, output_loading_info=True)
    keys = [sorted(map(str, info[kind])) for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")]
    report.append([type(model).__name__, keys, model(ids).logits.double().sum().item()])
print(json.dumps(report))
"""


def test_stock_transformers_loads_hub_directories(tied: Path, untied: Path, tmp_path: Path) -> None:
    """Catches names, config entries or metadata that only our classes understand."""
    paths = []
    for source in (tied, untied):
        tp, _ = there_and_back(source, tmp_path / f"from-{source.name}", 4)
        convert(tp, tmp_path / source.name, to="hub", max_shard_size="100KB")
        paths += [str(source), str(tmp_path / source.name)]
    report = json.loads(subprocess.check_output([sys.executable, "-I", "-c", _LOAD, *paths], text=True))
    for original, converted in zip(report[::2], report[1::2], strict=True):
        assert converted == original
        assert converted[:2] == ["GPT2LMHeadModel", [[], [], []]]


@pytest.mark.slow
@settings(max_examples=25, deadline=None)
@given(
    # From 26 words on, each of six ranks has rows; so it is with 11 and 12 columns, at any of the degrees.
    sizes=st.fixed_dictionaries(
        {
            "vocab_size": st.integers(26, 45),
            "n_head": st.sampled_from([11, 12]),
            "n_inner": st.none() | st.integers(26, 40),
            "n_layer": st.integers(1, 2),
            "tie_word_embeddings": st.booleans(),
        }
    ),
    head_dim=st.integers(1, 3),
    degrees=st.lists(st.sampled_from([1, 2, 3, 4, 6]), min_size=1, max_size=4),
)
def test_any_shape_any_degrees(
    tmp_path_factory: pytest.TempPathFactory, sizes: dict[str, Any], head_dim: int, degrees: list[int]
) -> None:
    """Catches sizes that happen to work in the other tests: uneven vocabularies and inner sizes, one-wide heads."""
    directory = tmp_path_factory.mktemp("any")
    source = save_stock(directory / "stock", **sizes, n_embd=sizes["n_head"] * head_dim)
    hub = there_and_back(source, directory, *degrees, verify=True)[-1]
    assert (hub / "model.safetensors").read_bytes() == (source / "model.safetensors").read_bytes()
