"""GPT-2 with heads for language modeling and fine-tuning tasks.

The language-modeling head is cut along the vocabulary; those of the other tasks are replicated.

Shapes: B batch, S sequence, H hidden, V vocabulary; ``_p`` marks this rank's part.
"""

from __future__ import annotations

from functools import wraps
from typing import Any

import torch
from torch import nn
from transformers.cache_utils import Cache
from transformers.modeling_outputs import CausalLMOutputWithCrossAttentions
from transformers.models.gpt2.modeling_gpt2 import (
    GPT2ForQuestionAnswering,
    GPT2ForSequenceClassification,
    GPT2ForTokenClassification,
    GPT2LMHeadModel,
)
from transformers.utils import can_return_tuple

from hf_megatron.models.forward import region_of_call
from hf_megatron.models.forward_arguments import CACHE
from hf_megatron.models.generation import ParallelGenerationMixin
from hf_megatron.models.gpt2.configuration_gpt2 import MegatronGPT2Config
from hf_megatron.models.gpt2.modeling_gpt2 import MegatronGPT2Model, MegatronGPT2PreTrainedModel
from hf_megatron.models.heads import LOSS_ARGUMENTS, VocabParallelHead, VocabParallelLossMixin, next_token_labels
from hf_megatron.tensor_parallel import ReplicatedLinear


class MegatronGPT2LMHeadModel(
    VocabParallelLossMixin, ParallelGenerationMixin, MegatronGPT2PreTrainedModel, GPT2LMHeadModel
):
    """GPT-2 with the language-modeling head; training computes the loss without materializing logits."""

    accepts_loss_kwargs = True

    def __init__(self, config: MegatronGPT2Config) -> None:
        self._init_pretrained(config)
        self.loss_type = "ForCausalLM"  # labels are shifted, so Trainer counts only the predicted tokens
        self.transformer = MegatronGPT2Model(config)
        self.lm_head = VocabParallelHead(config.n_embd, config.vocab_size, is_tied=config.tie_word_embeddings)
        self.post_init()

    def get_output_embeddings(self) -> nn.Module | None:
        """The head if it is untied, else None."""
        return None if self.lm_head.weight is None else self.lm_head

    @can_return_tuple  # type: ignore[untyped-decorator]
    @wraps(GPT2LMHeadModel.forward)
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
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
        loss_arguments = {name: kwargs.pop(name) for name in LOSS_ARGUMENTS if name in kwargs}
        targets = kwargs.pop("shift_labels", None)
        if targets is not None and getattr(self, "_loss_function", None) is not None:
            loss_arguments["shift_labels"] = targets
        elif targets is None and labels is not None:
            targets = next_token_labels(labels, loss_arguments.get("ignore_index", -100))
        region, tied = region_of_call(self.transformer, input_ids, inputs_embeds), None
        if self._is_fused(labels):
            use_cache = bool(use_cache)  # the stock default would copy keys and values that nobody reads
            if inputs_embeds is None:
                input_ids, inputs_embeds, tied = self._embed_for_tied_head(self.lm_head, input_ids, attention_mask)
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
            region=region,
            **kwargs,
        )
        del inputs_embeds  # only the gradient's way back to them is needed, and the loss takes memory
        hidden_states = outputs.last_hidden_state
        if not isinstance(logits_to_keep, int) or logits_to_keep:
            if region is not None:
                hidden_states, region = region.gather(hidden_states), None
            kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
            hidden_states = hidden_states[:, kept, :]
        loss, logits = self._loss_and_logits(
            self.lm_head, hidden_states, labels, targets, loss_arguments=loss_arguments, region=region, tied=tied
        )
        return CausalLMOutputWithCrossAttentions(
            loss=loss,
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            **{CACHE: getattr(outputs, CACHE)},
        )


class MegatronGPT2ForSequenceClassification(MegatronGPT2PreTrainedModel, GPT2ForSequenceClassification):
    """GPT-2 for sequence classification from the last token; the head is replicated."""

    def __init__(self, config: MegatronGPT2Config) -> None:
        self._init_pretrained(config)
        self.num_labels = config.num_labels
        self.transformer = MegatronGPT2Model(config)
        self.score = ReplicatedLinear(config.n_embd, self.num_labels, bias=False)
        self.post_init()


class MegatronGPT2ForTokenClassification(MegatronGPT2PreTrainedModel, GPT2ForTokenClassification):
    """GPT-2 for token classification; the head is replicated."""

    def __init__(self, config: MegatronGPT2Config) -> None:
        self._init_pretrained(config)
        self.num_labels = config.num_labels
        self.transformer = MegatronGPT2Model(config)
        # The stock class looks for two settings that its config does not have, and then uses 0.1.
        candidates = (getattr(config, "classifier_dropout", None), getattr(config, "hidden_dropout", None), 0.1)
        self.dropout = nn.Dropout(next(p for p in candidates if p is not None))
        self.classifier = ReplicatedLinear(config.hidden_size, config.num_labels)
        self.post_init()


class MegatronGPT2ForQuestionAnswering(MegatronGPT2PreTrainedModel, GPT2ForQuestionAnswering):
    """GPT-2 for extractive question answering: predicts start and end; the head is replicated."""

    def __init__(self, config: MegatronGPT2Config) -> None:
        self._init_pretrained(config)
        self.num_labels = config.num_labels
        self.transformer = MegatronGPT2Model(config)
        self.qa_outputs = ReplicatedLinear(config.hidden_size, 2)
        self.post_init()
