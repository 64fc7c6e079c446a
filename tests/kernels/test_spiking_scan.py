"""The spiking neurons' kernels, interpreted, against the loop in float64."""

from __future__ import annotations

import pathlib

import pytest
import torch

from corelib.kernels.gates.interpreter import load_file
from corelib.primitives.spiking_scan import spiking_scan_reference
from corelib.testing import assert_same

shared = load_file(str(pathlib.Path(__file__).with_name("shared.py")))
RUN = "corelib.kernels.gates.cases:forward_backward"
TARGET = "corelib.kernels.spiking_scan:spiking_scan"
NAMES = ("spikes", "membrane", "d_x", "d_state")


def inputs(B, L, C, dtype=torch.float64):
    generator = torch.Generator().manual_seed(L)
    x = 2 * torch.randn(B, L, C, generator=generator, dtype=torch.float64)
    return [x.to(dtype), torch.rand(B, C, generator=generator, dtype=torch.float64).to(dtype)]


def seeds(x, state):
    generator = torch.Generator().manual_seed(9)
    return [
        torch.randn(y.shape, generator=generator, dtype=torch.float64).to(y) for y in (x, state)
    ]


def expected(given, options, d_out):
    x, state = (y.double().requires_grad_() for y in given)
    out = spiking_scan_reference(x, state=state, **options)
    grads = torch.autograd.grad(out, (x, state), [y.double() for y in d_out], allow_unused=True)
    return [*(y.detach() for y in out), *(torch.zeros_like(y) if y is None else y for y in grads)]


CASES = {
    "one of everything": ((1, 1, 1), {}),
    "no multiple of four": ((2, 7, 3), dict(tau=1.3, threshold=0.3, slope=2.5)),
    "more than a block": ((1, 37, 66), {}),
    "one block": ((1, 32, 16), dict(threshold=0.5)),
    "a block and a bit": ((1, 33, 3), dict(tau=5.0)),
}


@pytest.mark.parametrize("case", CASES)
def test_spikes_and_gradients(interpreter, case):
    sizes, options = CASES[case]
    x, state = inputs(*sizes)
    d_out = seeds(x, state)
    out, grads = interpreter.call(RUN, TARGET, (x,), dict(state=state, **options), tuple(d_out))
    wanted = expected((x, state), options, d_out)
    shared.assert_close(NAMES, (*out, *grads), wanted, 1e-12, relative=1e-11)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_other_dtypes(interpreter, dtype):
    x, state = inputs(1, 21, 5, dtype)
    d_out = seeds(x, state)
    out, grads = interpreter.call(RUN, TARGET, (x,), dict(state=state), tuple(d_out))
    wanted = expected((x, state), {}, d_out)
    assert all(y.dtype == dtype for y in (*out, *grads))
    assert torch.equal(out[0].double(), wanted[0])
    tolerance = 1e-5 if dtype == torch.float32 else 5e-3
    assert_same((*out, *grads), wanted, tolerance=tolerance)


def from_rest(x):
    """No state, another layout, and only the spikes used."""
    from corelib.kernels.spiking_scan import spiking_scan

    return spiking_scan(x.transpose(0, 1).contiguous().transpose(0, 1))[0]


def test_from_rest(interpreter):
    x, _ = inputs(2, 9, 5)
    (spikes,), (d_x,) = interpreter.call(
        RUN, f"{__file__}:from_rest", (x,), None, (torch.ones_like(x),)
    )
    rest = torch.zeros(2, 5, dtype=torch.float64)
    wanted = expected((x, rest), {}, (torch.ones_like(x), rest))
    assert torch.equal(spikes, wanted[0])
    torch.testing.assert_close(d_x, wanted[2], atol=1e-12, rtol=1e-11)


def test_inference(interpreter):
    x, state = inputs(1, 10, 3)
    (spikes, after), grads = interpreter.call(RUN, TARGET, (x,), dict(state=state), None)
    wanted = spiking_scan_reference(x, state=state)
    assert torch.equal(spikes, wanted[0]) and not grads
    torch.testing.assert_close(after, wanted[1])


@pytest.mark.parametrize("sizes", [(0, 3, 4), (2, 0, 4), (2, 3, 0)])
def test_nothing_to_do(interpreter, sizes):
    x, state = inputs(*sizes)
    d_out = seeds(x, state)
    (spikes, after), (d_x, d_state) = interpreter.call(
        RUN, TARGET, (x,), dict(state=state), tuple(d_out)
    )
    assert spikes.shape == d_x.shape == sizes
    assert torch.equal(after, state) and torch.equal(d_state, d_out[1])


@pytest.mark.counted
def test_moves_no_more_than_it_has_to(interpreter):
    from corelib.kernels.spiking_scan import backward_bytes, forward_bytes
    from corelib.measure import count_io

    x, state = inputs(1, 34, 3, torch.float32)
    count = count_io(TARGET, x, state=state)
    assert count.bytes_moved == forward_bytes(1, 34, 3, keep=False)
    count = count_io(RUN, TARGET, (x,), dict(state=state), seeds(x, state))
    assert count.bytes_moved == forward_bytes(1, 34, 3) + backward_bytes(1, 34, 3)


def test_launcher_uses_declared_tiles():
    from corelib.kernels.spiking_scan import BACKWARD, FORWARD, SPECIALISATIONS

    for row in SPECIALISATIONS:
        tile = FORWARD if row.direction == "forward" else BACKWARD
        assert row.constexprs["BLOCK_C"] == tile.block_c and row.num_warps == tile.num_warps
        assert row.constexprs.get("BLOCK_T", tile.block_t) == tile.block_t


BAD = {
    "axes": (lambda x, s: ((x[0],), {}), ValueError, "x: expected .B, L, C."),
    "whole numbers": (lambda x, s: ((x.long(),), {}), TypeError, "x: expected a floating-point"),
    "tau": (lambda x, s: ((x,), dict(tau=1.0)), ValueError, "tau: expected a number above 1"),
    "state": (lambda x, s: ((x,), dict(state=s[:1])), ValueError, "state: expected .2, 3."),
    "kind": (lambda x, s: ((x,), dict(state=s.float())), ValueError, "got .2, 3. in torch.float32"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_named(interpreter, case):
    change, error, message = BAD[case]
    args, options = change(*inputs(2, 5, 3))
    shared.assert_refused_where_it_runs(interpreter, TARGET, args, error, message, **options)


def test_the_device_is_named():
    shared.assert_wants_cuda(TARGET, inputs(1, 1, 1)[:1])


def check():
    """What every mutant of the kernels has to get past."""
    from corelib.kernels.gates.cases import forward_backward

    # lengths that leave one, two and three steps over: each is masked on its own
    fast = dict(tau=1.5, threshold=0.3)
    for sizes, options in (((2, 38, 3), {}), ((1, 5, 66), fast), ((2, 7, 2), fast)):
        x, state = inputs(*sizes)
        d_out = seeds(x, state)
        out, grads = forward_backward(TARGET, (x,), dict(state=state, **options), d_out)
        wanted = expected((x, state), options, d_out)
        shared.assert_close(NAMES, (*out, *grads), wanted, 1e-11)


@pytest.mark.slow
def test_mutants_are_caught():
    """A sample; ``limit=None`` runs all of them."""
    assert shared.survivors("spiking_scan", f"{__file__}:check", limit=6) == []
