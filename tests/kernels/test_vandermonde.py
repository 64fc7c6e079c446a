"""The Vandermonde kernels, interpreted, against the complex formula in complex128."""

from __future__ import annotations

import pathlib

import pytest
import torch

from corelib.kernels.gates.interpreter import load_file
from corelib.state_space.vandermonde import vandermonde_sums_reference
from corelib.testing import assert_same

shared = load_file(str(pathlib.Path(__file__).with_name("shared.py")))
RUN = "corelib.kernels.gates.cases:forward_backward"
KERNEL = "corelib.kernels.vandermonde:vandermonde_sums"
TARGET = f"{__file__}:in_real_numbers"
NAMES = ("sums", "d_weights", "d_rates")


def in_real_numbers(weights, rates, taps):
    """The kernel on ``(..., 2)`` tensors, which the gate can differentiate; ``taps (L,)``."""
    from corelib.kernels.vandermonde import vandermonde_sums

    weights, rates = torch.view_as_complex(weights), torch.view_as_complex(rates)
    return vandermonde_sums(weights, rates, len(taps))


def inputs(C, P, L, dtype=torch.float64, seed=0, turn=2.0):
    """Weights, rates on both sides of the circle, and a tensor as long as the taps."""
    generator = torch.Generator().manual_seed(seed)
    weights = torch.randn(C, P, 2, generator=generator, dtype=torch.float64)
    rates = torch.randn(C, P, 2, generator=generator, dtype=torch.float64)
    rates[..., 0] = -0.02 * rates[..., 0].abs()
    rates[..., 1] *= turn
    return [x.to(dtype) for x in (weights, rates, torch.zeros(L))]


def expected(given, d_out):
    weights, rates, taps = (x.double() for x in given)
    leaves = [torch.view_as_complex(x).requires_grad_() for x in (weights, rates)]
    out = vandermonde_sums_reference(*leaves, len(taps))
    grads = torch.autograd.grad(out, leaves, d_out.double())
    return [out.detach(), *(torch.view_as_real(x) for x in grads)]


CASES = {
    "one of everything": (1, 1, 1),
    "shorter than a block": (2, 5, 63),
    "more than a block": (2, 9, 131),
    "one block and a bit": (1, 17, 257),
    "blocks that fit": (1, 8, 128),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_sums_and_gradients(interpreter, case, dtype):
    given = inputs(*CASES[case], dtype=dtype)
    C, _, L = CASES[case]
    d_out = torch.randn(C, L, generator=torch.Generator().manual_seed(1)).to(dtype)
    (out,), (d_weights, d_rates, _) = interpreter.call(RUN, TARGET, given, None, (d_out,))
    assert out.dtype == d_weights.dtype == d_rates.dtype == dtype
    tolerance = 1e-12 if dtype == torch.float64 else 2e-6
    for name, got, want in zip(NAMES, (out, d_weights, d_rates), expected(given, d_out)):
        assert_same(got, want, what=name, tolerance=tolerance)


def test_float32_keeps_its_digits_at_large_angles(interpreter):
    """Hundreds of radians a step, a thousand steps: the integer has the place on the circle."""
    given = inputs(1, 6, 1000, dtype=torch.float32, turn=300.0)
    (out,), _ = interpreter.call(RUN, TARGET, given)
    want = expected(given, torch.zeros(1, 1000))[0]
    assert (out.double() - want).abs().max() < 2e-6 * want.abs().max()


def test_every_quarter_of_the_circle(interpreter):
    """Eighths of a turn a step, half a turn itself included, either way."""
    rates = torch.zeros(17, 1, 2, dtype=torch.float64)
    rates[:, 0, 1] = torch.pi / 4 * torch.arange(-8, 9)
    weights = torch.tensor([[[0.3, -0.7]]], dtype=torch.float64).repeat(17, 1, 1)
    given = [weights, rates, torch.zeros(9, dtype=torch.float64)]
    (out,), _ = interpreter.call(RUN, TARGET, given)
    torch.testing.assert_close(out, expected(given, torch.zeros(17, 9))[0], atol=1e-12, rtol=0)


def test_growing_powers_past_the_end_do_not_overflow(interpreter):
    given = inputs(1, 3, 5, dtype=torch.float32)
    given[1][..., 0] = 4.0
    (out,), grads = interpreter.call(RUN, TARGET, given, None, (torch.ones(1, 5),))
    want = expected(given, torch.ones(1, 5))
    for got, wanted in zip((out, *grads[:2]), want):
        assert (got.double() - wanted).abs().max() < 1e-5 * wanted.abs().max()


def conjugated_slices(weights, rates, taps):
    """Lazy conjugates and strides of every kind."""
    from corelib.kernels.vandermonde import vandermonde_sums

    weights = torch.view_as_complex(weights).mT.contiguous().mT.conj()
    return vandermonde_sums(weights, torch.view_as_complex(rates).conj(), len(taps))


def test_any_layout(interpreter):
    given = inputs(3, 4, 21)
    (out,), _ = interpreter.call(RUN, f"{__file__}:conjugated_slices", given)
    torch.testing.assert_close(out, expected(given, torch.zeros(3, 21))[0], atol=1e-12, rtol=0)


@pytest.mark.parametrize("sizes", [(0, 3, 4), (2, 0, 4), (2, 3, 0)])
def test_nothing_to_do(interpreter, sizes):
    d_out = torch.zeros(sizes[0], sizes[2]).double()
    (out,), (d_weights, d_rates, _) = interpreter.call(RUN, TARGET, inputs(*sizes), None, (d_out,))
    assert out.shape == d_out.shape and not out.any()
    assert not d_weights.any() and not d_rates.any()


@pytest.mark.method("ptd")
def test_an_s4d_layer_through_these_sums(interpreter, monkeypatch):
    """The layer's kernel with the CPU's sums replaced by the interpreted kernel's."""
    from corelib.state_space import s4d

    torch.manual_seed(0)
    layer = s4d.S4D(2, 8).double()
    want = layer.kernel(33)

    def by_kernel(weights, rates, L):
        weights, rates = (torch.view_as_real(x.detach().resolve_conj()) for x in (weights, rates))
        return interpreter.call(TARGET, weights, rates, torch.zeros(L))

    monkeypatch.setattr(s4d, "vandermonde_sums", by_kernel)
    torch.testing.assert_close(layer.kernel(33), want.detach(), atol=1e-12, rtol=0)


@pytest.mark.counted
def test_moves_no_more_than_it_has_to(interpreter):
    from corelib.kernels.vandermonde import forward_bytes
    from corelib.measure import count_io

    count = count_io(TARGET, *inputs(2, 16, 300, dtype=torch.float32))
    assert count.bytes_moved == forward_bytes(2, 16, 300)
    assert count.bytes_moved < 8 * 2 * 16 * 300  # all powers, written once


@pytest.mark.counted
def test_backward_moves_no_more_than_it_has_to(interpreter):
    from corelib.kernels.vandermonde import backward_bytes, forward_bytes
    from corelib.measure import count_io

    given = inputs(2, 16, 130, dtype=torch.float32)
    count = count_io(RUN, TARGET, given, None, (torch.ones(2, 130),))
    assert count.bytes_moved == forward_bytes(2, 16, 130) + backward_bytes(2, 16, 130)


def test_launcher_uses_declared_tiles():
    from corelib.kernels.vandermonde import BACKWARD, FORWARD, SPECIALISATIONS

    declared = {
        (x.kernel, x.signature["growth"], x.constexprs["BLOCK_T"], x.constexprs["TERMS"],
         x.constexprs.get("BLOCK_P"))
        for x in SPECIALISATIONS
    }  # fmt: skip
    for dtype, kind in {torch.float32: "*fp32", torch.float64: "*fp64"}.items():
        tile = FORWARD[dtype]
        assert ("_vandermonde_forward", kind, tile.block_t, tile.terms, None) in declared
        tile = BACKWARD[dtype]
        assert ("_vandermonde_backward", kind, tile.block_t, tile.terms, tile.block_p) in declared


BAD = {
    "axes": (lambda w, r, L: (w[0], r, L), ValueError, "weights: expected .C, P."),
    "shapes": (lambda w, r, L: (w, r[:, :1], L), ValueError, "weights: expected .C, P."),
    "real": (lambda w, r, L: (w.real, r, L), TypeError, "weights: expected complex64"),
    "mixed": (
        lambda w, r, L: (w, r.to(torch.complex64), L), TypeError, "rates: expected complex64",
    ),
    "length": (lambda w, r, L: (w, r, -1), ValueError, "L: expected an int"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_named(interpreter, case):
    change, error, message = BAD[case]
    args = change(*map(torch.view_as_complex, inputs(3, 4, 5)[:2]), 5)
    shared.assert_refused_where_it_runs(interpreter, KERNEL, args, error, message)


def test_the_device_is_named():
    args = (*map(torch.view_as_complex, inputs(1, 1, 1)[:2]), 1)
    shared.assert_wants_cuda(KERNEL, args)


def check():
    """What every mutant of the kernels has to get past."""
    from corelib.kernels.gates.cases import forward_backward

    for sizes in ((2, 9, 67), (2, 5, 130)):
        given = inputs(*sizes)
        C, _, L = sizes
        generator = torch.Generator().manual_seed(1)
        d_out = torch.randn(C, L, generator=generator, dtype=torch.float64)
        (out,), grads = forward_backward(TARGET, given, None, (d_out,))
        wanted = expected(given, d_out)
        shared.assert_close(NAMES, (out, *grads[:2]), wanted, 1e-10, relative=1e-11)


@pytest.mark.slow
def test_mutants_are_caught():
    """A sample; ``limit=None`` runs all of them."""
    assert shared.survivors("vandermonde", f"{__file__}:check", limit=8) == []
