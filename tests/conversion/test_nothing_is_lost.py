"""What is converted is what was planned, is what arrives, and damage on either side is noticed."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import stat
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from hf_megatron.checkpoint import itemsize
from hf_megatron.errors import (
    CheckpointError,
    CheckpointFormatError,
    CheckpointIncompleteError,
    DestinationError,
)
from hf_megatron.partition import Box
from hf_megatron_conversion import convert, files, verify
from hf_megatron_conversion.tensors import bounded
from tests.conversion.checkpoints import (
    directory_bytes,
    flipped,
    hub_bytes,
    read_config,
    read_tensors,
    save_stock,
    write_hub,
)
from tests.conversion.commands import Commands

WEIGHT = "transformer.h.0.attn.c_attn.weight"


@pytest.mark.parametrize(("to", "tp_size"), [("hub", None), ("tp", 4), ("megatron-lm", 2)])
def test_checksums_are_those_of_the_files(to: Any, tp_size: int | None, source: Path, tmp_path: Path) -> None:
    """Catches checksums of something else than the bytes on the disk, in the result and for sha256sum."""
    (source / "vocab.json").write_text('{"a": 0}')
    result = convert(source, tmp_path / "out", to=to, tp_size=tp_size)
    for directory, digests in ((tmp_path / "out", result.sha256), (source, result.source_sha256)):
        expected = {
            path.relative_to(directory).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in directory.rglob("*")
            if path.is_file() and path.name != "SHA256SUMS"
        }
        assert digests == expected
    subprocess.run(["sha256sum", "--strict", "-c", "SHA256SUMS"], cwd=tmp_path / "out", check=True, capture_output=True)
    lines = (tmp_path / "out/SHA256SUMS").read_text().splitlines()
    assert len(lines) == len(result.sha256)


def test_a_flipped_bit_of_an_archive_is_found(tied: Path, tmp_path: Path) -> None:
    """Catches the CRCs of .pt files that are written and never read."""
    source = tmp_path / "m"
    convert(tied, source, to="megatron-lm", tp_size=2)
    (source / "SHA256SUMS").unlink()
    file = source / "release/mp_rank_01/model_optim_rng.pt"
    size = file.stat().st_size
    for position in (size // 3, size // 2, 2 * size // 3):
        whole = file.read_bytes()
        file.write_bytes(flipped(file, position))
        with pytest.raises(CheckpointIncompleteError, match=r"mp_rank_01.*CRC-32"):
            convert(source, tmp_path / "hub", to="hub")
        with pytest.raises(CheckpointIncompleteError, match=r"mp_rank_01.*CRC-32"):
            verify(tied, source)
        file.write_bytes(whole)
    assert not (tmp_path / "hub").exists()
    assert verify(tied, source).equal


def test_an_archive_without_checksums_is_refused(source: Path, tmp_path: Path) -> None:
    """Catches a file that was saved with CRCs switched off called damaged, or taken as it is without a word."""
    tensors = read_tensors(source)
    (source / "model.safetensors").unlink()
    has_crcs = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(tensors, source / "pytorch_model.bin")
    finally:
        torch.serialization.set_crc32_options(has_crcs)
    with pytest.raises(CheckpointError, match=r"no checksums.*set_crc32_options\(True\)|Bad CRC-32"):
        convert(source, tmp_path / "hub", to="hub")
    torch.save(tensors, source / "pytorch_model.bin")
    convert(source, tmp_path / "hub", to="hub")
    assert set(hub_bytes(tmp_path / "hub")) == set(tensors)


def test_a_flipped_bit_of_what_was_converted_is_found(tied: Path, tmp_path: Path, command: Commands) -> None:
    """Catches checksums that are written and never read again."""
    source = tmp_path / "tp"
    convert(tied, source, to="tp", tp_size=2)
    shard = source / "shard-00001-model-00001-of-00001.safetensors"
    shard.write_bytes(flipped(shard))
    message = command.refusal("convert", source, tmp_path / "hub", "--to", "hub")
    assert shard.name in message
    assert "delete SHA256SUMS" in message
    code, result, _ = command.run("verify", source, source)  # the same model twice, and damaged
    assert (code, result["equal"], result["damaged"]) == (1, True, [str(shard)])
    (source / "SHA256SUMS").unlink()
    assert command.run("convert", source, tmp_path / "hub", "--to", "hub")[0] == 0


def test_a_save_into_a_converted_directory_takes_its_checksums_away(tied: Path, tmp_path: Path) -> None:
    """Catches a fine-tuned model that is called damaged because checksums of another one lie beside it."""
    import hf_megatron

    convert(tied, tmp_path / "hub", to="hub")
    hf_megatron.MegatronGPT2LMHeadModel.from_pretrained(tmp_path / "hub").save_pretrained(tmp_path / "hub")
    assert not (tmp_path / "hub/SHA256SUMS").exists()
    convert(tmp_path / "hub", tmp_path / "tp", to="tp", tp_size=2)


# ---------------------------------------------------------------------- what is not the source's to give


@pytest.mark.parametrize("name", ["LICENSE", "README.md", "tokenizer.json", "generation_config.json"])
def test_a_link_out_of_the_source_is_left_out(
    name: str, source: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Catches `LICENSE -> ~/.ssh/id_rsa`, copied into a directory that is uploaded next."""
    (tmp_path / "secret").write_text('{"key": "secret"}')
    (source / name).unlink(missing_ok=True)
    (source / name).symlink_to(tmp_path / "secret")
    convert(source, tmp_path / "tp", to="tp", tp_size=2)
    assert f"{name} is a link to {tmp_path / 'secret'}" in caplog.text
    assert not [path for path in (tmp_path / "tp").iterdir() if b"secret" in path.read_bytes()]


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_weights_behind_a_link_out_of_the_source_are_refused(name: str, source: Path, tmp_path: Path) -> None:
    """Catches entries of another directory's configuration in the result."""
    (source / name).rename(tmp_path / name)
    (source / name).symlink_to(tmp_path / name)
    with pytest.raises(CheckpointFormatError, match=f"{name} is a link to"):
        convert(source, tmp_path / "tp", to="tp", tp_size=2)
    (source / name).unlink()
    (source / "files").mkdir()
    (tmp_path / name).rename(source / "files" / name)
    (source / name).symlink_to(Path("files") / name)
    convert(source, tmp_path / "tp", to="tp", tp_size=2)


@pytest.mark.parametrize(("mode", "umask", "expected"), [(0o600, 0o022, 0o600), (0o666, 0o027, 0o640)])
def test_permissions_are_not_widened(mode: int, umask: int, expected: int, source: Path, tmp_path: Path) -> None:
    """Catches weights that only their owner may read, converted for everybody, and a umask that is ignored."""
    (source / "tokenizer.json").write_text('{"model": {"vocab": {"a": 0}}}')
    for path in source.iterdir():
        path.chmod(mode)
    before = os.umask(umask)
    try:
        convert(source, tmp_path / "tp", to="tp", tp_size=2)
        convert(source, tmp_path / "m", to="megatron-lm", tp_size=2)
        convert(source, tmp_path / "copy", to="hub")
    finally:
        os.umask(before)
    for name in ("tp/shard-00001-model-00001-of-00001.safetensors", "copy/model.safetensors", "copy/tokenizer.json"):
        assert stat.S_IMODE((tmp_path / name).stat().st_mode) == expected, name
    assert stat.S_IMODE((tmp_path / "m/release/mp_rank_00/model_optim_rng.pt").stat().st_mode) == expected
    assert stat.S_IMODE((tmp_path / "tp/config.json").stat().st_mode) == 0o666 & ~umask


def test_code_of_the_source_is_not_named_by_the_result(
    source: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Catches an auto_map, by which trust_remote_code runs another repository's code."""
    code = {
        "auto_map": {"AutoModel": "evil--code"},
        "custom_pipelines": {"x": {"impl": "evil--code.X", "pt": ["AutoModel"]}},
    }
    write_hub(source, read_tensors(source), {**read_config(source), **code})
    convert(source, tmp_path / "hub", to="hub")
    assert not {"auto_map", "custom_pipelines"} & set(read_config(tmp_path / "hub"))
    assert "auto_map is left out of config.json" in caplog.text
    assert "custom_pipelines is left out of config.json" in caplog.text


_LENGTH = 1000000000000000019884624838656  # as transformers writes it


@pytest.mark.parametrize("auto_map", [{"AutoTokenizer": [None, "evil--code.T"]}, ["evil--code.T", None], None])
@pytest.mark.parametrize("to", ["hub", "tp", "megatron-lm"])
@pytest.mark.parametrize("is_own", [True, False])
def test_code_is_not_named_by_the_tokenizer(
    is_own: bool, to: Any, auto_map: object, source: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Catches an auto_map that AutoTokenizer follows, in its two spellings, and what is lost with it."""
    directory = source if is_own else tmp_path / "tokenizer"
    directory.mkdir(exist_ok=True)
    content = {"tokenizer_class": "GPT2Tokenizer", "model_max_length": _LENGTH, "x": [float("inf"), "\ud800 \u00e9"]}
    config = directory / "tokenizer_config.json"
    config.write_text(json.dumps({**content, "auto_map": auto_map}))
    config.chmod(0o600)
    convert(
        source, tmp_path / "out", to=to, tp_size=None if to == "hub" else 2, tokenizer=None if is_own else directory
    )
    result = tmp_path / "out/tokenizer_config.json"
    assert json.loads(result.read_text()) == content
    assert stat.S_IMODE(result.stat().st_mode) == 0o600
    assert "auto_map is left out of tokenizer_config.json" in caplog.text


def test_a_tokenizer_that_names_no_code_is_copied(source: Path, tmp_path: Path) -> None:
    """Catches settings that are written in another way, for no reason."""
    text = f'{{"b": 1e400,  "a": {{"auto_map": 0}}, "model_max_length": {_LENGTH}}}\r\n'
    (source / "tokenizer_config.json").write_bytes(text.encode())
    convert(source, tmp_path / "out", to="hub")
    assert (tmp_path / "out/tokenizer_config.json").read_bytes() == text.encode()


_UNREADABLE = ["{", '{"auto_map": 1}\xff', "[" * 10**5, f'{{"x": {"9" * 5000}}}', f'{{"x":{" " * 2**24}1}}']


@pytest.mark.parametrize("text", _UNREADABLE, ids=["cut off", "not UTF-8", "too deep", "too many digits", "too long"])
def test_a_tokenizer_of_which_code_cannot_be_seen_is_refused(text: str, source: Path, tmp_path: Path) -> None:
    """Catches an auto_map that is overlooked because its file is read otherwise than by transformers."""
    (source / "tokenizer_config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(CheckpointFormatError, match=r"tokenizer_config\.json cannot be read"):
        convert(source, tmp_path / "out", to="hub")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_escape_sequences_do_not_reach_the_terminal(source: Path, tmp_path: Path, command: Commands) -> None:
    """Catches names in files that move the cursor, change colours or the title, or hide what follows."""
    evil = "\x1b]0;pwned\x07\x9b2J\u202e\x00"
    shown = r"\x1b]0;pwned\x07\x9b2J\u202e"
    tensors = read_tensors(source)
    config = read_config(source)
    index = {"weight_map": {name: f"model{evil}.safetensors" for name in tensors}}
    outputs = []
    write_hub(source, {**tensors, f"a{evil}": torch.ones(1)}, config)
    outputs.append(command.show("inspect", source))
    write_hub(source, tensors, {**config, "architectures": [f"GPT2{evil}"]})
    outputs.append(command.show("inspect", source))
    (source / "model.safetensors").unlink()
    (source / "model.safetensors.index.json").write_text(json.dumps(index))
    outputs.append(command.show("inspect", source))
    source.rename(tmp_path / f"source{evil[:-1]}")
    outputs.append(command.show("inspect", tmp_path / f"source{evil[:-1]}"))
    outputs.append(command.show("inspect", "--bogus", f"source{evil[:-1]}"))
    outputs.append(command.show("inspect", f"--{evil[:-1]}"))
    for code, out, err in outputs:
        assert code == 2
        assert not {"\x1b", "\x07", "\x9b", "\u202e", "\x00"} & set(out + err)
    assert sum(shown in err.replace("\n", "") for _, _, err in outputs) >= 4


# ---------------------------------------------------------------------- before the work


def test_nan_is_named_and_no_difference(
    source: Path, tmp_path: Path, command: Commands, caplog: pytest.LogCaptureFixture
) -> None:
    """Catches a bit-exact copy of a checkpoint with NaN in it that --verify calls different, and does not say where."""
    tensors = read_tensors(source)
    tensors[WEIGHT][3, 5] = float("nan")
    tensors["transformer.wpe.weight"][0, :2] = float("inf")
    write_hub(source, tensors, read_config(source))
    for to in ("tp", "megatron-lm"):
        code, result, _ = command.run("convert", source, tmp_path / to, "--to", to, "--tp", 2, "--verify")
        assert (code, result["verified"]) == (0, True)
    assert f"{WEIGHT} holds 1 values that are NaN or infinite" in caplog.text
    assert "transformer.wpe.weight holds 2 values" in caplog.text


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--to", "hub", "--max-shard-size", "-1GB"], "max_shard_size='-1GB'"),
        (["--to", "hub", "--max-shard-size", "0"], "max_shard_size='0'"),
        (["--to", "hub", "--max-shard-size", "nan"], "max_shard_size='nan'"),
        (["--to", "hub", "--max-shard-size", "9999999999TB"], "max_shard_size"),
        (["--to", "tp", "--tp", "-2"], "tp_size=-2"),
        (["--to", "tp", "--tp", "99999999999999999999"], "tp_size=9999"),
        (["--to", "hub", "--vocab-size", "-5"], "--vocab-size"),
        (["--to", "hub", "--max-memory", "1KB"], "max_memory=1,000"),
        (["--to", "hub", "--max-memory", "-1GB"], "max_memory='-1GB'"),
        (["--to", "hub", "--revision", "main"], "is a directory"),
    ],
)
def test_absurd_sizes_are_refused(
    arguments: list[str], told: str, source: Path, tmp_path: Path, command: Commands
) -> None:
    """Catches sizes that are accepted and mean something else, or end in a defect of ours."""
    message = command.refusal("convert", source, tmp_path / "out", *arguments)
    assert told in message
    assert "defect" not in message
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


@pytest.mark.parametrize("shape", [(2, 10**6), (1, 1, 10**5, 3), (7,), (3, 0, 5), ()])
def test_slices_are_bounded_whatever_the_shape(shape: tuple[int, ...]) -> None:
    """Catches a row that is larger than the bound and is read whole (one file of 6 KB took 11 GB), and lost ends."""
    whole = Box.whole(shape)
    parts = list(bounded(whole, "F32", 4000))
    assert sum(part.numel for part in parts) == whole.numel
    assert all(part.numel * itemsize("F32") <= 4000 for part in parts)
    order = [part.offset for part in parts]
    assert order == sorted(order)


def test_overwriting_needs_room_for_both(tied: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a check that counts on the space of what is only deleted at the end."""
    convert(tied, tmp_path / "tp", to="tp", tp_size=2)
    before = directory_bytes(tmp_path / "tp")
    usage = shutil.disk_usage(tmp_path)._replace(free=sum(map(len, before.values())) - 1)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(DestinationError, match="beside the tp that is there"):
        convert(tied, tmp_path / "tp", to="tp", tp_size=2, overwrite=True)
    assert directory_bytes(tmp_path / "tp") == before


def test_a_failing_thread_stops_the_others(tied: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches files that are written for hours after the disk was full, and errors that threads keep to themselves."""
    write, written = files._write, []

    def fail(file: Any, *arguments: Any) -> str:
        written.append(file.path)
        if file.path.startswith("shard-00001"):
            raise OSError(28, "No space left on device")
        return write(file, *arguments)

    monkeypatch.setattr(files, "_write", fail)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0})
    with pytest.raises(DestinationError, match="no space left"):
        convert(tied, tmp_path / "tp", to="tp", tp_size=12)
    assert len(written) <= 2
    assert list(tmp_path.iterdir()) == []


def test_a_revision_is_fetched_and_recorded(tied: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a --revision that some of the downloads ignore, and a card that does not say which commit it was."""
    commit = "0123456789" * 4
    snapshot = tmp_path / "models--some--gpt2/snapshots" / commit
    shutil.copytree(tied, snapshot)
    asked = []

    def snapshot_download(repository: str, *, revision: str, allow_patterns: list[str]) -> str:
        asked.append((repository, revision))
        return str(snapshot)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    convert("some/gpt2", tmp_path / "hub", to="hub", revision="v1")
    assert verify("some/gpt2", tmp_path / "hub", revision="v1").equal
    assert set(asked) == {("some/gpt2", "v1")}
    assert len(asked) == 3
    assert f"`some/gpt2` at commit `{commit}`" in (tmp_path / "hub/README.md").read_text()


def test_every_tensor_is_where_it_was(tmp_path: Path) -> None:
    """Catches files of threads mixed up: many files, many times."""
    source = save_stock(tmp_path / "stock", n_layer=6)
    convert(source, tmp_path / "many", to="hub", max_shard_size="20KB")
    convert(tmp_path / "many", tmp_path / "tp", to="tp", tp_size=12)
    convert(tmp_path / "tp", tmp_path / "back", to="hub")
    assert hub_bytes(tmp_path / "back") == hub_bytes(source)
