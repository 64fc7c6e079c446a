"""Toeplitz matrices and their products by FFT, against loops and scipy."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from corelib.primitives.fft_conv import fast_length
from corelib.primitives.toeplitz import (
    circulant_ring,
    middle_lags,
    rows_with_any,
    toeplitz,
    toeplitz_fft,
)
from corelib.primitives.toeplitz_bank import toeplitz_bank

EXACT = dict(atol=1e-11, rtol=1e-11)


def rand(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def by_definition(lags, queries, keys):
    """``M_ij = lags_(j - i)``, entry by entry; queries at the last positions."""
    middle = lags.shape[-1] // 2
    rows = [
        [lags[..., middle + j - (i + keys - queries)] for j in range(keys)] for i in range(queries)
    ]
    return torch.stack([torch.stack(row, -1) for row in rows], -2)


@pytest.mark.parametrize(("queries", "keys"), [(1, 1), (5, 5), (7, 7), (1, 6), (3, 7)])
def test_the_matrix(queries, keys):
    lags = rand(2, 13)
    got = toeplitz(lags, queries, keys)
    assert torch.equal(got, by_definition(lags, queries, keys))


def test_default_is_the_whole_table_and_scipy_agrees():
    linalg = pytest.importorskip("scipy.linalg")
    lags = rand(9)
    column, row = lags[:5].flip(0), lags[4:]
    assert torch.equal(toeplitz(lags), torch.from_numpy(linalg.toeplitz(column, row)))
    x = rand(5, 3)
    wanted = torch.from_numpy(linalg.matmul_toeplitz((column.numpy(), row.numpy()), x.numpy()))
    torch.testing.assert_close(toeplitz_fft(lags, x.T).T, wanted, **EXACT)


@settings(deadline=None, max_examples=25)
@given(L=st.integers(1, 40), spare=st.integers(0, 5), causal=st.booleans())
def test_the_product_is_the_matrix_times_x(L, spare, causal):
    lags, x = rand(3, 2 * (L + spare) - 1), rand(2, 3, L)
    matrix = toeplitz(lags, L)
    matrix = matrix.tril() if causal else matrix
    wanted = torch.einsum("hij,bhj->bhi", matrix, x)
    torch.testing.assert_close(toeplitz_fft(lags, x, causal=causal), wanted, **EXACT)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("L", [1, 2, 6])
def test_gradients(L, causal):
    lags, x = rand(2, 11).requires_grad_(), rand(3, 2, L).requires_grad_()
    assert torch.autograd.gradcheck(lambda a, b: toeplitz_fft(a, b, causal=causal), (lags, x))
    assert torch.autograd.gradcheck(lambda a: toeplitz(a, L), (lags,))


def test_flipped_lags_are_the_transpose():
    lags, x = rand(2, 13), rand(2, 7)
    torch.testing.assert_close(toeplitz(lags.flip(-1)), toeplitz(lags).mT)
    wanted = torch.einsum("hij,hi->hj", toeplitz(lags), x)
    torch.testing.assert_close(toeplitz_fft(lags.flip(-1), x), wanted, **EXACT)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("L", [1, 3, 8])
def test_the_ring_is_a_circulant_with_the_matrix_in_its_corner(L, causal):
    lags = rand(2, 15)
    ring = circulant_ring(lags, L, causal=causal)
    assert ring.shape == (2, fast_length(2 * L - 1))
    t = torch.arange(ring.shape[-1])
    corner = ring[:, (t[:, None] - t) % len(t)][:, :L, :L]
    wanted = toeplitz(lags, L)
    assert torch.equal(corner, wanted.tril() if causal else wanted)


def test_nothing_to_multiply():
    assert toeplitz_fft(rand(2, 5), rand(0, 2, 3)).shape == (0, 2, 3)
    assert toeplitz(rand(2, 5), 0, 3).shape == (2, 0, 3)


def test_the_middle_is_a_view():
    lags = rand(2, 11)
    assert middle_lags(lags, 2).tolist() == lags[:, 4:7].tolist()
    assert middle_lags(lags, 2).data_ptr() == lags[:, 4:].data_ptr()


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("queries", "keys"), [(1, 1), (6, 6), (2, 6)])
def test_rows_with_any(queries, keys, causal):
    here = rand(40, 13) > 1.2
    matrix = by_definition(here, queries, keys)
    matrix = matrix.tril(keys - queries) if causal else matrix
    assert torch.equal(rows_with_any(here, queries, keys, causal=causal), matrix.any(-1))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("L", [1, 9])
def test_a_bank_is_one_product_for_each_pair(L, causal):
    q, k, w, lags = rand(2, 6, 3, L), rand(2, 2, 3, L), rand(2, 2, 4, L), rand(6, 2 * L + 3)
    wanted = torch.zeros(2, 6, 4, L, dtype=torch.float64)
    for f in range(3):
        for a in range(4):
            products = (k[:, :, f] * w[:, :, a]).repeat_interleave(3, 1)
            wanted[:, :, a] += q[:, :, f] * toeplitz_fft(lags, products, causal=causal)
    torch.testing.assert_close(toeplitz_bank(q, k, w, lags, causal=causal), wanted, **EXACT)


@pytest.mark.no_shape_checks
def test_bad_input_is_named():
    with pytest.raises(ValueError, match="lags: expected an odd number"):
        toeplitz(rand(2, 4))
    with pytest.raises(ValueError, match="lags: expected distances for 4 positions, 7 entries"):
        toeplitz_fft(rand(5), rand(4))
    with pytest.raises(ValueError, match="queries: expected 0 to keys = 3"):
        toeplitz(rand(5), 4, 3)
    with pytest.raises(TypeError, match="lags: expected the dtype of x"):
        toeplitz_fft(rand(5).float(), rand(3))
    with pytest.raises(ValueError, match="kernel: expected the channels of u"):
        toeplitz_fft(rand(2, 5), rand(3, 3))
    with pytest.raises(ValueError, match="k: expected groups that divide q's 2 heads"):
        toeplitz_bank(rand(1, 2, 1, 3), rand(1, 3, 1, 3), rand(1, 3, 1, 3), rand(2, 5), causal=True)
