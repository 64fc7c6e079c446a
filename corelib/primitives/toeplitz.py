"""Toeplitz matrices: whatever depends on the distance of two positions only.

    M_ij = lags_(j - i)                 a relative position bias, a relative weight, a convolution

``lags (..., 2 n - 1)`` holds the distances ``-(n - 1) .. n - 1`` in this order, distance 0 in the
middle, so that a table made for ``n`` positions serves every shorter length: what is used of it is
the middle part. Negative distances look back.

* `toeplitz` writes the matrix out: it is a sliding window over the table, upside down.
* `toeplitz_fft` multiplies by it in ``O(L log L)``: a Toeplitz matrix is the corner of a circulant
  one of twice the size, which the FFT diagonalises. The work is `fft_conv`'s.
* `circulant_ring` is the first column of that circulant matrix, for those who go to the spectrum
  themselves (`corelib.linear_time.nprf_rpe`).

The transposed matrix belongs to ``lags.flip(-1)``. Oracle: ``scipy.linalg.toeplitz`` and
``scipy.linalg.matmul_toeplitz``.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Shaped
from torch import Tensor

from ._checks import check_same_kind
from .fft_conv import fast_length, fft_conv, two_sided_fft_conv

Lags = Float[Tensor, "*heads T"]


def toeplitz(
    lags: Lags, queries: int | None = None, keys: int | None = None
) -> Float[Tensor, "*heads L S"]:
    """The matrix ``(*heads, queries, keys)``; row ``i`` stands at position ``i + keys - queries``.

    Args:
        queries: rows; by default as many as the table allows.
        keys: columns, at least the rows; by default as many as the rows.

    Raises ValueError if the table is too short or of even length.
    """
    queries = _reach(lags) if queries is None else queries
    keys = queries if keys is None else keys
    if not 0 <= queries <= keys:
        raise ValueError(f"queries: expected 0 to keys = {keys}, got {queries}")
    if queries == 0:
        return lags.new_zeros(*lags.shape[:-1], 0, keys)
    # row i begins with distance -(i + keys - queries): the last row with the table's first entry
    used = middle_lags(lags, keys)[..., : keys + queries - 1]
    return used.unfold(-1, keys, 1).flip(-2)


def toeplitz_fft(
    lags: Lags, x: Float[Tensor, "*batch_and_heads L"], *, causal: bool = False
) -> Float[Tensor, "*batch_and_heads L"]:
    """``y_i = sum_j lags_(j - i) x_j`` in ``O(L log L)``; ``causal``: over ``j <= i`` only.

    The axes of ``x`` before the length end with the table's heads; those before them are a batch.
    Differentiable in both. Raises ValueError or TypeError for shapes and dtypes that do not fit.
    """
    check_same_kind(x=x, lags=lags)
    L = x.shape[-1]
    if x.numel() == 0:
        return x.clone()
    used = middle_lags(lags, L)
    past = used[..., :L].flip(-1)
    if causal or L == 1:
        return fft_conv(x, past)
    return two_sided_fft_conv(x, past, used[..., L:])


def circulant_ring(
    lags: Lags, length: int, *, causal: bool = False
) -> Float[Tensor, "*heads circle"]:
    """First column of a circulant matrix with the Toeplitz matrix in its upper left corner.

    Distance 0 first, then what looks back, zeros, and what looks ahead, the nearest last. The
    circle has at least ``2 length - 1`` points and a length that the FFT likes.
    """
    used = middle_lags(lags, length)
    past, ahead = used[..., :length].flip(-1), used[..., length:].flip(-1)
    if causal:
        ahead = ahead[..., :0]
    gap = fast_length(2 * length - 1) - past.shape[-1] - ahead.shape[-1]
    return torch.cat([past, lags.new_zeros(*lags.shape[:-1], gap), ahead], -1)


def middle_lags(lags: Shaped[Tensor, "*heads T"], length: int) -> Shaped[Tensor, "*heads used"]:
    """The ``2 length - 1`` distances that ``length`` positions can have (a view)."""
    reach = _reach(lags)
    if not 1 <= length <= reach:
        raise ValueError(
            f"lags: expected distances for {length} positions, {max(1, 2 * length - 1)} entries at "
            f"least, got {lags.shape[-1]}"
        )
    return lags[..., reach - length : reach + length - 1]


def rows_with_any(
    here: Bool[Tensor, "*heads T"], queries: int, keys: int, *, causal: bool = False
) -> Bool[Tensor, "*heads L"]:
    """Which rows of the Toeplitz matrix of ``here`` hold a True; queries at the last positions."""
    here = middle_lags(here, keys)
    if causal:
        here = here & (torch.arange(2 * keys - 1, device=here.device) < keys)
    before = torch.nn.functional.pad(here.long().cumsum(-1), (1, 0))
    first = keys - 1 - torch.arange(keys - queries, keys, device=here.device)
    return before[..., first + keys] > before[..., first]


def _reach(lags: Tensor) -> int:
    if lags.dim() == 0 or lags.shape[-1] % 2 == 0:
        raise ValueError(
            "lags: expected an odd number of distances, 2 n - 1, on the last axis, got shape "
            f"{tuple(lags.shape)}"
        )
    return (lags.shape[-1] + 1) // 2
