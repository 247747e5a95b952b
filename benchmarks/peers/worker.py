"""A rank of a configuration: ``python -m benchmarks.peers.worker JOB RANK RENDEZVOUS``.

It says hello when it has imported everything, then reads commands from standard input, a word and its arguments a line,
and answers each with a line of JSON on standard output; what libraries print goes to standard error. A command that
fails is answered with ``{"error": traceback}``.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import timedelta
from importlib import import_module, metadata
from pathlib import Path
from typing import Any, Self, TextIO

import torch
import torch.distributed as dist
from torch.autograd import DeviceType
from torch.distributed.tensor import DTensor

from benchmarks.peers.competitors import COMPETITORS, Built, Configuration, Setup, build
from benchmarks.peers.meters import Clock, Collectives, peak_bytes, start_peak
from benchmarks.peers.workload import Workload, batch_of

__all__ = ["Job", "Worker"]

Reply = dict[str, Any]
_PACKAGES = ("torch", "transformers", "hf-megatron", "megatron-core", "triton")


@dataclass(frozen=True)
class Job:
    """What a worker is started with.

    Args:
        configuration: Who computes, on how many ranks.
        workload: What.
        checkpoint: Directory with the weights.
        device: ``cpu`` or ``cuda``.
        repetitions: Steps per sample; a sample is their mean.
    """

    configuration: Configuration
    workload: Workload
    checkpoint: str
    device: str = "cpu"
    repetitions: int = 1

    def to_json(self) -> str:
        """As an argument of the command line."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Self:
        """The job that was written so."""
        fields = json.loads(text)
        configuration, workload = Configuration(**fields.pop("configuration")), Workload(**fields.pop("workload"))
        return cls(configuration, workload, **fields)


class Worker:
    """This process's rank of a configuration.

    Its public methods are the commands.

    Args:
        job: What to do.
        rank: Which rank this is.
        rendezvous: A file that does not exist, through which the ranks find each other.
    """

    def __init__(self, job: Job, rank: int, rendezvous: str) -> None:
        self._job, self._rank, self._ranks = job, rank, job.configuration.ranks
        self._device = torch.device(job.device)
        self._built: Built | None = None
        has_card_each = job.device == "cuda" and torch.cuda.device_count() >= self._ranks
        if has_card_each:
            torch.cuda.set_device(rank)
        competitor = COMPETITORS[job.configuration.competitor]
        self._batch = batch_of(job.workload, self._device, positions=competitor.module == "ours")
        torch.set_num_threads(job.configuration.threads)
        needs_group = self._ranks > 1 or competitor.module == "megatron_core"
        if needs_group and not dist.is_initialized():
            dist.init_process_group(
                "nccl" if has_card_each else "gloo",
                init_method=f"file://{rendezvous}",
                rank=rank,
                world_size=self._ranks,
                timeout=timedelta(minutes=10),
            )
        import_module(f"benchmarks.peers.{competitor.module}")

    # ------------------------------------------------------------------ commands

    def hello(self) -> Reply:
        """What this process is made of."""
        versions = {}
        for package in _PACKAGES:
            with contextlib.suppress(metadata.PackageNotFoundError):
                versions[package] = metadata.version(package)
        name = torch.cuda.get_device_name() if self._device.type == "cuda" else "cpu"
        return {"versions": versions, "device": name, "resident": start_peak(self._device)}

    def load(self, checkpoint: str = "") -> Reply:
        """Build the model anew, from the job's checkpoint or another of the same model.

        A lazy loader maps files and reads what is touched first, so the time and the memory are those of a model whose
        every weight has been touched.
        """
        self._built = None
        before = start_peak(self._device)
        self._barrier()
        clock, started = Clock(self._device), time.process_time()
        clock.mark()
        self._built = self._build(checkpoint)
        with torch.no_grad():
            for parameter in self._built.model.parameters():
                _local(parameter).sum()
        clock.mark()
        times = {"seconds": clock.intervals()[0], "processor": time.process_time() - started}
        return {**times, "before": before, "peak": peak_bytes(self._device), "weights": self._weight_bytes()}

    def unload(self) -> Reply:
        """Let go of the model."""
        self._built = None
        return {"resident": start_peak(self._device)}

    def check(self) -> Reply:
        """Warm up; the loss and the norm of one gradient, to be compared with the others'."""
        self._forward_backward(Clock(self._device))
        loss = self._forward_backward(Clock(self._device))
        gradient = self._model.position_embedding.grad
        assert gradient is not None
        norm = _local(gradient).double().norm().item()
        self._forget()
        return {"loss": _number(loss), "gradient_norm": norm}

    def step(self) -> Reply:
        """A sample: seconds of forward, of backward, of both, and their processor seconds."""
        self._barrier()
        clock, started = Clock(self._device), time.process_time()
        for _ in range(self._job.repetitions):
            loss = self._forward_backward(clock)
            self._model.model.zero_grad(set_to_none=True)
        processor = time.process_time() - started
        marks = clock.intervals()
        mean = {name: sum(marks[start::3]) / self._job.repetitions for name, start in (("forward", 0), ("backward", 1))}
        step = mean["forward"] + mean["backward"]
        return {**mean, "step": step, "processor": processor / self._job.repetitions, "loss": _number(loss)}

    def memory(self) -> Reply:
        """The most memory in a forward and backward pass, next to that before it."""
        self._forget()
        before = start_peak(self._device)
        self._barrier()
        self._forward_backward(Clock(self._device))
        peak = peak_bytes(self._device)
        self._forget()
        return {"before": before, "peak": peak, "weights": self._weight_bytes()}

    def activations(self) -> Reply:
        """Bytes that autograd holds at the end of a forward pass, beside the weights."""
        weights = {_local(parameter).untyped_storage()._cdata for parameter in self._model.model.parameters()}
        held: dict[int, torch.UntypedStorage] = {}

        def note(tensor: torch.Tensor) -> torch.Tensor:
            storage = _local(tensor).untyped_storage()
            if storage._cdata not in weights:
                held[storage._cdata] = storage  # which keeps it, so that no other gets its address
            return tensor

        with self._model.around_step(), torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            self._model.loss(self._batch)
        return {"kept": sum(storage.nbytes() for storage in held.values())}

    def communication(self) -> Reply:
        """The collectives of a forward and a backward pass."""
        with self._model.around_step():
            with Collectives() as forward:
                loss = self._model.loss(self._batch)
            with Collectives() as backward:
                loss.backward()
        self._forget()
        return {
            name: {"count": dict(seen.count), "bytes": dict(seen.bytes)}
            for name, seen in (("forward", forward), ("backward", backward))
        }

    def profile(self, most: str = "25") -> Reply:
        """Where the time of a forward and backward pass goes: the operators that took most, without what they call."""
        self._barrier()
        with torch.profiler.profile() as profiler:
            self._forward_backward(Clock(self._device))
        self._forget()
        on_card = self._device.type == "cuda"
        rows = [
            {
                "operator": event.key,
                "calls": event.count,
                "seconds": (event.self_device_time_total if on_card else event.self_cpu_time_total) / 1e6,
            }
            for event in profiler.key_averages()
            if event.device_type == DeviceType.CPU  # which has the time of the kernels that it launched
        ]
        return {"operators": sorted(rows, key=lambda row: -row["seconds"])[: int(most)]}

    def optimizer(self) -> Reply:
        """Seconds of five AdamW steps, after a first that allocates; fused if torch can with these parameters."""
        self._forward_backward(Clock(self._device))
        kind, optimizer = "fused", torch.optim.AdamW(self._model.model.parameters(), lr=0.0, fused=True)
        try:
            optimizer.step()
        except RuntimeError:  # of parameters of which some are DTensors and some are not
            kind, optimizer = "default", torch.optim.AdamW(self._model.model.parameters(), lr=0.0)
            optimizer.step()
        seconds = []
        for _ in range(5):
            self._barrier()
            clock = Clock(self._device)
            clock.mark()
            optimizer.step()
            clock.mark()
            seconds += clock.intervals()
        del optimizer
        self._forget()
        return {"seconds": seconds, "kind": kind}

    def generate(self, new_tokens: str) -> Reply:
        """Greedy decoding after the batch's tokens, with a cache of keys and values."""
        model: Any = self._model.model.eval()
        count = int(new_tokens)
        ids = self._batch["input_ids"][:, : self._job.workload.sequence - count]
        self._barrier()
        clock = Clock(self._device)
        clock.mark()
        with torch.no_grad():
            output = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=count,
                min_new_tokens=count,
                do_sample=False,
                use_cache=True,
                pad_token_id=0,
            )
        clock.mark()
        model.train()
        return {"seconds": clock.intervals()[0], "tokens": output[:, ids.shape[1] :].tolist()}

    # ------------------------------------------------------------------ parts

    @property
    def _model(self) -> Built:
        if self._built is None:
            raise RuntimeError("there is no model yet; the command for it is `load`")
        return self._built

    def _build(self, checkpoint: str) -> Built:
        job = self._job
        options = COMPETITORS[job.configuration.competitor].options
        setup = Setup(job.workload, Path(checkpoint or job.checkpoint), self._rank, self._ranks, self._device, options)
        return build(job.configuration.competitor, setup)

    def _forward_backward(self, clock: Clock) -> torch.Tensor:
        with self._model.around_step():
            clock.mark()
            loss = self._model.loss(self._batch)
            clock.mark()
            loss.backward()
            clock.mark()
        return loss

    def _forget(self) -> None:
        """Free the gradients, and on a GPU what was freed before, for the other workers."""
        self._model.model.zero_grad(set_to_none=True)
        gc.collect()
        if self._device.type == "cuda":
            torch.cuda.empty_cache()

    def _barrier(self) -> None:
        if self._ranks > 1:
            dist.barrier()

    def _weight_bytes(self) -> int:
        return sum(_local(p).numel() * p.element_size() for p in self._model.model.parameters())


def _local(tensor: torch.Tensor) -> torch.Tensor:
    """This rank's part of a tensor that may be a DTensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _number(loss: torch.Tensor) -> float:
    loss = loss.detach()
    return float(loss.full_tensor() if isinstance(loss, DTensor) else loss)


def _answer(command: Callable[..., Reply], *arguments: str) -> Reply:
    try:
        return command(*arguments)
    except Exception:
        return {"error": traceback.format_exc()}


def _say(replies: TextIO, reply: Reply) -> None:
    replies.write(json.dumps(reply) + "\n")
    replies.flush()


def main() -> None:
    """Obey until told to quit, or until nobody is there to tell."""
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    worker: Worker | None = None

    def start() -> Reply:
        nonlocal worker
        worker = Worker(Job.from_json(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
        return worker.hello()

    _say(replies, _answer(start))
    for line in sys.stdin:
        command, *arguments = line.split()
        if command == "quit" or worker is None:
            break
        _say(replies, _answer(getattr(worker, command), *arguments))
    os._exit(0)  # without waiting for the other ranks' ends of the process group


if __name__ == "__main__":
    main()
