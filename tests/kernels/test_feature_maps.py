"""The fused Taylor features, interpreted, against the PyTorch forms in float64."""

from __future__ import annotations

import pathlib

import pytest
import torch

from corelib.kernels.gates.interpreter import load_file
from corelib.primitives import symmetric_taylor_features, taylor_features
from corelib.testing import assert_same

shared = load_file(str(pathlib.Path(__file__).with_name("shared.py")))
RUN = "corelib.kernels.gates.cases:forward_backward"
MODULE = "corelib.kernels.feature_maps"
WANTED = {
    "taylor_features": taylor_features,
    "symmetric_taylor_features": symmetric_taylor_features,
}
FORMS = list(WANTED)


def random_input(*shape, dtype=torch.float32):
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, generator=generator).to(dtype)


def assert_equals(got, form, x, d_out, tolerance, **options):
    (out,), (d_x,) = got
    leaf = x.detach().double().requires_grad_()
    wanted = WANTED[form](leaf, **options)
    (d_wanted,) = torch.autograd.grad(wanted, leaf, d_out.double())
    assert out.dtype == d_x.dtype == x.dtype
    torch.testing.assert_close(out.double(), wanted, atol=tolerance, rtol=tolerance)
    assert_same(d_x, d_wanted, what="d_x", tolerance=tolerance)


def run(interpreter, form, x, tolerance, **options):
    d_out = random_input(*WANTED[form](x.double()).shape).to(x.dtype)
    got = interpreter.call(RUN, f"{MODULE}:{form}", (x,), options, (d_out,))
    assert_equals(got, form, x, d_out, tolerance, **options)


SHAPES = [(1,), (1, 1), (3, 2), (2, 3, 21, 5), (100, 16), (63, 8), (5, 17), (9, 32)]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_the_plain_form(interpreter, form, shape):
    """Rows ragged against a program's, widths that are no power of two, one number alone."""
    run(interpreter, form, random_input(*shape), 2e-6)


@pytest.mark.parametrize("form", FORMS)
def test_half_precision(interpreter, form):
    run(interpreter, form, random_input(20, 7, dtype=torch.float16), 1e-3)


@pytest.mark.parametrize("form", FORMS)
def test_scale(interpreter, form):
    run(interpreter, form, random_input(6, 4), 2e-6, scale=0.3)


@pytest.mark.parametrize("form", FORMS)
def test_dot_products_are_the_polynomial(interpreter, form):
    """Independent of any layout: 1 + s + s^2 / 2."""
    q, k = random_input(9, 12), random_input(11, 12)
    f_q, f_k = (interpreter.call(f"{MODULE}:{form}", x) for x in (q, k))
    s = q.double() @ k.double().T / 12**0.5
    torch.testing.assert_close((f_q @ f_k.T).double(), 1 + s + s**2 / 2, atol=1e-4, rtol=1e-5)


def test_any_layout_and_nothing(interpreter):
    x = random_input(6, 5, 4)
    want = interpreter.call(f"{MODULE}:taylor_features", x.transpose(0, 1).contiguous())
    assert torch.equal(interpreter.call(f"{MODULE}:taylor_features", x.transpose(0, 1)), want)
    (out,), (d_x,) = interpreter.call(
        RUN, f"{MODULE}:taylor_features", (x[:0],), None, (torch.zeros(0, 5, 21),)
    )
    assert out.shape == (0, 5, 21) and d_x.shape == (0, 5, 4)


@pytest.mark.counted
@pytest.mark.parametrize("form", FORMS)
def test_moves_the_least_there_is(interpreter, form):
    from corelib.kernels.feature_maps import feature_bytes
    from corelib.measure import count_io

    N, D = 50, 6
    x = random_input(N, D, dtype=torch.float16)
    d_out = taylor_features(x) if form == FORMS[0] else symmetric_taylor_features(x)
    forward, backward = feature_bytes(N, D, symmetric=form == FORMS[1])
    assert forward == 2 * (x.numel() + d_out.numel())
    assert count_io(f"{MODULE}:{form}", x).bytes_moved == forward
    both = count_io(RUN, f"{MODULE}:{form}", (x,), None, (d_out,))
    assert both.bytes_moved == forward + backward


BAD = {
    "kind": (torch.ones(2, 3).double(), {}, TypeError, "x: expected float16, bfloat16"),
    "wide": (torch.ones(2, 33), {}, ValueError, "x: expected a last axis of 1 to 32"),
    "axes": (torch.tensor(1.0), {}, ValueError, "x: expected a last axis"),
    "scale": (torch.ones(2, 3), {"scale": 0.0}, ValueError, "scale: expected a finite number"),
    "device": (torch.ones(2, 3), {}, ValueError, "expected CUDA tensors"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_named(case):
    x, options, error, message = BAD[case]
    shared.assert_refused(f"{MODULE}:taylor_features", (x,), error, message, **options)


def check():
    """What every mutant of the kernels has to get past."""
    from corelib.kernels.gates.cases import forward_backward

    for form in FORMS:
        x = random_input(70, 7)
        d_out = random_input(*WANTED[form](x).shape)
        got = forward_backward(f"{MODULE}:{form}", (x,), None, (d_out,))
        assert_equals(got, form, x, d_out, 2e-6)


@pytest.mark.slow
def test_mutants_are_caught():
    """A sample; ``limit=None`` runs all of them."""
    assert shared.survivors("feature_maps", f"{__file__}:check", limit=12) == []
