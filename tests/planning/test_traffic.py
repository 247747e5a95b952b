"""Planned collectives are the ones that ranks really issue."""

import dataclasses
import itertools
from collections import Counter
from typing import Any

import pytest

from hf_megatron.architectures.presets import PRESETS
from hf_megatron.planning import MACHINES, PRECISIONS, ModelShape, Run, collectives, plan_memory
from hf_megatron.planning.traffic import Collective, seconds
from tests.live import on_live_ranks
from tests.models.collectives import Recorder
from tests.planning.models import forward, make_model, make_run, make_shape
from tests.tiers import cases

_OPERATIONS = {"allreduce_": "all-reduce", "_allgather_base_": "all-gather", "_reduce_scatter_base_": "reduce-scatter"}


@cases(
    "kind, tp_size, recompute, sequence_parallel",
    itertools.product(("gpt2", "bert-pre", "bert-post"), (2, 4), (False, True), (False, True)),
    [("gpt2", 2, False, False), ("gpt2", 2, True, True), ("bert-pre", 2, True, False), ("bert-post", 2, False, True)],
)
@on_live_ranks()
def test_collectives_of_a_step(kind: str, tp_size: int, recompute: bool, sequence_parallel: bool) -> None:
    """Catches a collective that is planned and not issued, issued and not planned, or of another size."""
    run = make_run(tp_size=tp_size, recompute="full" if recompute else "none", sequence_parallel=sequence_parallel)
    planned: Counter[tuple[str, int]] = Counter()
    for collective in collectives(make_shape(kind), run):
        assert collective.group == "tp"
        planned[collective.operation, collective.bytes] += collective.count
    model = make_model(kind, tp_size, sequence_parallel=sequence_parallel)
    if recompute:
        model.activation_checkpointing_enable()
    with Recorder() as recorder:
        forward(model, kind).loss.backward()
    # The recorder has seen the results, which of a reduce-scatter are the parts.
    seen = ((_OPERATIONS[name], size * tp_size if "scatter" in name else size) for name, size in recorder.seen)
    recorded = Counter(seen)
    assert recorded == planned, recorded


@pytest.mark.parametrize(("sequence_parallel", "operation"), [(False, "all-reduce"), (True, "reduce-scatter")])
@pytest.mark.parametrize(("kind", "left_out"), [("gpt2", 3), ("bert-post", 0)])
def test_recomputation_without_dropout(kind: str, left_out: int, sequence_parallel: bool, operation: str) -> None:
    """Catches a sum that recomputation leaves out, once in each of three layers, and the plan counts all the same."""
    run = make_run(tp_size=2, recompute="full", sequence_parallel=sequence_parallel)
    counts = [
        sum(c.count for c in collectives(make_shape(kind, dropout=p), run) if c.operation == operation)
        for p in (0.1, 0.0)
    ]
    assert counts[0] - counts[1] == left_out


def test_data_parallel_gradients_travel_once_per_step_and_fsdp_s_parameters_twice() -> None:
    """Catches traffic that grows with the micro-batches where it does not, and the other way around."""
    shape = make_shape("gpt2")
    parameters = plan_memory(shape, make_run()).parameters
    planned = list(collectives(shape, make_run(dp_size=4, accumulation=3)))
    assert sum(c.count * c.bytes for c in planned) == parameters
    fsdp = list(collectives(shape, make_run(dp_size=4, accumulation=3, fsdp=True)))
    assert {c.operation for c in fsdp} == {"all-gather", "reduce-scatter"}
    scattered = sum(c.count * c.bytes for c in fsdp if c.operation == "reduce-scatter")
    gathered = sum(c.count * c.bytes for c in fsdp if c.operation == "all-gather")
    assert scattered == 3 * parameters
    assert 3 * parameters < gathered < 6 * parameters  # what lies outside of the layers stays


def test_a_ring_sends_each_byte_almost_twice() -> None:
    """Catches a collective's payload taken for what travels, and a sum that costs no more than a gather."""
    expected: dict[Any, int] = {"all-reduce": 1400, "all-gather": 700}
    for operation, sent in expected.items():
        assert Collective(purpose="", operation=operation, group="tp", count=1, bytes=800).bytes_sent(8) == sent


def test_rings_that_leave_a_node_share_its_network() -> None:
    """Catches data-parallel traffic at the speed of the links inside a node."""
    machine = MACHINES["v100-32gb"]
    gradients = Collective(purpose="", operation="all-reduce", group="dp", count=1, bytes=10**9)
    run = make_run(tp_size=8, dp_size=2, precision=PRECISIONS["master"])
    inside = seconds(gradients, run, machine)
    across = seconds(gradients, make_run(tp_size=8, dp_size=4), machine)
    assert inside == pytest.approx(1e9 / machine.link_bandwidth, rel=0.01)
    assert across == pytest.approx(8 * 1.5e9 / machine.node_bandwidth, rel=0.01)


def test_heads_that_lie_on_two_ranks() -> None:
    """Catches traffic or work that a plan forgets: 25 heads over 2 ranks are 13 each, and 32 columns travel."""
    shape = ModelShape.from_config(PRESETS["gpt2-xl"].config)
    run = Run(tp_size=2, precision=PRECISIONS["fp32"])
    assert run.heads(shape) == 13
    exchanges = [c for c in collectives(shape, run) if c.operation == "exchange"]
    assert [(c.count, c.bytes, c.bytes_sent(2)) for c in exchanges] == [(48, size := 3 * 32 * 1024 * 4, size)] * 2
    assert not [c for c in collectives(shape, dataclasses.replace(run, tp_size=5)) if c.operation == "exchange"]
    assert dataclasses.replace(run, tp_size=5).heads(shape) == 5
