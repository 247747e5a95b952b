"""A source distribution is enough to test and to rebuild the package from."""

import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

import hf_megatron
from tests.repository import ROOT, repository_files

# Git's own files, and what a checkout has for its hosting only.
_NOT_SHIPPED = {".gitignore"}


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The source distribution of the working tree, built in a copy of it and unpacked."""
    scratch = tmp_path_factory.mktemp("sdist")
    for path in repository_files():
        copy = scratch / "tree" / path.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(path, copy)
    command = [sys.executable, "-m", "build", "--sdist", "--no-isolation", "--outdir", str(scratch), "tree"]
    done = subprocess.run(command, cwd=scratch, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    (archive,) = scratch.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        tar.extractall(scratch / "unpacked", filter="data")
    (directory,) = (scratch / "unpacked").iterdir()
    return directory


def test_it_has_every_file_and_the_version_of_the_code(unpacked: Path) -> None:
    """Catches a folder that MANIFEST.in does not know, as of documents or tests, and metadata with another version."""
    expected = {str(path.relative_to(ROOT)) for path in repository_files()} - _NOT_SHIPPED
    assert sorted(name for name in expected if not (unpacked / name).is_file()) == []
    assert unpacked.name == f"hf_megatron-{hf_megatron.__version__}"
    assert f"\nVersion: {hf_megatron.__version__}\n" in (unpacked / "PKG-INFO").read_text(encoding="utf-8")


def test_its_tests_run(unpacked: Path) -> None:
    """Catches tests that need a file of the checkout which is not shipped."""
    command = [sys.executable, "-m", "pytest", "-q", "-m", "not slow", "-p", "no:cacheprovider", "tests/partition"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    done = subprocess.run(command, cwd=unpacked, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:]
    assert " passed" in done.stdout
