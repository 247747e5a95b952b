"""LoRA with peft on tensor-parallel models.

    from peft import LoraConfig
    from hf_megatron.peft import get_peft_model, load_adapter

    model = get_peft_model(model, LoraConfig(r=8, target_modules=["c_attn"], task_type="CAUSAL_LM"))

An adapter adds ``B(A(x))`` to a layer's output. A and B are sharded like the weight they adapt, and each is one of this
package's own layers with its usual communication (``r`` is the adapter's rank, B S batch and sequence):

    adapted layer               A [r, in]                      B [out, r]              collective for the adapter
    ColumnParallelLinear        ReplicatedLinear               ColumnParallelLinear    backward, [B, S, r]
      behind a shared ``f``     ReplicatedLinear, summed       ColumnParallelLinear    backward, [r, in]
    RowParallelLinear           RowParallelLinear              ReplicatedLinear        forward, [B, S, r]
    ReplicatedLinear            ReplicatedLinear               ReplicatedLinear        none

Adapters are saved in peft's ordinary format, with whole tensors under the stock names: they load with plain peft on the
stock model, and ordinary adapters load here at any degree.

Source: Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models", arXiv:2106.09685.
"""

from __future__ import annotations

import os
from typing import Any

import peft
from peft import LoraConfig, PeftModel

from hf_megatron.errors import UnsupportedError
from hf_megatron.models.pretrained import MegatronModelMixin
from hf_megatron.peft.model import adapter_errors, check_adapter_files, join_data_parallel_ranks, with_our_methods
from hf_megatron.peft.targets import adapting

__all__ = ["get_peft_model", "load_adapter"]


def get_peft_model(
    model: MegatronModelMixin, config: LoraConfig, adapter_name: str = "default", **kwargs: Any
) -> PeftModel:
    """Add a fresh LoRA adapter, as ``peft.get_peft_model`` does; every rank must make this call.

    The model, of this package and at any layout, is changed in place. The configuration's defaults are peft's for the
    stock model; ``kwargs`` are those of ``peft.get_peft_model``. The initial values are those that stock peft draws
    from the same random state, at every degree. Every rank must call the result's ``save_pretrained`` too; the first
    one writes.

    Raises:
        UnsupportedError: The configuration uses a feature that is not supported for tensor-parallel models.

    Collective: broadcast over all processes of each adapter's initial values.
    """
    if not isinstance(model, MegatronModelMixin):
        raise UnsupportedError(
            f"hf_megatron.peft adapts models of this package, not {type(model).__name__}; use peft.get_peft_model."
        )
    if getattr(getattr(model.config, "distributed_config", None), "enable_sequence_parallel", False):  # type: ignore[attr-defined]
        raise UnsupportedError("LoRA with enable_sequence_parallel=True is not supported; leave it False.")
    with adapting(model, config):
        adapted: PeftModel = peft.get_peft_model(model, config, adapter_name=adapter_name, **kwargs)
    kind: Any = type(adapted)
    adapted.__class__ = with_our_methods(kind)
    join_data_parallel_ranks(adapted)
    return adapted


def load_adapter(
    model: MegatronModelMixin,
    directory: str | os.PathLike[str],
    adapter_name: str = "default",
    *,
    is_trainable: bool = False,
    **kwargs: Any,
) -> PeftModel:
    """Add an adapter that was saved here or by stock peft, as ``PeftModel.from_pretrained`` does.

    The directory has ``adapter_config.json`` and ``adapter_model.safetensors``; or it is a name on the Hub, and
    ``kwargs`` are for the download, such as ``revision`` and ``token``.

    Raises:
        UnsupportedError: The adapter is not LoRA, or uses a feature not supported for tensor-parallel models.
        CheckpointError: The adapter lacks weights, or its files are not what they should be.
    """
    check_adapter_files(directory, kwargs.get("subfolder"))
    with adapter_errors(directory):
        config = peft.PeftConfig.from_pretrained(os.fspath(directory), **kwargs)
        config.inference_mode = not is_trainable
        adapted = get_peft_model(model, config, adapter_name)
    adapted.load_adapter(os.fspath(directory), adapter_name, is_trainable=is_trainable, **kwargs)
    return adapted
