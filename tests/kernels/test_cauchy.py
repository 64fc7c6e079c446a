"""The Cauchy kernels, interpreted, against the complex formula in complex128."""

from __future__ import annotations

import pathlib

import pytest
import torch

from corelib.kernels.gates.interpreter import load_file
from corelib.state_space.cauchy import cauchy_sums_reference
from corelib.testing import assert_same

shared = load_file(str(pathlib.Path(__file__).with_name("shared.py")))
RUN = "corelib.kernels.gates.cases:forward_backward"
KERNEL = "corelib.kernels.cauchy:cauchy_sums"
TARGET = f"{__file__}:in_real_numbers"
NAMES = ("sums", "d_weights", "d_poles")


def in_real_numbers(weights, poles, sine, cosine):
    """The kernel on ``(..., 2)`` tensors, which the gate can differentiate."""
    from corelib.kernels.cauchy import cauchy_sums

    weights, poles = torch.view_as_complex(weights), torch.view_as_complex(poles)
    return torch.view_as_real(cauchy_sums(weights, poles, sine, cosine))


def inputs(M, C, P, K, dtype=torch.float64, seed=0, sharpness=0.1):
    """Weights, poles and frequencies from 0 up to where the cosine is 0."""
    generator = torch.Generator().manual_seed(seed)
    weights = torch.randn(M, C, P, 2, generator=generator, dtype=torch.float64)
    poles = torch.randn(C, P, 2, generator=generator, dtype=torch.float64)
    poles[..., 0] = -sharpness - poles[..., 0].abs()
    angles = torch.pi / 2 * torch.linspace(0, 1, K, dtype=torch.float64)
    return [x.to(dtype) for x in (weights, poles, angles.sin(), angles.cos())]


def expected(given, d_out):
    weights, poles, sine, cosine = (x.double() for x in given)
    leaves = [torch.view_as_complex(x).requires_grad_() for x in (weights, poles)]
    out = cauchy_sums_reference(*leaves, sine, cosine)
    grads = torch.autograd.grad(out, leaves, torch.view_as_complex(d_out.double()))
    return [torch.view_as_real(x.detach()) for x in (out, *grads)]


CASES = {
    "one of everything": (1, 1, 1, 1),
    "shorter than a block": (4, 2, 5, 63),
    "three sums, more than a block": (3, 2, 9, 131),
    "one block and a bit": (1, 1, 17, 65),
    "blocks that fit": (4, 1, 8, 128),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_sums_and_gradients(interpreter, case, dtype):
    given = inputs(*CASES[case], dtype=dtype)
    M, C, _, K = CASES[case]
    d_out = torch.randn(M, C, K, 2, generator=torch.Generator().manual_seed(1)).to(dtype)
    (out,), (d_weights, d_poles, d_sine, d_cosine) = interpreter.call(
        RUN, TARGET, given, None, (d_out,)
    )
    assert d_sine is None and d_cosine is None
    assert out.dtype == d_weights.dtype == d_poles.dtype == dtype
    tolerance = 1e-11 if dtype == torch.float64 else 3e-5
    for name, got, want in zip(NAMES, (out, d_weights, d_poles), expected(given, d_out)):
        assert_same(got, want, what=name, tolerance=tolerance)


def test_poles_close_to_the_axis(interpreter):
    """As sharp as HiPPO's against the frequencies: as good as the poles' own rounding."""
    given = inputs(2, 1, 6, 100, dtype=torch.float32, sharpness=1e-3)
    (out,), _ = interpreter.call(RUN, TARGET, given)
    want = expected(given, torch.zeros(2, 1, 100, 2))[0]
    assert (out.double() - want).abs().max() < 2e-4 * want.abs().max()


def conjugated_slices(weights, poles, sine, cosine):
    """Lazy conjugates and strides of every kind."""
    from corelib.kernels.cauchy import cauchy_sums

    weights, poles = torch.view_as_complex(weights), torch.view_as_complex(poles)
    weights = weights.transpose(0, 1).contiguous().transpose(0, 1).conj()
    return torch.view_as_real(cauchy_sums(weights, poles, sine[::2], cosine[::2]))


def test_any_layout(interpreter):
    given = inputs(2, 3, 4, 21)
    (out,), _ = interpreter.call(RUN, f"{__file__}:conjugated_slices", given)
    weights, poles, sine, cosine = given
    weights = weights * torch.tensor([1.0, -1.0], dtype=torch.float64)
    given = [weights, poles, sine[::2], cosine[::2]]
    want = expected(given, torch.zeros(2, 3, 11, 2, dtype=torch.float64))[0]
    torch.testing.assert_close(out, want, atol=1e-11, rtol=0)


@pytest.mark.parametrize("sizes", [(2, 0, 3, 4), (2, 3, 4, 0)])
def test_nothing_to_do(interpreter, sizes):
    (out,), (d_weights, d_poles, *_) = interpreter.call(
        RUN, TARGET, inputs(*sizes), None, (torch.zeros(*sizes[:2], sizes[3], 2).double(),)
    )
    assert out.shape == (*sizes[:2], sizes[3], 2)
    assert not d_weights.any() and not d_poles.any()


@pytest.mark.method("s4")
def test_s4_kernel_through_these_sums(interpreter, monkeypatch):
    """The whole path of `s4_kernel` with the CPU's sums replaced by the interpreted kernel's."""
    from corelib.state_space import dplr_kernel, s4

    def by_kernel(weights, poles, sine, cosine):
        weights, poles = (torch.view_as_real(x.resolve_conj()) for x in (weights, poles))
        out = interpreter.call(TARGET, weights, poles, sine, cosine)
        return torch.view_as_complex(out)

    e = s4.example()
    system, step = e["system"], e["step"]
    want = s4.s4_kernel_reference(system, e["C"], step, 9)
    monkeypatch.setattr(dplr_kernel, "cauchy_sums", by_kernel)
    got = s4.s4_kernel(system, s4.to_tilde(system, e["C"], step, 9), step, 9)
    torch.testing.assert_close(got, want, atol=1e-12, rtol=0)


@pytest.mark.counted
def test_moves_no_more_than_it_has_to(interpreter):
    from corelib.kernels.cauchy import forward_bytes
    from corelib.measure import count_io

    sizes = (4, 2, 16, 130)
    given = inputs(*sizes, dtype=torch.float32)
    count = count_io(TARGET, *given)
    assert count.bytes_moved == forward_bytes(*sizes)
    matrix = 2 * 2 * 4 * 2 * 16 * 130  # both fractions of every pole at every frequency, written
    assert count.bytes_moved < matrix


@pytest.mark.counted
def test_backward_moves_no_more_than_it_has_to(interpreter):
    from corelib.kernels.cauchy import backward_bytes, forward_bytes
    from corelib.measure import count_io

    sizes = (4, 2, 16, 130)
    given = inputs(*sizes, dtype=torch.float32)
    count = count_io(RUN, TARGET, given, None, (torch.ones(4, 2, 130, 2),))
    assert count.bytes_moved == forward_bytes(*sizes) + backward_bytes(*sizes)


def test_launcher_uses_declared_tiles():
    from corelib.kernels.cauchy import BACKWARD, FORWARD, SPECIALISATIONS

    declared = {
        (x.kernel, x.signature["sine"], x.constexprs["BLOCK_K"], x.constexprs.get("BLOCK_P"))
        for x in SPECIALISATIONS
    }
    kinds = {torch.float32: "*fp32", torch.float64: "*fp64"}
    for dtype, kind in kinds.items():
        assert ("_cauchy_forward", kind, FORWARD[dtype].block_k, None) in declared
        tile = BACKWARD[dtype]
        assert ("_cauchy_backward", kind, tile.block_k, tile.block_p) in declared


BAD = {
    "channels": (lambda w, p, s, c: (w[:, :1], p, s, c), ValueError, "weights: expected .M, C, P."),
    "frequencies": (lambda w, p, s, c: (w, p, s, c[:2]), ValueError, "cosine: expected the one"),
    "half": (lambda w, p, s, c: (w, p, s.half(), c), TypeError, "sine: expected torch.float32"),
    "mixed": (lambda w, p, s, c: (w, p, s, c.float()), TypeError, "cosine: expected torch.float64"),
    "poles": (
        lambda w, p, s, c: (w, p.to(torch.complex64), s, c), TypeError, "poles: .*complex128",
    ),
}  # fmt: skip


def complex_inputs(*sizes):
    weights, poles, sine, cosine = inputs(*sizes)
    return torch.view_as_complex(weights), torch.view_as_complex(poles), sine, cosine


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_named(interpreter, case):
    change, error, message = BAD[case]
    args = change(*complex_inputs(2, 3, 4, 5))
    shared.assert_refused_where_it_runs(interpreter, KERNEL, args, error, message)


def test_the_device_is_named():
    shared.assert_wants_cuda(KERNEL, complex_inputs(1, 1, 1, 1))


def check():
    """What every mutant of the kernels has to get past."""
    from corelib.kernels.gates.cases import forward_backward

    for sizes in ((3, 2, 9, 67), (1, 2, 4, 130)):
        given = inputs(*sizes)
        M, C, _, K = sizes
        generator = torch.Generator().manual_seed(1)
        d_out = torch.randn(M, C, K, 2, generator=generator, dtype=torch.float64)
        (out,), grads = forward_backward(TARGET, given, None, (d_out,))
        shared.assert_close(NAMES, (out, *grads[:2]), expected(given, d_out), 1e-11)


@pytest.mark.slow
def test_mutants_are_caught():
    """A sample; ``limit=None`` runs all of them."""
    assert shared.survivors("cauchy", f"{__file__}:check", limit=8) == []
