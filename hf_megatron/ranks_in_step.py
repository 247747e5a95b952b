"""A guard that notices when the ranks of a tensor-parallel group drift apart.

The ranks of a group act as one. They must read the same batches, draw the same random numbers, hold the same replicated
parameters and take the same decisions. Nothing in the mathematics would notice if they did not: the losses stay
plausible, and the model that is saved is nobody's; or one rank waits for ever for another that went elsewhere.

All that is compared goes through one exchange of two integers per rank. So ranks that come to it from different places
notice that too.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any
from zlib import crc32

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.distributed_c10d import _set_pg_timeout, _world
from torch.distributed.tensor import DTensor
from transformers import Trainer
from transformers.trainer_utils import has_length

from hf_megatron.errors import RanksDifferError

__all__ = ["GuardedTrainer", "RankComparison", "replicated_parameters"]

_CAUSES = {
    "batch": "a data set, sampler or collator that depends on the rank, a clock or a random generator that differs; "
    "choose a stream's order by set_epoch(epoch), or by an attribute `generator`, which Trainer seeds",
    "random": "random numbers that one rank alone draws, in a callback, a data loader or by sampling from the model",
    "parameter": "other numbers in an earlier batch or dropout mask, or weights that one rank alone changed",
    "number": "a data set, or arguments, of another length on one rank",
    "place": "a callback or an error that only one rank has, or a stream that ends earlier on it",
}
_CONTROL = ("should_training_stop", "should_epoch_stop", "should_save", "should_evaluate", "should_log")


class RankComparison:
    """Compares small facts, and digests of large ones, over the ranks of a tensor-parallel group.

    Args:
        group: The tensor-parallel group, or one of the same ranks for tensors on the CPU.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self._group = group
        self._last_equal: str | None = None

    @classmethod
    def of(cls, group: dist.ProcessGroup) -> RankComparison:
        """One for this tensor-parallel group; every rank of every group must call it.

        On GPUs the comparison has a group of its own on the CPU, so that it does not wait for the device.
        """
        if dist.get_backend(group) == "gloo":
            return cls(group)
        size, own = dist.get_world_size(group), None
        for first in range(0, dist.get_world_size(), size):
            ranks = list(range(first, first + size))
            created = dist.new_group(ranks, backend="gloo")
            own = created if dist.get_rank() in ranks else own
        assert own is not None
        return cls(own)

    def agree(self, place: str, facts: Mapping[str, Any], wishes: int = 0) -> int:
        """Have all ranks say where they are and what they see there.

        Args:
            place: What comes next on this rank.
            facts: Small values, or digests, by name.
            wishes: Bits; those that any rank has set are returned.

        Returns:
            The wishes of all ranks.

        Raises:
            RanksDifferError: Places or facts differ.

        Collective: all-gather over the group of two integers; if they differ also of the facts.
        """
        digest = crc32(repr((place, sorted(facts.items()))).encode())
        gathered = [torch.empty(2, dtype=torch.int64) for _ in range(dist.get_world_size(self._group))]
        dist.all_gather(gathered, torch.tensor([digest, wishes]), group=self._group)
        digests, all_wishes = zip(*(pair.tolist() for pair in gathered), strict=True)
        if len(set(digests)) > 1:
            everything: list[Any] = [None] * len(digests)
            dist.all_gather_object(everything, (place, dict(facts)), group=self._group)
            raise RanksDifferError(self._description(everything))
        result = 0
        for wish in all_wishes:
            result |= wish
        return result

    def compare(self, place: str, model: nn.Module, batch: Any = None) -> None:
        """Compare the batch, the states of torch's random generators, and the replicated parameters.

        Args:
            place: Where the run is.
            model: The model.
            batch: Tensors, nested in dictionaries and lists.

        Raises:
            RanksDifferError: Any of them differs.

        Collective: as :meth:`agree`.
        """
        facts = {f"batch{name}": _digest(tensor) for name, tensor in _tensors(batch)}
        facts["random generator of the CPU"] = _digest(torch.get_rng_state())
        if torch.cuda.is_initialized():
            facts["random generator of the GPU"] = _digest(torch.cuda.get_rng_state())
        facts |= {f"parameter {name}": _digest(tensor) for name, tensor in replicated_parameters(model)}
        self.agree(place, facts)
        self._last_equal = place

    def _description(self, everything: list[tuple[str, dict[str, Any]]]) -> str:
        ranks = dist.get_process_group_ranks(self._group)
        places = [place for place, _ in everything]
        message = "the ranks of a tensor-parallel group are no longer in step. "
        if len(set(places)) > 1:
            where = "; ".join(f"rank {rank}: {place}" for rank, place in zip(ranks, places, strict=True))
            return f"{message}They are at different places: {where}. The usual cause: {_CAUSES['place']}."
        names = list(dict.fromkeys(name for _, facts in everything for name in facts))
        different, kinds = [], []
        for name in names:
            values = [facts.get(name) for _, facts in everything]
            if len(set(values)) > 1:
                others = [str(rank) for rank, value in zip(ranks, values, strict=True) if value != values[0]]
                kinds.append(name.split()[0].split("[")[0])
                has_values = kinds[-1] not in ("batch", "random", "parameter")
                listed = f" ({', '.join(map(str, values))} on ranks {', '.join(map(str, ranks))})" if has_values else ""
                different.append(f"{name}{listed}: rank {', '.join(others)} differs from rank {ranks[0]}")
        shown = "; ".join(different[:5]) + (f"; and {len(different) - 5} more" if len(different) > 5 else "")
        since = f"They were equal at: {self._last_equal}." if self._last_equal else "They were not compared before."
        causes = "; or ".join(_CAUSES[kind] for kind in dict.fromkeys(kinds))
        return f"{message}At: {places[0]}. {shown}. {since} The usual cause: {causes}."


def replicated_parameters(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """The parameters that every rank of a tensor-parallel group holds whole, or the same FSDP shard of; by name."""
    for name, parameter in model.named_parameters():
        if not isinstance(parameter, DTensor):
            yield name, parameter
            continue
        names = parameter.device_mesh.mesh_dim_names or ()
        placements = dict(zip(names, parameter.placements, strict=True))
        if "tp" not in placements or placements["tp"].is_replicate():
            yield name, parameter.to_local()


def _tensors(data: Any, name: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    if isinstance(data, torch.Tensor):
        yield name, data
    elif isinstance(data, Mapping):
        for key, value in data.items():
            yield from _tensors(value, f"{name}[{key!r}]")
    elif isinstance(data, (list, tuple)):
        for index, value in enumerate(data):
            yield from _tensors(value, f"{name}[{index}]")


def _digest(tensor: torch.Tensor) -> tuple[Any, ...]:
    data = tensor.detach().cpu().contiguous().flatten().view(torch.uint8)
    return (*tensor.shape, crc32(data.numpy().data))


class GuardedTrainer(Trainer):
    """Trainer whose tensor-parallel ranks compare what must be equal.

    They do so in the first step of every data set, every ``rank_check_steps`` steps, before every checkpoint and when
    training ends. What a callback of one rank asks for, to stop or to save, all ranks of its group do.
    """

    rank_check_steps: int = 100
    _comparison: RankComparison | None = None
    _is_data_unchecked = False
    _checked_step: int | None = None

    @property
    def _ranks(self) -> RankComparison | None:
        if self._comparison is None and self.get_tp_size() > 1 and self.rank_check_steps:
            mesh = self.accelerator.torch_device_mesh
            self._comparison = RankComparison.of(mesh["tp"].get_group())
        return self._comparison

    def _agree(self, place: str, facts: Mapping[str, Any], wishes: int = 0) -> int:
        return wishes if self._ranks is None else self._ranks.agree(place, facts, wishes)

    def _compare(self, place: str, batch: Any = None) -> None:
        if self._ranks is not None:
            self._ranks.compare(f"{place} step {self.state.global_step}", self.model, batch)
            self._checked_step = self.state.global_step

    def train(self, *args: Any, **kwargs: Any) -> Any:
        self._limit_waiting()
        self._is_data_unchecked = True
        output = super().train(*args, **kwargs)
        self._compare("the end of training, after")
        return output

    def _limit_waiting(self) -> None:
        """Give up on a rank that does not come to a collective after ``args.ddp_timeout`` seconds.

        TrainingArguments comes too late for it where the model was loaded first, and transformers waits for two hours;
        no argument reaches the groups of a mesh.
        """
        if self.is_distributed_loading_by_transformers:
            for group in _world.pg_map:
                _set_pg_timeout(self.args.ddp_timeout_delta, group)

    def _init_training_state(self, max_steps: int, steps_per_epoch: int, *args: Any, **kwargs: Any) -> tuple[int, int]:
        facts = {"number of steps": max_steps, "number of steps in an epoch": steps_per_epoch}
        self._agree("the start of training", facts)
        place: tuple[int, int] = super()._init_training_state(max_steps, steps_per_epoch, *args, **kwargs)
        return place

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> Any:
        # The first thing after reading; what follows is a collective that a rank without a batch leaves out.
        if not has_length(self.train_dataset):
            facts = {"number of batches": len(batch_samples)}
            self._agree(f"reading for step {self.state.global_step + 1}", facts)
        return super()._get_num_items_in_batch(batch_samples, device)

    def training_step(self, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        step = self.state.global_step
        is_due = bool(self.rank_check_steps) and step % self.rank_check_steps == 0 and step != self._checked_step
        if self._is_data_unchecked or is_due:
            self._is_data_unchecked = False
            self._compare("before the step after", inputs)
        loss: torch.Tensor = super().training_step(model, inputs, *args, **kwargs)
        return loss

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        self._share_control("after a step")
        does_anything = self.control.should_log or self.control.should_evaluate or self.control.should_save
        super()._maybe_log_save_evaluate(*args, **kwargs)
        if does_anything:
            self._share_control("after logging, evaluating and saving")

    def _share_control(self, place: str) -> None:
        wishes = sum(getattr(self.control, name) << bit for bit, name in enumerate(_CONTROL))
        wishes = self._agree(f"{place} {self.state.global_step}", {}, wishes)
        for bit, name in enumerate(_CONTROL):
            setattr(self.control, name, bool(wishes >> bit & 1))

    def evaluation_loop(self, dataloader: Any, description: str, *args: Any, **kwargs: Any) -> Any:
        if has_length(dataloader):
            self._agree(f"the start of {description}", {"number of batches": len(dataloader)})
        self._is_data_unchecked = True
        return super().evaluation_loop(dataloader, description, *args, **kwargs)

    def prediction_step(self, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        if self._is_data_unchecked:
            self._is_data_unchecked = False
            self._compare("the first batch of an evaluation after", inputs)
        return super().prediction_step(model, inputs, *args, **kwargs)
