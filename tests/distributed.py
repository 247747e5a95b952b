"""Live ranks for tests: processes joined by gloo that start once and then take one job after another.

Starting ranks for every test costs seconds, most of it importing torch. Here one fork server imports torch once, and
transformers and hf_megatron if a test does, ranks are forked from it, and a job then costs milliseconds:

    def _sum_of_ranks() -> float:                         # module level, so that the ranks can import it
        x = torch.tensor(float(dist.get_rank()))
        dist.all_reduce(x)
        return x.item()

    def test_sum(pool):                                   # `pool` is the fixture in conftest.py
        assert pool(4).run(_sum_of_ranks) == [6.0] * 4

A job may rely on a gloo world of exactly `world_size` ranks, the environment variables of a launcher (RANK, ...), one
thread, no GPU, and the same seed, default dtype and environment at its start. What went wrong is an exception in the
test: it names the rank that failed first, or that hung, and has the tracebacks of all. A failing rank leaves the world,
so that peers who wait for it come back with "connection closed". The next job starts a fresh pool, unless a job that
expects an error on every rank catches it itself.
"""

import contextlib
import faulthandler
import gc
import multiprocessing
import os
import pickle
import random
import shutil
import signal
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

_T = TypeVar("_T")

# Imported once by the fork server; a rank inherits them by fork. Submodules are named because both torch and
# transformers import most of themselves lazily: torch._dynamo, a second of it, with the first operation on a DTensor.
_PRELOADED = ["pytest", "torch._dynamo", "torch.distributed.checkpoint", "torch.distributed.tensor"]
_PRELOADED_WITH_TRANSFORMERS = [
    *_PRELOADED,
    "transformers.distributed.utils",
    "transformers.modeling_utils",
    "transformers.models.gpt2.modeling_gpt2",
    "hf_megatron.training.trainer",
    "tests.preloaded",
]
_START_TIMEOUT = 180.0  # seconds; importing everything takes tens of seconds on a cold, busy machine
_GRACE = 5.0  # seconds the other ranks have to report once one of them has failed
# Every group costs each rank a few threads and sockets that live as long as the world does. Destroying them is no way
# out: DTensor caches meshes by value, with group names that the next world would give to other groups. So ranks that
# hold more groups than this are replaced after the job.
_MAX_GROUPS = 60


class RankError(Exception):
    """A job did not complete on every rank; `rank` is the one where it went wrong first."""

    def __init__(self, message: str, rank: int) -> None:
        super().__init__(message)
        self.rank = rank


class RankFailedError(RankError):
    """A rank raised an exception or died."""


class RankHungError(RankError):
    """A rank did not finish in time."""


class _Done(NamedTuple):
    """A rank finished a job: its result, pickled, and how many process groups the rank holds now."""

    result: bytes
    num_groups: int


class _Failed(NamedTuple):
    """A rank failed: its traceback and when it happened (`time.monotonic`, one clock for all processes)."""

    text: str
    seconds: float


@dataclass(frozen=True)
class _Rank:
    """One live rank as the test process sees it."""

    index: int
    process: BaseProcess
    connection: Connection
    stack_file: Path


class RankPool:
    """A world of `world_size` live ranks that runs jobs. They start with the first job."""

    def __init__(self, world_size: int) -> None:
        self.world_size = world_size
        self._ranks: list[_Rank] = []
        self._directory: Path | None = None

    def run(self, job: Callable[..., _T], /, *args: Any, timeout: float = 60.0, **kwargs: Any) -> list[_T]:
        """What a module-level function returns on every rank, by rank.

        The function, its arguments and results travel by pickle: a tensor arrives as a copy, not as shared memory. A
        DTensor does not travel; return `to_local()` or `full_tensor()` of it.

        Raises:
            RankFailedError: a rank raised an exception or died. The failing rank's traceback comes first.
            RankHungError: a rank did not finish within `timeout` seconds.
        """
        __tracebackhide__ = True
        message = pickle.dumps((job, args, kwargs))
        try:
            if not self._ranks:
                self._start()
            for rank in self._ranks:
                with contextlib.suppress(BrokenPipeError):  # a dead rank is reported by _collect
                    rank.connection.send_bytes(message)
            replies = self._collect(f"{job.__module__}.{job.__qualname__}", timeout)
        except BaseException:
            self.close()
            raise
        if max(reply.num_groups for reply in replies) > _MAX_GROUPS:
            self.close()
        return [pickle.loads(reply.result) for reply in replies]

    def close(self) -> None:
        """End the ranks, whatever they are doing. The next job starts new ones."""
        for rank in self._ranks:
            rank.process.kill()
        for rank in self._ranks:
            rank.process.join()
            rank.connection.close()
        self._ranks = []
        if self._directory is not None:
            shutil.rmtree(self._directory, ignore_errors=True)
            self._directory = None

    def _start(self) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(_PRELOADED_WITH_TRANSFORMERS if "transformers" in sys.modules else _PRELOADED)
        self._directory = Path(tempfile.mkdtemp(prefix="rank-pool-"))
        for index in range(self.world_size):
            ours, theirs = context.Pipe()
            process = context.Process(
                target=_rank_main, args=(index, self.world_size, self._directory, theirs), daemon=True
            )
            process.start()
            theirs.close()  # so that the end of the rank is the end of the connection
            self._ranks.append(_Rank(index, process, ours, _stack_file(self._directory, index)))
        self._collect("the start of the ranks", _START_TIMEOUT)

    def _collect(self, label: str, timeout: float) -> list[_Done]:
        """Wait for every rank's reply; raise one error that tells about all ranks unless all are done."""
        __tracebackhide__ = True
        replies: dict[int, _Done | _Failed] = {}
        deadline = time.monotonic() + timeout
        while len(replies) < self.world_size:
            waiting = {rank.connection: rank for rank in self._ranks if rank.index not in replies}
            ready = wait(list(waiting), max(0.0, deadline - time.monotonic()))
            if not ready:
                break
            for connection in ready:
                rank = waiting[connection]  # type: ignore[index]
                reply = replies[rank.index] = _receive(rank)
                if isinstance(reply, _Failed):
                    deadline = min(deadline, time.monotonic() + _GRACE)

        done = {index: reply for index, reply in replies.items() if isinstance(reply, _Done)}
        if len(done) == self.world_size:
            return [done[index] for index in range(self.world_size)]
        failed = {index: reply for index, reply in replies.items() if isinstance(reply, _Failed)}
        stacks = _stacks(rank for rank in self._ranks if rank.index not in replies)
        if failed:
            raise _failure(label, failed, stacks)
        raise _hang(label, timeout, stacks)


def _receive(rank: _Rank) -> _Done | _Failed:
    """Read the reply of a rank whose connection is ready, or whose process has ended."""
    try:
        reply = pickle.loads(rank.connection.recv_bytes())
    except (EOFError, ConnectionResetError):
        rank.process.join()
        stack = rank.stack_file.read_text() if rank.stack_file.exists() else ""  # where a fatal signal met it
        # The time sorts it first: a rank that dies says nothing, and its peers notice before we do.
        return _Failed(f"the process died with exit code {rank.process.exitcode}\n{stack}", seconds=0.0)
    assert isinstance(reply, _Done | _Failed)
    return reply


def _failure(label: str, failed: dict[int, _Failed], stacks: dict[int, str]) -> RankFailedError:
    """The error for a job that failed on some ranks, the one that failed first at the top."""
    order = sorted(failed, key=lambda index: failed[index].seconds)
    sections = [f"rank {index}: {failed[index].text}" for index in order]
    sections += [f"rank {index} did not stop within {_GRACE:g} s; it was at\n{stacks[index]}" for index in stacks]
    return RankFailedError("\n".join([f"rank {order[0]} failed first in {label}", *sections]), order[0])


def _hang(label: str, timeout: float, stacks: dict[int, str]) -> RankHungError:
    """The error for a job that did not end. Ranks that merely wait for others in a collective are no culprits."""
    culprits = [index for index, stack in stacks.items() if not _is_in_collective(stack)]
    order = culprits + [index for index in stacks if index not in culprits]
    title = f"{_name_ranks(culprits or order)} hung in {label} after {timeout:g} s"
    if not culprits:
        title += ", each inside a collective: the ranks did not call the same ones in the same order"
    sections = [f"rank {index} was at\n{stacks[index]}" for index in order]
    return RankHungError("\n".join([title, *sections]), order[0])


def _name_ranks(indices: Sequence[int]) -> str:
    return ("rank " if len(indices) == 1 else "ranks ") + ", ".join(map(str, indices))


def _stacks(ranks: Iterable[_Rank]) -> dict[int, str]:
    """Ask ranks where they are; works while they are stuck in C code. By rank index, the innermost call first."""
    stuck = list(ranks)
    for rank in stuck:
        if rank.process.pid is not None and rank.stack_file.exists():
            os.kill(rank.process.pid, signal.SIGUSR1)
    time.sleep(0.5 if stuck else 0.0)  # for the signal handlers to write
    stacks = {}
    for rank in stuck:
        text = rank.stack_file.read_text() if rank.stack_file.exists() else "(it had not started)"
        lines = text.splitlines()
        below_job = next((i for i, line in enumerate(lines) if line.endswith(" in _run_job")), len(lines))
        stacks[rank.index] = "\n".join([*lines[:below_job], ""])
    return stacks


def _is_in_collective(stack: str) -> bool:
    """Whether the innermost frames, those inside torch, belong to `torch.distributed`."""
    _, _, main_thread = stack.partition("Current thread")  # the one that runs Python's signal handlers: the main one
    for line in main_thread.splitlines()[1:]:
        if "/torch/distributed/" in line:
            return True
        if "/torch/" not in line:
            return False
    return False


def _stack_file(directory: Path, index: int) -> Path:
    return directory / f"stack-of-rank-{index}"


# From here on: what runs inside a rank.


def _rank_main(index: int, world_size: int, directory: Path, connection: Connection) -> None:
    """Join the world, say so, then run jobs until one fails or the test process hangs up."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the test process, which then ends the ranks
    try:
        with _stack_file(directory, index).open("w") as stack_file:
            faulthandler.enable(file=stack_file, all_threads=True)
            faulthandler.register(signal.SIGUSR1, file=stack_file, all_threads=True)
            _join_world(index, world_size, directory)
            connection.send_bytes(pickle.dumps(_Done(pickle.dumps(None), num_groups=1)))
            environment = dict(os.environ)
            while True:
                message = connection.recv_bytes()
                _reset(environment)
                connection.send_bytes(pickle.dumps(_run_job(message)))
    except (EOFError, BrokenPipeError):
        os._exit(0)
    except BaseException as error:
        frames = error.__traceback__.tb_next if error.__traceback__ is not None else None
        text = "".join(traceback.format_exception(type(error), error, frames))
        connection.send_bytes(pickle.dumps(_Failed(text, time.monotonic())))
        # Closes the sockets at once, which is what wakes the peers. An orderly exit would wait for them.
        os._exit(1)


def _join_world(index: int, world_size: int, directory: Path) -> None:
    import torch
    import torch.distributed as dist

    from hf_megatron.tensor_parallel import cpu

    os.environ.update(
        RANK=str(index),
        LOCAL_RANK=str(index),
        WORLD_SIZE=str(world_size),
        LOCAL_WORLD_SIZE=str(world_size),
        # For libraries that insist on them. The world itself meets in a file: no port that another run could hold.
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT="29500",
        CUDA_VISIBLE_DEVICES="",
    )
    # Without it gloo resolves the host's name, which fails or leaves the machine on some laptops and containers.
    for name in {"lo", "lo0"}.intersection(name for _, name in socket.if_nameindex()):
        os.environ["GLOO_SOCKET_IFNAME"] = name
    torch.set_num_threads(1)
    cpu.POLLING_SECONDS = 0.0  # the cores are shared with the ranks of other workers
    dist.init_process_group(
        "gloo",
        init_method=f"file://{directory}/rendezvous",
        rank=index,
        world_size=world_size,
        timeout=timedelta(minutes=30),  # the pool's own timeout is the one that counts
    )
    _keep_meshes()
    gc.freeze()  # what the fork server imported stays; makes the collection before each job cheap


def _keep_meshes() -> None:
    """One DeviceMesh for each layout: transformers makes several with every model, whose process groups cost time."""
    import torch.distributed as dist

    create = dist.init_device_mesh
    meshes: dict[str, Any] = {}

    def init_device_mesh(*args: Any, **kwargs: Any) -> Any:
        layout = repr((args, sorted(kwargs.items())))
        if layout not in meshes:
            meshes[layout] = create(*args, **kwargs)
        return meshes[layout]

    dist.init_device_mesh = init_device_mesh


def _reset(environment: dict[str, str]) -> None:
    """Take back what the job before may have changed, so that the order of tests does not matter."""
    import numpy as np
    import torch

    gc.collect()
    os.environ.clear()
    os.environ.update(environment)
    torch.set_default_dtype(torch.float32)
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


def _run_job(message: bytes) -> _Done:
    from torch.distributed import distributed_c10d

    job, args, kwargs = pickle.loads(message)
    result = pickle.dumps(job(*args, **kwargs))
    return _Done(result, num_groups=len(distributed_c10d._world.pg_map))
