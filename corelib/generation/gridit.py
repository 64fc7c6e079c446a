"""GriDiT: long image sequences as grids of small frames (arXiv 2512.21276).

Idea: tile 16 small frames into one picture, and a plain 2-D diffusion transformer becomes a video
model, for its attention sees all frames; sharpen every frame on its own afterwards.

    grid[r h + y, c w + x] = frames[r columns + c][y, x]                    (to_grid)
    position of a patch = (frame, row, column), in sines and cosines        (pos3d)
    next grid: its first rows = the last ``rows_known`` rows of this one    (rollout)

| here         | paper                     | what                                          |
|:-------------|:--------------------------|:----------------------------------------------|
| frames       | subsampled sequence       | ``(B, T, c, h, w)``, T = rows * columns       |
| grid         | grid image                | ``(B, c, rows h, columns w)``                 |
| rows_known   | 3 of 4                    | rows of frames that the next grid begins with |
| GridDiT      | stage 1                   | a `DiT` on the patches of a grid              |
| FrameSR      | stage 2                   | a `DiT` on one frame, given its small version |

Exact: with reordered positions the grid model *is* the model with full attention over stacked
frames, up to the order of its patches. Approximate: known rows enter a rollout as noised pixels
(`diffusion.paint`), the model is not told which they are. Different: pixels instead of the latents
of an autoencoder, a net that predicts velocities, classes with guidance where the paper's models
have none. Known rows are noised to the level just reached; the released code noises them to
the level before and does not paste them at the end (``paste_final=False``). It also adds the
positions in the order of the frames to patches in raster order (``reorder=False`` in `pos3d`):
still one code for each place, so it trains, but neighbours in the code are no neighbours in time.
Left out: the interpolation sampler (`paint` with another mask). How the released stage 2 mixes in
its condition was not read; here it is a second channel.
Cost: attention over ``T h w / patch^2`` patches a pass; stage 2 is linear in the frames.
Oracle: the same `DiT` on stacked frames.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from .diffusion import Denoiser, Schedule, guided, noise_from_velocity, paint
from .dit import DiT, DiTConfig, dit_flops, patchify, unpatchify
from .frame_grid import Frames, Grid, from_grid, pos3d, raster_order, to_grid
from .frame_sr import FrameSR, SRConfig, super_resolve

__all__ = [
    "Flops",
    "FrameSR",
    "GridConfig",
    "GridDiT",
    "SRConfig",
    "flops_grid_vs_tensor",
    "from_grid",
    "pos3d",
    "raster_order",
    "rollout",
    "super_resolve",
    "to_grid",
]


@dataclasses.dataclass(frozen=True)
class GridConfig:
    """Sizes of a `GridDiT`: ``rows`` by ``columns`` frames of ``side`` by ``side`` pixels."""

    rows: int = 4
    columns: int = 4
    side: int = 12
    patch: int = 6
    channels: int = 1
    width: int = 96
    layers: int = 6
    heads: int = 3
    condition: int = 64
    labels: int = 10

    @property
    def frames(self) -> int:
        return self.rows * self.columns

    @property
    def dit(self) -> DiTConfig:
        shared = {k: getattr(self, k) for k in ("width", "layers", "heads", "condition", "labels")}
        return DiTConfig(patch=self.channels * self.patch**2, **shared)


class GridDiT(nn.Module):
    """Stage 1: the velocity of a noisy grid, and of the same frames stacked."""

    def __init__(self, config: GridConfig, seed: int | None = 0):
        super().__init__()
        self.config, self.dit = config, DiT(config.dit, seed)
        per_side = config.side // config.patch
        self.layout = (config.rows, config.columns), (per_side, per_side)
        self.register_buffer("positions", pos3d(*self.layout), persistent=False)

    @property
    def n_parameters(self) -> int:
        return self.dit.n_parameters

    def forward(
        self, grid: Grid, t: Int[Tensor, " B"], label: Int[Tensor, " B"] | None = None
    ) -> Grid:
        patches = patchify(grid, self.config.patch)
        return unpatchify(
            self.dit(patches, self.positions, t, label), self.config.patch, *grid.shape[2:]
        )

    def stacked(
        self, frames: Frames, t: Int[Tensor, " B"], label: Int[Tensor, " B"] | None = None
    ) -> Frames:
        """The same net on the patches of one frame after another: the 3-D tensor model."""
        B, T, c, h, w = frames.shape
        patches = patchify(frames.flatten(0, 1), self.config.patch)
        axes = (torch.arange(n) for n in (T, h // self.config.patch, w // self.config.patch))
        positions = torch.cartesian_prod(*axes).to(frames.device)
        out = self.dit(patches.reshape(B, -1, patches.shape[2]), positions, t, label)
        pictures = unpatchify(out.reshape(B * T, -1, out.shape[2]), self.config.patch, h, w)
        return pictures.view(frames.shape)

    def denoiser(
        self, schedule: Schedule, label: Int[Tensor, " B"] | None = None, guidance: float = 1.0
    ) -> Denoiser:
        """What the samplers call; with a label and guidance other than 1 it runs twice."""

        def given(label):
            return lambda x, t: noise_from_velocity(schedule, x, self(x, t, label), t)

        if label is None or guidance == 0.0:
            return given(None)
        return given(label) if guidance == 1.0 else guided(given(label), given(None), guidance)


def rollout(
    denoiser: Denoiser,
    first: Frames,
    rows_known: int,
    passes: int,
    schedule: Schedule,
    steps: int,
    *,
    columns: int = 4,
    eta: float = 1.0,
    paste_final: bool = True,
    clip: float | None = 1.0,
    generator: torch.Generator | None = None,
) -> Float[Tensor, "B more c h w"]:
    """``first`` and what follows: every pass begins a grid with the last ``rows_known`` rows.

    Args:
        denoiser: of grids with as many frames as ``first``.
        rows_known: 0 gives grids that know nothing of each other.
        eta: 1 is the ancestral sampler of the released code, 0 DDIM, see `diffusion.step_down`.
        passes: grids to sample; each adds ``T - rows_known * columns`` frames.
        paste_final: known rows end as what they were, bit for bit.

    Raises ValueError when nothing would be known or nothing new.
    """
    B, T, c, h, w = first.shape
    rows = T // columns
    if not 0 <= rows_known < rows:
        raise ValueError(f"rows_known: expected 0 to {rows - 1}, got {rows_known}")
    mask = torch.zeros(1, 1, rows * h, 1, dtype=torch.bool)
    mask[:, :, : rows_known * h] = True
    kept, out = rows_known * columns, first
    options = dict(eta=eta, paste_final=paste_final, clip=clip, generator=generator)
    for _ in range(passes):
        noise = torch.randn(B, c, rows * h, columns * w, generator=generator, dtype=first.dtype)
        last = out[:, out.shape[1] - kept :]
        known = to_grid(F.pad(last, (0, 0) * 3 + (0, T - kept)), columns)
        grid = paint(denoiser, noise, known, mask, schedule, steps, **options)
        frames = from_grid(grid, rows, columns)
        out = torch.cat([out[:, : out.shape[1] - kept], frames], 1)
    return out


class Flops(NamedTuple):
    """Multiplications and additions of sampling a sequence."""

    grid: int
    sharpen: int
    tensor: int

    @property
    def ratio(self) -> float:
        """How many times as much the 3-D tensor costs."""
        return self.tensor / (self.grid + self.sharpen)


def flops_grid_vs_tensor(
    frames: int,
    *,
    config: GridConfig | None = None,
    sr: SRConfig | None = None,
    rows_known: int = 3,
    steps: int = 50,
    sr_steps: int = 50,
) -> Flops:
    """Grids and sharpening, against one `DiT` of the same sizes on all full frames at once."""
    config, sr = config or GridConfig(), sr or SRConfig()
    if frames < config.frames:
        raise ValueError(f"frames: expected at least {config.frames}, got {frames}")
    new = config.frames - rows_known * config.columns
    passes = 1 + -(-(frames - config.frames) // new)
    small, large = ((side // config.patch) ** 2 for side in (config.side, config.side * sr.by))
    one = (sr.side * sr.by // sr.patch) ** 2
    return Flops(
        grid=passes * steps * dit_flops(config.dit, config.frames * small),
        sharpen=frames * sr_steps * dit_flops(sr.dit, one),
        tensor=steps * dit_flops(config.dit, frames * large),
    )


def example() -> tuple[GridDiT, dict]:
    """An untrained grid model, zeros replaced: six frames of 4 by 4 pixels, patches of 2."""
    config = GridConfig(
        rows=2, columns=3, side=4, patch=2, width=12, layers=2, heads=2, condition=8, labels=2
    )
    generator = torch.Generator().manual_seed(0)
    model = GridDiT(config).double()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.2 * torch.randn(p.shape, generator=generator, dtype=p.dtype))
    frames = torch.randn(2, 6, 1, 4, 4, generator=generator, dtype=torch.float64)
    return model, dict(frames=frames, t=torch.tensor([5, 900]), label=torch.tensor([1, 2]))
