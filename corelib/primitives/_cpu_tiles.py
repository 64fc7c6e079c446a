"""Band attention in tiles: O(rows * window) on PyTorch's CPU flash kernel.

Row ``i`` of a band sees the keys ``i`` to ``i + m - n`` of ``m`` keys, for ``n`` rows. A tile is a
block of ``c`` consecutive rows with the ``c + m - n`` keys that any of them sees. All tiles share
one additive mask, and neighbouring tiles overlap in their keys, so that the tiles of ``k`` and
``v`` are views: nothing is copied, and one kernel call runs many tiles.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ._flash import additive, backward_op, forward_op

GRADIENT_NUMBERS = 1 << 20  # bounds the numbers in the overlapping key gradients of one call


def forward_rows(reach: int) -> int:
    """Rows of a forward tile: few waste less of the mask, many multiply faster (measured)."""
    return _power_of_two(reach // 8, 16, 64)


def backward_rows(reach: int) -> int:
    """Rows of a backward tile: five products for the forward's two, and overlaps to add."""
    return _power_of_two(reach // 2, 32, 256)


def _power_of_two(n: int, low: int, high: int) -> int:
    """The largest power of two up to ``n``, kept between two powers of two."""
    return min(max(1 << (max(n, 1).bit_length() - 1), low), high)


def band_forward(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """``q (B, H, n, D)``, ``k, v (B, G, m, D)`` -> ``out (B, H, n, D)``, ``lse (B, H, n)``."""
    B, G = k.shape[:2]
    reach = k.shape[2] - q.shape[2]
    k, v = k.flatten(0, 1), v.flatten(0, 1)
    out = q.new_empty(q.shape)
    lse = q.new_empty(q.shape[:3], dtype=torch.promote_types(q.dtype, torch.float32))
    for rows, span in _spans(q.shape[2], forward_rows(reach)):
        mask = _mask(rows, reach, q)
        keys, values = (_key_tiles(x, rows, span, reach) for x in (k, v))
        for heads in _one_per_group(q.shape[1], G):
            tiles = _row_tiles(q, heads, rows, span).flatten(0, 1)
            part, part_lse = forward_op(tiles, keys, values, attn_mask=mask, scale=scale)
            _row_tiles(out, heads, rows, span).copy_(part.unflatten(0, (B, G)))
            _row_tiles(lse, heads, rows, span).copy_(part_lse.unflatten(0, (B, G)))
    return out, lse


def band_backward(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of ``q``, ``k``, ``v``, given the final ``out`` and ``lse`` of each row."""
    B, G, m, D = k.shape
    reach = m - q.shape[2]
    size = backward_rows(reach)
    step = size * max(1, GRADIENT_NUMBERS // (B * G * (size + reach) * D))
    k, v = k.flatten(0, 1), v.flatten(0, 1)
    dq = q.new_empty(q.shape)
    wide = torch.promote_types(q.dtype, torch.float32)
    dk, dv = (k.new_zeros(B * G, m + size, D, dtype=wide) for _ in range(2))
    for rows, span in _spans(q.shape[2], size, step):
        mask = _mask(rows, reach, q)
        keys, values = (_key_tiles(x, rows, span, reach) for x in (k, v))
        for heads in _one_per_group(q.shape[1], G):
            grad_tile, q_tile, out_tile, lse_tile = (
                _row_tiles(x, heads, rows, span).flatten(0, 1) for x in (grad_out, q, out, lse)
            )
            part_q, part_k, part_v = backward_op(
                grad_tile, q_tile, keys, values, out_tile, lse_tile, 0.0, False,
                attn_mask=mask, scale=scale,
            )  # fmt: skip
            _row_tiles(dq, heads, rows, span).copy_(part_q.unflatten(0, (B, G)))
            _add_key_tiles(dk, part_k, rows, span.start)
            _add_key_tiles(dv, part_v, rows, span.start)
    return dq, *(x[:, :m].unflatten(0, (B, G)) for x in (dk, dv))


def _spans(n: int, rows: int, step: int | None = None) -> Iterator[tuple[int, slice]]:
    """``(rows of a tile, rows of one call)``: whole tiles, ``step`` rows a call, then the rest."""
    whole = n - n % rows
    step = step or max(whole, 1)
    for start in range(0, whole, step):
        yield rows, slice(start, min(start + step, whole))
    if whole < n:
        yield n - whole, slice(whole, n)


def _one_per_group(H: int, G: int) -> list[slice]:
    """The query heads, in sets that hold one head of each group."""
    return [slice(first, None, H // G) for first in range(H // G)]


def _row_tiles(x: Tensor, heads: slice, rows: int, span: slice) -> Tensor:
    """``(B, H, n, ...) -> (B, G, tiles, rows, ...)``: a view."""
    return x[:, heads, span].unflatten(2, (-1, rows))


def _key_tiles(x: Tensor, rows: int, span: slice, reach: int) -> Tensor:
    """``(B * G, m, D) -> (B * G, tiles, rows + reach, D)``: a view with overlaps."""
    return x[:, span.start : span.stop + reach].unfold(1, rows + reach, rows).transpose(2, 3)


def _add_key_tiles(total: Tensor, tiles: Tensor, rows: int, first: int) -> None:
    """Add the overlapping ``tiles (B * G, tiles, width, D)`` into ``total`` from key ``first`` on.

    Stretches of ``rows`` keys at the same place of every tile do not overlap: one addition each.
    ``total (B * G, m + rows, D)`` has room for the last tile's last stretch to be a whole one.
    """
    count, width = tiles.shape[1:3]
    if count == 1:
        total[:, first : first + width] += tiles[:, 0]
        return
    for start in range(0, width, rows):
        stretch = tiles[:, :, start : start + rows]
        where = total[:, first + start : first + start + count * rows].unflatten(1, (count, rows))
        where[:, :, : stretch.shape[2]] += stretch


def _mask(rows: int, reach: int, like: Tensor) -> Tensor:
    """Additive mask of a tile ``(rows, rows + reach)``: 0 on the band, -inf beside it."""
    i = torch.arange(rows)[:, None]
    j = torch.arange(rows + reach)[None, :]
    return additive((i <= j) & (j <= i + reach), like)
