"""How fast a run is, how much memory it takes, and how long it will still take; and the record of a finished run.

Everything is known on the host: counting tokens waits for no device.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer
from transformers.utils import logging

from hf_megatron.errors import HfMegatronError
from hf_megatron.planning import PRECISIONS, ModelShape, Run, machine_of_device
from hf_megatron.planning.planner import model_flops
from hf_megatron.planning.run import RUN_FILE

logger = logging.get_logger(__name__)


class WatchedTrainer(Trainer):
    """Trainer whose log entries have tokens per second, MFU, time left and memory, and that leaves a record behind."""

    _progress: Progress | None = None

    def train(self, *args: Any, **kwargs: Any) -> Any:
        self._progress = None
        output = super().train(*args, **kwargs)
        if self._progress is not None and self.is_world_process_zero():
            self._progress.write(Path(self.args.output_dir))
        return output

    def training_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        if self._progress is None:
            self._progress = Progress(self)
        self._progress.count(inputs)
        return super().training_step(model, inputs, *args, **kwargs)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if self._progress is not None and "loss" in logs:
            logs.update(self._progress.entry())
        super().log(logs, *args, **kwargs)


class Progress:
    """Counts the tokens of a run, on each rank alike."""

    def __init__(self, trainer: Any) -> None:
        self._trainer = trainer
        self._tokens = self._flops = 0
        self._started = self._last = (time.monotonic(), 0, 0, trainer.state.global_step)
        self._run: Run | None = None
        self._shape = _shape_of(trainer.model)
        self._device = _name_of(trainer.args.device)
        self.machine = machine_of_device(self._device)

    def count(self, inputs: Any) -> None:
        """Count a micro-batch of this rank, of which the ranks of a tensor-parallel group have the same one."""
        ids = inputs.get("input_ids")
        if ids is None:
            return
        *batch, length = ids.shape
        run = _run_of(self._trainer, batch=torch.Size(batch).numel(), length=length)
        self._tokens += run.tokens * run.dp_size
        if self._shape is not None:
            self._flops += model_flops(self._shape, run) // run.accumulation
        self._run = run

    def entry(self) -> dict[str, float]:
        """What a log entry says of the steps since the last one, of all ranks; the memory is that of this rank.

        ``tokens_per_second``; ``mfu``, the share of the peak of all GPUs that the model's products take, where the
        machine is known; ``seconds_left``; ``peak_memory_gb`` of the device, on a CPU of the process.
        """
        now = (time.monotonic(), self._tokens, self._flops, self._trainer.state.global_step)
        found = self._between(self._last, now)
        self._last = now
        steps = self._trainer.state.max_steps - now[3]
        if "step_seconds" in found:
            found["seconds_left"] = round(steps * found.pop("step_seconds"), 1)
        return {**found, "peak_memory_gb": round(peak_memory(self._trainer.args.device) / 1e9, 3)}

    def _between(self, first: tuple[float, int, int, int], last: tuple[float, int, int, int]) -> dict[str, float]:
        seconds, tokens, flops, steps = (b - a for a, b in zip(first, last, strict=True))
        if not steps or not seconds or not tokens:
            return {}
        found = {"tokens_per_second": round(tokens / seconds, 1), "step_seconds": seconds / steps}
        if self.machine is not None and flops and self._run is not None:
            is_short = self._run.precision.compute == 2
            peak = self.machine.flops_16bit if is_short else self.machine.flops_32bit
            found["mfu"] = round(flops / seconds / (peak * self._run.num_ranks), 4)
        return found

    def write(self, directory: Path) -> None:
        """Write the record of the run, if it has trained anything."""
        now = (time.monotonic(), self._tokens, self._flops, self._trainer.state.global_step)
        measured = self._between(self._started, now)
        if self._run is None or not measured or not directory.is_dir():
            return
        record = {
            "config": self._trainer.model.config.to_dict(),
            "run": {**asdict(self._run), "precision": self._run.precision.name},
            "device": self._device,
            "measured": {**measured, "peak_memory_bytes": peak_memory(self._trainer.args.device)},
        }
        partial = directory / f".{RUN_FILE}.incomplete"
        try:
            partial.write_text(json.dumps(record, indent=1, default=str), encoding="utf-8")
            partial.replace(directory / RUN_FILE)
        except OSError as error:  # the run itself is complete
            logger.warning(f"{directory / RUN_FILE} could not be written ({error.strerror}).")
            partial.unlink(missing_ok=True)


def peak_memory(device: torch.device) -> int:
    """Bytes: the most that torch had allocated on a GPU, or on a CPU that the process had resident."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _name_of(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def _shape_of(model: Any) -> ModelShape | None:
    try:
        return ModelShape.from_config(model.config.to_dict())
    except (HfMegatronError, ValueError, AttributeError, KeyError):
        return None  # a model of another kind


def _run_of(trainer: Any, *, batch: int, length: int) -> Run:
    args, config = trainer.args, trainer.model.config
    layout = getattr(config, "distributed_config", None)
    tp_size = trainer.get_tp_size()
    dtype = next(trainer.model.parameters()).dtype
    is_amp = (args.bf16 or args.fp16) and dtype == torch.float32
    kwargs = args.gradient_checkpointing_kwargs or {}
    recompute: Any = kwargs.get("recompute", "full") if args.gradient_checkpointing else "none"
    return Run(
        micro_batch=max(1, batch),
        sequence_length=max(1, length),
        accumulation=args.gradient_accumulation_steps,
        tp_size=tp_size,
        dp_size=args.world_size // tp_size,
        fsdp=getattr(layout, "fsdp_size", 1) > 1,
        sequence_parallel=bool(getattr(layout, "enable_sequence_parallel", False)),
        recompute=recompute,
        attention="eager" if getattr(config, "_attn_implementation", "") == "eager" else "sdpa",
        precision=PRECISIONS["amp" if is_amp else "fp32" if dtype == torch.float32 else "bf16"],
        device="cuda" if args.device.type != "cpu" else "cpu",
    )
