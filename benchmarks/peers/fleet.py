"""The workers of a configuration, seen from the script that commands them."""

from __future__ import annotations

import contextlib
import json
import os
import select
import subprocess
import sys
from pathlib import Path
from typing import Any, Self

from benchmarks.peers.machine import ForeignLoad, processor_seconds_of, waited_seconds_of
from benchmarks.peers.worker import Job

__all__ = ["WorkerError", "Workers"]

_ROOT = Path(__file__).resolve().parent.parent.parent
_TIMEOUT = 900.0  # seconds for one command; the slowest is to compile a large model


class WorkerError(Exception):
    """A worker did not do what it was told."""


class Workers:
    """The ranks of one configuration: processes that hold its model and wait for commands.

    They start when this is made; :meth:`hello` waits until they can be commanded. As a context manager it ends them.

    Args:
        job: What they are to do.
        scratch: Directory for what they print and for their rendezvous.
        search_path: A directory to import from after all others.
        name: What to call them; their configuration's name if None.
    """

    def __init__(self, job: Job, scratch: Path, search_path: Path | None = None, name: str | None = None) -> None:
        self.configuration = job.configuration
        self.name = name or job.configuration.name
        self._logs = [scratch / f"{self.name}-{rank}.log" for rank in range(self.configuration.ranks)]
        self.processes = [self._start(job, rank, scratch, search_path) for rank in range(self.configuration.ranks)]

    def _start(self, job: Job, rank: int, scratch: Path, search_path: Path | None) -> subprocess.Popen[str]:
        path = [*os.environ.get("PYTHONPATH", "").split(os.pathsep), str(_ROOT), str(search_path or "")]
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(filter(None, path)),
            "OMP_NUM_THREADS": str(job.configuration.threads),
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(job.configuration.ranks),
            "GLOO_SOCKET_IFNAME": "lo",  # else gloo looks up the host's name, which may lead out of the machine
            "TOKENIZERS_PARALLELISM": "false",
            "HF_HUB_OFFLINE": "1",
            "TRANSFORMERS_VERBOSITY": "error",
        }
        rendezvous = scratch / f"{self.name}.rendezvous"
        with self._logs[rank].open("w") as log:
            return subprocess.Popen(
                [sys.executable, "-m", "benchmarks.peers.worker", job.to_json(), str(rank), str(rendezvous)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env=environment,
                cwd=scratch,  # Python imports from there first, and there is nothing
            )

    def hello(self) -> list[dict[str, Any]]:
        """Wait until they have started; to be called once, and first.

        Returns:
            What each says of itself, by rank.

        Raises:
            WorkerError: One of them did not get that far.
        """
        return [self._reply(rank, "start") for rank in range(len(self.processes))]

    def ask(self, command: str) -> list[dict[str, Any]]:
        """Command all ranks, and wait for all of them.

        Returns:
            Their replies, by rank.

        Raises:
            WorkerError: One of them failed, died, or did not answer in time. The others may be stuck or have replies
                that nobody read: there is nothing left to do with any of them but to close.
        """
        for process in self.processes:
            assert process.stdin is not None
            with contextlib.suppress(BrokenPipeError):  # its log tells more than its pipe
                process.stdin.write(command + "\n")
                process.stdin.flush()
        return [self._reply(rank, command) for rank in range(len(self.processes))]

    def _reply(self, rank: int, command: str) -> dict[str, Any]:
        stream = self.processes[rank].stdout
        assert stream is not None
        line = stream.readline() if select.select([stream], [], [], _TIMEOUT)[0] else ""
        if not line:
            log = "\n".join(self._logs[rank].read_text(errors="replace").splitlines()[-20:])
            raise WorkerError(f"{self.name}, rank {rank}, gave no answer to {command!r}; it last printed\n{log}")
        reply: dict[str, Any] = json.loads(line)
        if "error" in reply:
            raise WorkerError(f"{self.name}, rank {rank}, failed in {command!r}:\n{reply['error']}")
        return reply

    def foreign_load(self) -> ForeignLoad:
        """Starts counting what anybody but these workers computes."""
        return ForeignLoad(lambda: sum(processor_seconds_of(process.pid) for process in self.processes))

    def waited_seconds(self) -> float:
        """Time that their threads were ready to run and had no core, since they started."""
        return sum(waited_seconds_of(process.pid) for process in self.processes)

    def close(self) -> None:
        """End the processes."""
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.wait()
            for stream in (process.stdin, process.stdout):
                assert stream is not None
                with contextlib.suppress(BrokenPipeError):
                    stream.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
