"""GPT-2 whose attention, MLP, embedding and head are cut over tensor-parallel ranks.

The classes derive from transformers' GPT-2, whose forwards, outputs, masks, generation and heads they keep; what is
replaced are the modules that hold parameters. Names and shapes of the parameters are the stock ones.

Shapes: B batch, S sequence, H hidden, N heads, V vocabulary, P ranks; ``_p`` marks this rank's part.

Source: Shoeybi et al. 2019, arXiv:1909.08053, sections 3 and 5.
"""

from __future__ import annotations

from functools import wraps
from math import sqrt
from typing import Any

import torch
from torch import nn
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache
from transformers.generation import GenerationMixin
from transformers.modeling_outputs import CausalLMOutputWithCrossAttentions
from transformers.models.gpt2.modeling_gpt2 import (
    GPT2Block,
    GPT2ForQuestionAnswering,
    GPT2ForSequenceClassification,
    GPT2ForTokenClassification,
    GPT2LMHeadModel,
    GPT2Model,
    GPT2PreTrainedModel,
)
from transformers.utils import can_return_tuple
from transformers.utils.output_capturing import OutputRecorder

from hf_megatron.models.gpt2.configuration_gpt2 import MegatronGPT2Config
from hf_megatron.models.pretrained import MegatronModelMixin
from hf_megatron.modules import (
    ParallelAttention,
    VocabParallelHead,
    causal_lm_loss,
    gathers_attentions,
    next_token_labels,
)
from hf_megatron.partition import GPT2, PartitionTable
from hf_megatron.tensor_parallel import (
    ColumnParallelLinear,
    ReplicatedEmbedding,
    ReplicatedLayerNorm,
    ReplicatedLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
    head_tp_plan_of,
    synchronize_random_state,
)

__all__ = [
    "MegatronGPT2ForQuestionAnswering",
    "MegatronGPT2ForSequenceClassification",
    "MegatronGPT2ForTokenClassification",
    "MegatronGPT2LMHeadModel",
    "MegatronGPT2Model",
    "MegatronGPT2PreTrainedModel",
]


class MegatronGPT2Attention(ParallelAttention):
    """Self-attention: Q, K and V by columns, which is by heads, and the output projection by rows."""

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
        self.resid_dropout = nn.Dropout(config.resid_pdrop)

    def forward(
        self,
        hidden_states: torch.Tensor,
        past_key_values: Cache | None = None,
        attention_mask: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Attend.

        Args:
            hidden_states: [B, S, H], replicated.
            past_key_values: Cache with this rank's heads.
            attention_mask: As for :meth:`ParallelAttention.attend`.
            **kwargs: For the attention kernel.

        Returns:
            [B, S, H], replicated, and the probabilities [B, N_p, S, S_k], split by heads, where they are kept.

        Collective: all-reduce over tp, forward, in ``c_proj``; all-reduce over tp, backward, in ``c_attn``.
        """
        query, key, value = self.c_attn(hidden_states).chunk(3, dim=-1)
        context, probabilities = self.attend(query, key, value, attention_mask, past_key_values, **kwargs)
        return self.resid_dropout(self.c_proj(context)), probabilities


class MegatronGPT2MLP(nn.Module):
    """H to 4H by columns, the activation on each rank's own columns, and back to H by rows."""

    def __init__(self, config: MegatronGPT2Config) -> None:
        super().__init__()
        hidden = config.hidden_size
        inner = config.n_inner if config.n_inner is not None else 4 * hidden
        self.c_fc = ColumnParallelLinear(hidden, inner, weight_layout="in_out", specs=GPT2.module_specs("h.*.mlp.c_fc"))
        self.c_proj = RowParallelLinear(
            inner, hidden, weight_layout="in_out", specs=GPT2.module_specs("h.*.mlp.c_proj")
        )
        self.act = ACT2FN[config.activation_function]
        self.dropout = nn.Dropout(config.resid_pdrop)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """[B, S, H] to [B, S, H], both replicated; in between [B, S, 4H_p], split on the last dim.

        Collective: all-reduce over tp, forward, in ``c_proj``; all-reduce over tp, backward, in ``c_fc``.
        """
        output: torch.Tensor = self.dropout(self.c_proj(self.act(self.c_fc(hidden_states))))
        return output


class MegatronGPT2Block(GPT2Block):
    """One layer; its input and output [B, S, H] are replicated, and so are norms, residuals and their dropout."""

    def __init__(self, config: MegatronGPT2Config, layer_idx: int) -> None:
        nn.Module.__init__(self)
        self.ln_1 = ReplicatedLayerNorm(config.hidden_size, eps=config.layer_norm_epsilon)
        self.attn = MegatronGPT2Attention(config, layer_idx)
        self.ln_2 = ReplicatedLayerNorm(config.hidden_size, eps=config.layer_norm_epsilon)
        self.mlp = MegatronGPT2MLP(config)


class MegatronGPT2PreTrainedModel(MegatronModelMixin, GPT2PreTrainedModel):
    """Base of the GPT-2 classes."""

    config_class = MegatronGPT2Config
    _no_split_modules = ["MegatronGPT2Block"]  # noqa: RUF012 (transformers' class attribute)
    _can_record_outputs = {  # noqa: RUF012
        "hidden_states": MegatronGPT2Block,
        "attentions": OutputRecorder(MegatronGPT2Attention, layer_name=".attn", index=1),
    }

    @classmethod
    def partition_table_of(cls, config: MegatronGPT2Config) -> PartitionTable:
        return GPT2

    def _initial_std(self, name: str) -> float:
        # GPT-2's scheme: what is added to the residual stream is scaled by 1/sqrt of the number of additions.
        std = super()._initial_std(name)
        return std / sqrt(2 * self.config.num_hidden_layers) if name.endswith("c_proj.weight") else std


class MegatronGPT2Model(MegatronGPT2PreTrainedModel, GPT2Model):
    """The bare transformer: hidden states out, no head."""

    def __init__(self, config: MegatronGPT2Config) -> None:
        self._init_pretrained(config)
        self.embed_dim = config.hidden_size
        self.wte = VocabParallelEmbedding(config.vocab_size, self.embed_dim)
        self.wpe = ReplicatedEmbedding(config.max_position_embeddings, self.embed_dim)
        self.drop = nn.Dropout(config.embd_pdrop)
        self.h = nn.ModuleList([MegatronGPT2Block(config, i) for i in range(config.num_hidden_layers)])
        self.ln_f = ReplicatedLayerNorm(self.embed_dim, eps=config.layer_norm_epsilon)
        self.gradient_checkpointing = False
        self.post_init()

    forward = gathers_attentions(GPT2Model.forward)


class MegatronGPT2LMHeadModel(MegatronGPT2PreTrainedModel, GPT2LMHeadModel):
    """GPT-2 with the language-modeling head, which in training computes the loss without the logits.

    Attributes:
        fuses_head_and_loss: Set to False, outputs have logits in training too, gathered on every rank.
    """

    fuses_head_and_loss = True
    _tp_plan = head_tp_plan_of(GPT2, "MegatronGPT2LMHeadModel")
    _tied_weights_keys = None  # a tied head has no parameter of its own
    has_vocab_parallel_loss = True
    accepts_loss_kwargs = True

    def __init__(self, config: MegatronGPT2Config) -> None:
        self._init_pretrained(config)
        self.loss_type = "ForCausalLM"  # labels are shifted: Trainer counts the predicted tokens only
        self.transformer = MegatronGPT2Model(config)
        self.lm_head = VocabParallelHead(config.n_embd, config.vocab_size, is_tied=config.tie_word_embeddings)
        self.post_init()

    def get_output_embeddings(self) -> nn.Module | None:
        """The head if it has a weight of its own."""
        return None if self.lm_head.weight is None else self.lm_head

    @can_return_tuple  # type: ignore[untyped-decorator]
    @wraps(GPT2LMHeadModel.forward)
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.LongTensor | None = None,
        position_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        encoder_hidden_states: torch.Tensor | None = None,
        encoder_attention_mask: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithCrossAttentions:
        loss_kwargs = {
            name: kwargs.pop(name)
            for name in ("shift_labels", "num_items_in_batch", "ignore_index", "label_smoothing")
            if name in kwargs
        }
        outputs = self.transformer(
            input_ids,
            past_key_values=past_key_values,
            attention_mask=attention_mask,
            token_type_ids=token_type_ids,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            encoder_hidden_states=encoder_hidden_states,
            encoder_attention_mask=encoder_attention_mask,
            use_cache=use_cache,
            **kwargs,
        )
        hidden_states = outputs.last_hidden_state
        if not isinstance(logits_to_keep, int) or logits_to_keep:
            kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
            hidden_states = hidden_states[:, kept, :]
        loss, logits = self._loss_and_logits(hidden_states, labels, loss_kwargs)
        return CausalLMOutputWithCrossAttentions(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    def _loss_and_logits(
        self, hidden_states: torch.Tensor, labels: torch.Tensor | None, loss_kwargs: dict[str, Any]
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """The loss, a scalar, if there are labels [B, S]; the logits [B, S, V], unless the loss is all it takes.

        All of them are replicated.
        """
        embedding, vocab_size = self.transformer.wte.weight, self.config.vocab_size
        own_loss = getattr(self, "_loss_function", None)  # set by ``model.loss_function = ...``
        if labels is not None and self.training and self.fuses_head_and_loss and own_loss is None:
            targets = loss_kwargs.pop("shift_labels", None)
            if targets is None:
                targets = next_token_labels(labels, loss_kwargs.get("ignore_index", -100))
            return self.lm_head.loss(hidden_states, targets, embedding, **loss_kwargs), None
        shard = self.lm_head(hidden_states, embedding)  # [B, S, V_p], split on the last dim
        logits = self.lm_head.gather(shard)
        if labels is None:
            return None, logits
        if own_loss is not None:
            return own_loss(logits, labels, vocab_size=vocab_size, **loss_kwargs), logits
        return causal_lm_loss(self.tp_group, shard, labels, vocab_size=vocab_size, **loss_kwargs), logits

    @wraps(GenerationMixin.generate)
    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """Stock ``generate``; every rank must call it, and sampling gives every rank the same tokens.

        Collective: broadcast over tp of the random state, once.
        """
        synchronize_random_state(self.tp_group, self.device)
        return super().generate(*args, **kwargs)


class MegatronGPT2ForSequenceClassification(MegatronGPT2PreTrainedModel, GPT2ForSequenceClassification):
    """GPT-2 that classifies a sequence by its last token; the head is replicated."""

    _tp_plan = head_tp_plan_of(GPT2, "MegatronGPT2ForSequenceClassification")

    def __init__(self, config: MegatronGPT2Config) -> None:
        self._init_pretrained(config)
        self.num_labels = config.num_labels
        self.transformer = MegatronGPT2Model(config)
        self.score = ReplicatedLinear(config.n_embd, self.num_labels, bias=False)
        self.post_init()


class MegatronGPT2ForTokenClassification(MegatronGPT2PreTrainedModel, GPT2ForTokenClassification):
    """GPT-2 that classifies every token; the head is replicated."""

    _tp_plan = head_tp_plan_of(GPT2, "MegatronGPT2ForTokenClassification")

    def __init__(self, config: MegatronGPT2Config) -> None:
        self._init_pretrained(config)
        self.num_labels = config.num_labels
        self.transformer = MegatronGPT2Model(config)
        # The stock class looks for two names, of which its config has neither, before it settles on 0.1.
        candidates = (getattr(config, "classifier_dropout", None), getattr(config, "hidden_dropout", None), 0.1)
        self.dropout = nn.Dropout(next(p for p in candidates if p is not None))
        self.classifier = ReplicatedLinear(config.hidden_size, config.num_labels)
        self.post_init()


class MegatronGPT2ForQuestionAnswering(MegatronGPT2PreTrainedModel, GPT2ForQuestionAnswering):
    """GPT-2 that marks the start and the end of an answer; the head is replicated."""

    _tp_plan = head_tp_plan_of(GPT2, "MegatronGPT2ForQuestionAnswering")

    def __init__(self, config: MegatronGPT2Config) -> None:
        self._init_pretrained(config)
        self.num_labels = config.num_labels
        self.transformer = MegatronGPT2Model(config)
        self.qa_outputs = ReplicatedLinear(config.hidden_size, 2)
        self.post_init()
