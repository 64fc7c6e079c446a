"""Collectives' times by hand, and schedules as Gantt charts."""

from __future__ import annotations

import pytest

from corelib.distributed.cost_model import (
    Link,
    busy_share,
    collective_seconds,
    makespan,
    messages,
    simulate,
)
from corelib.distributed.lightseq import balanced_schedule
from corelib.distributed.shared import ring_schedule

LINK = Link(latency=1e-5, bandwidth=1e9)


def test_a_message():
    assert LINK.seconds(1e6) == pytest.approx(1.01e-3)
    assert LINK.seconds(LINK.half_size) == pytest.approx(2 * LINK.latency)


def test_messages_send_what_the_runtime_counts():
    """Messages times their size is what `corelib.runtime` counts as sent by each rank."""
    n = 12_000
    for P in (1, 2, 3, 4):
        counted = {
            "ring_shift": n if P > 1 else 0,
            "all_gather": (P - 1) * n,
            "reduce_scatter": (P - 1) * n // P,
            "all_to_all": (P - 1) * n // P,
            "all_reduce": 2 * (P - 1) * n // P,
        }
        for name, sent in counted.items():
            count, size = messages(name, n, P)
            assert count * size == pytest.approx(sent)


def test_ring_or_tree():
    """Small tensors want few messages, large ones few bytes."""
    small, large = 1e3, 1e8
    for size, better, worse in (
        (small, "all_reduce, tree", "all_reduce"),
        (large, "all_reduce", "all_reduce, tree"),
    ):
        fast, slow = (collective_seconds(name, size, 16, LINK) for name in (better, worse))
        assert fast < slow
    assert collective_seconds("all_reduce, tree", 0, 16, LINK) == pytest.approx(8e-5)


@pytest.mark.parametrize("P", [2, 3, 4, 7, 8])
def test_makespans_are_the_schedules(P):
    """Own block half a unit, then a unit a step: P - 1 steps for the ring, P // 2 balanced."""
    ring, balanced = simulate(ring_schedule(P, causal=True)), simulate(balanced_schedule(P))
    assert makespan(ring) == P - 0.5
    assert makespan(balanced) == P // 2 + 0.5
    work = P * P / 2
    assert busy_share(ring) == pytest.approx(work / (P * (P - 0.5)))
    assert busy_share(balanced) == pytest.approx(work / (P * (P // 2 + 0.5)))


def test_prefetching_hides_a_transfer_that_is_shorter_than_a_block():
    schedule = balanced_schedule(7)
    hidden = makespan(simulate(schedule, transfer=0.5))
    assert hidden == makespan(simulate(schedule))
    assert makespan(simulate(schedule, transfer=0.5, prefetch=False)) == hidden + 3 * 0.5
    late = simulate(schedule, transfer=2.0)
    assert makespan(late) == pytest.approx(2.0 * 3 + 1)  # bound by the link
    assert any(task.kind == "waiting" for task in late)


@pytest.mark.no_shape_checks
def test_errors():
    with pytest.raises(ValueError, match="latency and bandwidth"):
        Link(-1, 1)
    with pytest.raises(ValueError, match="collective: expected one of ring_shift"):
        messages("gossip", 1, 2)
