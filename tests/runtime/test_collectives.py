"""Every collective: its result, its gradient against one process, and the bytes it counts."""

import pytest
import torch

from corelib.runtime import (
    Ranks,
    all_gather,
    all_reduce,
    all_to_all,
    broadcast,
    count_traffic,
    reduce_scatter,
    ring_shift,
)

BYTES = 6 * 4 * 8  # of one rank's float64 tensor


@pytest.fixture(scope="module", params=[1, 2, 3])
def ranks(request):
    with Ranks(request.param, timeout=30) as started:
        yield started


def shards(size: int) -> torch.Tensor:
    """``(P, 6, 4)``: what each rank holds; 6 divides among 1, 2 and 3 ranks."""
    return torch.randn(
        size, 6, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(size)
    )


COLLECTIVES = {
    "all_reduce": (all_reduce, lambda x: x.sum(0).expand_as(x), lambda P: 2 * (P - 1) * BYTES // P),
    "all_gather": (
        lambda x: all_gather(x, 1),
        lambda x: torch.cat(list(x), 1).expand(len(x), -1, -1),
        lambda P: (P - 1) * BYTES,
    ),
    "reduce_scatter": (
        lambda x: reduce_scatter(x, 0),
        lambda x: torch.stack(x.sum(0).chunk(len(x), 0)),
        lambda P: (P - 1) * BYTES // P,
    ),
    "all_to_all": (
        lambda x: all_to_all(x, 0, 1),
        lambda x: torch.stack(
            [torch.cat([y.chunk(len(x), 0)[r] for y in x], 1) for r in range(len(x))]
        ),
        lambda P: (P - 1) * BYTES // P,
    ),
    "ring_shift": (ring_shift, lambda x: x.roll(1, 0), lambda P: BYTES if P > 1 else 0),
    "broadcast": (
        lambda x: broadcast(x, 0),
        lambda x: x[:1].expand_as(x),
        lambda P: (P - 1) * BYTES // P,
    ),
}


@pytest.mark.parametrize("name", COLLECTIVES)
def test_result_gradient_and_bytes_equal_one_process(ranks, name):
    collective, whole, sent = COLLECTIVES[name]
    x = shards(ranks.size)

    def on_rank(rank, x):
        mine = x[rank].clone().requires_grad_()
        with count_traffic() as traffic:
            out = collective(mine)
        weight = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out) * (rank + 1)
        ((out**2) * weight).sum().backward()
        return out, mine.grad, dict(traffic.sent)

    results = ranks.run(on_rank, x)
    full = x.clone().requires_grad_()
    expected = whole(full)
    loss = sum(
        (y**2 * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y) * (r + 1)).sum()
        for r, y in enumerate(expected)
    )
    loss.backward()
    for rank, (out, grad, counted) in enumerate(results):
        torch.testing.assert_close(out, expected[rank].detach(), rtol=0, atol=1e-12)
        torch.testing.assert_close(grad, full.grad[rank], rtol=0, atol=1e-12)
        assert counted.get(name, 0) == sent(ranks.size)
        assert set(counted) <= {name}


def test_inner_and_outer_counters_see_the_same(ranks):
    def nested(rank):
        with count_traffic() as outer:
            ring_shift(torch.zeros(3))
            with count_traffic() as inner:
                ring_shift(torch.zeros(3))
        return outer.total, inner.total, outer.calls["ring_shift"]

    each = 12 if ranks.size > 1 else 0
    assert ranks.run(nested) == [(2 * each, each, 2 if each else 0)] * ranks.size


@pytest.mark.no_shape_checks
def test_an_axis_that_does_not_divide_is_a_clear_error():
    with Ranks(2, timeout=30) as two, pytest.raises(Exception, match="does not divide among 2"):
        two.run(lambda rank: reduce_scatter(torch.zeros(3, 4), 0))


def test_outside_a_rank_is_a_clear_error():
    with pytest.raises(RuntimeError, match="run_ranks"):
        all_reduce(torch.zeros(1))
