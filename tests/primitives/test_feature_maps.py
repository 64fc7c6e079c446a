"""Taylor features: dot products against the polynomial, layout, gradients, errors."""

from __future__ import annotations

import math

import pytest
import torch

from corelib.primitives.feature_maps import (
    symmetric_taylor_features,
    symmetric_taylor_width,
    taylor_features,
    taylor_kernel,
    taylor_width,
)

EXACT = dict(atol=1e-12, rtol=1e-12)
FORMS = {taylor_features: taylor_width, symmetric_taylor_features: symmetric_taylor_width}


@pytest.mark.parametrize("features", FORMS)
@pytest.mark.parametrize("D", [1, 2, 7, 16])
@pytest.mark.parametrize("scale", [None, 1, 0.3])
def test_dot_products_are_the_polynomial(features, D, scale):
    torch.manual_seed(0)
    q, k = (3 * torch.randn(2, 3, n, D, dtype=torch.float64) for n in (5, 4))
    s = (D**-0.5 if scale is None else scale) * (q @ k.mT)
    got = features(q, scale=scale) @ features(k, scale=scale).mT
    torch.testing.assert_close(got, 1 + s + s * s / 2, **EXACT)
    torch.testing.assert_close(got, taylor_kernel(s), **EXACT)
    assert (got >= 0.5 - 1e-12).all()


def test_columns_by_hand():
    x = torch.tensor([2.0, 3.0, 5.0], dtype=torch.float64)
    half = math.sqrt(0.5)
    products = [half * a * b for a in (2, 3, 5) for b in (2, 3, 5)]
    wanted = torch.tensor([1, 2, 3, 5, *products], dtype=torch.float64)
    torch.testing.assert_close(taylor_features(x, scale=1.0), wanted, **EXACT)
    upper = torch.tensor([1, 2, 3, 5, 4 * half, 6, 10, 9 * half, 15, 25 * half])
    torch.testing.assert_close(symmetric_taylor_features(x.float(), scale=1.0), upper)
    papers = [x.new_ones(1), x / 3**0.25, (x[:, None] * x / math.sqrt(2 * 3)).flatten()]
    torch.testing.assert_close(taylor_features(x), torch.cat(papers), **EXACT)


@pytest.mark.parametrize("features", FORMS)
def test_widths(features):
    for D in (1, 4, 16, 24):
        assert features(torch.zeros(2, 0, D)).shape == (2, 0, FORMS[features](D))
    assert (taylor_width(16), symmetric_taylor_width(16)) == (273, 153)


@pytest.mark.parametrize("features", FORMS)
def test_gradients(features):
    torch.manual_seed(0)
    x = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(features, x)
    assert torch.autograd.gradgradcheck(features, x)


@pytest.mark.parametrize("features", FORMS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_rounded_once(features, dtype):
    torch.manual_seed(0)
    x = torch.randn(50, 8).to(dtype)
    assert features(x).dtype == dtype
    torch.testing.assert_close(features(x), features(x.float()).to(dtype), atol=0, rtol=0)


@pytest.mark.parametrize("features", FORMS)
def test_strided_input(features):
    x = torch.randn(4, 6, 3).transpose(0, 1)[::2]
    torch.testing.assert_close(features(x), features(x.contiguous()), atol=0, rtol=0)


@pytest.mark.no_shape_checks
@pytest.mark.parametrize("features", FORMS)
def test_bad_input_is_named(features):
    with pytest.raises(TypeError, match="x: expected a floating-point tensor, got torch.int64"):
        features(torch.zeros(2, 3, dtype=torch.int64))
    with pytest.raises(TypeError, match="x: expected a floating-point tensor, got list"):
        features([1.0])
    with pytest.raises(ValueError, match="x: expected a last axis of at least 1"):
        features(torch.zeros(2, 0))
    for scale in (0, -1.0, math.inf, math.nan):
        with pytest.raises(ValueError, match="scale: expected a finite number greater than 0"):
            features(torch.zeros(2, 3), scale=scale)
    with pytest.raises(TypeError, match="scale: expected a number or None, got str"):
        features(torch.zeros(2, 3), scale="1")
