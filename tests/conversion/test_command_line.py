"""The command as a user or a script meets it: exit codes, one JSON object on stdout, one clear message on stderr."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

import hf_megatron
from hf_megatron.commands import cli
from hf_megatron_conversion import convert
from tests.conversion.checkpoints import read_config, save_stock
from tests.repository import ROOT


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Run a command line in this process: exit code, stdout, stderr."""

    def run_command(*arguments: str | Path) -> tuple[int, str, str]:
        code = cli.run([str(argument) for argument in arguments])
        out, err = capfd.readouterr()
        return code, out, err

    return run_command


@pytest.fixture
def run_json(run: Callable[..., tuple[int, str, str]]) -> Callable[..., tuple[int, dict[str, Any]]]:
    """Run a command line with --json: exit code and the object, which must be all that stdout holds."""

    def run_command(*arguments: str | Path) -> tuple[int, dict[str, Any]]:
        code, out, _ = run(*arguments, "--json")
        assert out.count("\n") == 1
        return code, json.loads(out)

    return run_command


def test_convert(tied: Path, tmp_path: Path, run_json: Callable[..., tuple[int, dict[str, Any]]]) -> None:
    """Catches keys that scripts rely on gone missing, or wrong."""
    code, result = run_json("convert", tied, tmp_path / "tp", "--to", "tp", "--tp", "4", "--verify")
    assert code == 0
    assert result["source"] == str(tied)
    assert result["destination"] == str(tmp_path / "tp")
    assert result["tensors"] == len(load_file(tied / "model.safetensors"))
    assert result["bytes_written"] == sum(path.stat().st_size for path in (tmp_path / "tp").iterdir())
    assert result["seconds"] > 0
    assert result["peak_rss_bytes"] > 10**7
    assert result["verified"] is True
    code, result = run_json("convert", tmp_path / "tp", tmp_path / "hub", "--to", "hub", "--dry-run")
    assert (code, result["verified"], (tmp_path / "hub").exists()) == (0, None, False)


@pytest.mark.parametrize(("to", "tp_size", "model_type"), [("hub", 1, "gpt2"), ("tp", 3, "megatron_gpt2")])
def test_inspect(
    to: str,
    tp_size: int,
    model_type: str,
    untied: Path,
    tmp_path: Path,
    run_json: Callable[..., tuple[int, dict[str, Any]]],
) -> None:
    """Catches a wrong description; parameters are counted from the stock file."""
    path = untied
    if to == "tp":
        path = tmp_path / "tp"
        convert(untied, path, to="tp", tp_size=tp_size)
    tensors = load_file(untied / "model.safetensors")
    parameters = sum(tensor.numel() for tensor in tensors.values())
    code, result = run_json("inspect", path)
    assert code == 0
    assert result == {
        "format": to,
        "architecture": "gpt2",
        "model_class": "GPT2LMHeadModel",
        "model_type": model_type,
        "layernorm_placement": "pre",
        "tp_size": tp_size,
        "num_parameters": parameters,
        "num_tensors": len(tensors),
        "dtype": "float32",
        "bytes": 4 * parameters,
        "vocab_size": 131,
        "checkpoint_version": None,
        "dropped": [],
    }


def test_verify(tied: Path, untied: Path, run_json: Callable[..., tuple[int, dict[str, Any]]]) -> None:
    """Catches exit code 0 for models that differ."""
    code, result = run_json("verify", tied, tied)
    assert code == 0
    assert {key: result[key] for key in ("equal", "mismatched", "max_abs_diff", "max_logit_diff")} == {
        "equal": True,
        "mismatched": [],
        "max_abs_diff": 0.0,
        "max_logit_diff": None,
    }
    code, result = run_json("verify", tied, untied)
    assert (code, result["equal"]) == (1, False)
    assert "lm_head.weight" in result["mismatched"]


def test_failed_verification_is_exit_code_1(
    tied: Path,
    tmp_path: Path,
    run_json: Callable[..., tuple[int, dict[str, Any]]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Catches a failed --verify that a script takes for success."""
    from hf_megatron_conversion import converter

    monkeypatch.setattr(converter, "compare", lambda *_: ({"transformer.wte.weight": "differs"}, 1.0))
    code, result = run_json("convert", tied, tmp_path / "tp", "--to", "tp", "--tp", "2", "--verify")
    assert (code, result["verified"]) == (1, False)
    assert not (tmp_path / "tp").exists()


def test_tables_for_people(tied: Path, tmp_path: Path, run: Callable[..., tuple[int, str, str]]) -> None:
    """Catches results on stderr, where `| less` does not see them, and long lists that push the answer off screen."""
    code, out, err = run("inspect", tied)
    assert (code, err) == (0, "")
    assert "64,464" in out
    code, out, _ = run("verify", tied, save_stock(tmp_path / "stock", n_layer=3))
    assert (code, "Not the same model" in out) == (1, True)
    code, out, _ = run("convert", tied, tmp_path / "tp", "--to", "tp", "--tp", "2", "--dry-run")
    assert (code, "dry run" in out) == (0, True)


def _damaged(tied: Path, directory: Path, damage: str) -> Path:
    """A copy of a stock directory with something wrong in it."""
    shutil.copytree(tied, directory)
    weights, config = directory / "model.safetensors", directory / "config.json"
    if damage == "truncated":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif damage == "no weights":
        weights.unlink()
    elif damage == "no config":
        config.unlink()
    elif damage == "not json":
        config.write_text("{")
    elif damage == "not gpt2":
        config.write_text(json.dumps({**read_config(directory), "model_type": "llama"}))
    elif damage == "25 heads":
        config.write_text(json.dumps({**read_config(directory), "n_head": 25, "n_embd": 50}))
    elif damage == "index":
        index = {"metadata": {}, "weight_map": {"transformer.wte.weight": "model-00001-of-00002.safetensors"}}
        (directory / "model.safetensors.index.json").write_text(json.dumps(index))
        weights.unlink()
    else:
        assert damage == "tensors"
        tensors = load_file(weights)
        del tensors["transformer.ln_f.bias"]
        tensors["transformer.h.7.unheard_of"] = tensors["transformer.ln_f.weight"].clone()
        tensors["transformer.wpe.weight"] = tensors["transformer.wpe.weight"][:5].clone()
        save_file(tensors, weights, metadata={"format": "pt"})
    return directory


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        ("truncated", ["truncated"]),
        ("no weights", ["no weights"]),
        ("no config", ["config.json"]),
        ("not json", ["config.json", "JSON"]),
        ("not gpt2", ["llama", "gpt2"]),
        ("25 heads", ["num_attention_heads=25", "tp_size=2", "1, 5 or 25"]),
        ("index", ["model-00001-of-00002.safetensors", "missing"]),
        ("tensors", ["transformer.ln_f.bias", "transformer.h.7.unheard_of", "[5, 48]", "[32, 48]"]),
    ],
)
def test_bad_source(
    damage: str, told: list[str], tied: Path, tmp_path: Path, run: Callable[..., tuple[int, str, str]]
) -> None:
    """Catches a bad checkpoint converted all the same, a traceback, or a message that does not say what to do."""
    source = _damaged(tied, tmp_path / "source", damage)
    code, out, err = run("convert", source, tmp_path / "tp", "--to", "tp", "--tp", "2", "--json")
    assert code == 2
    assert set(json.loads(out)) == {"error", "error_type"}
    for part in told:
        assert part in err
    assert "Traceback" not in err
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_degree_is_checked_before_weights_are_opened(
    tied: Path, tmp_path: Path, run: Callable[..., tuple[int, str, str]]
) -> None:
    """Catches a download, or hours of reading, before a refusal that the configuration alone decides."""
    source = _damaged(tied, tmp_path / "source", "no weights")
    code, _, err = run("convert", source, tmp_path / "tp", "--to", "tp", "--tp", "5")
    assert code == 2
    assert "num_attention_heads=12" in err


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--to", "tp"], "--tp N"),
        (["--to", "hub", "--tp", "2"], "not cut"),
        (["--to", "tp", "--tp", "0"], "tp_size=0"),
        (["--to", "nowhere"], "nowhere"),
        ([], "--to"),
        (["--to", "hub", "--dtype", "int3"], "int3"),
        (["--to", "hub", "--max-shard-size", "many"], "many"),
        (["--to", "tp", "--tp", "2", "--max-shard-size", "5GB"], "max_shard_size"),
        (["--to", "hub", "--tokenizer", "."], "no tokenizer"),
        (["--to", "hub", "--config", "absent.json"], "absent.json"),
        (["--to", "hub", "--bogus"], "--bogus"),
    ],
)
def test_bad_option(
    arguments: list[str], told: str, tied: Path, tmp_path: Path, run: Callable[..., tuple[int, str, str]]
) -> None:
    """Catches an option that is ignored, or refused without a word on which."""
    code, out, err = run("convert", tied, tmp_path / "out", *arguments, "--json")
    assert code == 2
    assert told in err
    assert set(json.loads(out)) == {"error", "error_type"}
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("command", [["inspect"], ["verify", "."]])
@pytest.mark.parametrize("path", ["absent/directory/here", "./absent", "nobody/nothing", "not a name"])
def test_absent_source(command: list[str], path: str, run: Callable[..., tuple[int, str, str]]) -> None:
    """Catches a traceback from the Hub's client where there is neither a directory nor a network."""
    code, out, err = run(command[0], path, *command[1:], "--json")
    assert code == 2
    assert path in err
    assert json.loads(out)["error_type"] == "CheckpointFormatError"


def test_overflow_is_refused(tied: Path, tmp_path: Path, run: Callable[..., tuple[int, str, str]]) -> None:
    """Catches weights that silently become infinite."""
    source = tmp_path / "source"
    shutil.copytree(tied, source)
    tensors = load_file(source / "model.safetensors")
    tensors["transformer.ln_f.weight"][0] = 1e6
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    code, _, err = run("convert", source, tmp_path / "hub", "--to", "hub", "--dtype", "float16")
    assert code == 2
    assert "transformer.ln_f.weight holds 1e+06" in err
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_defects_are_not_dressed_up(
    tied: Path, run: Callable[..., tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a defect of ours reported as a bad checkpoint; and that its traceback can be had."""
    from hf_megatron_conversion import inspection

    monkeypatch.setattr(inspection, "read_model", lambda *_: 1 / 0)
    code, _, err = run("inspect", tied)
    assert code == 2
    assert "ZeroDivisionError" in err
    assert "HF_MEGATRON_DEBUG" in err
    monkeypatch.setenv("HF_MEGATRON_DEBUG", "1")
    with pytest.raises(ZeroDivisionError):
        cli.run(["inspect", str(tied)])


def test_inspect_needs_neither_torch_nor_transformers(tied: Path) -> None:
    """Catches an import that makes a look at a header wait for seconds."""
    watched = (
        "import sys; from hf_megatron.commands.cli import run; code = run(sys.argv[1:]); "
        "sys.exit(code or bool({'torch', 'transformers'} & set(sys.modules)))"
    )
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'conversion'}"}
    command = [sys.executable, "-c", watched, "inspect", str(tied)]
    assert subprocess.run(command, env=environment, check=False, stdout=subprocess.DEVNULL).returncode == 0


@pytest.mark.slow
def test_peak_memory_is_far_below_the_model(tmp_path: Path) -> None:
    """Catches whole tensors, files or models in memory, measured on the process as a whole."""
    source = save_stock(tmp_path / "stock", vocab_size=50257, n_embd=1536, n_layer=6, n_head=12)
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'conversion'}"}
    # verify after convert, in one process; convert's --verify also runs the models, for which they have to be loaded.
    script = (
        "import sys; from hf_megatron_conversion import verify; from hf_megatron_conversion.converter import convert;"
        "convert(*sys.argv[1:], to='tp', tp_size=4); assert verify(*sys.argv[1:]).equal;"
        "print(convert(*sys.argv[1:], to='tp', tp_size=4, overwrite=True, dry_run=True).peak_rss_bytes)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(source), str(tmp_path / "tp")],
        env=environment,
        check=True,
        stdout=subprocess.PIPE,
    )
    assert sum(path.stat().st_size for path in (tmp_path / "tp").iterdir()) > 0.98e9
    # Importing torch takes about 0.25e9 of it.
    assert int(done.stdout) < 0.6e9


def test_quickstart_is_offered_with_its_options(run: Callable[..., tuple[int, str, str]]) -> None:
    """Catches the command line and the quickstart drifting apart."""
    import inspect as introspection

    from hf_megatron.commands.quickstart import quickstart

    assert {"tp_size", "output", "overwrite", "say"} <= set(introspection.signature(quickstart).parameters)
    code, out, _ = run("quickstart", "--help")
    assert code == 0
    assert "--tp" in out
    assert "--output" in out


def test_version(run: Callable[..., tuple[int, str, str]]) -> None:
    """Catches a version that is another than the package's, or that takes a subcommand to ask for."""
    assert run("--version") == (0, f"hf-megatron {hf_megatron.__version__}\n", "")
