"""Check that the ranks of a tensor-parallel group agree on values that must be equal.

Every comparison is one exchange of two integers per rank. Ranks that reach it from different places in the code
therefore detect this too, instead of waiting for each other.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any
from zlib import crc32

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor

from hf_megatron.errors import RanksDifferError

_CAUSES = {
    "batch": "a data set, sampler or collator that depends on the rank, a clock or a random generator that differs; "
    "choose a stream's order by set_epoch(epoch), or by an attribute `generator`, which Trainer seeds",
    "prompt": "prompts that each rank reads or draws for itself",
    "argument": "arguments that depend on the rank",
    "random": "random numbers that one rank alone draws, in a callback, a data loader or by sampling from the model",
    "parameter": "other numbers in an earlier batch or dropout mask, or weights that one rank alone changed",
    "number": "a data set, or arguments, of another length on one rank",
    "place": "a callback or an error that only one rank has, or a stream that ends earlier on it",
}


class RankComparison:
    """Compares values over the ranks of a group, whose backend communicates from ``device``."""

    def __init__(self, group: dist.ProcessGroup, device: torch.device) -> None:
        self._group, self._device = group, device
        self._last_equal: str | None = None

    @classmethod
    def on_cpu(cls, group: dist.ProcessGroup) -> RankComparison:
        """Create a comparison that does not wait for a GPU; every rank of every tensor-parallel group must call it."""
        if dist.get_backend(group) == "gloo":
            return cls(group, torch.device("cpu"))
        own, _ = dist.new_subgroups(dist.get_world_size(group), backend="gloo")
        return cls(own, torch.device("cpu"))

    def agree(self, place: str, facts: Mapping[str, Any], wishes: int = 0) -> int:
        """Compare what comes next on each rank, and facts by name, small values or digests, across all ranks.

        Returns the bits of ``wishes`` that any rank has set; RanksDifferError if places or facts differ.

        Collective: all-gather over the group of two integers; if they differ also of the facts.
        """
        mine = torch.tensor([crc32(repr((place, sorted(facts.items()))).encode()), wishes], device=self._device)
        gathered = [torch.empty_like(mine) for _ in range(dist.get_world_size(self._group))]
        dist.all_gather(gathered, mine, group=self._group)
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
        """Compare a batch (nested tensors), the states of torch's random generators, and the replicated parameters.

        Raises and communicates as :meth:`agree`.
        """
        facts = digests_of(batch, "batch")
        facts["random generator of the CPU"] = _digest(torch.get_rng_state())
        if torch.cuda.is_initialized():
            facts["random generator of the GPU"] = _digest(torch.cuda.get_rng_state())
        facts |= {f"parameter {name}": _digest(tensor) for name, tensor in parameters_held_whole(model)}
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
                is_digest = any(isinstance(value, tuple) for value in values)
                listed = "" if is_digest else f" ({', '.join(map(str, values))} on ranks {', '.join(map(str, ranks))})"
                different.append(f"{name}{listed}: rank {', '.join(others)} differs from rank {ranks[0]}")
        shown = "; ".join(different[:5]) + (f"; and {len(different) - 5} more" if len(different) > 5 else "")
        since = f"They were equal at: {self._last_equal}." if self._last_equal else "They were not compared before."
        causes = "; or ".join(_CAUSES[kind] for kind in dict.fromkeys(kinds))
        return f"{message}At: {places[0]}. {shown}. {since} The usual cause: {causes}."


def parameters_held_whole(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Parameters by name that are replicated over the tensor-parallel group, or have the same FSDP shard there."""
    for name, parameter in model.named_parameters():
        if not isinstance(parameter, DTensor):
            yield name, parameter
            continue
        names = parameter.device_mesh.mesh_dim_names or ()
        placements = dict(zip(names, parameter.placements, strict=True))
        if "tp" not in placements or placements["tp"].is_replicate():
            yield name, parameter.to_local()


def digests_of(data: Any, name: str) -> dict[str, Any]:
    """A digest of each tensor in nested dictionaries and lists, by its path."""
    if isinstance(data, torch.Tensor):
        return {name: _digest(data)}
    if isinstance(data, Mapping):
        parts = [digests_of(value, f"{name}[{key!r}]") for key, value in data.items()]
    elif isinstance(data, (list, tuple)):
        parts = [digests_of(value, f"{name}[{index}]") for index, value in enumerate(data)]
    else:
        return {}
    return {key: value for part in parts for key, value in part.items()}


def _digest(tensor: torch.Tensor) -> tuple[Any, ...]:
    # A copy, for numpy() makes a storage's size final, and FSDP frees parameters by it.
    data = tensor.detach().cpu().clone(memory_format=torch.contiguous_format).flatten().view(torch.uint8)
    return (*tensor.shape, crc32(data.numpy().data))
