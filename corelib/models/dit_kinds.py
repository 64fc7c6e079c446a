"""The two kinds of image model: grids of small frames, and one frame sharpened (`gridit`)."""

from __future__ import annotations

import functools

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ..data.moving_digits import MovingDigits, digit_match, moving_digits, shrink
from ..generation import diffusion
from ..generation.gridit import (
    FrameSR,
    GridConfig,
    GridDiT,
    SRConfig,
    from_grid,
    super_resolve,
    to_grid,
)
from .recipes import Recipe, Stage
from .text_kinds import step_generator

DROPPED = 0.1  # how often the class is withheld, for guidance
SIDE = 24  # pixels of the clips as they are made

FRAME_SCHEDULE = diffusion.cosine_schedule(1000)


@functools.cache
def grid_schedule(side: int = 12) -> diffusion.Schedule:
    """Sixteen frames show the same digit, and it shines through much noise: the more pixels, the
    more noise it takes."""
    return diffusion.cosine_schedule(1000, shift=side / 6)


class ImageKind:
    """What both have in common: moving digits from -1 (paper) to 1 (ink), bfloat16 products."""

    unit = "mean squared error of the velocity"
    data = (
        "clips of 16 frames by `corelib.data.moving_digits`: one real 8 × 8 digit of the\n"
        "  train split flies and bounces; new clips in every step"
    )

    def schedule(self, config) -> diffusion.Schedule:
        raise NotImplementedError

    def made(self, config, clips: MovingDigits, generator: torch.Generator) -> tuple[Tensor, ...]:
        """Clean pictures, and what the model is given beside noise and level, from clips."""
        raise NotImplementedError

    def drawn(self, config, rows: int, split: str, generator: torch.Generator):
        """A batch: clean pictures, noise, levels (one from each of ``rows`` equal parts, which is
        steadier than drawing them freely), and what else the model is given."""
        clips = moving_digits(rows, 16, size=SIDE, split=split, generator=generator)
        clean, given = self.made(config, clips, generator)
        noise = torch.randn(clean.shape, generator=generator)
        part = (torch.rand(rows, generator=generator) + torch.arange(rows)) / rows
        last = self.schedule(config).last
        return clean, noise, 1 + (part * last).long().clamp(max=last - 1), given

    def batch(self, recipe: Recipe, step: int) -> tuple[Tensor, ...]:
        rows = recipe.stage_at(step).rows
        return self.drawn(recipe.config, rows, "train", step_generator(recipe, step))

    def loss(self, model: nn.Module, batch: tuple[Tensor, ...], stage: Stage | None) -> Tensor:
        clean, noise, t, given = batch
        schedule = self.schedule(model.config)
        x = diffusion.add_noise(schedule, clean, noise, t)
        with torch.autocast(x.device.type, dtype=torch.bfloat16):
            predicted = model(x, t, given)
        return ((predicted.float() - diffusion.velocity(schedule, clean, noise, t)) ** 2).mean()

    @torch.no_grad()
    def held_out(self, model: nn.Module) -> float:
        batch = self.drawn(model.config, 64, "valid", torch.Generator().manual_seed(0))
        return float(self.loss(model, batch, None))


class GridKind(ImageKind):
    """`GridDiT` on grids of frames, shrunk to the side that the sizes ask for."""

    config = GridConfig
    limits = (
        "small frames of one digit, trained for minutes; without guidance a digit may change\n"
        "  on its way."
    )

    def build(self, config: GridConfig, seed: int | None) -> GridDiT:
        return GridDiT(config, seed)

    def shape(self, config: GridConfig) -> str:
        return (
            f"{config.layers} blocks, width {config.width}, {config.heads} heads, adaLN-Zero; "
            f"{config.rows} × {config.columns} frames of\n{config.side} × {config.side} pixels, "
            f"patches of {config.patch}; {config.labels} classes"
        )

    def schedule(self, config: GridConfig) -> diffusion.Schedule:
        return grid_schedule(config.side)

    def made(self, config: GridConfig, clips, generator):
        small = shrink(clips.frames, SIDE // config.side)
        label = clips.labels[:, 0]
        withheld = torch.rand(len(label), generator=generator) < DROPPED
        label = torch.where(withheld, torch.full_like(label, config.labels), label)
        return to_grid(2 * small[:, :, None] - 1, config.columns), label

    def figures(self, model: GridDiT) -> dict[str, float]:
        """How real the digits of 40 sampled clips are, beside clips of unseen digits."""
        label = torch.arange(40) % 10
        found = clip_figures(sample_grids(model, label), label)
        clips = moving_digits(40, 16, split="test", generator=torch.Generator().manual_seed(1))
        real = clip_figures(shrink(clips.frames), clips.labels[:, 0])
        return found | {f"{key}, real clips": value for key, value in real.items()}


class FrameKind(ImageKind):
    """`FrameSR` from frames of 12 by 12 pixels to 24 by 24."""

    config = SRConfig
    limits = "it knows digits of one size only."

    def build(self, config: SRConfig, seed: int | None) -> FrameSR:
        return FrameSR(config, seed)

    def shape(self, config: SRConfig) -> str:
        return (
            f"{config.layers} blocks, width {config.width}, {config.heads} heads, adaLN-Zero; from "
            f"{config.side} × {config.side}\nto {config.side * config.by} pixels, "
            f"patches of {config.patch}"
        )

    def schedule(self, config: SRConfig) -> diffusion.Schedule:
        return FRAME_SCHEDULE

    def made(self, config: SRConfig, clips, generator):
        rows = len(clips.frames)
        one = torch.randint(clips.frames.shape[1], (rows,), generator=generator)
        sharp = 2 * clips.frames[torch.arange(rows), one][:, None] - 1
        return sharp, shrink(sharp, config.by)

    @torch.no_grad()
    def figures(self, model: FrameSR) -> dict[str, float]:
        """Mean squared error on unseen digits, beside bilinear interpolation."""
        generator = torch.Generator().manual_seed(1)
        clips = moving_digits(8, 16, split="test", generator=generator)
        sharp = 2 * clips.frames[:, ::4, None] - 1
        small = shrink(sharp, model.config.by)
        noise = torch.randn(sharp.shape, generator=generator)
        ours = super_resolve(model, small, FRAME_SCHEDULE, 8, noise=noise)
        plain = torch.nn.functional.interpolate(
            small.flatten(0, 1), size=sharp.shape[-2:], mode="bilinear"
        )
        return {
            "mean squared error": float(((ours - sharp) ** 2).mean()) / 4,
            "mean squared error, bilinear": float(((plain - sharp.flatten(0, 1)) ** 2).mean()) / 4,
        }


@torch.no_grad()
def sample_grids(
    model: GridDiT, label: Tensor, *, steps: int = 25, guidance: float = 2.0, seed: int = 0
) -> Float[Tensor, "B T h w"]:
    """Clips of the classes ``label (B,)``, ink from 0 to 1."""
    config, generator = model.config, torch.Generator().manual_seed(seed)
    H, W = config.rows * config.side, config.columns * config.side
    noise = torch.randn(len(label), config.channels, H, W, generator=generator)
    schedule = grid_schedule(config.side)
    denoiser = model.denoiser(schedule, label, guidance)
    grid = diffusion.sample(denoiser, noise, schedule, steps, clip=1.0)
    return (from_grid(grid, config.rows, config.columns)[:, :, 0] + 1) / 2


def clip_figures(frames: Float[Tensor, "B T h w"], label: Tensor) -> dict[str, float]:
    """What can be measured of clips of one digit, each as a mean."""
    match = digit_match(frames)
    step = (match.corner[:, 1:] - match.corner[:, :-1]).abs()
    return {
        "distance to the nearest digit": float(match.error.mean()),
        "frames of the class": float((match.label == label[:, None]).float().mean()),
        "pixels a frame": float(step.mean()),
        "jumps of more than 1.5 pixels": float((step > 1.5).any(-1).float().mean()),
    }
