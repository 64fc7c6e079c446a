"""Newton's method over the sequence: the states and gradients of the sequential RNN."""

import doctest

import pytest
import torch

from corelib.state_space import pararnn
from corelib.state_space.pararnn import (
    GRU,
    LSTM,
    newton_rnn,
    newton_trace,
    sequential_rnn,
)

EXACT = dict(atol=1e-10, rtol=1e-10)
CELLS = pytest.mark.parametrize("cell", [GRU, LSTM], ids=lambda cell: cell.name)


def inputs(cell, B=2, L=9, C=4, size=0.3, seed=0, state=True):
    generator = torch.Generator().manual_seed(seed)

    def rand(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    weights = size * rand(cell.rows, C)
    return rand(B, L, 3, C), weights, rand(B, C, *cell.tail) if state else None


def test_doctest():
    failures, tests = doctest.testmod(pararnn)
    assert tests and not failures


@CELLS
@pytest.mark.parametrize("L", [1, 2, 9, 70])
def test_states_and_gradients(cell, L):
    """Converged: equal to the loop, gradients to x, weights and first state equal to BPTT."""
    leaves = [y.requires_grad_() for y in inputs(cell, L=L)]
    got, wanted = newton_rnn(cell, *leaves, iterations=8), sequential_rnn(cell, *leaves)
    torch.testing.assert_close(got, wanted, **EXACT)
    seed = torch.randn(wanted.shape, generator=torch.Generator().manual_seed(1)).double()
    for x, y in zip(
        torch.autograd.grad(got, leaves, seed), torch.autograd.grad(wanted, leaves, seed)
    ):
        torch.testing.assert_close(x, y, **EXACT)


@CELLS
def test_jacobians(cell):
    """Against automatic differentiation, one position at a time."""
    x, weights, state = inputs(cell, B=1, L=1, size=1.0)
    after, J = cell.linearised(state, x[:, 0], weights)
    torch.testing.assert_close(after, cell.step(state, x[:, 0], weights), **EXACT)
    for c in range(4):

        def one(h, c=c):
            return cell.step(h, x[0, 0, :, c : c + 1], weights[:, c : c + 1])[0]

        wanted = torch.autograd.functional.jacobian(one, state[0, c : c + 1])
        wanted = wanted[0] if not cell.tail else wanted[:, 0]
        torch.testing.assert_close(J[0, c], wanted, **EXACT)


@CELLS
def test_first_states_are_exact_after_as_many_rounds(cell):
    """Even where Newton does not converge."""
    x, weights, state = inputs(cell, L=12, size=2.0)
    wanted = sequential_rnn(cell, x, weights, state)
    for k, h in enumerate(newton_trace(cell, x, weights, state, iterations=12)):
        torch.testing.assert_close(h[:, :k], wanted[:, :k], atol=1e-8, rtol=1e-8)


@CELLS
def test_three_rounds_do_for_small_weights_and_not_for_large_ones(cell):
    def error(size):
        x, weights, _ = inputs(cell, B=1, L=256, C=16, size=size, state=False)
        found = newton_rnn(cell, x, weights) - sequential_rnn(cell, x, weights)
        return found.abs().max().item()

    assert error(0.1) < 1e-6 < 1e-3 < error(2.0)


def test_error_falls_faster_and_faster():
    x, weights, _ = inputs(GRU, B=1, L=128, C=8, size=0.3, state=False)
    wanted = sequential_rnn(GRU, x, weights)
    errors = [(h - wanted).abs().max().item() for h in newton_trace(GRU, x, weights, iterations=4)]
    logs = torch.tensor(errors[1:4]).log10()
    assert logs.diff()[1] < 1.4 * logs.diff()[0] < 0


def test_gru_equals_torchs():
    """Diagonal matrices, the update gate's rows negated, no bias inside."""
    (x, weights, state), C = inputs(GRU), 4
    theirs = torch.nn.GRU(3 * C, C, batch_first=True).double()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.zero_()
        eye = torch.eye(C, dtype=torch.float64)
        for row, (gate, sign) in enumerate([(1, 1.0), (0, -1.0), (2, 1.0)]):  # theirs: r, z, n
            part = slice(row * C, (row + 1) * C)
            theirs.weight_ih_l0[part, gate * C : (gate + 1) * C] = sign * eye
            theirs.weight_hh_l0[part] = sign * torch.diag(weights[gate])
        wanted, _ = theirs(x.flatten(2), state[None])
    torch.testing.assert_close(newton_rnn(GRU, x, weights, state, iterations=9), wanted, **EXACT)


@CELLS
def test_an_empty_stretch(cell):
    x, weights, state = (y.requires_grad_() for y in inputs(cell, L=0))
    h = newton_rnn(cell, x, weights, state)
    assert h.shape == sequential_rnn(cell, x, weights, state).shape == (2, 0, 4, *cell.tail)
    grads = torch.autograd.grad(h.sum(), (x, weights, state))
    assert not any(g.any() for g in grads)


@pytest.mark.no_shape_checks
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (dict(x=torch.zeros(2, 9, 4).double()), ValueError, r"x: expected \(B, L, 3, C\)"),
        (dict(weights=torch.zeros(5, 4).double()), ValueError, r"weights: expected \(3, 4\)"),
        (dict(weights=torch.zeros(3, 4)), TypeError, "weights: expected x's dtype"),
        (dict(state=torch.zeros(2, 4, 2).double()), ValueError, r"state: expected \(2, 4\)"),
        (dict(iterations=-1), ValueError, "iterations: expected an int, at least 0"),
    ],
)
def test_bad_input_is_named(change, error, message):
    x, weights, state = inputs(GRU)
    with pytest.raises(error, match=message):
        newton_rnn(GRU, **dict(x=x, weights=weights, state=state) | change)
