"""Routing, permuting, multiplying by expert: against loops over tokens."""

from __future__ import annotations

import doctest

import pytest
import torch

from corelib.primitives import take_rows as take_rows_module
from corelib.primitives.expert_permute import (
    grouped_matmul,
    load_balance_loss,
    permute,
    route_topk,
    sort_by_expert,
    unpermute,
)
from corelib.primitives.take_rows import take_rows

EXACT = dict(atol=1e-11, rtol=1e-11)


def random_experts(N, k, E, dropped=0, seed=0):
    """Different experts for each token; the last of them gets nothing."""
    generator = torch.Generator().manual_seed(seed)
    experts = torch.rand(N, max(1, E - 1), generator=generator).argsort(1)[:, :k]
    experts[:dropped, -1] = -1
    return experts


def wide(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


CASES = [(1, 1, 1, 0), (13, 2, 5, 0), (40, 3, 4, 7), (9, 1, 3, 9), (0, 2, 4, 0)]


def test_routing_by_hand():
    routing = route_topk(torch.tensor([[1.0, 3.0, 2.0]]).log(), 2)
    assert routing.experts.tolist() == [[1, 2]]
    torch.testing.assert_close(routing.weights, torch.tensor([[0.6, 0.4]]))
    torch.testing.assert_close(routing.probabilities, torch.tensor([[1 / 6, 3 / 6, 2 / 6]]))
    assert (route_topk(wide(5, 4), 1).weights == 1).all()


def test_half_precision_is_routed_in_float32():
    routing = route_topk(wide(50, 8).bfloat16(), 2)
    assert routing.weights.dtype == torch.bfloat16
    assert routing.probabilities.dtype == torch.float32


def test_balance_loss_by_hand_and_at_its_least():
    probabilities = torch.tensor([[0.7, 0.3], [0.6, 0.4], [0.2, 0.8]])
    experts = torch.tensor([[0], [0], [1]])
    wanted = 2 * (2 / 3 * 0.5 + 1 / 3 * 0.5)
    torch.testing.assert_close(load_balance_loss(probabilities, experts).item(), wanted)
    even = load_balance_loss(torch.full((4, 4), 0.25), torch.arange(4)[:, None])
    assert even.item() == 1
    masked = torch.cat([experts, torch.tensor([[-1]])])
    longer = torch.cat([probabilities, torch.tensor([[1.0, 0.0]])])
    torch.testing.assert_close(load_balance_loss(longer, masked).item(), wanted)


def test_balance_loss_pulls_towards_balance():
    logits = wide(60, 4).requires_grad_()
    routing = route_topk(logits + torch.tensor([3.0, 0, 0, 0]), 2)
    (grad,) = torch.autograd.grad(load_balance_loss(*routing[::-2]), logits)
    assert grad.sum(0)[0] > 0 and (grad.sum(0)[1:] < 0).all()


def test_balance_loss_equals_a_loop():
    routing = route_topk(wide(50, 5), 2)
    chosen = [routing.experts.flatten().tolist().count(e) / 100 for e in range(5)]
    mean = [sum(routing.probabilities[:, e].tolist()) / 50 for e in range(5)]
    wanted = 5 * sum(f * p for f, p in zip(chosen, mean, strict=True))
    found = load_balance_loss(routing.probabilities, routing.experts).item()
    assert found == pytest.approx(wanted, rel=1e-12)


@pytest.mark.parametrize("case", CASES)
def test_rows_stand_by_expert_in_the_order_of_tokens(case):
    N, k, E, dropped = case
    experts = random_experts(*case)
    plan = sort_by_expert(experts, E)
    wanted = [(e, n) for e in range(E) for n in range(N) if e in experts[n].tolist()]
    starts = plan.cu_seqlens.tolist()
    found = [
        (e, int(plan.order[i]) // k) for e in range(E) for i in range(starts[e], starts[e + 1])
    ]
    assert found == wanted and len(plan.order) == N * k - dropped
    for n, j in ((n, j) for n in range(N) for j in range(k)):
        row = int(plan.place[n, j])
        assert (row == -1) == (experts[n, j] == -1)
        assert row == -1 or plan.order[row] == n * k + j


@pytest.mark.parametrize("case", CASES)
def test_permute_and_back_with_gradients(case):
    N, k, E, _ = case
    experts, x, weights = random_experts(*case), wide(N, 3), wide(N, k, seed=1)
    plan = sort_by_expert(experts, E)
    leaves = [x.requires_grad_(), weights.requires_grad_()]
    rows = permute(x, plan)
    torch.testing.assert_close(rows, x[plan.order // k], **EXACT)
    scaled = rows * torch.arange(1.0, len(rows) + 1, dtype=rows.dtype)[:, None]
    out = unpermute(scaled, plan, weights)
    place = plan.place
    factor = torch.where(place < 0, 0.0, (place + 1).double()) * weights
    wanted = x * factor.sum(1, keepdim=True)
    torch.testing.assert_close(out, wanted, **EXACT)
    for got, want in zip(
        torch.autograd.grad(out.cos().sum(), leaves, retain_graph=True),
        torch.autograd.grad(wanted.cos().sum(), leaves),
        strict=True,
    ):
        torch.testing.assert_close(got, want, **EXACT)
    torch.testing.assert_close(
        unpermute(scaled, plan), unpermute(scaled, plan, torch.ones_like(weights)), **EXACT
    )


def test_gradcheck():
    plan = sort_by_expert(random_experts(4, 2, 4, dropped=1), 4)
    x, weights, matrices = (
        t.requires_grad_() for t in (wide(4, 2), wide(4, 2, seed=1), wide(4, 2, 3))
    )

    def run(x, weights, matrices):
        rows = grouped_matmul(permute(x, plan), matrices, plan.cu_seqlens)
        return unpermute(rows, plan, weights)

    assert torch.autograd.gradcheck(run, (x, weights, matrices))


@pytest.mark.parametrize("case", CASES)
def test_a_layer_of_experts_equals_a_loop_over_tokens(case):
    N, k, E, _ = case
    experts, x, weights = random_experts(*case), wide(N, 3), wide(N, k, seed=1)
    matrices = wide(E, 3, 4)
    plan = sort_by_expert(experts, E)
    out = unpermute(grouped_matmul(permute(x, plan), matrices, plan.cu_seqlens), plan, weights)
    wanted = torch.zeros(N, 4, dtype=torch.float64)
    for n, j in ((n, j) for n in range(N) for j in range(k) if experts[n, j] >= 0):
        wanted[n] += weights[n, j] * (x[n] @ matrices[experts[n, j]])
    torch.testing.assert_close(out, wanted, **EXACT)


def test_what_goes_nowhere_touches_nothing():
    experts = torch.tensor([[0, 1], [-1, -1], [1, -1]])
    x = wide(3, 2)
    x[1] = torch.nan
    plan = sort_by_expert(experts, 2)
    out = unpermute(permute(x, plan), plan, torch.ones(3, 2, dtype=torch.float64))
    torch.testing.assert_close(out, torch.stack([2 * x[0], 0 * x[0], x[2]]), **EXACT)


def test_an_expert_without_tokens_gets_a_gradient_of_zeros():
    rows, weights = wide(3, 2), wide(3, 2, 2).requires_grad_()
    out = grouped_matmul(rows, weights, torch.tensor([0, 2, 2, 3]))
    (grad,) = torch.autograd.grad(out.sum(), weights)
    assert not grad[1].any() and grad[0].all()


def test_take_rows_example_and_gradient():
    assert not doctest.testmod(take_rows_module).failed
    x = wide(3, 2).requires_grad_()
    index, inverse = torch.tensor([2, 0, -1, 2]), torch.tensor([[1, -1], [-1, -1], [0, 3]])
    wanted = torch.where((index < 0)[:, None], 0.0, x[index])
    torch.testing.assert_close(take_rows(x, index, inverse), wanted, **EXACT)
    grads = [
        torch.autograd.grad((y.sin() * wide(4, 2, seed=2)).sum(), x)[0]
        for y in (take_rows(x, index, inverse), wanted)
    ]
    torch.testing.assert_close(*grads, **EXACT)


PLAN = sort_by_expert(torch.tensor([[0], [1]]), 2)
BAD = {
    "k": (lambda: route_topk(torch.zeros(2, 3), 4), "k: expected 1 to 3 experts, got 4"),
    "experts": (lambda: sort_by_expert(torch.tensor([[2]]), 2), "experts: expected -1 to 1"),
    "axes": (lambda: sort_by_expert(torch.tensor([2]), 2), r"experts: expected integers \(N, k\)"),
    "x": (lambda: permute(torch.zeros(3, 2), PLAN), r"x: expected shape \(2, C\)"),
    "rows": (lambda: unpermute(torch.zeros(1, 2), PLAN), r"rows: expected shape \(2, C\)"),
    "weights": (
        lambda: unpermute(torch.zeros(2, 2), PLAN, torch.ones(2, 2)),
        r"weights: expected shape \(2, 1\)",
    ),
    "matrices": (
        lambda: grouped_matmul(torch.zeros(2, 2), torch.zeros(2, 3, 1), PLAN.cu_seqlens),
        r"weights: expected shape \(2, 2, O\)",
    ),
    "inverse": (
        lambda: take_rows(torch.zeros(2, 2), torch.zeros(1).long(), torch.zeros(1, 1).long()),
        "inverse: expected 2 rows",
    ),
}


@pytest.mark.no_shape_checks
@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_named(case):
    call, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        call()
