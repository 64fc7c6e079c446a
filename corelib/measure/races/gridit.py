"""GriDiT on this machine: a denoising step of a whole sequence, as grids and as one tensor.

Nets are untrained, for time does not depend on the weights. ``rows_known`` decides how much of a
grid is new: with 3 of 4 rows known a pass adds 4 frames and computes 12 again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from ...generation.gridit import FrameSR, GridConfig, GridDiT, SRConfig, from_grid, to_grid
from ..race import race
from ..scaling import sweep
from . import Row, register, rows

BATCH = 4  # clips at a time: a sheet alone has too few patches to keep a processor busy


def nets() -> tuple[GridDiT, FrameSR]:
    """Both stages with random weights, in evaluation mode."""
    torch.manual_seed(0)
    pair = GridDiT(GridConfig()), FrameSR(SRConfig())
    for net in pair:
        net.eval().requires_grad_(False)
        for p in net.parameters():
            p.add_(0.02 * torch.randn(p.shape))
    return pair


def grid_step(
    grids: GridDiT, sharpen: FrameSR, frames: int, rows_known: int, batch: int = 1
) -> Callable:
    """One denoising step of every pass and of every frame of ``batch`` clips, pass after pass."""
    new = grids.config.frames - rows_known * grids.config.columns
    passes = 1 + -(-(frames - grids.config.frames) // new)
    every = batch * frames
    grid, t = torch.randn(batch, 1, 48, 48), torch.full((batch,), 500)
    sharp, small = torch.randn(every, 1, 24, 24), torch.randn(every, 1, 12, 12)
    t_frames = torch.full((every,), 500)

    def run() -> None:
        with torch.no_grad():
            for _ in range(passes):
                grids(grid, t)
            sharpen(sharp, t_frames, small)

    return run


def tensor_step(grids: GridDiT, frames: int, batch: int = 1) -> Callable:
    """One denoising step of the same `DiT` on all full frames of a clip at once."""
    stack, t = torch.randn(batch, frames, 1, 24, 24), torch.full((batch,), 500)

    def run() -> None:
        with torch.no_grad():
            grids.stacked(stack, t)

    return run


@register("gridit-sequence", "a step of a sequence: grids and sharpening against a tensor")
def gridit_sequence(quick: bool) -> Iterator[Row]:
    lengths = (16, 32) if quick else (16, 32, 64, 128, 256)
    grids, sharpen = nets()

    def contestants(frames: int) -> dict[str, Callable]:
        return {
            "corelib": grid_step(grids, sharpen, frames, 3, BATCH),
            "corelib, 1 row known": grid_step(grids, sharpen, frames, 1, BATCH),
            "3-D tensor": tensor_step(grids, frames, BATCH),
        }

    result = sweep(lengths, contestants, check=None, min_time=0.02, repeats=3)
    yield from rows(result, what="one step of all frames", shape=f"B{BATCH} of 24 x 24, float32")


@register("gridit-forms", "the same net on a grid and on stacked frames: equal, and as fast")
def gridit_forms(quick: bool) -> Iterator[Row]:
    grids, _ = nets()
    frames, t = torch.randn(2 if quick else 16, 16, 1, 12, 12), torch.tensor([500])
    t = t.expand(len(frames))

    def on_grid():
        with torch.no_grad():
            return from_grid(grids(to_grid(frames, 4), t), 4, 4)

    def on_stack():
        with torch.no_grad():
            return grids.stacked(frames, t)

    result = race({"corelib": on_grid, "stacked frames": on_stack}, min_time=0.05)
    yield from rows(result, what="one step", shape=f"{len(frames)} clips of 16 frames of 12 x 12")
