"""GPT-2 with attention, MLP and embedding sharded over tensor-parallel ranks.

The classes derive from transformers' GPT-2 and keep its outputs, masks, generation and heads. Only the modules that
hold parameters are replaced. Parameters have the stock names and shapes.

Shapes: B batch, S sequence, H hidden, N heads, V vocabulary, P ranks; ``_p`` marks this rank's part.

Source: Shoeybi et al. 2019, arXiv:1909.08053, sections 3 and 5.
"""

from __future__ import annotations

from functools import wraps
from math import sqrt
from typing import Any

import torch
from torch import nn
from transformers.cache_utils import Cache, DynamicCache
from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions
from transformers.models.gpt2.modeling_gpt2 import GPT2Block, GPT2Model, GPT2PreTrainedModel
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from hf_megatron.architectures import GPT2, Architecture
from hf_megatron.models.activations import activation
from hf_megatron.models.attention import ParallelAttention
from hf_megatron.models.forward import base_forward
from hf_megatron.models.forward_arguments import CACHE, refuse_arguments
from hf_megatron.models.gpt2.configuration_gpt2 import MegatronGPT2Config
from hf_megatron.models.masks import causal_mask
from hf_megatron.models.pretrained import MegatronModelMixin
from hf_megatron.tensor_parallel import (
    ColumnParallelLinear,
    HiddenDropout,
    ReplicatedEmbedding,
    ReplicatedLayerNorm,
    RowParallelLinear,
    SequenceParallelRegion,
    VocabParallelEmbedding,
    replicated_parameters,
)


class MegatronGPT2Attention(ParallelAttention):
    """Self-attention: column-parallel QKV projection (split by heads), row-parallel output projection."""

    def __init__(self, config: MegatronGPT2Config, layer_idx: int) -> None:
        head_dim = config.hidden_size // config.num_attention_heads
        scaling = head_dim**-0.5 if config.scale_attn_weights else 1.0
        if config.scale_attn_by_inverse_layer_idx:
            scaling /= layer_idx + 1
        super().__init__(
            config,
            num_heads=config.num_attention_heads,
            head_dim=head_dim,
            dropout=config.attn_pdrop,
            scaling=scaling,
            is_causal=True,
            upcast=config.reorder_and_upcast_attn,
            layer_idx=layer_idx,
        )
        hidden = config.hidden_size
        self.c_attn = ColumnParallelLinear(
            hidden, 3 * hidden, weight_layout="in_out", specs=GPT2.module_specs("h.*.attn.c_attn")
        )
        self.c_proj = RowParallelLinear(
            hidden, hidden, weight_layout="in_out", specs=GPT2.module_specs("h.*.attn.c_proj")
        )
        self.resid_dropout = HiddenDropout(config.resid_pdrop)

    def forward(
        self,
        hidden_states: torch.Tensor,
        past_key_values: Cache | None = None,
        attention_mask: torch.Tensor | None = None,
        region: SequenceParallelRegion | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Hidden states [B, S, H], replicated, or with a region [S_p, B, H], split on the sequence, to the same.

        Also returns the probabilities [B, N_p, S, S_k], split by heads, where they are kept. The other arguments are
        those of :meth:`ParallelAttention.attend`.

        Collective: all-reduce over tp, forward, in ``c_proj``; all-reduce over tp, backward, in ``c_attn``. With a
        region those of the layers.
        """
        query, key, value = self.c_attn(hidden_states, region).chunk(3, dim=-1)
        context, probabilities = self.attend(
            query, key, value, attention_mask, past_key_values, region=region, **kwargs
        )
        return self.resid_dropout(self.c_proj(context, region), region), probabilities


class MegatronGPT2MLP(nn.Module):
    """MLP: column-parallel H to 4H, activation, row-parallel 4H to H."""

    def __init__(self, config: MegatronGPT2Config) -> None:
        super().__init__()
        hidden = config.hidden_size
        inner = config.n_inner if config.n_inner is not None else 4 * hidden
        self.c_fc = ColumnParallelLinear(hidden, inner, weight_layout="in_out", specs=GPT2.module_specs("h.*.mlp.c_fc"))
        self.c_proj = RowParallelLinear(
            inner, hidden, weight_layout="in_out", specs=GPT2.module_specs("h.*.mlp.c_proj")
        )
        self.act = activation(config.activation_function)
        self.dropout = HiddenDropout(config.resid_pdrop)

    def forward(self, hidden_states: torch.Tensor, region: SequenceParallelRegion | None = None) -> torch.Tensor:
        """[B, S, H] to [B, S, H], both replicated or, with a region, split on the sequence.

        In between it is [B, S, 4H_p], split on the last dim.

        Collective: all-reduce over tp, forward, in ``c_proj``; all-reduce over tp, backward, in ``c_fc``. With a region
        those of the layers.
        """
        inner = self.act(self.c_fc(hidden_states, region))
        output: torch.Tensor = self.dropout(self.c_proj(inner, region), region)
        return output


class MegatronGPT2Block(GPT2Block):
    """One layer.

    Its input and output [B, S, H] are replicated, and so are norms, residuals and their dropout. With a region they are
    split on the sequence, [S_p, B, H].
    """

    def __init__(self, config: MegatronGPT2Config, layer_idx: int) -> None:
        nn.Module.__init__(self)
        self.ln_1 = ReplicatedLayerNorm(config.hidden_size, eps=config.layer_norm_epsilon)
        self.attn = MegatronGPT2Attention(config, layer_idx)
        self.ln_2 = ReplicatedLayerNorm(config.hidden_size, eps=config.layer_norm_epsilon)
        self.mlp = MegatronGPT2MLP(config)

    def forward(
        self,
        hidden_states: torch.Tensor,
        past_key_values: Cache | None = None,
        attention_mask: torch.Tensor | None = None,
        *,
        region: SequenceParallelRegion | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """As the class says; the other arguments are those of the attention.

        Collective: two all-reduces over tp, forward; two backward. With a region those of the layers, and one
        all-reduce over tp, backward, for the gradients of all norms and biases that are held whole.
        """
        if region is not None:
            region = region.sharing(replicated_parameters(self))
        attended, _ = self.attn(self.ln_1(hidden_states, region), past_key_values, attention_mask, region, **kwargs)
        hidden_states = attended + hidden_states
        output: torch.Tensor = hidden_states + self.mlp(self.ln_2(hidden_states, region), region)
        return output


class MegatronGPT2PreTrainedModel(MegatronModelMixin, GPT2PreTrainedModel):
    """Base of the GPT-2 classes."""

    config_class = MegatronGPT2Config
    _no_split_modules = ["MegatronGPT2Block"]  # noqa: RUF012 (transformers' class attribute)
    _can_record_outputs = {  # noqa: RUF012
        "hidden_states": MegatronGPT2Block,
        "attentions": OutputRecorder(MegatronGPT2Attention, layer_name=".attn", index=1),
    }

    @classmethod
    def architecture_of(cls, config: MegatronGPT2Config) -> Architecture:
        return GPT2

    def _initial_std(self, name: str) -> float:
        # GPT-2's initialization: projections into the residual stream are scaled by 1/sqrt(number of additions).
        std = super()._initial_std(name)
        return std / sqrt(2 * self.config.num_hidden_layers) if name.endswith("c_proj.weight") else std


class MegatronGPT2Model(MegatronGPT2PreTrainedModel, GPT2Model):
    """The transformer without a head; returns hidden states."""

    splits_last_hidden_state = True
    mask_follows_position_ids = True

    def __init__(self, config: MegatronGPT2Config) -> None:
        self._init_pretrained(config)
        self.embed_dim = config.hidden_size
        self.wte = VocabParallelEmbedding(config.vocab_size, self.embed_dim)
        self.wpe = ReplicatedEmbedding(config.max_position_embeddings, self.embed_dim)
        self.drop = HiddenDropout(config.embd_pdrop)
        self.h = nn.ModuleList([MegatronGPT2Block(config, i) for i in range(config.num_hidden_layers)])
        self.ln_f = ReplicatedLayerNorm(self.embed_dim, eps=config.layer_norm_epsilon)
        self.gradient_checkpointing = False
        self.post_init()

    @base_forward
    @merge_with_config_defaults  # type: ignore[untyped-decorator]
    @capture_outputs  # type: ignore[untyped-decorator]
    @wraps(GPT2Model.forward)
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        encoder_hidden_states: None = None,
        encoder_attention_mask: None = None,
        use_cache: bool | None = None,
        *,
        region: SequenceParallelRegion | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPastAndCrossAttentions:
        # Reimplemented because the stock forward has no hook for scattering and gathering the hidden states.
        refuse_arguments(
            "these models have no cross-attention",
            encoder_hidden_states=encoder_hidden_states,
            encoder_attention_mask=encoder_attention_mask,
        )
        for name in ("output_attentions", "output_hidden_states"):  # recorded by capture_outputs
            kwargs.pop(name, None)
        if input_ids is not None and inputs_embeds is None:
            self.warn_if_padding_and_no_attention_mask(input_ids, attention_mask)
            inputs_embeds = self.wte(input_ids.view(-1, input_ids.shape[-1]))
            batch_shape = input_ids.shape[:-1]
        elif input_ids is None and inputs_embeds is not None:
            batch_shape = inputs_embeds.shape[:-2]
        else:
            raise ValueError("Give either input_ids or inputs_embeds.")
        is_new = use_cache and past_key_values is None
        if is_new:
            past_key_values = DynamicCache(config=self.config)
        if attention_mask is not None and attention_mask.ndim < 4:
            attention_mask = attention_mask.view(inputs_embeds.shape[0], -1)
        attention_mask = causal_mask(
            self.config, inputs_embeds, attention_mask, past_key_values, position_ids, is_new_cache=bool(is_new)
        )
        if position_ids is None:
            seen = 0 if past_key_values is None else past_key_values.get_seq_length()
            position_ids = (torch.arange(inputs_embeds.shape[1], device=inputs_embeds.device) + seen)[None]
        hidden_states = inputs_embeds + self.wpe(position_ids).to(inputs_embeds.device)
        if token_type_ids is not None:
            hidden_states = hidden_states + self.wte(token_type_ids.view(-1, inputs_embeds.shape[1]))
        is_recomputed = self.gradient_checkpointing and self.training and torch.is_grad_enabled()
        cache = None if is_recomputed else past_key_values
        hidden_states = self._transform(
            hidden_states, cache, attention_mask, region, position_ids=position_ids, use_cache=use_cache, **kwargs
        )
        first, second, width = hidden_states.shape
        shape = (*batch_shape, second, width) if region is None else (first, *batch_shape, width)
        return BaseModelOutputWithPastAndCrossAttentions(
            last_hidden_state=hidden_states.view(*shape),
            **{CACHE: past_key_values if use_cache else None},
        )

    def _transform(
        self,
        hidden_states: torch.Tensor,
        past_key_values: Cache | None,
        attention_mask: torch.Tensor | None,
        region: SequenceParallelRegion | None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """Run everything from the embedding dropout to the final norm.

        The sum of the embeddings [B, S, H], replicated, to [B, S, H], replicated, or with a region to [S_p, B, H],
        split on the sequence. The other arguments are those of the attention.
        """
        if region is not None:
            hidden_states = region.scatter(hidden_states)
        hidden_states = self.drop(hidden_states, region)
        for block in self.h:
            hidden_states = block(hidden_states, past_key_values, attention_mask, region=region, **kwargs)
        if region is not None:
            region = region.sharing(replicated_parameters(self.ln_f))
        normalised: torch.Tensor = self.ln_f(hidden_states, region)
        return normalised
