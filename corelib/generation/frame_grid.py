"""Frames tiled into one picture, and where each patch of it stands in time and space: the layout of
GriDiT (arXiv 2512.21276).

    grid[r h + y, c w + x] = frames[r columns + c][y, x]                    (to_grid)
    position of a patch = (frame, row, column)                              (pos3d)

Moving pixels and counting, nothing else; `gridit` has the model. Oracle: the formula, pixel by
pixel.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

Frames = Float[Tensor, "B T c h w"]
Grid = Float[Tensor, "B c H W"]


def to_grid(frames: Frames, columns: int) -> Grid:
    """Frames in reading order, ``columns`` a row."""
    B, T, c, h, w = frames.shape
    if columns < 1 or T % columns:
        raise ValueError(f"columns: expected a divisor of {T} frames, got {columns}")
    tiled = frames.view(B, T // columns, columns, c, h, w).permute(0, 3, 1, 4, 2, 5)
    return tiled.reshape(B, c, T // columns * h, columns * w)


def from_grid(grid: Grid, rows: int, columns: int) -> Frames:
    """The inverse of `to_grid`."""
    B, c, H, W = grid.shape
    if rows < 1 or columns < 1 or H % rows or W % columns:
        raise ValueError(f"rows, columns: expected divisors of {H}, {W}, got {rows}, {columns}")
    cut = grid.view(B, c, rows, H // rows, columns, W // columns).permute(0, 2, 4, 1, 3, 5)
    return cut.reshape(B, rows * columns, c, H // rows, W // columns)


def raster_order(grid: tuple[int, int], frame: tuple[int, int]) -> Int[Tensor, " L"]:
    """For each patch of a grid in raster order, its number when frames are stacked.

    ``grid``: rows and columns of frames; ``frame``: rows and columns of patches in a frame.
    """
    stacked = torch.arange(grid[0] * grid[1] * frame[0] * frame[1]).float()
    return to_grid(stacked.view(1, -1, 1, *frame), grid[1]).flatten().long()


def pos3d(
    grid: tuple[int, int], frame: tuple[int, int], *, reorder: bool = True
) -> Int[Tensor, "L 3"]:
    """Frame, row and column of every patch of a grid in raster order.

    ``reorder=False`` lists them frame after frame instead, as if frames were stacked; on the
    patches of a grid that is what the released code does.
    """
    axes = (torch.arange(n) for n in (grid[0] * grid[1], *frame))
    stacked = torch.cartesian_prod(*axes).view(-1, 3)
    return stacked[raster_order(grid, frame)] if reorder else stacked
