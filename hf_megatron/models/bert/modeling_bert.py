"""BERT with attention, MLP, embedding and masked-LM head sharded over tensor-parallel ranks.

One set of classes for both placements of the LayerNorms: ``pre`` is the paper's rearranged BERT and equals stock
MegatronBert, ``post`` is the original and equals stock Bert. The classes derive from transformers' Bert, whose masks,
outputs and heads they keep; names and shapes of the parameters are the stock ones of either.

Shapes: B batch, S sequence, H hidden, V vocabulary, P ranks; ``_p`` marks this rank's part.

Source: Shoeybi et al. 2019, arXiv:1909.08053, sections 3 and 5.3, figure 7.
"""

from __future__ import annotations

from functools import wraps
from typing import Any

import torch
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import (
    BaseModelOutputWithPastAndCrossAttentions,
    BaseModelOutputWithPoolingAndCrossAttentions,
)
from transformers.models.bert.modeling_bert import (
    BertEmbeddings,
    BertEncoder,
    BertModel,
    BertPooler,
    BertPreTrainedModel,
)
from transformers.pytorch_utils import apply_chunking_to_forward

from hf_megatron.architectures import Architecture
from hf_megatron.errors import UnsupportedError
from hf_megatron.models.activations import activation
from hf_megatron.models.attention import ParallelAttention
from hf_megatron.models.bert.configuration_bert import MegatronBertConfig, table_of_placement
from hf_megatron.models.forward import base_forward
from hf_megatron.models.forward_arguments import refuse_arguments
from hf_megatron.models.masks import bidirectional_mask
from hf_megatron.models.pretrained import MegatronModelMixin
from hf_megatron.tensor_parallel import (
    ColumnParallelLinear,
    HiddenDropout,
    ReplicatedEmbedding,
    ReplicatedLayerNorm,
    ReplicatedLinear,
    RowParallelLinear,
    SequenceParallelRegion,
    VocabParallelEmbedding,
    column_parallel_linear,
    replicated_parameters,
)

_LAYER = "encoder.layer.*"


def _table(config: MegatronBertConfig) -> Architecture:
    return table_of_placement(config.layernorm_placement)


def _norm(config: MegatronBertConfig, *, placement: str) -> nn.Module:
    """A LayerNorm if the configuration's placement has one here, else a no-op."""
    if config.layernorm_placement != placement:
        return _NoNorm()
    return ReplicatedLayerNorm(config.hidden_size, eps=config.layer_norm_eps)


class _NoNorm(nn.Identity):
    """No-op with the signature of a LayerNorm: returns its input."""

    def forward(self, x: torch.Tensor, region: SequenceParallelRegion | None = None) -> torch.Tensor:
        return x


class MegatronBertEmbeddings(BertEmbeddings):
    """Sum of word, position and token type embeddings: [B, S, H], replicated.

    Collective: all-reduce over tp, forward, for the words.
    """

    def __init__(self, config: MegatronBertConfig) -> None:
        nn.Module.__init__(self)
        hidden, positions = config.hidden_size, config.max_position_embeddings
        self.word_embeddings = VocabParallelEmbedding(config.vocab_size, hidden, padding_idx=config.pad_token_id)
        self.position_embeddings = ReplicatedEmbedding(positions, hidden)
        self.token_type_embeddings = ReplicatedEmbedding(config.type_vocab_size, hidden)
        self.LayerNorm = _norm(config, placement="post")
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.register_buffer("position_ids", torch.arange(positions).expand((1, -1)), persistent=False)
        self.register_buffer("token_type_ids", torch.zeros((1, positions), dtype=torch.long), persistent=False)


class MegatronBertSelfAttention(ParallelAttention):
    """Attention with three column-parallel projections (split by heads) behind one shared ``f``."""

    def __init__(self, config: MegatronBertConfig, layer_idx: int) -> None:
        head_dim = config.hidden_size // config.num_attention_heads
        super().__init__(
            config,
            num_heads=config.num_attention_heads,
            head_dim=head_dim,
            dropout=config.attention_probs_dropout_prob,
            scaling=head_dim**-0.5,
            is_causal=False,
            layer_idx=layer_idx,
        )
        self.query, self.key, self.value = (
            ColumnParallelLinear(
                config.hidden_size,
                config.hidden_size,
                specs=_table(config).module_specs(f"{_LAYER}.attention.self.{name}"),
            )
            for name in ("query", "key", "value")
        )

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        region: SequenceParallelRegion | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Attend with hidden states [B, S, H], replicated, or with a region [S_p, B, H], split on the sequence.

        Returns the context [B, S, H_p], split by heads, and the probabilities [B, N_p, S, S] where they are kept.

        Collective: those of :func:`column_parallel_linear`, once for all three projections.
        """
        layers = (self.query, self.key, self.value)
        if self.tp_group.size > 1 and all(isinstance(layer, ColumnParallelLinear) for layer in layers):
            query, key, value = column_parallel_linear(hidden_states, region, *layers)
        else:  # separately: no f to share, or an adapter or accelerate wraps the calls of a layer
            query, key, value = (layer(hidden_states, region) for layer in layers)
        return self.attend(query, key, value, attention_mask, region=region, **kwargs)


class MegatronBertOutput(nn.Module):
    """Row-parallel projection to the hidden size, dropout and residual; ``post`` normalizes the sum.

    Collective: all-reduce over tp, forward. With a region those of :class:`RowParallelLinear`.
    """

    def __init__(self, config: MegatronBertConfig, in_features: int, module: str) -> None:
        super().__init__()
        specs = _table(config).module_specs(f"{module}.dense")
        self.dense = RowParallelLinear(in_features, config.hidden_size, specs=specs)
        self.LayerNorm = _norm(config, placement="post")
        self.dropout = HiddenDropout(config.hidden_dropout_prob)

    def forward(
        self, hidden_states: torch.Tensor, residual: torch.Tensor, region: SequenceParallelRegion | None = None
    ) -> torch.Tensor:
        """[B, S, in_p] split on the last dim, and a residual [B, S, H], to [B, S, H].

        Residual and output are replicated or, with a region, split on the sequence.
        """
        added = self.dropout(self.dense(hidden_states, region), region)
        output: torch.Tensor = self.LayerNorm(residual + added, region)
        return output


class MegatronBertAttention(nn.Module):
    """Attention with its projections and residual: [B, S, H] to [B, S, H], laid out as :class:`MegatronBertLayer`'s."""

    def __init__(self, config: MegatronBertConfig, layer_idx: int) -> None:
        super().__init__()
        self.ln = _norm(config, placement="pre")
        self.self = MegatronBertSelfAttention(config, layer_idx)
        self.output = MegatronBertOutput(config, config.hidden_size, f"{_LAYER}.attention.output")

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        region: SequenceParallelRegion | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """As the class says.

        Collective: all-reduce over tp, forward; all-reduce over tp, backward. With a region those of the layers.
        """
        context, _ = self.self(self.ln(hidden_states, region), attention_mask, region, **kwargs)
        output: torch.Tensor = self.output(context, hidden_states, region)
        return output


class MegatronBertIntermediate(nn.Module):
    """Column-parallel H to 4H and the activation: [B, S, H] to [B, S, 4H_p], split on the last dim."""

    def __init__(self, config: MegatronBertConfig) -> None:
        super().__init__()
        specs = _table(config).module_specs(f"{_LAYER}.intermediate.dense")
        self.dense = ColumnParallelLinear(config.hidden_size, config.intermediate_size, specs=specs)
        self.intermediate_act_fn = activation(config.hidden_act)

    def forward(self, hidden_states: torch.Tensor, region: SequenceParallelRegion | None = None) -> torch.Tensor:
        """As the class says; the input is replicated or, with a region, split on the sequence.

        Collective: all-reduce over tp, backward. With a region those of :class:`ColumnParallelLinear`.
        """
        output: torch.Tensor = self.intermediate_act_fn(self.dense(hidden_states, region))
        return output


class MegatronBertLayer(GradientCheckpointingLayer):
    """One layer: [B, S, H] to [B, S, H], both replicated or, with a region, split on the sequence."""

    def __init__(self, config: MegatronBertConfig, layer_idx: int) -> None:
        super().__init__()
        self.chunk_size_feed_forward = config.chunk_size_feed_forward
        self.attention = MegatronBertAttention(config, layer_idx)
        self.ln = _norm(config, placement="pre")
        self.intermediate = MegatronBertIntermediate(config)
        self.output = MegatronBertOutput(config, config.intermediate_size, f"{_LAYER}.output")

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        encoder_hidden_states: None = None,
        *,
        encoder_attention_mask: None = None,
        past_key_values: None = None,
        cache: None = None,
        region: SequenceParallelRegion | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """The arguments of the stock layers; those of decoders are always None, as the base model refuses them.

        Collective: two all-reduces over tp, forward; two backward. With a region those of the layers, and one
        all-reduce over tp, backward, for the gradients of all norms and biases that are held whole.
        """
        if region is not None:
            region = region.sharing(replicated_parameters(self))
        hidden_states = self.attention(hidden_states, attention_mask, region, **kwargs)
        if region is not None:
            return self.feed_forward(hidden_states, region)
        output: torch.Tensor = apply_chunking_to_forward(
            self.feed_forward_chunk, self.chunk_size_feed_forward, 1, hidden_states
        )
        return output

    def feed_forward_chunk(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """The MLP on some of the positions: [B, S', H] to [B, S', H], both replicated."""
        return self.feed_forward(hidden_states, None)

    def feed_forward(self, hidden_states: torch.Tensor, region: SequenceParallelRegion | None) -> torch.Tensor:
        """The MLP: [B, S, H] to [B, S, H], laid out as the layer's."""
        inner = self.intermediate(self.ln(hidden_states, region), region)
        output: torch.Tensor = self.output(inner, hidden_states, region)
        return output


class MegatronBertEncoder(BertEncoder):
    """All layers, followed by a final norm with ``pre``.

    With a region the hidden states are split on the sequence from here to the end of it.
    """

    def __init__(self, config: MegatronBertConfig) -> None:
        nn.Module.__init__(self)
        self.config = config
        self.layer = nn.ModuleList([MegatronBertLayer(config, i) for i in range(config.num_hidden_layers)])
        self.ln = _norm(config, placement="pre")

    @wraps(BertEncoder.forward)
    def forward(
        self, hidden_states: torch.Tensor, *args: Any, region: SequenceParallelRegion | None = None, **kwargs: Any
    ) -> BaseModelOutputWithPastAndCrossAttentions:
        if region is None:
            outputs = super().forward(hidden_states, *args, **kwargs)
            outputs.last_hidden_state = self.ln(outputs.last_hidden_state)
        else:
            outputs = super().forward(region.scatter(hidden_states), *args, region=region, **kwargs)
            last = self.ln(outputs.last_hidden_state, region.sharing(replicated_parameters(self.ln)))
            outputs.last_hidden_state = region.gather(last)
        return outputs


class MegatronBertPooler(BertPooler):
    """tanh of a linear layer on the first token: [B, S, H] to [B, H], both replicated, without communication."""

    def __init__(self, config: MegatronBertConfig) -> None:
        nn.Module.__init__(self)
        self.dense = ReplicatedLinear(config.hidden_size, config.hidden_size)
        self.activation = nn.Tanh()


class MegatronBertPreTrainedModel(MegatronModelMixin, BertPreTrainedModel):
    """Base of the BERT classes."""

    config_class = MegatronBertConfig
    _no_split_modules = ["MegatronBertEmbeddings", "MegatronBertLayer"]  # noqa: RUF012 (transformers' class attribute)
    _supports_flex_attn = False
    _can_record_outputs = {  # noqa: RUF012
        "hidden_states": MegatronBertLayer,
        "attentions": MegatronBertSelfAttention,
    }

    @classmethod
    def architecture_of(cls, config: MegatronBertConfig) -> Architecture:
        return _table(config)

    def _init_pretrained(self, config: MegatronBertConfig) -> None:
        layout = getattr(config, "distributed_config", None)
        if config.chunk_size_feed_forward and layout is not None and layout.enable_sequence_parallel:
            raise UnsupportedError(
                f"chunk_size_feed_forward={config.chunk_size_feed_forward} with enable_sequence_parallel=True: ranks "
                "hold different positions, and cannot go through them in step. Set one of them to 0 or False."
            )
        super()._init_pretrained(config)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, MegatronBertEmbeddings):
            module.position_ids.copy_(torch.arange(module.position_ids.shape[-1]).expand((1, -1)))
            module.token_type_ids.zero_()


class MegatronBertModel(MegatronBertPreTrainedModel, BertModel):
    """The encoder without a head: returns hidden states, and the pooled first token if there is a pooler."""

    def __init__(self, config: MegatronBertConfig, add_pooling_layer: bool = True) -> None:
        self._init_pretrained(config)
        self.gradient_checkpointing = False
        self.embeddings = MegatronBertEmbeddings(config)
        self.encoder = MegatronBertEncoder(config)
        self.pooler = MegatronBertPooler(config) if add_pooling_layer else None
        self.post_init()

    def init_parallel_plans(self) -> None:
        """Same as the stock method, without the pooler in the plan if the model has none."""
        super().init_parallel_plans()
        if self.pooler is None:
            del self._tp_plan["pooler.dense"]

    def _create_attention_masks(
        self,
        attention_mask: torch.Tensor | None,
        encoder_attention_mask: None,
        embedding_output: torch.Tensor,
        *_: Any,
        **__: Any,
    ) -> tuple[Any, None]:
        return bidirectional_mask(self.config, embedding_output, attention_mask), None

    @base_forward
    @wraps(BertModel.forward)
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        encoder_hidden_states: None = None,
        encoder_attention_mask: None = None,
        past_key_values: None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPoolingAndCrossAttentions:
        refuse_arguments(
            "these models are encoders, without cross-attention and without a key-value cache",
            encoder_hidden_states=encoder_hidden_states,
            encoder_attention_mask=encoder_attention_mask,
            past_key_values=past_key_values,
        )
        outputs: BaseModelOutputWithPoolingAndCrossAttentions = super().forward(
            input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds, use_cache=use_cache, **kwargs
        )
        return outputs
