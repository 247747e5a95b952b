"""Base class of all tensor-parallel modules.

Every parameter keeps its full, unsharded shape and name: on one rank it is an ordinary tensor, on several a DTensor.
The forward pass computes with this rank's shard as a plain tensor and calls collectives explicitly.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cached_property
from typing import ClassVar

from torch import nn

from hf_megatron.errors import UnsupportedError
from hf_megatron.partition import Replicated, Spec
from hf_megatron.tensor_parallel.group import SINGLE, TensorParallelGroup


class ParallelModule(nn.Module):
    """A module with a tensor-parallel group and a partition spec for each of its own parameters."""

    tp_group: TensorParallelGroup = SINGLE  # one rank until :meth:`set_tensor_parallel` is called
    sees_whole_sequence: ClassVar[bool] = False
    """Whether with sequence parallelism too the gradients of replicated parameters are whole, and no partial sums."""

    @cached_property
    def _hf_tp_plan(self) -> str:
        # peft reads this attribute before it adapts a layer, and hf_megatron.peft sets it before that. Without it, peft
        # would take a replicated layer or an embedding for the stock one it derives from.
        raise UnsupportedError(
            f"peft cannot tell how a {type(self).__name__} is cut over the ranks. Call hf_megatron.peft.get_peft_model "
            "in place of peft.get_peft_model, and hf_megatron.peft.load_adapter in place of PeftModel.from_pretrained."
        )

    def partition_specs(self) -> Mapping[str, Spec]:
        """The partition spec of each own parameter; parameters that are not listed are replicated."""
        return {}

    def set_tensor_parallel(self, group: TensorParallelGroup) -> None:
        """Set the group. The parameters are sharded separately; see ``placement``."""
        self.tp_group = group

    def extra_repr(self) -> str:
        """The base class's text, and the rank and size of the group."""
        place = f"tp_size={self.tp_group.size}, tp_rank={self.tp_group.rank}" if self.tp_group.size > 1 else ""
        return ", ".join(part for part in (super().extra_repr(), place) if part)


def replicated_parameters(module: nn.Module) -> Iterator[nn.Parameter]:
    """The replicated parameters of a module whose gradients are partial sums with sequence parallelism, in order."""
    for child in module.modules():
        if isinstance(child, ParallelModule) and not child.sees_whole_sequence:
            specs = child.partition_specs()
            for name, parameter in child._parameters.items():
                if parameter is not None and isinstance(specs.get(name, Replicated()), Replicated):
                    yield parameter
