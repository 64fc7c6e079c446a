"""The scan over 2 x 2 matrices, interpreted, against the loop in float64."""

from __future__ import annotations

import pathlib

import pytest
import torch

from corelib.kernels.gates.interpreter import load_file
from corelib.primitives.diagonal_scan import scan_reference
from corelib.testing import assert_same

shared = load_file(str(pathlib.Path(__file__).with_name("shared.py")))
RUN = "corelib.kernels.gates.cases:forward_backward"
KERNEL = "corelib.kernels.block_scan:block_scan"
TARGET = f"{__file__}:by_kernel"


def by_kernel(blocks, x, state, reset=None, reverse=False):
    from corelib.kernels.block_scan import block_scan

    return block_scan(blocks, x, reset=reset, state=state, reverse=reverse)


def inputs(B, L, C, dtype=torch.float64):
    generator = torch.Generator().manual_seed(L)
    shapes = (B, L, C, 2, 2), (B, L, C, 2), (B, C, 2)
    blocks, x, state = (
        torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes
    )
    return [y.to(dtype) for y in (0.5 * torch.tanh(blocks), x, state)]


def seed_for(x):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x.dtype)


def resets(B, L):
    return torch.rand(B, L, generator=torch.Generator().manual_seed(5)) < 0.25


def expected(given, options, d_out):
    leaves = [y.detach().double().requires_grad_() for y in given]
    blocks, x, state = leaves
    reset = options.get("reset")
    if reset is not None:
        blocks = blocks.masked_fill(reset[..., None, None, None], 0)
    out = scan_reference(blocks, x, state=state, reverse=options.get("reverse", False))
    return [out.detach(), *torch.autograd.grad(out, leaves, d_out.double())]


CASES = {  # sizes, with resets, reversed
    "one of everything": ((1, 1, 1), False, True),
    "shorter than a block": ((2, 10, 3), True, True),
    "more than a block": ((1, 35, 2), False, False),
    "one block, resets": ((1, 16, 2), True, False),
    "two blocks of channels": ((1, 3, 9), False, True),
    "two rows, a block and one": ((2, 17, 1), True, False),
}
NAMES = ("states", "d_blocks", "d_x", "d_state")


@pytest.mark.parametrize("case", CASES)
def test_states_and_gradients(interpreter, case):
    sizes, with_reset, reverse = CASES[case]
    given = inputs(*sizes)
    options = dict(reset=resets(*sizes[:2]) if with_reset else None, reverse=reverse)
    d_out = seed_for(given[1])
    (out,), grads = interpreter.call(RUN, TARGET, given, options, (d_out,))
    shared.assert_close(NAMES, (out, *grads), expected(given, options, d_out), 1e-12)


def test_float32(interpreter):
    given = inputs(1, 7, 2, dtype=torch.float32)
    d_out = torch.ones_like(given[1])
    (out,), grads = interpreter.call(RUN, TARGET, given, None, (d_out,))
    assert out.dtype == torch.float32
    assert_same((out, *grads), expected(given, {}, d_out), tolerance=1e-5)


def through_strides(blocks, x, state):
    """Every argument a view with strides of its own; the state left out."""
    from corelib.kernels.block_scan import block_scan

    return block_scan(blocks.mT.contiguous().mT, x.mT.contiguous().mT)


def test_strides_and_no_state(interpreter):
    blocks, x, state = inputs(2, 5, 3)
    out = interpreter.call(f"{__file__}:through_strides", blocks, x, state)
    torch.testing.assert_close(out, scan_reference(blocks, x), atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("sizes", [(0, 3, 4), (2, 0, 4), (2, 3, 0)])
def test_nothing_to_do(interpreter, sizes):
    given = inputs(*sizes)
    (out,), grads = interpreter.call(RUN, TARGET, given, None, (seed_for(given[1]),))
    assert out.shape == (*sizes, 2) and not any(y.any() for y in grads)


@pytest.mark.counted
def test_moves_the_bytes_that_it_says(interpreter):
    from corelib.kernels.block_scan import backward_bytes, forward_bytes
    from corelib.measure import count_io

    given = inputs(1, 18, 3, dtype=torch.float32)
    assert count_io(TARGET, *given).bytes_moved == forward_bytes(1, 18, 3)
    both = count_io(RUN, TARGET, given, None, (seed_for(given[1]),)).bytes_moved
    assert both == forward_bytes(1, 18, 3) + backward_bytes(1, 18, 3)


def test_launcher_uses_declared_tiles():
    from corelib.kernels.block_scan import BACKWARD, FORWARD, SPECIALISATIONS

    shared.assert_tiles_are_declared(SPECIALISATIONS, FORWARD, BACKWARD)


BAD = {
    "axes": (lambda a, x, s: ((a, x[0]), {}), ValueError, "x: expected .B, L, C, 2."),
    "half": (lambda a, x, s: ((a.half(), x.half()), {}), TypeError, "x: expected float32"),
    "blocks": (lambda a, x, s: ((a[:, :2], x), {}), ValueError, "blocks: expected .2, 5, 3, 2"),
    "kind": (lambda a, x, s: ((a.float(), x), {}), ValueError, "blocks: .* in torch.float32"),
    "state": (lambda a, x, s: ((a, x), dict(state=s[:1])), ValueError, "state: expected .2, 3"),
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

    for sizes, reverse in (((1, 18, 9), False), ((2, 17, 9), True)):
        given = inputs(*sizes)
        options = dict(reset=resets(*sizes[:2]), reverse=reverse)
        d_out = seed_for(given[1])
        (out,), grads = forward_backward(TARGET, given, options, (d_out,))
        shared.assert_close(NAMES, (out, *grads), expected(given, options, d_out), 1e-11)


@pytest.mark.slow
def test_mutants_are_caught():
    """A sample; ``limit=None`` runs all of them."""
    assert shared.survivors("block_scan", f"{__file__}:check", limit=6) == []
