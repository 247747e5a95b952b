"""``hf-megatron plan`` as a user or a script meets it."""

from __future__ import annotations

import json
from math import prod
from pathlib import Path
from typing import Any

import pytest

from hf_megatron.architectures.presets import PRESETS
from hf_megatron.planning import MACHINES
from hf_megatron_conversion import convert
from tests.conversion.commands import Commands

_LARGEST = ["gpt2-8.3b", "--tp", "8", "--micro-batch", "8", "--seq", "1024", "--recompute", "full"]


def test_keys_that_scripts_rely_on(command: Commands) -> None:
    """Catches keys gone missing, and options that do not arrive."""
    options = ["--dp", "4", "--device", "v100-32gb", "--precision", "master", "--accumulation", "2", "--no-dropout"]
    code, result, _ = command.run("plan", *_LARGEST, *options, "--sequence-parallel", "--fsdp", "--attention", "eager")
    assert code == 0
    assert result["num_parameters"] == 8_314_143_744
    kinds = {"parameters", "gradients", "optimizer", "activations", "logits_and_loss", "communication", "peak"}
    assert set(result["bytes_per_rank"]) == kinds
    assert all(isinstance(size, int) for size in result["bytes_per_rank"].values())
    assert result["collectives_per_step"] == sum(c["count"] for c in result["collectives"]) > 0
    assert result["bytes_communicated_per_step"] > 0
    assert result["step_seconds"] == pytest.approx(sum(result["seconds"].values()))
    assert 0 < result["scaling_efficiency"] < 1
    run: dict[str, Any] = {
        "micro_batch": 8,
        "sequence_length": 1024,
        "accumulation": 2,
        "tp_size": 8,
        "dp_size": 4,
        "fsdp": True,
    }
    run |= {"sequence_parallel": True, "recompute": "full", "attention": "eager", "precision": "master"}
    assert result["run"] == {**run, "dropout": False, "overlap": True, "labelled": 0.15, "device": "cuda"}


def test_layouts_for_a_number_of_gpus(command: Commands) -> None:
    """Catches advice that is not the best of the layouts listed, and hours of one GPU or of another speed."""
    options = ["--gpus", "16", "--micro-batch", "4", "--recompute", "full", "--tokens", "3e9"]
    code, result, _ = command.run("plan", "gpt2-8.3b", *options)
    assert code == 0
    assert result["hours"] == pytest.approx(3e9 / result["tokens_per_second"] / 3600)
    fitting = [way for way in result["layouts"] if way["fits"]]
    best = max(fitting, key=lambda way: way["tokens_per_second"])
    assert (result["run"]["tp_size"], result["run"]["dp_size"]) == (best["tp_size"], best["dp_size"])
    assert {way["tp_size"] * way["dp_size"] for way in result["layouts"]} == {16}


def test_what_is_given_with_gpus_is_kept(command: Commands) -> None:
    """Catches --tp that is ignored, and layouts that are not compared at one global batch."""
    code, result, _ = command.run("plan", "gpt2-2.5b", "--gpus", "8", "--tp", "4", "--global-batch", "64", "--no-fsdp")
    assert code == 0
    assert {(way["tp_size"], way["dp_size"], way["fsdp"]) for way in result["layouts"]} == {(4, 2, False)}
    assert {way["accumulation"] for way in result["layouts"]} == {32}
    assert {way["recompute"] for way in result["layouts"]} == {"none", "full"}
    assert result["global_batch"] == 64


@pytest.mark.parametrize("options", [[], ["--gpus", "1"]])
def test_what_does_not_fit_is_no_success(options: list[str], command: Commands) -> None:
    """Catches a script that rents GPUs which the model does not fit."""
    code, result, _ = command.run("plan", "gpt2-8.3b", *options)
    assert (code, result["fits"]) == (1, False)


@pytest.mark.parametrize("kind", ["file", "hub", "tp", "megatron-lm"])
def test_what_can_be_planned(kind: str, tied: Path, tmp_path: Path, command: Commands) -> None:
    """Catches a checkpoint that has to be converted, or read whole, before anything can be planned."""
    model = tied
    if kind in ("tp", "megatron-lm"):
        model = tmp_path / kind
        convert(tied, model, to=kind, tp_size=2)  # type: ignore[arg-type]
    elif kind == "file":
        model = tied / "config.json"
    code, result, _ = command.run("plan", model, "--tp", "2")
    assert (code, result["num_parameters"]) == (0, 64_464)
    assert result["run"]["sequence_length"] == 32  # the model's positions


def test_a_table_for_people(command: Commands, tmp_path: Path) -> None:
    """Catches an answer without its verdict, its kinds of memory or the source of its figures, and a plot not drawn."""
    plot = tmp_path / "memory.png"
    code, out, _ = command.show("plan", *_LARGEST, "--gpus", "8", "--device", "h100", "--plot", plot)
    out = " ".join(out.replace("\u2502", " ").split())
    assert code == 0
    told = ["global batch 64 of 1,024 tokens each", "precision amp", "recomputation full, attention sdpa, dropout on"]
    told += ["8,314,143,744", "optimizer", "peak", "fits", "all-reduce", "layouts", "TP 8 x DP 1", "nccl-tests"]
    assert [part for part in told if part not in out] == []
    assert plot.stat().st_size > 10_000


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["gpt3"], "gpt2-8.3b"),
        (["gpt2-8.3b", "--pp", "2"], "no pipeline stages"),
        (["gpt2-8.3b", "--gpus", "8", "--tp", "3"], "cannot be divided over 8 GPUs at tp_size=3"),
        (["gpt2-8.3b", "--gpus", "8", "--dp", "2"], "leave --dp or --gpus out"),
        (["gpt2-8.3b", "--global-batch", "8"], "is for --gpus"),
        (["gpt2-8.3b", "--gpus", "8", "--micro-batch", "3", "--global-batch", "8"], "no whole micro-batches of 3"),
        (["gpt2-8.3b", "--device", "tpu"], "v100-32gb"),
        (["gpt2-8.3b", "--device", "absent.json"], "absent.json"),
        (["absent.json"], "absent.json"),
        ([], "MODEL"),
    ],
)
def test_what_cannot_be_planned(arguments: list[str], told: str, command: Commands) -> None:
    """Catches a traceback, or a refusal that does not say what to do."""
    assert told in command.refusal("plan", *arguments)


def _write_sparse(directory: Path, name: str) -> Path:
    """A stock checkpoint with every header and no bytes on the disk."""
    preset = PRESETS[name]
    config = preset.table.config_of(preset.sizes, preset.table.classes[0], stock=True)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for tensor in preset.table.tensors(config, preset.table.classes[0]).values():
        start, end = end, end + 2 * prod(tensor.shape)
        header[tensor.name] = {"dtype": "BF16", "shape": tensor.shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(config))
    with (directory / "model.safetensors").open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        stream.truncate(8 + len(text) + end)
    return directory


@pytest.mark.parametrize(("name", "tp_size"), [("gpt2-8.3b", 8), ("bert-3.9b", 4)])
@pytest.mark.parametrize("to", ["tp", "megatron-lm"])
def test_the_largest_models_are_planned_and_their_checkpoints_too(
    name: str, tp_size: int, to: str, tmp_path: Path, command: Commands
) -> None:
    """Catches a plan or a dry run that reads or allocates what it counts, and one that counts something else."""
    source = _write_sparse(tmp_path / "source", name)
    code, planned, _ = command.run("plan", source, "--tp", str(tp_size), "--precision", "bf16")
    assert code == 0
    conversion = convert(source, tmp_path / "out", to=to, tp_size=tp_size, dry_run=True)  # type: ignore[arg-type]
    assert not (tmp_path / "out").exists()
    weights = [size for file, size in conversion.files.items() if file.endswith((".safetensors", ".pt"))]
    assert len(weights) == tp_size
    if to == "megatron-lm":
        # Every rank's file holds what the rank does, a padded vocabulary, and some kilobytes around it.
        assert max(weights) == pytest.approx(planned["bytes_per_rank"]["parameters"], rel=0.002)
    else:
        assert sum(weights) == pytest.approx(2 * planned["num_parameters"], rel=1e-4)


def _record(directory: Path, **changes: Any) -> None:
    config = {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "n_embd": 64, "n_layer": 2, "n_head": 4}
    run = {"micro_batch": 2, "sequence_length": 32, "tp_size": 2, "precision": "bf16"}
    measured = {"tokens_per_second": 640.0, "step_seconds": 0.1, "peak_memory_bytes": 10**9}
    record = {"config": config, "run": run, "device": "NVIDIA H200", "measured": measured, **changes}
    (directory / "run.json").write_text(json.dumps(record))


def test_a_run_is_held_against_its_plan(command: Commands, tmp_path: Path) -> None:
    """Catches ratios that are upside down, figures of another machine than the run's, and a file that is ignored."""
    _record(tmp_path)
    code, found, _ = command.run("plan", "--compare", str(tmp_path))
    assert code == 0
    assert found["compared"].keys() == {"peak_memory_bytes", "step_seconds", "tokens_per_second"}
    row = found["compared"]["peak_memory_bytes"]
    assert row["ratio"] == pytest.approx(10**9 / row["planned"])
    _record(tmp_path, device="cpu")
    code, found, _ = command.run("plan", "--compare", str(tmp_path))
    assert (code, found["compared"].keys()) == (0, {"peak_memory_bytes"})
    machine = tmp_path / "mine.json"
    machine.write_text(json.dumps(vars(MACHINES["h200"]) | {"name": "mine"}))
    code, found, _ = command.run("plan", "--compare", str(tmp_path), "--device", str(machine))
    assert (code, found["compared"].keys()) == (0, {"peak_memory_bytes", "step_seconds", "tokens_per_second"})


@pytest.mark.parametrize(("device", "note"), [("cpu", True), ("cuda", False)])
def test_a_comparison_for_people(command: Commands, tmp_path: Path, device: str, note: bool) -> None:
    """Catches a ratio of twenty that nobody explains, and memory that has to be counted by its digits."""
    run = {"micro_batch": 2, "sequence_length": 32, "tp_size": 2, "precision": "bf16", "device": device}
    _record(tmp_path, device="GPU of mine" if device == "cuda" else "cpu", run=run)
    code, out, _ = command.show("plan", "--compare", str(tmp_path))
    out = " ".join(out.replace("\u2502", " ").split())
    assert code == 0
    assert "GB per rank measured 1, planned 0.0" in out
    assert ("with interpreter and libraries" in out) == note
    assert "measured 640; for a plan, describe the machine by --device FILE.json" in out


@pytest.mark.parametrize(
    ("arguments", "changes", "message"),
    [
        (["--compare", "{}/none"], {}, "has no run.json"),
        (["gpt2", "--compare", "{}"], {}, "leave gpt2 out"),
        (["--compare", "{}"], {"run": {"precision": "fp7"}}, "is not the record of a run"),
        (["--compare", "{}"], {"measured": {}}, "is not the record of a run"),
        (["--compare", "{}"], {"run": {"precision": "fp32", "wrong": 1}}, "is not the record of a run"),
    ],
)
def test_what_cannot_be_compared(
    command: Commands, tmp_path: Path, arguments: list[str], changes: dict[str, Any], message: str
) -> None:
    """Catches a foreign error for a directory without a record, or with another one."""
    _record(tmp_path, **changes)
    assert message in command.refusal("plan", *(argument.format(tmp_path) for argument in arguments))
