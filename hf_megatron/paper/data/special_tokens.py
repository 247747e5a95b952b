"""The special tokens of a tokenizer that BERT's pretraining cannot do without."""

from __future__ import annotations

from transformers import PreTrainedTokenizerBase

from hf_megatron.errors import DataError


def special_token_id(tokenizer: PreTrainedTokenizerBase, name: str) -> int:
    """The id of the token that the tokenizer calls ``name``: ``cls``, ``sep``, ``mask`` or ``pad``.

    Raises:
        DataError: The tokenizer has no such token.
    """
    token_id: int | None = getattr(tokenizer, f"{name}_token_id")
    if token_id is None:
        raise DataError(
            f"{type(tokenizer).__name__} has no {name} token, which pretraining a BERT needs; take a BERT tokenizer, "
            f"or add one: tokenizer.add_special_tokens({{'{name}_token': '[{name.upper()}]'}})."
        )
    return token_id
