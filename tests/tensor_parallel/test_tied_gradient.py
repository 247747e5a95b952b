"""The gradient of a weight that embeds words and predicts them, added up in one tensor on a CPU."""

from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from hf_megatron import MegatronGPT2Config, MegatronGPT2LMHeadModel
from hf_megatron.tensor_parallel import SINGLE, VocabParallelEmbedding, cpu, vocab_parallel_linear_cross_entropy
from hf_megatron.tensor_parallel.cpu import TiedGradient, row_blocks
from tests.tensor_parallel.ranks import assert_close

V, H, PADDING = 13, 6, 3
USES: list[dict[str, Any]] = [{"is_detached": True}]
USES += [{"backwards": backwards} for backwards in ((True,), (True, True), (False,), (True, False))]
IDS = torch.tensor([[0, 7, PADDING, 12], [12, 7, 7, 5]])  # some of them several times


class _Whole(TorchDispatchMode):
    """Counts the tensors as large as the weight that operations make; views and sums in place make none."""

    count: int = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        is_new = all(returned.alias_info is None for returned in func._schema.returns)
        self.count += is_new and isinstance(out, torch.Tensor) and out.numel() == V * H and not out.is_sparse
        return out


def _gradient(
    *, is_tied: bool, padding: int | None = None, is_detached: bool = False, backwards: tuple[bool, ...] = (True,)
) -> tuple[torch.Tensor, int]:
    """The weight's gradient after passes that begin at the head or not, and how many tensors of its size they make."""
    torch.manual_seed(0)
    embedding = VocabParallelEmbedding(V, H, padding_idx=padding).double()
    scale = torch.ones(H, dtype=torch.float64, requires_grad=True)
    tied = TiedGradient(embedding.weight) if is_tied else None
    embedded = embedding(IDS, tied)
    hidden_states = (embedded.detach() * scale if is_detached else embedded.sin() * scale).view(-1, H)
    weight = embedding.weight if tied is None else tied.for_head
    loss = vocab_parallel_linear_cross_entropy(
        SINGLE, hidden_states, weight, None, IDS.roll(1).view(-1), vocab_size=V, tied=tied
    )
    with _Whole() as whole:
        for begins_at_head in backwards:
            (loss if begins_at_head else embedded.square().sum()).backward(retain_graph=len(backwards) > 1)
    assert embedding.weight.grad is not None
    return embedding.weight.grad, whole.count


@pytest.mark.parametrize("padding", [None, PADDING])
@pytest.mark.parametrize("use", USES, ids=str)
def test_gradient_is_that_of_two(padding: int | None, use: dict[str, Any]) -> None:
    """Catches repeated tokens counted once, a padding row that learns, one of two gradients lost, or kept too long."""
    expected, _ = _gradient(is_tied=False, padding=padding, **use)
    actual, _ = _gradient(is_tied=True, padding=padding, **use)
    assert_close(actual, expected)


def test_the_switch_turns_it_off(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a path for CPUs that is taken whatever the switch says, and one that changes numbers."""
    model = MegatronGPT2LMHeadModel.from_config(MegatronGPT2Config(vocab_size=V, n_embd=H, n_layer=1, n_head=2), seed=0)
    gradients = []
    for is_on in (True, False):
        monkeypatch.setattr(cpu, "TUNED", is_on)
        assert len(row_blocks(torch.empty(2**17, 4))) == (2 if is_on else 1)
        model.zero_grad()
        with patch("hf_megatron.models.heads.TiedGradient", wraps=TiedGradient) as tied:
            torch.manual_seed(0)
            model(input_ids=IDS, labels=IDS).loss.backward()
        assert tied.call_count == is_on
        assert model.transformer.wte.weight.grad is not None
        gradients.append(model.transformer.wte.weight.grad)
    assert_close(gradients[0], gradients[1], 1e-6)


def test_no_second_gradient_is_made() -> None:
    """Catches a whole gradient for the lookups, and a sum that does not happen in place."""
    assert _gradient(is_tied=False)[1] > 0
    assert _gradient(is_tied=True)[1] == 0
