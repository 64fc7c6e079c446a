"""Adaptive layer normalisation on a CPU."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from corelib.primitives import adaln as ops

pytestmark = pytest.mark.method("gridit")
SIZES = [(1, 1, 1, 1), (2, 1, 5, 1), (2, 7, 33, 1), (2, 7, 33, 7), (3, 4, 8, 4)]


def inputs(B, L, C, Lm, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    draw = lambda n: torch.randn(B, n, C, generator=generator, dtype=dtype)  # noqa: E731
    return draw(L), draw(L), draw(Lm), draw(Lm), draw(Lm)  # x, branch, gate, shift, scale


@pytest.mark.parametrize("sizes", SIZES)
def test_values_and_gradients(sizes):
    """Against the definition, and the definition against torch's layer norm."""
    leaves = [x.requires_grad_() for x in inputs(*sizes)]
    x, branch, gate, shift, scale = leaves
    residual, y = ops.gated_adaln(*leaves)
    torch.testing.assert_close(residual, x + gate * branch, atol=1e-14, rtol=0)
    oracle = F.layer_norm(x + gate * branch, sizes[2:3], eps=1e-6) * (1 + scale) + shift
    reference = ops.gated_adaln_reference(*leaves)
    weights = torch.linspace(-1, 2, y.numel(), dtype=torch.float64).view_as(y)
    grads = [
        torch.autograd.grad((out * weights).sum() + (res * weights**2).sum(), leaves)
        for res, out in ((residual, y), (x + gate * branch, oracle), reference)
    ]
    for got, *wanted in zip((residual, y, *grads[0]), *[
        (x + gate * branch, oracle, *grads[1]), (*reference, *grads[2])
    ], strict=True):  # fmt: skip
        for want in wanted:
            torch.testing.assert_close(got, want, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("sizes", SIZES)
def test_without_a_branch(sizes):
    x, _, _, shift, scale = inputs(*sizes)
    want = F.layer_norm(x, sizes[2:3], eps=1e-6) * (1 + scale) + shift
    for form in (ops.adaln, ops.adaln_reference):
        torch.testing.assert_close(form(x, shift, scale), want, atol=1e-10, rtol=0)


def test_one_modulation_for_all_is_the_same_for_each():
    x, branch, *one = inputs(2, 7, 33, 1)
    each = [m.expand(2, 7, 33).contiguous() for m in one]
    for a, b in zip(
        ops.gated_adaln(x, branch, *one), ops.gated_adaln(x, branch, *each), strict=True
    ):
        assert torch.equal(a, b)


def test_a_closed_gate_is_the_identity():
    x, branch, gate, shift, scale = inputs(2, 7, 33, 1, torch.float32)
    residual, y = ops.gated_adaln(x, branch, 0 * gate, shift, scale)
    assert torch.equal(residual, x) and torch.equal(y, ops.adaln(x, shift, scale))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_dtype_stays(dtype):
    given = inputs(2, 3, 8, 1, dtype)
    residual, y = ops.gated_adaln(*given)
    assert residual.dtype == y.dtype == dtype
    want = ops.gated_adaln_reference(*(x.double() for x in given))
    tolerance = {torch.float16: 1e-2, torch.bfloat16: 1e-1, torch.float32: 1e-5}[dtype]
    torch.testing.assert_close(y.double(), want[1], atol=tolerance, rtol=tolerance)


def test_no_tokens():
    x, branch, gate, shift, scale = inputs(2, 0, 8, 1)
    assert ops.gated_adaln(x, branch, gate, shift, scale)[1].shape == (2, 0, 8)


x, branch, gate, shift, scale = inputs(2, 3, 4, 1)
BAD = {
    "x: expected .batch, length, width.": (ValueError, lambda: ops.adaln(x[0], shift, scale)),
    "branch: expected .2, 3, 4.": (
        ValueError, lambda: ops.gated_adaln(x, branch[:, :2], gate, shift, scale),
    ),
    "shift: expected .2, 1, 4. or": (ValueError, lambda: ops.adaln(x, shift[:1], scale)),
    "scale: expected the dtype": (TypeError, lambda: ops.adaln(x, shift, scale.float())),
    "shift, scale: expected one length": (
        ValueError, lambda: ops.adaln(x, shift, scale.expand(2, 3, 4)),
    ),
    "eps: expected more than 0": (ValueError, lambda: ops.adaln(x, shift, scale, eps=0.0)),
}  # fmt: skip


@pytest.mark.no_shape_checks
@pytest.mark.parametrize("message", BAD)
def test_bad_input_is_named(message):
    error, call = BAD[message]
    with pytest.raises(error, match=message):
        call()
