"""The adaptive layer norm kernels, interpreted, against the definition in float64."""

from __future__ import annotations

import pathlib

import pytest
import torch

from corelib.kernels.gates.interpreter import load_file
from corelib.primitives.adaln import adaln_reference, gated_adaln_reference
from corelib.testing import assert_same

shared = load_file(str(pathlib.Path(__file__).with_name("shared.py")))
RUN = "corelib.kernels.gates.cases:forward_backward"
MODULE = "corelib.kernels.adaln"
NAMES = {True: ("x", "branch", "gate", "shift", "scale"), False: ("x", "shift", "scale")}

pytestmark = pytest.mark.method("gridit")


def inputs(B, L, C, Lm, *, gated=True, dtype=torch.float32, seed=0):
    """Modulations as a net makes them: slices of one wide row, none of them contiguous."""
    generator = torch.Generator().manual_seed(seed)
    tokens = [torch.randn(B, L, C, generator=generator) + 0.5 for _ in range(1 + gated)]
    wide = torch.randn(B, Lm, (2 + gated) * C, generator=generator)
    given = [x.to(dtype) for x in (*tokens, wide)]
    return [*given[:-1], *given[-1].chunk(2 + gated, -1)]


def expected(given, d_outs):
    leaves = [x.double().requires_grad_() for x in given]
    form = gated_adaln_reference if len(given) == 5 else adaln_reference
    outs = form(*leaves)
    outs = outs if isinstance(outs, tuple) else (outs,)
    grads = torch.autograd.grad(outs, leaves, [d.double() for d in d_outs])
    return [x.detach() for x in (*outs, *grads)]


def d_outs_of(given, seed=1):
    generator = torch.Generator().manual_seed(seed)
    x = given[0]
    return tuple(
        torch.randn(x.shape, generator=generator).to(x.dtype) for _ in range(1 + (len(given) == 5))
    )


def target(given):
    return f"{MODULE}:{'gated_adaln' if len(given) == 5 else 'adaln'}"


CASES = {
    "one of everything": (1, 1, 1, 1),
    "shared, less than a span": (2, 5, 12, 1),
    "shared, two spans": (2, 23, 20, 1),
    "token-wise": (2, 19, 20, 19),
    "a row wider than a tile": (1, 3, 2100, 1),
    "63 tokens": (1, 63, 16, 63),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_values_and_gradients(interpreter, case, gated, dtype):
    given = inputs(*CASES[case], gated=gated, dtype=dtype)
    d_outs = d_outs_of(given)
    outs, grads = interpreter.call(RUN, target(given), given, None, d_outs)
    names = ("residual", "out", *NAMES[True]) if gated else ("out", *NAMES[False])
    tolerance = 1e-5 if dtype == torch.float32 else 4e-3
    for name, got, want in zip(names, (*outs, *grads), expected(given, d_outs), strict=True):
        assert got.dtype == dtype and got.shape == want.shape, name
        assert_same(got, want, what=name, tolerance=tolerance)


@pytest.mark.parametrize("unused", [0, 1])
def test_one_output_alone(interpreter, unused):
    given = inputs(1, 5, 12, 1)
    d_outs = [d if i != unused else None for i, d in enumerate(d_outs_of(given))]
    _, grads = interpreter.call(RUN, target(given), given, None, d_outs)
    full = [torch.zeros_like(given[0]) if d is None else d for d in d_outs]
    for got, want in zip(grads, expected(given, full)[2:], strict=True):
        torch.testing.assert_close(got.double(), want, atol=1e-5, rtol=1e-5)


def test_a_closed_gate_is_the_identity(interpreter):
    x, branch, gate, shift, scale = inputs(2, 5, 12, 1)
    (residual, _), _ = interpreter.call(
        RUN, f"{MODULE}:gated_adaln", (x, branch, 0 * gate, shift, scale)
    )
    assert torch.equal(residual, x)


@pytest.mark.parametrize("Lm", [1, 0])
def test_no_tokens(interpreter, Lm):
    given = inputs(2, 0, 8, Lm)
    outs, grads = interpreter.call(RUN, target(given), given, None, d_outs_of(given))
    assert outs[1].shape == (2, 0, 8)
    assert all(g.shape == x.shape and not g.any() for g, x in zip(grads, given, strict=True))


def test_a_large_mean_does_not_drown_the_variance(interpreter):
    x, shift, scale = inputs(1, 3, 64, 1, gated=False)
    given = [x + 1000, shift, scale]
    (out,), _ = interpreter.call(RUN, target(given), given)
    want = expected(given, d_outs_of(given))[0]
    torch.testing.assert_close(out.double(), want, atol=2e-3, rtol=0)


@pytest.mark.counted
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("Lm", [1, 40])
def test_moves_no_more_than_it_has_to(interpreter, gated, Lm):
    """The counted traffic, and how far it is from reading and writing everything once."""
    from corelib.kernels.adaln import backward_bytes, forward_bytes
    from corelib.measure import count_io

    given = [x.contiguous() for x in inputs(2, 40, 24, Lm, gated=gated)]
    form = dict(gated=gated, tokenwise=Lm > 1, itemsize=4)
    forward = forward_bytes(2, 40, 24, **form)
    assert count_io(target(given), *given).bytes_moved == forward
    least = 4 * (sum(x.numel() for x in given) + (1 + gated) * given[0].numel())
    assert forward <= 1.15 * least
    both = count_io(RUN, target(given), given, None, d_outs_of(given)).bytes_moved
    assert both == forward + backward_bytes(2, 40, 24, **form)
    least_backward = 4 * (
        (6 if gated else 3) * given[0].numel() + (5 if gated else 3) * given[-1].numel()
    )
    assert both - forward <= 1.2 * least_backward


def test_launcher_uses_declared_shapes():
    from corelib.kernels.adaln import SPAN, SPECIALISATIONS, shape_of

    for one in SPECIALISATIONS:
        shape = shape_of(one.constexprs["C"])
        assert (one.constexprs["BLOCK_C"], one.constexprs["ROWS"]) == (shape.block, shape.rows)
        assert one.num_warps == shape.warps and SPAN % shape.rows == 0


BAD = {
    "double": (lambda *xs: [x.double() for x in xs], TypeError, "^x: expected float16"),
    "wide": (lambda *xs: [x.repeat(1, 1, 2000) for x in xs], ValueError, "^x: expected a width"),
    "shapes": (lambda x, a, b: (x, a[:, :, :-1], b), ValueError, "^shift: expected"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_named(interpreter, case):
    change, error, message = BAD[case]
    args = change(*inputs(1, 2, 8, 1, gated=False))
    shared.assert_refused_where_it_runs(interpreter, f"{MODULE}:adaln", args, error, message)


def test_the_device_is_named():
    shared.assert_wants_cuda(f"{MODULE}:adaln", inputs(1, 2, 8, 1, gated=False))


def check():
    """What every mutant of the kernels has to get past."""
    from corelib.kernels.gates.cases import forward_backward

    for sizes, gated in (((2, 19, 20, 1), True), ((2, 18, 20, 18), True), ((1, 3, 20, 1), False)):
        given = inputs(*sizes, gated=gated)
        d_outs = d_outs_of(given)
        outs, grads = forward_backward(target(given), given, None, d_outs)
        for got, want in zip((*outs, *grads), expected(given, d_outs), strict=True):
            torch.testing.assert_close(got.double(), want, atol=2e-5, rtol=2e-5)


@pytest.mark.slow
def test_mutants_are_caught():
    """A sample; ``limit=None`` runs all of them."""
    assert shared.survivors("adaln", f"{__file__}:check", limit=8) == []
