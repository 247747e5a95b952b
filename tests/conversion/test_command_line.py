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

from hf_megatron.commands import cli
from hf_megatron_conversion import convert, converter, inspection
from tests.conversion.checkpoints import read_config, read_tensors, save_stock, write_hub
from tests.conversion.commands import Commands
from tests.repository import environment


def test_convert(tied: Path, tmp_path: Path, command: Commands) -> None:
    """Catches keys that scripts rely on gone missing, or wrong."""
    code, result, _ = command.run("convert", tied, tmp_path / "tp", "--to", "tp", "--tp", "4", "--verify")
    assert code == 0
    expected: dict[str, Any] = {
        "source": str(tied),
        "destination": str(tmp_path / "tp"),
        "tensors": len(read_tensors(tied)),
    }
    expected |= {"bytes_written": sum(path.stat().st_size for path in (tmp_path / "tp").iterdir()), "verified": True}
    assert {key: result[key] for key in expected} == expected
    assert result["seconds"] > 0
    assert result["peak_rss_bytes"] > 10**7
    code, result, _ = command.run("convert", tmp_path / "tp", tmp_path / "hub", "--to", "hub", "--dry-run")
    assert (code, result["verified"], (tmp_path / "hub").exists()) == (0, None, False)


@pytest.mark.parametrize(("to", "tp_size", "model_type"), [("hub", 1, "gpt2"), ("tp", 3, "megatron_gpt2")])
def test_inspect(to: str, tp_size: int, model_type: str, untied: Path, tmp_path: Path, command: Commands) -> None:
    """Catches a wrong description; parameters are counted from the stock file."""
    path = untied
    if to == "tp":
        path = tmp_path / "tp"
        convert(untied, path, to="tp", tp_size=tp_size)
    tensors = read_tensors(untied)
    parameters = sum(tensor.numel() for tensor in tensors.values())
    code, result, _ = command.run("inspect", path)
    assert code == 0
    expected: dict[str, Any] = {
        "format": to,
        "container": None,
        "core_version": None,
        "architecture": "gpt2",
        "model_class": "GPT2LMHeadModel",
        "model_type": model_type,
    }
    expected |= {"layernorm_placement": "pre", "tp_size": tp_size, "num_parameters": parameters, "dtype": "float32"}
    expected |= {"num_tensors": len(tensors), "bytes": 4 * parameters, "vocab_size": 131}
    assert result == {**expected, "checkpoint_version": None, "dropped": []}


def test_verify(tied: Path, untied: Path, command: Commands) -> None:
    """Catches exit code 0 for models that differ."""
    code, result, _ = command.run("verify", tied, tied)
    expected = {"equal": True, "mismatched": [], "max_abs_diff": 0.0, "max_logit_diff": None}
    assert (code, {key: result[key] for key in expected}) == (0, expected)
    code, result, _ = command.run("verify", tied, untied)
    assert (code, result["equal"]) == (1, False)
    assert "lm_head.weight" in result["mismatched"]


def test_failed_verification_is_exit_code_1(
    tied: Path, tmp_path: Path, command: Commands, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a failed --verify that a script takes for success."""
    monkeypatch.setattr(converter, "compare", lambda *_: ({"transformer.wte.weight": "differs"}, 1.0))
    code, result, _ = command.run("convert", tied, tmp_path / "tp", "--to", "tp", "--tp", "2", "--verify")
    assert (code, result["verified"]) == (1, False)
    assert not (tmp_path / "tp").exists()


def test_tables_for_people(tied: Path, tmp_path: Path, command: Commands) -> None:
    """Catches results on stderr, where `| less` does not see them, and long lists that push the answer off screen."""
    code, out, err = command.show("inspect", tied)
    assert (code, err) == (0, "")
    assert "64,464" in out
    code, out, _ = command.show("verify", tied, save_stock(tmp_path / "stock", n_layer=3))
    assert (code, "Not the same model" in out) == (1, True)
    code, out, _ = command.show("convert", tied, tmp_path / "tp", "--to", "tp", "--tp", "2", "--dry-run")
    assert (code, "dry run" in out) == (0, True)


def _config(**entries: object) -> Callable[[Path], object]:
    return lambda source: (source / "config.json").write_text(json.dumps({**read_config(source), **entries}))


def _change_tensors(source: Path) -> None:
    tensors = read_tensors(source)
    del tensors["transformer.ln_f.bias"]
    tensors["transformer.h.7.unheard_of"] = tensors["transformer.ln_f.weight"].clone()
    tensors["transformer.wpe.weight"] = tensors["transformer.wpe.weight"][:5].clone()
    write_hub(source, tensors, read_config(source))


@pytest.mark.parametrize(
    ("damage", "tp_size", "told"),
    [
        (lambda source: os.truncate(source / "model.safetensors", 200_000), 2, ["truncated"]),
        (lambda source: (source / "config.json").write_text("{"), 2, ["config.json", "JSON"]),
        (_config(model_type="llama"), 2, ["llama", "gpt2"]),
        (_config(n_head=25, n_embd=50), 26, ["num_attention_heads=25", "tp_size=26", "25 or less"]),
        *(
            (_config(**{name: value}), 2, [name])
            for name, value in (
                ("layer_norm_epsilon", -1),
                ("layer_norm_epsilon", "small"),
                ("attn_pdrop", 7),
                ("quantization_config", {"quant_method": "gptq"}),
            )
        ),
        (_change_tensors, 2, ["transformer.ln_f.bias", "transformer.h.7.unheard_of", "[5, 48]", "[32, 48]"]),
        # Before a download, or hours of reading, what the configuration alone decides.
        (lambda source: (source / "model.safetensors").unlink(), 13, ["num_attention_heads=12"]),
    ],
    ids=["truncated", "no json", "llama", "25 heads", "eps", "eps word", "dropout", "quantized", "tensors", "degree"],
)
def test_bad_source(
    damage: Callable[[Path], object], tp_size: int, told: list[str], tied: Path, tmp_path: Path, command: Commands
) -> None:
    """Catches a bad checkpoint converted all the same, a traceback, or a message that does not say what to do."""
    shutil.copytree(tied, tmp_path / "source")
    damage(tmp_path / "source")
    message = command.refusal("convert", tmp_path / "source", tmp_path / "tp", "--to", "tp", "--tp", tp_size)
    assert [part for part in told if part not in message] == []
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


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
def test_bad_option(arguments: list[str], told: str, tied: Path, tmp_path: Path, command: Commands) -> None:
    """Catches an option that is ignored, or refused without a word on which."""
    assert told in command.refusal("convert", tied, tmp_path / "out", *arguments)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("arguments", [["inspect"], ["verify", "."]])
@pytest.mark.parametrize("path", ["absent/directory/here", "./absent", "nobody/nothing", "not a name"])
def test_absent_source(arguments: list[str], path: str, command: Commands) -> None:
    """Catches a traceback from the Hub's client where there is neither a directory nor a network."""
    code, result, err = command.run(arguments[0], path, *arguments[1:])
    assert (code, result["error_type"]) == (2, "CheckpointFormatError")
    assert path in err


def test_an_empty_dropout_is_no_reason_to_refuse(tied: Path, tmp_path: Path) -> None:
    """Catches a conversion that fails because its model card wants a number."""
    source = write_hub(tmp_path / "source", read_tensors(tied), {**read_config(tied), "resid_pdrop": None})
    convert(source, tmp_path / "tp", to="tp", tp_size=2)


def test_overflow_is_refused(tied: Path, tmp_path: Path, command: Commands) -> None:
    """Catches weights that silently become infinite."""
    tensors = read_tensors(tied)
    tensors["transformer.ln_f.weight"][0] = 1e6
    source = write_hub(tmp_path / "source", tensors, read_config(tied))
    message = command.refusal("convert", source, tmp_path / "hub", "--to", "hub", "--dtype", "float16")
    assert "transformer.ln_f.weight holds 1e+06" in message
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_defects_are_not_dressed_up(tied: Path, command: Commands, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a defect of ours reported as a bad checkpoint; and that its traceback can be had."""
    monkeypatch.setattr(inspection, "read_model", lambda *_: 1 / 0)
    code, _, err = command.show("inspect", tied)
    assert (code, "ZeroDivisionError" in err, "HF_MEGATRON_DEBUG" in err) == (2, True, True)
    monkeypatch.setenv("HF_MEGATRON_DEBUG", "1")
    with pytest.raises(ZeroDivisionError):
        cli.run(["inspect", str(tied)])


@pytest.mark.parametrize("arguments", ["--help", "inspect {tied}", "plan gpt2-8.3b --tp 8 --gpus 64"])
def test_a_look_imports_nothing_heavy(arguments: str, tied: Path) -> None:
    """Catches an import that makes `--help`, shell completion, a look at a header or a plan wait for seconds."""
    heavy = {"datasets", "matplotlib", "numpy", "safetensors", "torch", "transformers"}
    watched = "import sys; from hf_megatron.commands.cli import run; code = run(sys.argv[1:]); "
    watched += f"sys.exit(code or bool({heavy} & set(sys.modules)))"
    process = [sys.executable, "-c", watched, *arguments.format(tied=tied).split()]
    assert subprocess.run(process, env=environment(), check=False, stdout=subprocess.DEVNULL).returncode == 0
