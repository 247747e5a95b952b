"""Changing the size of the vocabulary, in one process."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.distributed.tensor import DTensor

from hf_megatron.errors import UnsupportedError
from hf_megatron.models.heads import VocabParallelHead
from hf_megatron.tensor_parallel import TensorParallelGroup


class ResizingMixin:
    """``resize_token_embeddings`` for heads that are not ``nn.Linear``."""

    tp_group: TensorParallelGroup

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> nn.Embedding:
        """Resize the vocabulary as the stock method does, in one process; UnsupportedError where it is cut."""
        if isinstance(self.get_input_embeddings().weight, DTensor):  # type: ignore[attr-defined]
            raise UnsupportedError(
                f"resize_token_embeddings needs the whole vocabulary, which is cut over {self.tp_group.size} ranks. "
                "Load in one process, resize, save_pretrained, then load that directory with distributed_config."
            )
        resized: nn.Embedding = super().resize_token_embeddings(*args, **kwargs)  # type: ignore[misc]
        for module in self.modules():  # type: ignore[attr-defined]
            if isinstance(module, VocabParallelHead):
                module.out_features = resized.num_embeddings
        return resized

    def _get_resized_lm_head(self, old_lm_head: Any, *args: Any, **kwargs: Any) -> Any:
        # The stock method needs an nn.Linear, so it gets one that shares the head's parameters.
        linear = nn.Linear(old_lm_head.in_features, old_lm_head.out_features, bias=False, device="meta")
        linear.weight, linear.bias = old_lm_head.weight, old_lm_head.bias
        linear = super()._get_resized_lm_head(linear, *args, **kwargs)  # type: ignore[misc]
        old_lm_head.weight, old_lm_head.bias = linear.weight, linear.bias
        old_lm_head.out_features = linear.out_features
        return old_lm_head
