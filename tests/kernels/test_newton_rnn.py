"""The fused Newton rounds and their backward, interpreted, against plain PyTorch in float64."""

from __future__ import annotations

import pathlib

import pytest
import torch

from corelib.kernels.gates.interpreter import load_file
from corelib.state_space.pararnn import GRU, LSTM, newton_rnn, newton_trace, sequential_rnn
from corelib.testing import assert_same

shared = load_file(str(pathlib.Path(__file__).with_name("shared.py")))
RUN = "corelib.kernels.gates.cases:forward_backward"
KERNEL = "corelib.kernels.newton_rnn:newton_rnn"
TARGET = f"{__file__}:by_kernel"
CELLS = {"gru": GRU, "lstm": LSTM}


def by_kernel(x, weights, state, cell, iterations=1):
    from corelib.kernels.newton_rnn import newton_rnn

    return newton_rnn(cell, x, weights, state, iterations=iterations)


def inputs(cell, B, L, C, dtype=torch.float64, size=0.4):
    generator = torch.Generator().manual_seed(L)

    def rand(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    pair = CELLS[cell].tail
    found = rand(B, L, 3, C), size * rand(CELLS[cell].rows, C), rand(B, C, *pair)
    return [y.to(dtype) for y in found]


def seed_for(given):
    x, _, state = given
    shape = (*x.shape[:2], *state.shape[1:])
    generator = torch.Generator().manual_seed(1)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(x.dtype)


def expected(cell, given, iterations, d_out):
    """The primitive's rounds, and its adjoint at the states that they found."""
    leaves = [y.detach().double().requires_grad_() for y in given]
    out = newton_rnn(CELLS[cell], *leaves, iterations=iterations)
    return [out.detach(), *torch.autograd.grad(out, leaves, d_out.double())]


CASES = {  # sizes, rounds
    "gru, one of everything": ("gru", (1, 1, 1), 1),
    "gru, a guess only": ("gru", (1, 5, 3), 0),
    "gru, one block": ("gru", (1, 32, 2), 2),
    "gru, more than a block": ("gru", (2, 35, 3), 1),
    "gru, two blocks of channels": ("gru", (1, 3, 9), 1),
    "lstm, one of everything": ("lstm", (1, 1, 1), 1),
    "lstm, a guess only": ("lstm", (1, 5, 3), 0),
    "lstm, one block": ("lstm", (1, 16, 2), 1),
    "lstm, more than a block": ("lstm", (2, 17, 3), 1),
    "lstm, two blocks of channels": ("lstm", (1, 3, 9), 1),
}
NAMES = ("states", "d_x", "d_weights", "d_state")


@pytest.mark.parametrize("case", CASES)
def test_states_and_gradients(interpreter, case):
    """Also where two rounds are not enough: the same iterate, and the adjoint at it."""
    cell, sizes, iterations = CASES[case]
    given = inputs(cell, *sizes)
    options, d_out = dict(cell=cell, iterations=iterations), seed_for(given)
    (out,), grads = interpreter.call(RUN, TARGET, given, options, (d_out,))
    wanted = expected(cell, given, iterations, d_out)
    shared.assert_close(NAMES, (out, *grads), wanted, 1e-12)


@pytest.mark.parametrize("cell", CELLS)
def test_float32(interpreter, cell):
    given = inputs(cell, 1, 4, 3, dtype=torch.float32)
    d_out = torch.ones_like(seed_for(given))
    (out,), grads = interpreter.call(RUN, TARGET, given, dict(cell=cell), (d_out,))
    assert out.dtype == torch.float32
    assert_same((out, *grads), expected(cell, given, 1, d_out), tolerance=1e-5)


@pytest.mark.parametrize("cell", CELLS)
def test_enough_rounds_give_the_loop(interpreter, cell):
    given = inputs(cell, 1, 5, 2)
    out = interpreter.call(TARGET, *given, cell, 5)
    wanted = sequential_rnn(CELLS[cell], *given)
    torch.testing.assert_close(out, wanted, atol=1e-11, rtol=1e-11)
    first = newton_trace(CELLS[cell], *given, iterations=0)[0]
    assert (first - wanted).abs().max() > 0.01  # it had something to do


@pytest.mark.parametrize("cell", CELLS)
def test_saturated_gates(interpreter, cell):
    """Inputs of hundreds: gates wholly open or shut, nothing overflows."""
    x, weights, state = inputs(cell, 1, 5, 2)
    given = [100 * x, weights, state]
    d_out = seed_for(given)
    (out,), grads = interpreter.call(RUN, TARGET, given, dict(cell=cell), (d_out,))
    shared.assert_close(NAMES, (out, *grads), expected(cell, given, 1, d_out), 1e-12)


def through_strides(x, weights, state, cell):
    """Every argument a view with strides of its own."""
    return by_kernel(*(y.mT.contiguous().mT for y in (x, weights, state)), cell)


@pytest.mark.parametrize("cell", CELLS)
def test_strides(interpreter, cell):
    given = inputs(cell, 2, 4, 3)
    out = interpreter.call(f"{__file__}:through_strides", *given, cell)
    wanted = newton_rnn(CELLS[cell], *given, iterations=1)
    torch.testing.assert_close(out, wanted, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("sizes", [(0, 3, 4), (2, 0, 4)])
@pytest.mark.parametrize("cell", CELLS)
def test_nothing_to_do(interpreter, cell, sizes):
    given = inputs(cell, *sizes)
    d_out = seed_for(given)
    (out,), grads = interpreter.call(RUN, TARGET, given, dict(cell=cell), (d_out,))
    assert out.shape == d_out.shape and not any(y.any() for y in grads)


@pytest.mark.counted
@pytest.mark.parametrize("cell", CELLS)
def test_moves_the_bytes_that_it_says(interpreter, cell):
    from corelib.kernels.newton_rnn import forward_bytes
    from corelib.kernels.newton_rnn_backward import backward_bytes
    from corelib.measure import count_io

    given = inputs(cell, 1, 18, 3, dtype=torch.float32)
    forward = count_io(TARGET, *given, cell).bytes_moved
    both = count_io(RUN, TARGET, (*given, cell), None, (seed_for(given),)).bytes_moved
    assert forward == forward_bytes(cell, 1, 18, 3, iterations=1)
    assert both == forward + backward_bytes(cell, 1, 18, 3)


def test_launcher_uses_declared_tiles():
    from corelib.kernels.newton_rnn import FORWARD, SPECIALISATIONS
    from corelib.kernels.newton_rnn_backward import BACKWARD
    from corelib.kernels.newton_rnn_backward import SPECIALISATIONS as OF_BACKWARD

    for row in [*SPECIALISATIONS, *OF_BACKWARD]:
        tiles = FORWARD if row.direction == "forward" else BACKWARD
        tile = tiles["gru" if "gru" in row.kernel else "lstm"]
        assert (row.constexprs["BLOCK_T"], row.constexprs["BLOCK_C"]) == tile[:2]
        assert row.num_warps == tile.num_warps


BAD = {
    "cell": (lambda x, w, s: (("rnn", x, w), {}), ValueError, "cell: expected one of"),
    "axes": (lambda x, w, s: (("gru", x[0], w), {}), ValueError, "x: expected .B, L, 3, C."),
    "half": (lambda x, w, s: (("gru", x.half(), w), {}), TypeError, "x: expected float32"),
    "weights": (lambda x, w, s: (("lstm", x, w), {}), ValueError, "weights: expected .5, 2."),
    "kind": (lambda x, w, s: (("gru", x, w.float()), {}), ValueError, "weights: .* torch.float32"),
    "state": (lambda x, w, s: (("gru", x, w, s[:, :1]), {}), ValueError, "state: expected .1, 2."),
    "rounds": (lambda x, w, s: (("gru", x, w), dict(iterations=-1)), ValueError, "iterations: "),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_named(interpreter, case):
    change, error, message = BAD[case]
    args, options = change(*inputs("gru", 1, 5, 2))
    shared.assert_refused_where_it_runs(interpreter, KERNEL, args, error, message, **options)


def test_the_device_is_named():
    shared.assert_wants_cuda(KERNEL, ("gru", *inputs("gru", 1, 1, 1)[:2]))


def check():
    """What every mutant of the kernels has to get past."""
    from corelib.kernels.gates.cases import forward_backward

    for cell, sizes in (("gru", (2, 33, 9)), ("lstm", (2, 17, 9))):
        given = inputs(cell, *sizes)
        options, d_out = dict(cell=cell, iterations=1), seed_for(given)
        (out,), grads = forward_backward(TARGET, given, options, (d_out,))
        shared.assert_close(NAMES, (out, *grads), expected(cell, given, 1, d_out), 1e-11)


@pytest.mark.slow
@pytest.mark.parametrize("module", ["newton_rnn", "newton_rnn_backward"])
def test_mutants_are_caught(module):
    """A sample; ``limit=None`` runs all of them."""
    assert shared.survivors(module, f"{__file__}:check", limit=3) == []
