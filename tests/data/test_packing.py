"""Documents packed into full sequences."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_megatron.errors import DataError
from hf_megatron.paper.data import PackedDocuments


@settings(deadline=None)
@given(sizes=st.lists(st.integers(0, 9), min_size=3, max_size=20), length=st.integers(2, 7))
def test_every_token_is_predicted_once(sizes: list[int], length: int) -> None:
    """Catches tokens lost or learnt twice between sequences, a document without its end, and an empty one with one."""
    documents = [list(range(10 * i, 10 * i + size)) for i, size in enumerate([9, *sizes])]
    tokens = [token for document in documents if document for token in [*document, 1000]]
    packed = PackedDocuments(documents, length=length, end_of_document=1000)
    predicted = []
    for i in range(len(packed)):
        example = packed[i]
        assert example["input_ids"].tolist() == example["labels"].tolist()
        assert example["input_ids"].shape == (length,)
        predicted += example["labels"].tolist()[1:]  # the model shifts them
    assert predicted == tokens[1 : len(predicted) + 1]
    assert len(tokens) - 1 - len(predicted) < length - 1


@pytest.mark.parametrize(("documents", "length"), [([], 4), ([[1, 2]], 4), ([[1, 2]], 1)])
def test_too_little_text_is_refused(documents: list[list[int]], length: int) -> None:
    """Catches a data set of nothing, over which training would end at once."""
    with pytest.raises(DataError, match=rf"tokens do not make a sequence of {length}"):
        PackedDocuments(documents, length=length, end_of_document=99)
