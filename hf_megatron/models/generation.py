"""Generation on several ranks: all ranks produce the same tokens and stop together.

Each rank has its own clock, stopping criteria and streamer. If one rank stopped or failed alone, the others would wait
for it in the next layer forever. Therefore the decision of one rank applies to all.
"""

from __future__ import annotations

from functools import wraps
from typing import Any, cast

import torch
import torch.distributed as dist
from transformers import StoppingCriteriaList
from transformers.generation import (
    ConfidenceCriteria,
    EosTokenCriteria,
    GenerationMixin,
    MaxLengthCriteria,
    StopStringCriteria,
)
from transformers.generation.streamers import BaseStreamer

from hf_megatron.errors import RanksDifferError, UnsupportedError
from hf_megatron.tensor_parallel import TensorParallelGroup, synchronize_random_state
from hf_megatron.tensor_parallel.agreement import RankComparison, digests_of

# These depend only on tokens and scores, which are equal on all ranks.
_SAME_EVERYWHERE = (ConfidenceCriteria, EosTokenCriteria, MaxLengthCriteria, StopStringCriteria)


class ParallelGenerationMixin(GenerationMixin):
    """``generate`` for tensor-parallel models."""

    tp_group: TensorParallelGroup
    device: torch.device

    @cast(Any, wraps(GenerationMixin.generate))  # type: ignore[untyped-decorator]
    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """Stock ``generate``; every rank must call it with the same prompts, and gets the same tokens.

        ``max_time`` and stopping criteria end the sequence on all ranks when they do so on one, and an error of one
        rank's streamer ends the call on all.

        Raises:
            RanksDifferError: Prompts or arguments differ, or another rank's streamer failed.

        Collective: broadcast over tp of the random state and two all-gathers over tp of two integers. Per token, an
        all-gather of two integers with a streamer, and an all-reduce of a flag with ``max_time`` or own criteria.
        """
        if self.tp_group.size == 1:
            return super().generate(*args, **kwargs)
        synchronize_random_state(self.tp_group, self.device)
        streamer = kwargs.pop("streamer", None)
        facts = digests_of([args, kwargs], "prompt")
        facts |= {
            f"argument {name}": value
            for name, value in kwargs.items()
            if isinstance(value, (int, float, str)) and name != "max_time"
        }
        if self._comparison.agree("generate", facts, int(streamer is not None)):
            kwargs["streamer"] = _SharedStreamer(streamer, self)
        return super().generate(*args, **kwargs)

    @property
    def _comparison(self) -> RankComparison:
        assert self.tp_group.process_group is not None
        return RankComparison(self.tp_group.process_group, self.device)

    def _get_stopping_criteria(self, *args: Any, **kwargs: Any) -> StoppingCriteriaList:
        criteria: StoppingCriteriaList = super()._get_stopping_criteria(*args, **kwargs)
        if self.tp_group.size > 1:
            may_differ = any(not isinstance(criterion, _SAME_EVERYWHERE) for criterion in criteria)
            if self._comparison.agree("stopping criteria", {}, int(may_differ)):
                return _SharedCriteria(criteria, self.tp_group)
        return criteria

    @cast(Any, wraps(GenerationMixin.init_continuous_batching))  # type: ignore[untyped-decorator]
    def init_continuous_batching(self, *args: Any, **kwargs: Any) -> Any:
        """Stock continuous batching (``generate_batch``), in one process; UnsupportedError on several ranks."""
        if self.tp_group.size > 1:
            raise UnsupportedError(
                f"continuous batching under tensor parallelism (tp_size={self.tp_group.size}): the paged cache of "
                "transformers cannot tell that these heads are cut. Call generate, or load in one process."
            )
        return super().init_continuous_batching(*args, **kwargs)


class _SharedCriteria(StoppingCriteriaList):
    """Stopping criteria that apply to a sequence if they apply on any rank of the group."""

    def __init__(self, criteria: StoppingCriteriaList, group: TensorParallelGroup) -> None:
        super().__init__(criteria)
        self._group = group

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        done: torch.Tensor = super().__call__(input_ids, scores, **kwargs).to(torch.uint8)  # gloo cannot reduce bool
        dist.all_reduce(done, dist.ReduceOp.MAX, group=self._group.process_group)
        return done.bool()


class _SharedStreamer(BaseStreamer):
    """A streamer whose failure ends the call on all ranks; usually only one rank has a streamer."""

    def __init__(self, streamer: BaseStreamer | None, model: ParallelGenerationMixin) -> None:
        self._streamer = streamer
        self._comparison = model._comparison

    def put(self, value: torch.Tensor) -> None:
        self._do("put", value)

    def end(self) -> None:
        self._do("end")

    def _do(self, method: str, *args: Any) -> None:
        error = None
        try:
            if self._streamer is not None:
                getattr(self._streamer, method)(*args)
        except Exception as caught:
            error = caught
        failed = self._comparison.agree(f"the streamer's {method}", {}, int(error is not None))
        if error is not None:
            raise error
        if failed:
            raise RanksDifferError("the streamer of another rank failed, whose error tells why; generation ends.")
