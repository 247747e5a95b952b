"""A reader that is fuzzed, and how one of its cases is run: what it does wrong becomes a find."""

from __future__ import annotations

import re
import shutil
import traceback
import warnings
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

from hf_megatron.checkpoint.unpickle import Global
from tests.fuzz.guard import Violation

Check = Callable[[Any, Path], bool]


class FindError(AssertionError):
    """A case that shows a bug; ``kind`` is the same for cases that show the same one."""

    def __init__(self, kind: str, details: str) -> None:
        super().__init__(f"{kind}\n{details}")
        self.kind = kind


@dataclass(frozen=True)
class Reader:
    """A reader: the strategy for its cases, the check of one, and an undamaged case.

    The check is given an empty directory to work in, and says whether the reader has accepted the case.
    """

    name: str
    cases: Callable[[], st.SearchStrategy[Any]]
    check: Check
    healthy: Callable[[], Any]


def run(reader: Reader, case: Any, directory: Path) -> bool:
    """Check one case, and say whether it was accepted; FindError if something does not hold."""
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    try:
        with warnings.catch_warnings(action="ignore"):
            return reader.check(case, directory)
    except FindError:
        raise
    except Violation as violation:
        kind = re.sub(r"\d+|/\S+", "N", str(violation))[:60]
        raise FindError(_place(violation, "Violation", kind), traceback.format_exc()[-4000:]) from None
    except AssertionError as error:
        raise FindError(_place(error, "AssertionError", str(error)[:60]), traceback.format_exc()[-4000:]) from None
    except Exception as error:
        raise FindError(_place(error, type(error).__name__), traceback.format_exc()[-4000:]) from None


def _place(error: BaseException, *words: str) -> str:
    """The kind of a find: words, and the last line of this package that it came from."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if "hf_megatron" in frame.filename]
    last = f"{Path(frames[-1].filename).name}:{frames[-1].lineno} {frames[-1].name}" if frames else "no frame"
    return " | ".join([*words, last])


def require_harmless(lookups: set[tuple[str, str]], allowed: Collection[Global]) -> None:
    """FindError if one of these (module, name) is not allowed."""
    names = sorted(f"{module}:{name}" for module, name in lookups if "." in name or Global(module, name) not in allowed)
    if names:
        raise FindError("harmless for us, not for pickle", f"It would look up {names}.")
