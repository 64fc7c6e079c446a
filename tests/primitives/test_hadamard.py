"""Hadamard matrices against scipy, and the fast transform against the matrix."""

import pytest
import torch

from corelib.primitives.hadamard import fwht, hadamard, hadamard_factors


@pytest.mark.parametrize("n", [1, 2, 8, 64])
def test_sylvester_is_scipys(n):
    linalg = pytest.importorskip("scipy.linalg")
    assert torch.equal(hadamard(n), torch.from_numpy(linalg.hadamard(n)).double())


@pytest.mark.parametrize("n", [1, 2, 4, 12, 20, 24, 44, 48, 80, 96])
def test_rows_stand_at_right_angles(n):
    H = hadamard(n)
    assert (H.abs() == 1).all()
    assert torch.equal(H @ H.T, n * torch.eye(n, dtype=torch.float64))


@pytest.mark.parametrize("n", [1, 2, 12, 96, 160, 256, 512, 176])
def test_fast_is_dense(n):
    x = torch.randn(2, 3, n, dtype=torch.float64, generator=torch.Generator().manual_seed(n))
    torch.testing.assert_close(fwht(x), x @ hadamard(n).T, atol=1e-12, rtol=0)
    x.requires_grad_()
    (grad,) = torch.autograd.grad(fwht(x)[0, 0, -1], x)
    torch.testing.assert_close(grad[0, 0], hadamard(n)[-1], atol=1e-12, rtol=0)


def test_sizes_of_models():
    """Inner widths of published Mambas; the largest power of two stays outside."""
    assert hadamard_factors(5120) == (256, 20)
    assert hadamard_factors(1536) == (128, 12)
    assert hadamard_factors(4096) == (4096, 1)


def test_matrices_follow_the_device():
    """Those that are kept were made on a CPU, and serve where the default is another device."""
    assert hadamard(12, device="meta").device.type == "meta"
    x = torch.zeros(2, 96)
    assert fwht(x).device.type == "cpu"
    with torch.device("meta"):
        assert fwht(torch.zeros(2, 48)).device.type == hadamard(24).device.type == "meta"
        assert fwht(x).device.type == "cpu"
    assert torch.equal(fwht(torch.eye(48)), hadamard(48, dtype=torch.float32).T)


def test_one_outlier_is_spread():
    x = torch.zeros(256, dtype=torch.float64)
    x[7] = 80.0
    rotated = fwht(x) / 16
    assert torch.equal(rotated.abs(), torch.full_like(x, 5.0))


@pytest.mark.no_shape_checks
def test_bad_input_is_named():
    for n in (3, 28, 14):
        with pytest.raises(ValueError, match=f"n: expected a power of two .* got {n}"):
            hadamard(n)
    with pytest.raises(ValueError, match="n: expected an int, at least 1, got 0"):
        hadamard_factors(0)
    with pytest.raises(TypeError, match="x: expected a floating-point tensor"):
        fwht(torch.ones(4, dtype=torch.int8))
