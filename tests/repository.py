"""What the tests about the repository itself share: where it is and which files belong to it."""

import os
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def repository_files() -> list[Path]:
    """Every file that is or could be committed, by absolute path: tracked ones, and new ones git does not ignore."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout.split("\0")
    return [ROOT / name for name in sorted(set(names)) if name and (ROOT / name).is_file()]


def environment(**changes: str) -> dict[str, str]:
    """For another process: this one's environment, in which the repository's own code is what is imported."""
    return {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'conversion'}", **changes}
