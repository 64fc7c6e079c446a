"""The diagonal scan's kernels, interpreted, against the loop in float64."""

from __future__ import annotations

import pathlib

import pytest
import torch

from corelib.kernels.gates.interpreter import load_file
from corelib.primitives.diagonal_scan import scan_reference
from corelib.testing import assert_same

shared = load_file(str(pathlib.Path(__file__).with_name("shared.py")))
RUN = "corelib.kernels.gates.cases:forward_backward"
KERNEL = "corelib.kernels.diagonal_scan:diagonal_scan"
TARGET = f"{__file__}:in_real_numbers"
NAMES = ("states", "d_decay", "d_x", "d_state")


def in_real_numbers(decay, x, state, reset=None, reverse=False):
    """The kernel; complex numbers come as ``(..., 2)``, so that the gate can differentiate."""
    from corelib.kernels.diagonal_scan import diagonal_scan

    if x.dim() == 3:
        return diagonal_scan(decay, x, reset=reset, state=state, reverse=reverse)
    decay, x, state = (torch.view_as_complex(y) for y in (decay, x, state))
    return torch.view_as_real(diagonal_scan(decay, x, reset=reset, state=state, reverse=reverse))


def inputs(B, L, C, is_complex=False, dtype=torch.float64, seed=0):
    """Decays of size below 1, inputs, a state before."""
    generator = torch.Generator().manual_seed(seed)
    tail = (2,) if is_complex else ()
    shapes = (B, L, C, *tail), (B, L, C, *tail), (B, C, *tail)
    decay, x, state = (
        torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes
    )
    return [y.to(dtype) for y in (0.6 * torch.tanh(decay), x, state)]


def expected(given, options, d_out):
    leaves = [y.double() for y in given]
    leaves = [torch.view_as_complex(y) for y in leaves] if given[1].dim() == 4 else leaves
    leaves = [y.requires_grad_() for y in leaves]
    decay, x, state = leaves
    out = scan_reference(decay, x, state=state, **options)
    seed = torch.view_as_complex(d_out.double()) if out.is_complex() else d_out.double()
    found = [out.detach(), *torch.autograd.grad(out, leaves, seed)]
    return [torch.view_as_real(y) if y.is_complex() else y for y in found]


def resets(B, L):
    return torch.rand(B, L, generator=torch.Generator().manual_seed(5)) < 0.2


CASES = {  # sizes, with resets, reversed
    "one of everything": ((1, 1, 1), False, True),
    "shorter than a block": ((2, 20, 3), True, True),
    "more than a block": ((1, 67, 19), False, False),
    "one block and a bit, complex": ((1, 33, 2, True), True, False),
    "one block and a bit, reversed": ((2, 33, 1), True, True),
    "one block, complex": ((1, 32, 3, True), False, True),
}


@pytest.mark.parametrize("case", CASES)
def test_states_and_gradients(interpreter, case):
    sizes, with_reset, reverse = CASES[case]
    given = inputs(*sizes)
    options = dict(reset=resets(*sizes[:2]) if with_reset else None, reverse=reverse)
    d_out = torch.randn(given[1].shape, generator=torch.Generator().manual_seed(1)).double()
    (out,), grads = interpreter.call(RUN, TARGET, given, options, (d_out,))
    shared.assert_close(NAMES, (out, *grads), expected(given, options, d_out), 1e-12)


@pytest.mark.parametrize("is_complex", [False, True])
def test_float32(interpreter, is_complex):
    given = inputs(1, 20, 3, is_complex, dtype=torch.float32)
    d_out = torch.ones_like(given[1])
    (out,), grads = interpreter.call(RUN, TARGET, given, None, (d_out,))
    assert out.dtype == torch.float32
    assert_same((out, *grads), expected(given, {}, d_out), tolerance=1e-5)


def one_decay_for_all(decay, x, state):
    """A row of decays, and inputs in another layout; its gradient adds up."""
    from corelib.kernels.diagonal_scan import diagonal_scan

    return diagonal_scan(decay, x.transpose(0, 1).contiguous().transpose(0, 1), state=state)


def test_one_decay_for_all_steps(interpreter):
    decay, x, state = inputs(2, 9, 5)
    given = [decay[0, 0].clone(), x, state]
    d_out = torch.ones_like(x)
    (out,), grads = interpreter.call(RUN, f"{__file__}:one_decay_for_all", given, None, (d_out,))
    shared.assert_close(NAMES, (out, *grads), expected(given, {}, d_out), 1e-11)


@pytest.mark.parametrize("sizes", [(0, 3, 4), (2, 0, 4), (2, 3, 0)])
def test_nothing_to_do(interpreter, sizes):
    given = inputs(*sizes)
    (out,), (d_decay, d_x, d_state) = interpreter.call(
        RUN, TARGET, given, None, (torch.zeros(sizes).double(),)
    )
    assert out.shape == d_decay.shape == d_x.shape == sizes and not d_state.any()


@pytest.mark.counted
def test_moves_no_more_than_it_has_to(interpreter):
    from corelib.kernels.diagonal_scan import forward_bytes
    from corelib.measure import count_io

    count = count_io(TARGET, *inputs(1, 40, 20, dtype=torch.float32))
    assert count.bytes_moved == forward_bytes(1, 40, 20)


@pytest.mark.counted
def test_backward_moves_no_more_than_it_has_to(interpreter):
    from corelib.kernels.diagonal_scan import backward_bytes, forward_bytes
    from corelib.measure import count_io

    given = inputs(1, 40, 20, dtype=torch.float32)
    count = count_io(RUN, TARGET, given, None, (torch.ones_like(given[1]),))
    assert count.bytes_moved == forward_bytes(1, 40, 20) + backward_bytes(1, 40, 20)


def test_launcher_uses_declared_tiles():
    from corelib.kernels.diagonal_scan import BACKWARD, FORWARD, SPECIALISATIONS

    shared.assert_tiles_are_declared(SPECIALISATIONS, FORWARD, BACKWARD)


BAD = {
    "axes": (lambda a, x, s: ((a, x[0]), {}), ValueError, "x: expected .B, L, C."),
    "half": (lambda a, x, s: ((a.half(), x.half()), {}), TypeError, "x: expected single"),
    "decay": (lambda a, x, s: ((a[:, :2], x), {}), ValueError, "decay: expected .2, 5, 3."),
    "kind": (lambda a, x, s: ((a.float(), x), {}), ValueError, "decay: .* in torch.float32"),
    "state": (lambda a, x, s: ((a, x), dict(state=s[:1])), ValueError, "state: expected .2, 3."),
    "reset": (lambda a, x, s: ((a, x), dict(reset=s > 0)), ValueError, "reset: expected bool"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_named(interpreter, case):
    change, error, message = BAD[case]
    args, options = change(*inputs(2, 5, 3))
    shared.assert_refused_where_it_runs(interpreter, KERNEL, args, error, message, **options)


def test_the_device_is_named():
    shared.assert_wants_cuda(KERNEL, inputs(1, 1, 1)[:2])


def check():
    """What every mutant of the kernels has to get past."""
    from corelib.kernels.gates.cases import forward_backward

    for sizes, reverse in (((2, 35, 2), False), ((1, 40, 2, True), True)):
        given = inputs(*sizes)
        options = dict(reset=resets(*sizes[:2]), reverse=reverse)
        d_out = torch.randn(given[1].shape, generator=torch.Generator().manual_seed(1)).double()
        (out,), grads = forward_backward(TARGET, given, options, (d_out,))
        shared.assert_close(NAMES, (out, *grads), expected(given, options, d_out), 1e-11)


@pytest.mark.slow
def test_mutants_are_caught():
    """A sample; ``limit=None`` runs all of them."""
    assert shared.survivors("diagonal_scan", f"{__file__}:check", limit=6) == []
