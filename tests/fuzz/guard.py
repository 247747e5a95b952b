"""Runs one case of the fuzzer under watch: what it may do, and how much time and memory it may take.

``watched`` raises a :class:`Violation` as soon as the case does what no reader may: run a command, look up a name that
a pickle asks for, write outside of its directory, take 20 seconds of CPU time or 600 MB of memory, or wait for ever.
"""

from __future__ import annotations

import os
import resource
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

CPU_SECONDS = 20
MAX_BYTES = 600 * 10**6
CANARY = "hf_megatron_canary"  # a module that does not exist: only hostile files ask for it

# What no reader does, by the names of Python's audit events.
_FORBIDDEN = {
    "os.exec",
    "os.fork",
    "os.forkpty",
    "os.posix_spawn",
    "os.spawn",
    "os.startfile",
    "os.system",
    "pty.spawn",
    "socket.connect",
    "subprocess.Popen",
}
# Events of a change of files -> which of their arguments are paths.
_CHANGES = {"os.remove": 1, "os.rename": 2, "os.rmdir": 1, "os.mkdir": 1, "os.chmod": 1, "os.symlink": 2, "os.link": 2}
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
_BLOCKED_SECONDS = 4
# Stays handled until the process ends, for it may arrive late: no signal that what is tested handles itself.
_WAKE = signal.SIGRTMIN
_MAX_FILE_BYTES = 2**29


class Violation(BaseException):
    """A case did what no reader may. No Exception, so that no reader takes it for an error of the file."""


@dataclass
class _Watch:
    directory: str  # the only place to write to
    is_allowed: Callable[[str, str], bool]  # whether the standard unpickler may look up (module, name)
    thread: int = field(default_factory=threading.get_ident)
    native_id: int = field(default_factory=threading.get_native_id)
    violations: list[str] = field(default_factory=list)


largest_growth = 0  # bytes, over all cases of this process
_watch: _Watch | None = None
_installed_in = 0  # the process, of which one that was forked has not all


def _report(message: str) -> None:
    assert _watch is not None
    _watch.violations.append(message)
    raise Violation(message)


def _audit(event: str, arguments: tuple[Any, ...]) -> None:
    if _watch is None:
        return
    if event in _FORBIDDEN or (event == "import" and str(arguments[0]).startswith(CANARY)):
        _report(f"{event} {arguments!r:.200}")
    elif event == "pickle.find_class":
        if not _watch.is_allowed(str(arguments[0]), str(arguments[1])):
            _report(f"the standard unpickler looks up {arguments!r:.200}")
    elif event == "open" and isinstance(arguments[2], int) and arguments[2] & _WRITING:
        _check_place(event, arguments[0])
    elif event in _CHANGES:
        for path in arguments[_CHANGES[event] - 1 : _CHANGES[event]]:
            _check_place(event, path)


def _check_place(event: str, path: Any) -> None:
    assert _watch is not None
    if isinstance(path, int) or path is None:  # a descriptor
        return
    place = os.path.abspath(os.fsdecode(path))  # noqa: PTH100 (a Path would open nothing either, and is slow)
    temporary = os.path.join(tempfile.gettempdir(), tempfile.gettempprefix())  # noqa: PTH118
    is_inside = place.startswith((_watch.directory, "/dev/null", temporary)) or "__pycache__" in place
    # Paths relative to a directory's descriptor, as shutil.rmtree uses them.
    if not is_inside and os.path.isabs(os.fsdecode(path)):  # noqa: PTH117
        _report(f"{event} outside of the case's directory: {place!r:.200}")


def _install() -> None:
    global _installed_in
    if _installed_in == os.getpid():
        return
    if not _installed_in:
        sys.addaudithook(_audit)
    _installed_in = os.getpid()
    signal.signal(signal.SIGPROF, lambda *_: _late("takes too much CPU time"))
    signal.signal(_WAKE, lambda *_: _late("waits for ever"))
    threading.Thread(target=_look_for_blocked_cases, daemon=True).start()


def _late(message: str) -> None:
    if _watch is not None:
        _report(message)


def _look_for_blocked_cases() -> None:
    """Interrupt a case that waits, as for a FIFO: it is asleep, and uses no CPU time."""
    last: tuple[_Watch | None, str] = (None, "")
    since = 0.0
    while True:
        time.sleep(0.5)
        watch, state = _watch, _state_of(_watch)
        if watch is None or not state.startswith("S") or last != (watch, state):
            last, since = (watch, state), time.monotonic()
        elif time.monotonic() - since > _BLOCKED_SECONDS:
            signal.pthread_kill(watch.thread, _WAKE)
            if time.monotonic() - since > 3 * _BLOCKED_SECONDS:  # code that tries again when interrupted
                os.kill(os.getpid(), signal.SIGKILL)


def _state_of(watch: _Watch | None) -> str:
    """State of the case's thread, and the CPU time it has used; a thread that others keep from running is not S."""
    try:
        fields = Path(f"/proc/self/task/{watch.native_id}/stat").read_text().rpartition(")")[2].split() if watch else []
    except FileNotFoundError:  # no Linux: whatever uses no time is taken to be asleep
        return f"S {time.process_time():.1f}"
    return f"{fields[0]} {fields[11]} {fields[12]}" if fields else ""


def _reset_peak() -> int:
    """Start to measure the peak of the resident memory anew, and return what is resident now."""
    if not Path("/proc/self/clear_refs").exists():
        return 0
    Path("/proc/self/clear_refs").write_text("5")
    return status("VmRSS")


def status(name: str) -> int:
    """A number of bytes that the system has of this process, such as VmRSS; 0 where it does not say."""
    try:
        with open("/proc/self/status", encoding="ascii") as lines:  # noqa: PTH123 (measured in every case)
            return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))
    except FileNotFoundError:
        return 0


@contextmanager
def watched(directory: Path, is_allowed: Callable[[str, str], bool] = lambda module, name: False) -> Iterator[None]:
    """Run a case, which may write to ``directory``; raise a Violation for what a reader caught, too."""
    global _watch, largest_growth
    _install()
    before = _reset_peak()
    watch = _Watch(str(directory), is_allowed)
    signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS, 1)
    # What never comes back to Python cannot be interrupted: it ends the process.
    signal.setitimer(signal.ITIMER_VIRTUAL, 3 * CPU_SECONDS)
    files = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (_MAX_FILE_BYTES, files[1]))
    _watch = watch
    try:
        yield
    finally:
        _watch = None
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        resource.setrlimit(resource.RLIMIT_FSIZE, files)
        grown = status("VmHWM") - before
        largest_growth = max(largest_growth, grown)
    if watch.violations:
        raise Violation(watch.violations[0])
    if grown > MAX_BYTES:
        raise Violation(f"takes {grown / 1e6:,.0f} MB")
