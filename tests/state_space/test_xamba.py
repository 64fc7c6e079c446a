"""XAMBA: sums as products, activations as tables, and Mamba-2 out of them."""

import doctest

import pytest
import torch
import torch.nn.functional as F

from corelib.state_space import xamba
from corelib.state_space.mamba2 import Mamba2Block
from corelib.state_space.xamba import (
    NpuMamba2,
    PiecewiseLinear,
    cumba,
    npuify,
    op_census,
    reduba,
    segment_sums,
    table_error,
)
from corelib.testing import conformance

EXACT = dict(atol=1e-12, rtol=1e-12)


def rand(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def make_block(groups=1):
    torch.manual_seed(0)
    return Mamba2Block(6, state=4, head_width=3, groups=groups, chunk=4).double()


def test_doctest():
    failures, tests = doctest.testmod(xamba)
    assert tests and not failures


@pytest.mark.parametrize("block", [None, 1, 4, 7, 100])
@pytest.mark.parametrize("dim", [0, 1, -1])
def test_cumba_is_cumsum(dim, block):
    x = rand(5, 9, 7)
    torch.testing.assert_close(cumba(x, dim, block=block), x.cumsum(dim), **EXACT)
    torch.testing.assert_close(cumba(x.float(), dim, block=block), x.float().cumsum(dim))


@pytest.mark.parametrize("block", [None, 16])
def test_integers_are_exact_in_float32(block):
    x = torch.randint(-50, 50, (3, 200), generator=torch.Generator().manual_seed(0)).float()
    assert torch.equal(cumba(x, block=block), x.cumsum(-1))


@pytest.mark.parametrize("block", [None, 4])
def test_backward_of_a_running_sum_runs_backwards(block):
    x, g = rand(3, 9).requires_grad_(), rand(3, 9, seed=1)
    (grad,) = torch.autograd.grad(cumba(x, block=block), x, g)
    torch.testing.assert_close(grad, cumba(g.flip(-1), block=block).flip(-1), **EXACT)


def test_edges():
    assert cumba(torch.zeros(2, 0)).shape == (2, 0)
    assert cumba(torch.ones(1)).tolist() == [1.0]
    assert reduba(torch.zeros(2, 0)).tolist() == [0.0, 0.0]


@pytest.mark.parametrize("dim", [0, 1, -1])
def test_reduba_is_sum(dim):
    x = rand(5, 9, 7).requires_grad_()
    torch.testing.assert_close(reduba(x, dim), x.sum(dim), **EXACT)
    (grad,) = torch.autograd.grad(reduba(x, dim).sum(), x)
    assert torch.equal(grad, torch.ones_like(x))


@pytest.mark.parametrize(("function", "curvature"), [(F.softplus, 0.25), (F.silu, 0.5)])
def test_tables_keep_their_promise(function, curvature):
    """The bound, that it is nearly reached, and four times less for twice the segments."""
    x = torch.linspace(-8, 8, 20_001, dtype=torch.float64)[:-1]
    errors = []
    for segments in (32, 64, 128):
        worst = (PiecewiseLinear(function, segments)(x) - function(x)).abs().max().item()
        bound = table_error(segments, curvature=curvature)
        assert 0.9 * bound < worst <= bound * (1 + 1e-9)
        errors.append(worst)
    assert errors[0] / errors[1] == pytest.approx(4, rel=0.1)
    assert errors[1] / errors[2] == pytest.approx(4, rel=0.1)


def test_numbers_of_the_card():
    assert table_error(64, curvature=0.25) == pytest.approx(1.95e-3, rel=0.01)
    assert table_error(64, curvature=0.5) == pytest.approx(3.9e-3, rel=0.01)


def test_tables_outside_their_range_and_at_the_knots():
    table = PiecewiseLinear(F.silu, 16, radius=4.0)
    far = torch.tensor([-1e30, -4.001, 4.0, 4.001, 1e30])
    assert table(far).tolist() == [0.0, 0.0, *far[2:].tolist()]
    knots = torch.linspace(-4, 4, 17, dtype=torch.float64)[:-1]
    torch.testing.assert_close(table(knots), F.silu(knots), **EXACT)
    assert table(torch.zeros(2, 3, dtype=torch.float32)).dtype == torch.float32


def test_segment_sums_are_sums_of_segments():
    steps = rand(2, 5)
    for cumsum in (torch.cumsum, cumba):
        found = segment_sums(steps, cumsum)
        for i in range(5):
            for j in range(5):
                wanted = steps[:, j + 1 : i + 1].sum(1) if j <= i else torch.tensor(-torch.inf)
                torch.testing.assert_close(found[:, i, j], wanted.expand(2).double(), **EXACT)


@pytest.mark.parametrize("rewritten", [False, True])
@pytest.mark.parametrize("L", [0, 1, 4, 9])
@pytest.mark.parametrize("groups", [1, 2])
def test_the_list_of_operations_is_the_block(groups, L, rewritten):
    """Sums as products change nothing; the state goes on where it stopped."""
    block, x = make_block(groups), rand(2, L, 6)
    sums = dict(cumsum=cumba, total=reduba) if rewritten else {}
    state = block(rand(2, 3, 6, seed=1))[1]
    wanted, wanted_state = block(x, state)
    got, got_state = NpuMamba2(block, **sums)(x, state)
    torch.testing.assert_close(got, wanted, atol=1e-10, rtol=1e-10)
    torch.testing.assert_close(tuple(got_state), tuple(wanted_state), atol=1e-10, rtol=1e-10)


def test_conformance():
    conformance(npuify(make_block()), rand(2, 9, 6))


def test_more_segments_come_closer():
    block, x = make_block(), rand(2, 9, 6)
    wanted, _ = block(x)
    errors = [
        ((npuify(block, segments=K)(x)[0] - wanted).norm() / wanted.norm()).item()
        for K in (32, 128, 512)
    ]
    assert errors[0] > 4 * errors[1] > 16 * errors[2] and errors[0] < 0.1


def test_census_of_both_graphs():
    """Nothing slow is left; before, there was."""
    block, x = make_block(), rand(1, 8, 6)
    slow = {"cumsum", "sum", "silu", "softplus"}
    for run in (lambda mixer: mixer(x), lambda mixer: mixer.step(x[:, 0], mixer.init_state(1))):
        before, after = op_census(run, NpuMamba2(block)), op_census(run, npuify(block))
        assert slow - set(before) in (set(), {"cumsum"})
        assert not slow & set(after)
    assert op_census(lambda: x.cumsum(1).sum() + 1) == {"cumsum": 1, "sum": 1, "add": 1}


@pytest.mark.no_shape_checks
def test_bad_input_is_named():
    with pytest.raises(ValueError, match="block: expected None or at least 1, got 0"):
        cumba(torch.ones(3), block=0)
    with pytest.raises(ValueError, match="segments: expected at least 1"):
        PiecewiseLinear(F.silu, 0)
    with pytest.raises(ValueError, match="radius: expected more than 0"):
        PiecewiseLinear(F.silu, 8, radius=0.0)
