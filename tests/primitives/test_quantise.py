"""int8: scales, rounding, and products that are exact integers."""

import pytest
import torch

from corelib.primitives import quantise as quantise_module
from corelib.primitives.hadamard import hadamard
from corelib.primitives.quantise import (
    EXACT_TERMS,
    Int8Linear,
    QuantObserver,
    dequantise,
    hadamard_quantise,
    int8_linear,
    int8_matmul,
    int8_matmul_reference,
    quantise,
)


def integers(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-128, 128, shape, generator=generator, dtype=torch.int8)


@pytest.mark.parametrize("sizes", [(1, 1, 1), (3, 5, 7), (4, 2, EXACT_TERMS + 1), (0, 3, 4)])
def test_product_is_exact(sizes):
    M, N, K = sizes
    a, b = integers(M, K), integers(N, K, seed=1)
    for found in (int8_matmul(a, b), quantise_module._by_float32(a, b)):
        assert torch.equal(found, int8_matmul_reference(a, b))


def test_the_largest_product_is_exact():
    """Where one float32 product over all columns would round."""
    K = 2 * EXACT_TERMS + 1
    a = torch.full((1, K), -128, dtype=torch.int8)
    b = a.clone()
    b[0, -1] = 127
    for found in (int8_matmul(a, b), quantise_module._by_float32(a, b)):
        assert found.item() == (K - 1) * 128**2 - 128 * 127


def test_a_processor_that_saturates_is_found_out(monkeypatch):
    """And one without integer products; then float32 takes over."""
    a = torch.full((1, 4), -128, dtype=torch.int8)

    def saturating(x, y):
        return (x.int() @ y.int()).clamp(max=2**15)

    for product in (saturating, None):
        if product is None:
            monkeypatch.delattr(torch, "_int_mm")
        else:
            monkeypatch.setattr(torch, "_int_mm", product)
        quantise_module._has_integer_products.cache_clear()
        assert int8_matmul(a, a).item() == 4 * 128**2
    quantise_module._has_integer_products.cache_clear()


def test_rounding():
    x = torch.tensor([0.0, 0.5, 1.5, -0.5, 126.6, 300.0, -300.0])
    assert quantise(x, 1.0).tolist() == [0, 0, 2, 0, 127, 127, -128]
    assert quantise(x, 2.0)[4:].tolist() == [63, 127, -128]
    q = integers(50)
    assert torch.equal(quantise(dequantise(q, 0.25), 0.25), q)


def test_largest_value_over_all_samples():
    observer = QuantObserver()
    for x in ([1.0, -12.7], [3.0], []):
        observer.observe(torch.tensor(x))
    assert observer.scale == pytest.approx(0.1)


def test_percentile():
    x = torch.arange(1.0, 1001)
    x[0] = -1e6
    whole, most = QuantObserver(), QuantObserver(99.9)
    for observer in (whole, most):
        observer.observe(x)
    assert whole.scale == pytest.approx(1e6 / 127)
    assert most.scale == pytest.approx(1000 / 127)
    most.observe(torch.full((10,), 500.0))  # the mean of both samples
    assert most.scale == pytest.approx(750 / 127)


def test_of_zeros():
    observer = QuantObserver()
    observer.observe(torch.zeros(3))
    assert observer.scale == 1.0


def test_linear():
    generator = torch.Generator().manual_seed(3)
    x, weight = torch.randn(2, 3, 40, generator=generator), torch.randn(5, 40, generator=generator)
    bias = torch.randn(5, generator=generator)
    layer = Int8Linear.of(weight, x.abs().max().item() / 127)
    q = quantise(x, layer.x_scale)
    torch.testing.assert_close(layer(q), layer.simulated(dequantise(q, layer.x_scale)))
    got = int8_linear(q, layer.weight, layer.x_scale, layer.weight_scale, bias)
    torch.testing.assert_close(got, layer(q) + bias)
    wanted = x @ weight.T
    assert 0 < (layer(q) - wanted).norm() / wanted.norm() < 0.02


def test_rotated():
    x = torch.randn(2, 3, 12, generator=torch.Generator().manual_seed(0))
    rotated = x @ hadamard(12, dtype=torch.float32).T / 12**0.5
    off = hadamard_quantise(x, 0.02) - quantise(rotated, 0.02)
    assert off.abs().max() <= 1 and (off != 0).sum() <= 1  # one half may fall either way
    assert hadamard_quantise(x[:0], 0.02).shape == (0, 3, 12)


@pytest.mark.no_shape_checks
def test_bad_input_is_named():
    a = integers(2, 3)
    with pytest.raises(TypeError, match="b: expected int8, got torch.float32"):
        int8_matmul(a, a.float())
    with pytest.raises(ValueError, match="a: expected two axes"):
        int8_matmul(a[0], a)
    with pytest.raises(ValueError, match=r"expected \(M, K\) and \(N, K\)"):
        int8_matmul(a, a[:, :2])
    with pytest.raises(ValueError, match="scale: expected more than 0"):
        quantise(torch.ones(1), 0.0)
    with pytest.raises(ValueError, match="percentile: expected None or"):
        QuantObserver(101.0)
    with pytest.raises(ValueError, match="x: expected finite"):
        QuantObserver().observe(torch.tensor([float("nan")]))
    with pytest.raises(RuntimeError, match="nothing was observed"):
        _ = QuantObserver().scale
