"""BERT with heads for pretraining, masked language modeling and fine-tuning tasks.

The masked-LM head is cut along the vocabulary: its decoder is the word embedding's shard and its bias is cut likewise;
the small transform before it is replicated, as are the heads of the other tasks.

Shapes: B batch, S sequence, H hidden, V vocabulary; ``_p`` marks this rank's part.
"""

from collections.abc import Callable, Mapping
from functools import wraps
from typing import Any, Unpack

import torch
import torch.nn.functional as F
from torch import nn
from transformers.modeling_outputs import MaskedLMOutput
from transformers.models.bert.modeling_bert import (
    BertForMaskedLM,
    BertForMultipleChoice,
    BertForPreTraining,
    BertForPreTrainingOutput,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertForTokenClassification,
    BertPredictionHeadTransform,
)
from transformers.utils import TransformersKwargs, can_return_tuple

from hf_megatron.errors import UnsupportedError
from hf_megatron.models.activations import activation
from hf_megatron.models.bert.configuration_bert import MegatronBertConfig
from hf_megatron.models.bert.modeling_bert import MegatronBertModel, MegatronBertPreTrainedModel
from hf_megatron.models.heads import LOSS_ARGUMENTS, VocabParallelHead, VocabParallelLossMixin
from hf_megatron.partition import Spec, VocabSplit
from hf_megatron.tensor_parallel import ParallelModule, ReplicatedLayerNorm, ReplicatedLinear


class MegatronBertPredictionHeadTransform(BertPredictionHeadTransform):
    """Linear layer, activation and norm: [..., H] to [..., H], both replicated, without communication."""

    def __init__(self, config: MegatronBertConfig) -> None:
        nn.Module.__init__(self)
        self.dense = ReplicatedLinear(config.hidden_size, config.hidden_size)
        self.transform_act_fn = activation(config.prediction_head_act or config.hidden_act)
        self.LayerNorm = ReplicatedLayerNorm(config.hidden_size, eps=config.layer_norm_eps)


class MegatronBertLMPredictionHead(ParallelModule):
    """Masked-LM head, transform and decoder: [..., H] replicated to logits [..., V_p], split on the last dim."""

    def __init__(self, config: MegatronBertConfig) -> None:
        super().__init__()
        self.transform = MegatronBertPredictionHeadTransform(config)
        self.decoder = VocabParallelHead(
            config.hidden_size, config.vocab_size, is_tied=config.tie_word_embeddings, bias=True
        )
        # An untied decoder has two biases; the stock classes use the decoder's own and only store this one.
        self.bias = nn.Parameter(torch.zeros(config.vocab_size))

    def partition_specs(self) -> Mapping[str, Spec]:
        return {"bias": VocabSplit()}

    def forward(
        self, hidden_states: torch.Tensor, shared_weight: Callable[[], torch.Tensor], **loss_arguments: Any
    ) -> torch.Tensor:
        """As the class says; with ``labels`` the loss, see :class:`VocabParallelHead`.

        ``shared_weight`` gives the word embedding's weight [V_p, H], split on dim 0, for a tied decoder.

        Collective: all-reduce over tp, backward, of the gradient of the transform's output.
        """
        output: torch.Tensor = self.decoder(self.transform(hidden_states), shared_weight, self.bias, **loss_arguments)
        return output


class MegatronBertHeads(nn.Module):
    """The pretraining heads under their stock names; the second one exists if ``has_sentence_order``."""

    def __init__(self, config: MegatronBertConfig, *, has_sentence_order: bool) -> None:
        super().__init__()
        self.predictions = MegatronBertLMPredictionHead(config)
        if has_sentence_order:
            self.seq_relationship = ReplicatedLinear(config.hidden_size, 2)


class _MaskedLM(VocabParallelLossMixin, MegatronBertPreTrainedModel):
    """Shared methods of the two classes with a masked-LM head."""

    def get_output_embeddings(self) -> nn.Module | None:
        """The decoder if it is untied, else None."""
        decoder = self.cls.predictions.decoder
        return None if decoder.weight is None else decoder

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        self.cls.predictions.decoder = new_embeddings

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> nn.Embedding:
        """Resize the vocabulary and the decoder bias; new tokens get a bias of zero."""
        resized = super().resize_token_embeddings(*args, **kwargs)
        predictions, size = self.cls.predictions, resized.num_embeddings
        if predictions.bias.shape[0] != size:
            bias = F.pad(predictions.bias.detach()[:size], (0, max(0, size - predictions.bias.shape[0])))
            predictions.bias = nn.Parameter(bias, requires_grad=predictions.bias.requires_grad)
        return resized

    def _encode(
        self,
        input_ids: torch.Tensor | None,
        inputs_embeds: torch.Tensor | None,
        attention_mask: torch.Tensor | None,
        labels: torch.Tensor | None,
        masked_positions: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Any, torch.Tensor | None, torch.Tensor | None]:
        """The encoder's outputs, the loss and the logits of the masked-LM head.

        In training with labels only the labelled positions are computed, about 15% of a masked batch, and there are no
        logits; otherwise the logits are [B, S, V], replicated. See :func:`_labelled` for ``masked_positions``.
        """
        loss_arguments = {name: kwargs.pop(name) for name in LOSS_ARGUMENTS if name in kwargs}
        predictions, tied, targets = self.cls.predictions, None, labels
        if self._is_fused(labels) and inputs_embeds is None:
            head = predictions.decoder
            input_ids, inputs_embeds, tied = self._embed_for_tied_head(head, input_ids, attention_mask)
        outputs = self.bert(input_ids, attention_mask=attention_mask, inputs_embeds=inputs_embeds, **kwargs)
        del inputs_embeds  # only the gradient's way back to them is needed, and the loss takes memory
        hidden_states = outputs.last_hidden_state
        if labels is not None and self._is_fused(labels):
            ignored = loss_arguments.get("ignore_index", -100)
            hidden_states, targets = _labelled(hidden_states, labels, masked_positions, ignored)
        loss, logits = self._loss_and_logits(
            predictions, hidden_states, labels, targets, loss_arguments=loss_arguments, tied=tied
        )
        return outputs, loss, logits


def _labelled(
    hidden_states: torch.Tensor, labels: torch.Tensor, positions: torch.Tensor | None, ignored: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The hidden states [..., H] and labels [...] of the positions to compute, of [B, S, H] and [B, S], all replicated.

    ``positions`` [B, M] are those in each row that have a label, filled up with others. Without them they are looked
    for, which an accelerator has to be waited for, or in a compiled model all are computed.

    Raises:
        UnsupportedError: A label is at none of the positions.
    """
    if positions is None:
        if torch.compiler.is_compiling():  # how many labels there are is not known
            return hidden_states, labels
        is_labelled = labels != ignored
        return hidden_states[is_labelled], labels[is_labelled]
    chosen = labels.gather(1, positions)
    if positions.is_cpu and not torch.compiler.is_compiling():
        is_labelled = labels != ignored
        given, found = int(is_labelled.sum()), int((chosen != ignored).sum())
        missing = int(is_labelled.scatter(1, positions, False).sum())
        if missing or given != found:
            raise UnsupportedError(
                f"masked_positions: {given} positions have a label, of which {missing} are missing and "
                f"{found - given + missing} are given twice. Each must be there once, as "
                "DataCollatorForMegatronBertPretraining has them."
            )
    rows = positions[..., None].expand(-1, -1, hidden_states.shape[-1])
    return hidden_states.gather(1, rows), chosen


class MegatronBertForPreTraining(_MaskedLM, BertForPreTraining):
    """BERT with both pretraining heads: masked language modeling and sentence order."""

    def __init__(self, config: MegatronBertConfig) -> None:
        self._init_pretrained(config)
        self.bert = MegatronBertModel(config)
        self.cls = MegatronBertHeads(config, has_sentence_order=True)
        self.post_init()

    @can_return_tuple  # type: ignore[untyped-decorator]
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        next_sentence_label: torch.Tensor | None = None,
        sentence_order_label: torch.Tensor | None = None,
        # transformers' tests read this annotation, so annotations in this module are not strings.
        **kwargs: Unpack[TransformersKwargs],  # type: ignore[misc]
    ) -> BertForPreTrainingOutput:
        """Both heads, with the arguments of the stock class and some more.

        ``labels`` [B, S] are the masked tokens, -100 elsewhere. ``sentence_order_label`` [B], or by its stock name
        ``next_sentence_label``, is 0 if the sentences stand in their order and 1 if they are swapped. The masked-LM
        loss takes ``num_items_in_batch``, ``ignore_index`` and ``label_smoothing``, and in training
        ``masked_positions`` [B, M]: the positions with a label in each row, filled up with some without. With them
        nobody waits for an accelerator to count the labels.

        Returns:
            ``loss``, the sum of the losses whose labels are given; ``prediction_logits`` [B, S, V], None in training
            with ``labels``; ``seq_relationship_logits`` [B, 2]. All replicated.
        """
        if next_sentence_label is not None and sentence_order_label is not None:
            raise UnsupportedError("sentence_order_label and next_sentence_label are the same argument; give one.")
        order = sentence_order_label if next_sentence_label is None else next_sentence_label
        outputs, loss, logits = self._encode(
            input_ids,
            inputs_embeds,
            attention_mask,
            labels,
            token_type_ids=token_type_ids,
            position_ids=position_ids,
            **kwargs,
        )
        order_logits = self.cls.seq_relationship(outputs.pooler_output)
        if order is not None:
            order_loss = F.cross_entropy(order_logits.view(-1, 2), order.view(-1))
            loss = order_loss if loss is None else loss + order_loss
        return BertForPreTrainingOutput(
            loss=loss,
            prediction_logits=logits,
            seq_relationship_logits=order_logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


class MegatronBertForMaskedLM(_MaskedLM, BertForMaskedLM):
    """BERT with the masked-LM head."""

    accepts_loss_kwargs = True

    def __init__(self, config: MegatronBertConfig) -> None:
        self._init_pretrained(config)
        self.bert = MegatronBertModel(config, add_pooling_layer=False)
        self.cls = MegatronBertHeads(config, has_sentence_order=False)
        self.post_init()

    @can_return_tuple  # type: ignore[untyped-decorator]
    @wraps(BertForMaskedLM.forward)
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        encoder_hidden_states: None = None,
        encoder_attention_mask: None = None,
        labels: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> MaskedLMOutput:
        outputs, loss, logits = self._encode(
            input_ids,
            inputs_embeds,
            attention_mask,
            labels,
            token_type_ids=token_type_ids,
            position_ids=position_ids,
            encoder_hidden_states=encoder_hidden_states,
            encoder_attention_mask=encoder_attention_mask,
            **kwargs,
        )
        return MaskedLMOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )


class _Classifier(MegatronBertPreTrainedModel):
    """BERT with dropout and a linear layer, which is replicated."""

    _has_pooler = True
    _num_outputs: int | None = None  # the number of labels if None

    def __init__(self, config: MegatronBertConfig) -> None:
        self._init_pretrained(config)
        self.num_labels = config.num_labels
        self.bert = MegatronBertModel(config, add_pooling_layer=self._has_pooler)
        has_own_dropout = config.classifier_dropout is not None
        self.dropout = nn.Dropout(config.classifier_dropout if has_own_dropout else config.hidden_dropout_prob)
        self.classifier = ReplicatedLinear(config.hidden_size, self._num_outputs or config.num_labels)
        self.post_init()


class MegatronBertForSequenceClassification(_Classifier, BertForSequenceClassification):
    """BERT for sequence (pair) classification from the pooled first token."""


class MegatronBertForMultipleChoice(_Classifier, BertForMultipleChoice):
    """BERT for multiple choice: scores each candidate."""

    _num_outputs = 1


class MegatronBertForTokenClassification(_Classifier, BertForTokenClassification):
    """BERT for token classification."""

    _has_pooler = False


class MegatronBertForQuestionAnswering(MegatronBertPreTrainedModel, BertForQuestionAnswering):
    """BERT for extractive question answering: predicts start and end; the head is replicated."""

    def __init__(self, config: MegatronBertConfig) -> None:
        self._init_pretrained(config)
        self.num_labels = config.num_labels
        self.bert = MegatronBertModel(config, add_pooling_layer=False)
        self.qa_outputs = ReplicatedLinear(config.hidden_size, config.num_labels)
        self.post_init()
