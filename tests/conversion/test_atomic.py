"""A destination is complete or not there, whatever happens to the process or the disk."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from hf_megatron.checkpoint import AtomicDirectory, renaming
from hf_megatron.errors import DestinationError
from hf_megatron_conversion import convert, files
from tests.conversion.checkpoints import directory_bytes, hub_bytes
from tests.repository import environment

_CHILD = "import sys; from hf_megatron.commands.cli import main; main()"

# The command line, which sends itself a signal once it has read and written so many bytes.
_KILLED = """
import os, signal, sys
from hf_megatron.commands import cli, console

limit, sent = int(sys.argv.pop()), int(sys.argv.pop())

class Killer:
    def __init__(self, bars): self.left = limit
    def begin(self, task, total_bytes): pass
    def advance(self, num_bytes):
        self.left -= num_bytes
        if self.left < 0:
            os.kill(os.getpid(), sent)

console.ProgressBar = Killer
cli.main()
"""


def _convert_until(sent: int, num_bytes: int, source: Path, destination: Path) -> subprocess.CompletedProcess[str]:
    command = ["convert", str(source), str(destination), "--to", "tp", "--tp", "4", "--overwrite", "--json"]
    return subprocess.run(
        [sys.executable, "-c", _KILLED, *command, str(sent), str(num_bytes)],
        env=environment(HF_MEGATRON_REGISTER="0"),
        check=False,
        capture_output=True,
        text=True,
    )


@pytest.fixture
def old(untied: Path, tmp_path: Path) -> tuple[Path, dict[str, bytes]]:
    """A destination that is there already, and what it holds."""
    convert(untied, tmp_path / "tp", to="tp", tp_size=2)
    return tmp_path / "tp", directory_bytes(tmp_path / "tp")


@pytest.mark.parametrize("num_bytes", [0, 100_000, 260_000])
def test_kill_leaves_nothing_loadable(num_bytes: int, tied: Path, tmp_path: Path) -> None:
    """Catches writing in place: after kill -9 a directory with some of its shards would load, and compute nonsense."""
    destination = tmp_path / "tp"
    assert _convert_until(signal.SIGKILL, num_bytes, tied, destination).returncode == -signal.SIGKILL
    (left,) = tmp_path.iterdir()
    assert left.name == ".tp.incomplete"
    assert not (left / "tp/config.json").exists()
    convert(tied, destination, to="tp", tp_size=4)  # which clears away what the killed one left
    assert list(tmp_path.iterdir()) == [destination]


def test_kill_leaves_the_old_destination(tied: Path, old: tuple[Path, dict[str, bytes]]) -> None:
    """Catches an --overwrite that removes first and writes then."""
    destination, before = old
    assert _convert_until(signal.SIGKILL, 100_000, tied, destination).returncode == -signal.SIGKILL
    assert directory_bytes(destination) == before


def test_terminate_cleans_up(tied: Path, tmp_path: Path) -> None:
    """Catches hidden directories left by a scheduler's SIGTERM, for which there is time to clean up."""
    done = _convert_until(signal.SIGTERM, 1000, tied, tmp_path / "tp")
    assert (done.returncode, "Interrupted" in done.stderr) == (130, True)
    assert '"error": "Interrupted."' in done.stdout
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("where", ["writing", "renaming"])
def test_an_error_restores_everything(
    where: str, tied: Path, old: tuple[Path, dict[str, bytes]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a failed --overwrite that loses the old directory or leaves it aside, and new parents left behind."""
    destination, before = old
    rename = Path.rename

    def fail(path: object, *arguments: Any) -> Any:
        if isinstance(path, Path) and (path.parent == tmp_path or path.suffix == ".replaced"):
            return rename(path, *arguments)  # of the two renames the first one, and its undoing
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(renaming, "exchange", lambda *_: False)

    place: Any = files if where == "writing" else Path
    monkeypatch.setattr(place, "_write" if where == "writing" else "rename", fail)
    for target in (destination, tmp_path / "new/parents/tp"):
        with pytest.raises(DestinationError, match="Input/output error"):
            convert(tied, target, to="tp", tp_size=2, overwrite=True)
    assert directory_bytes(destination) == before
    assert list(tmp_path.iterdir()) == [destination]


def test_killed_between_the_renames_is_repaired(tied: Path, old: tuple[Path, dict[str, bytes]], tmp_path: Path) -> None:
    """Catches an old directory that stays hidden for ever, or is deleted while it is the only one there is."""
    destination, before = old
    assert _convert_until(signal.SIGKILL, 100_000, tied, destination).returncode == -signal.SIGKILL
    destination.rename(tmp_path / ".tp.incomplete/tp.replaced")  # without an exchange, the first of two renames
    with pytest.raises(DestinationError, match="exists"):
        convert(tied, destination, to="tp", tp_size=2)
    assert directory_bytes(destination) == before
    assert list(tmp_path.iterdir()) == [destination]


@pytest.mark.parametrize(("to", "ranks"), [("tp", "shard-*"), ("megatron-lm", "release/*")])
def test_overwrite_replaces_the_whole_directory(to: Any, ranks: str, tied: Path, tmp_path: Path) -> None:
    """Catches stale shards of another degree left beside new ones, which stock transformers mixes in silently."""
    destination = tmp_path / "out"
    convert(tied, destination, to=to, tp_size=4)
    with pytest.raises(DestinationError, match="exists"):
        convert(tied, destination, to=to, tp_size=2)
    convert(tied, destination, to=to, tp_size=2, overwrite=True)
    assert len(list(destination.glob(ranks))) == 2
    convert(destination, tmp_path / "hub", to="hub")
    assert hub_bytes(tmp_path / "hub") == hub_bytes(tied)


def test_overwrite_deletes_no_more_than_a_checkpoint(tied: Path, tmp_path: Path) -> None:
    """Catches --overwrite aimed at a home or project directory by mistake."""
    (tmp_path / "project/src").mkdir(parents=True)
    (tmp_path / "file").write_text("text")
    for name, told in (("project", "src"), ("file", "not a directory")):
        with pytest.raises(DestinationError, match=told):
            convert(tied, tmp_path / name, to="hub", overwrite=True)
    assert (tmp_path / "project/src").is_dir()
    assert (tmp_path / "file").read_text() == "text"


@pytest.mark.parametrize("destination", ["source", "source/inside", ".", "link/inside", "source/../source"])
def test_overlap_is_refused(destination: str, tied: Path, tmp_path: Path) -> None:
    """Catches a source destroyed by its own conversion, also through links and dots, or a refusal that says not why."""
    source = tmp_path / "source"
    shutil.copytree(tied, source)
    (tmp_path / "link").symlink_to(source)
    before = directory_bytes(source)
    with pytest.raises(DestinationError, match="overlap"):
        convert(source, tmp_path / destination, to="hub", overwrite=True)
    assert directory_bytes(source) == before


def _tmpfs(options: str) -> list[str]:
    """A shell in a mount namespace of its own, with a small file system at $1, that runs the rest and lists $1."""
    script = f'mount -t tmpfs -o {options} none "$1" && d="$1" && shift && "$@"; code=$?; ls -A "$d" >&2; exit $code'
    return ["unshare", "-rm", "sh", "-c", script, "sh"]


def _can_mount() -> bool:
    command = [*_tmpfs("size=64k"), "/mnt", "true"]
    return bool(shutil.which("unshare")) and subprocess.run(command, check=False, capture_output=True).returncode == 0


# Two ways in which a file system is full: by its bytes, which is known beforehand, and by its number of files, which is
# only found out while writing. The limit on the size of a file needs no privileges.
_FULL_DISKS: dict[str, list[str]] = {"limit": []}
if _can_mount():
    _FULL_DISKS |= {"bytes": _tmpfs("size=128k"), "files": _tmpfs("size=8m,nr_inodes=4")}


@pytest.mark.parametrize("full", _FULL_DISKS)
def test_full_disk(full: str, tied: Path, tmp_path: Path) -> None:
    """Catches a traceback, a half-written directory, or an exit code of 0 on a full disk."""
    target = tmp_path / "disk"
    target.mkdir()
    prefix = [*_FULL_DISKS[full], str(target)] if _FULL_DISKS[full] else []
    limit = "" if prefix else "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000)); "
    command = [sys.executable, "-c", limit + _CHILD, "convert", str(tied), str(target / "tp"), "--to", "tp", "--tp=2"]
    done = subprocess.run([*prefix, *command], env=environment(), check=False, capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    assert "space" in done.stderr
    assert "Traceback" not in done.stderr
    # After the message comes, from the shell, the list of what is left on the small file system: nothing.
    assert ".incomplete" not in done.stderr
    assert done.stderr.count("\n") == 1
    assert list(target.iterdir()) == []


def test_space_is_checked_before_writing(tied: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches hours of writing that cannot succeed."""
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    monkeypatch.setattr(files, "_write", None)
    with pytest.raises(DestinationError, match="1,000 bytes of free space"):
        convert(tied, tmp_path / "tp", to="tp", tp_size=2)
    assert list(tmp_path.iterdir()) == []


def test_dry_run_writes_nothing_and_predicts_every_byte(stock: Path, tmp_path: Path) -> None:
    """Catches an estimate: sizes, index and model card included, what is announced is what is written."""
    hub = {"to": "hub", "max_shard_size": "100KB", "verify": True}
    megatron_lm = {"to": "megatron-lm", "tp_size": 2}
    cases = [{"to": "tp", "tp_size": 3}, hub, {"to": "hub", "model_type": "megatron"}, megatron_lm]
    for number, options in enumerate(cases):
        destination = tmp_path / str(number)
        planned = convert(stock, destination, dry_run=True, **options)  # type: ignore[arg-type]
        assert not destination.exists()
        assert planned.verified is None
        written = convert(stock, destination, **options)  # type: ignore[arg-type]
        sizes = {
            str(path.relative_to(destination)): path.stat().st_size for path in destination.rglob("*") if path.is_file()
        }
        assert planned.files == written.files == sizes
        assert planned.bytes_written == sum(sizes.values())


def _in_mount(script: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Run a shell script in a mount namespace of its own, with the command line as ``$convert``."""
    script = f'convert() {{ "{sys.executable}" -c "{_CHILD}" convert "$@" || exit 7; }}\n{script}'
    command = ["unshare", "-rm", "sh", "-ec", script, "sh", *map(str, arguments)]
    return subprocess.run(command, env=environment(), check=False, capture_output=True, text=True)


def _can_overlay(directory: Path) -> bool:
    for name in ("lower", "upper", "work", "merged"):
        (directory / name).mkdir(parents=True)
    mount = 'mount -t overlay -o "userxattr,lowerdir=$1/lower,upperdir=$1/upper,workdir=$1/work" none "$1/merged"'
    return _can_mount() and _in_mount(mount, directory).returncode == 0


@pytest.mark.skipif(not _can_mount(), reason="needs a mount namespace")
def test_a_mount_point_is_overwritten(tied: Path, untied: Path, tmp_path: Path) -> None:
    """Catches --overwrite that fails after all the work because a mount point cannot be renamed (EBUSY)."""
    (tmp_path / "tp").mkdir()
    script = """
    mount -t tmpfs -o size=8m none "$1/tp"
    echo mine > "$1/tp/notes"
    convert "$2" "$1/tp" --to tp --tp 4 --overwrite
    convert "$3" "$1/tp" --to megatron-lm --tp 2 --overwrite
    convert "$2" "$1/tp" --to tp --tp 3 --overwrite
    cp -r "$1/tp" "$1/copy"
    """
    done = _in_mount(script, tmp_path, tied, untied)
    assert done.returncode == 0, done.stderr
    convert(tied, tmp_path / "expected", to="tp", tp_size=3)
    assert directory_bytes(tmp_path / "copy") == directory_bytes(tmp_path / "expected")
    assert list((tmp_path / "tp").iterdir()) == []  # under the mount


def test_a_lower_layer_of_an_overlay_is_overwritten(tied: Path, untied: Path, tmp_path: Path) -> None:
    """Catches --overwrite that fails after all the work because a directory of an image cannot be renamed (EXDEV)."""
    if not _can_overlay(tmp_path / "layers"):
        pytest.skip("needs overlays in a mount namespace")
    convert(untied, tmp_path / "layers/lower/out", to="megatron-lm", tp_size=2)
    script = """
    mount -t overlay -o "userxattr,lowerdir=$1/lower,upperdir=$1/upper,workdir=$1/work" none "$1/merged"
    convert "$2" "$1/merged/out" --to tp --tp 3 --overwrite
    cp -r "$1/merged" "$1/copy"
    """
    done = _in_mount(script, tmp_path / "layers", tied)
    assert done.returncode == 0, done.stderr
    convert(tied, tmp_path / "expected", to="tp", tp_size=3)
    assert [path.name for path in (tmp_path / "layers/copy").iterdir()] == ["out"]
    assert directory_bytes(tmp_path / "layers/copy/out") == directory_bytes(tmp_path / "expected")


@pytest.mark.parametrize("step", range(12))
def test_file_by_file_the_old_or_the_new_comes_of_it(
    step: int, tied: Path, old: tuple[Path, dict[str, bytes]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a mixture of two checkpoints where files are moved one by one and the process is killed meanwhile."""
    destination, before = old
    convert(tied, tmp_path / "new", to="tp", tp_size=3)
    after = directory_bytes(tmp_path / "new")
    monkeypatch.setattr("os.path.ismount", lambda path: path == destination)
    moves: list[Path] = []
    move = renaming.move

    def killed(path: Path, target: Path) -> None:
        if len(moves) == step:
            raise SystemExit
        moves.append(path)
        move(path, target)

    monkeypatch.setattr(renaming, "move", killed)
    monkeypatch.setattr(AtomicDirectory, "__exit__", lambda self, *_: self._lock.release())  # a process that is gone
    with pytest.raises(SystemExit):
        convert(tied, destination, to="tp", tp_size=3, overwrite=True)
    monkeypatch.undo()
    monkeypatch.setattr("os.path.ismount", lambda path: path == destination)
    found = {path.name for path in destination.iterdir() if not path.name.startswith(".")}
    assert "config.json" not in found or found in (set(before), set(after)), "half a checkpoint that loads"
    with AtomicDirectory(destination) as directory:
        assert directory.container.parent == destination
    assert directory_bytes(destination) == (before if len(moves) < len(before) else after)
