"""The collator: the batch it makes, and that it can be made again, elsewhere too."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from hf_megatron.errors import DataError
from hf_megatron.paper.data import DataCollatorForMegatronBertPretraining as Collator
from hf_megatron.paper.data import NgramMasking, sentence_order_pairs
from tests.data.conftest import Document
from tests.models.architectures import PRE
from tests.models.reference import Pool

Batch = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def examples(tokenizer: PreTrainedTokenizerBase, documents: list[Document]) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(0)
    return list(sentence_order_pairs(documents, tokenizer, max_length=48, generator=generator))


def _is_equal(one: Batch, other: Batch) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_the_batch(tokenizer: PreTrainedTokenizerBase, examples: list[dict[str, Any]]) -> None:
    """Catches labels at padding, special or unmasked tokens, a masked token without its label, and wrong padding."""
    batch = Collator(tokenizer, seed=1)(examples[:40])
    longest = max(len(example["input_ids"]) for example in examples[:40])
    assert batch["input_ids"].shape == (40, longest)
    assert batch["sentence_order_label"].tolist() == [example["sentence_order_label"] for example in examples[:40]]
    words = NgramMasking(tokenizer)
    for row, example in enumerate(examples[:40]):
        ids, length = example["input_ids"], len(example["input_ids"])
        padding = longest - length
        seen, labels = batch["input_ids"][row].tolist(), batch["labels"][row].tolist()
        assert batch["attention_mask"][row].tolist() == [1] * length + [0] * padding
        assert batch["token_type_ids"][row].tolist() == example["token_type_ids"] + [0] * padding
        assert seen[length:] == [tokenizer.pad_token_id] * padding
        assert labels[length:] == [-100] * padding
        chosen = {position for position in range(length) if labels[position] != -100}
        assert all(labels[position] == ids[position] for position in chosen)
        assert all(seen[position] == ids[position] for position in set(range(length)) - chosen)
        whole = [word for word in words.words(ids) if chosen.issuperset(word)]
        assert chosen == {position for word in whole for position in word}
        assert 1 <= len(chosen) <= max(0.15 * (length - 3), min(map(len, words.words(ids))))


def test_positions_of_the_labels(tokenizer: PreTrainedTokenizerBase, examples: list[dict[str, Any]]) -> None:
    """Catches a label whose position is not given, or twice, and more fillers than the row with most labels needs."""
    batch = Collator(tokenizer, seed=1)(examples)
    labels, positions = batch["labels"], batch["masked_positions"]
    is_labelled = labels != -100
    assert positions.shape == (len(examples), is_labelled.sum(1).max())
    for row, given in enumerate(positions):
        assert len(set(given.tolist())) == len(given)
        assert set(is_labelled[row].nonzero()[:, 0].tolist()) <= set(given.tolist())


def test_examples_without_pairs(tokenizer: PreTrainedTokenizerBase) -> None:
    """Catches a collator that needs pairs, where MegatronBertForMaskedLM has none; tensors are taken as well."""
    plain = [tokenizer(text, return_token_type_ids=False) for text in ("the statement is executed", "an expression")]
    tensors = [{name: torch.tensor(ids) for name, ids in example.items()} for example in plain]
    batch = Collator(tokenizer, seed=1)(plain)
    assert set(batch) == {"input_ids", "attention_mask", "token_type_ids", "labels", "masked_positions"}
    assert not batch["token_type_ids"].any()
    assert _is_equal(batch, Collator(tokenizer, seed=1)(tensors))


def test_padding_to_a_multiple(tokenizer: PreTrainedTokenizerBase, examples: list[dict[str, Any]]) -> None:
    """Catches a length that is not a multiple, or one more multiple than needed."""
    for multiple, length in ((1, 48), (16, 48), (7, 49), (64, 64)):
        assert Collator(tokenizer, pad_to_multiple_of=multiple)(examples[:8])["labels"].shape == (8, length)


def test_a_seed_makes_a_stream_of_its_own(tokenizer: PreTrainedTokenizerBase, examples: list[dict[str, Any]]) -> None:
    """Catches masks that depend on what else draws random numbers, or that are the same in every epoch."""
    first, second = (Collator(tokenizer, seed=8) for _ in range(2))
    state = torch.get_rng_state()
    batches = [first(examples[:8]) for _ in range(2)]
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(99)
    assert all(_is_equal(batch, second(examples[:8])) for batch in batches)
    assert not _is_equal(*batches)
    assert not _is_equal(Collator(tokenizer, seed=9)(examples[:8]), batches[0])


def test_seeds_of_examples(tokenizer: PreTrainedTokenizerBase, examples: list[dict[str, Any]]) -> None:
    """Catches masks that depend on the batch an example is in, on its place there, or on what was drawn before."""
    seeded = [{**example, "masking_seed": number} for number, example in enumerate(examples[:8])]
    collate = Collator(tokenizer)
    state = torch.get_rng_state()
    whole = collate(seeded)
    assert torch.equal(torch.get_rng_state(), state)
    for part in (slice(4, 8), slice(7, None), slice(0, 1)):
        batch = collate(seeded[part])
        for name in ("input_ids", "labels"):
            here = batch[name].shape[1]
            assert torch.equal(batch[name], whole[name][part, :here]), name
    other = [{**example, "masking_seed": example["masking_seed"] + 100} for example in seeded]
    assert not _is_equal(collate(other), whole)


def test_no_seed_means_the_default_generator(
    tokenizer: PreTrainedTokenizerBase, examples: list[dict[str, Any]]
) -> None:
    """Catches masks that a resumed training, which restores that generator, would not see again."""
    batches = []
    for _ in range(2):
        torch.manual_seed(4)
        batches.append(Collator(tokenizer)(examples[:8]))
    assert _is_equal(*batches)


def test_workers_do_not_repeat_each_other(
    tokenizer: PreTrainedTokenizerBase, examples: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches DataLoader workers that all mask alike because each has a copy of the seed."""
    batches = []
    for worker in (None, SimpleNamespace(id=0), SimpleNamespace(id=1)):
        monkeypatch.setattr("hf_megatron.paper.data.masking.get_worker_info", lambda worker=worker: worker)
        batches.append(Collator(tokenizer, seed=8)(examples[:8]))
    assert _is_equal(batches[0], batches[1])
    assert not _is_equal(batches[1], batches[2])


def _batches_on_a_rank(directory: Path, examples: list[dict[str, Any]]) -> list[Batch]:
    tokenizer = AutoTokenizer.from_pretrained(directory)
    rank = torch.distributed.get_rank()
    torch.manual_seed(rank)
    with_seed = Collator(tokenizer, seed=1)(examples)
    PRE.build(2, config=PRE.config())  # loading a model puts the ranks in step
    return [with_seed, Collator(tokenizer)(examples)]


def test_same_batch_on_all_ranks(
    tokenizer: PreTrainedTokenizerBase, examples: list[dict[str, Any]], pool: Pool, tmp_path: Path
) -> None:
    """Catches ranks that mask other tokens: their shards would be trained on different batches, without an error."""
    tokenizer.save_pretrained(tmp_path)
    first, second = pool(2).run(_batches_on_a_rank, tmp_path, examples[:8])
    assert all(_is_equal(one, other) for one, other in zip(first, second, strict=True))
    assert _is_equal(first[0], Collator(tokenizer, seed=1)(examples[:8]))


def test_what_cannot_be_used_is_refused(tokenizer: PreTrainedTokenizerBase) -> None:
    """Catches a sequence that silently has no label, order labels of other examples, and None among the token ids."""
    collate = Collator(tokenizer)
    text = dict(tokenizer("the statement"))
    with pytest.raises(DataError, match="an example of 2 tokens has nothing but special ones"):
        collate([text, tokenizer("")])
    with pytest.raises(DataError, match="1 of 2 examples have a sentence_order_label"):
        collate([text, {**text, "sentence_order_label": 1}])
    with pytest.raises(DataError, match="has no pad token"):
        Collator(PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, mask_token="[MASK]"))
