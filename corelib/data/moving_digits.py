"""Clips of handwritten digits that fly over a canvas and bounce off its edges.

The digits are the real ones of `corelib.data.digits`; everything else about a clip is known: which
digits, where they are in every frame, how fast. So whoever makes such clips can be asked whether
they are right: `digit_match` finds the training digit that a frame shows best.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from .images import digits, upsample

PHASES = ((0, 0), (0, 1), (1, 0), (1, 1))  # where a digit may lie within a pixel of half the side


class MovingDigits(NamedTuple):
    """``N`` clips of ``T`` frames with ``n`` digits each, and the truth about them."""

    frames: Float[Tensor, "N T size size"]  # 0 (paper) to 1 (ink)
    labels: Int[Tensor, "N n"]
    corners: Int[Tensor, "N T n 2"]  # row and column of each digit's upper left pixel
    velocity: Int[Tensor, "N n 2"]  # pixels a frame, before the first bounce


def moving_digits(
    count: int,
    frames: int,
    *,
    size: int = 24,
    digit: int = 16,
    objects: int = 1,
    fastest: int = 2,
    contrast: float = 3.0,
    split: str = "train",
    generator: torch.Generator | None = None,
) -> MovingDigits:
    """``count`` clips; digits fly straight, at whole pixels a frame, and bounce off the edges.

    Args:
        size: side of the canvas, in pixels.
        digit: side of a digit (the originals have 8 by 8 pixels).
        objects: digits in a clip; where they overlap the darker one shows.
        fastest: each axis moves by 1 to ``fastest`` pixels a frame, either way.
        contrast: of the strokes; 1 leaves the upsampled digit as it is, soft.
        split: whose digits, see `corelib.data.digits`.

    Raises ValueError for sizes that do not fit.
    """
    for name, value in (("count", count), ("frames", frames), ("objects", objects)):
        if value < 1:
            raise ValueError(f"{name}: expected at least 1, got {value}")
    if not 1 <= digit <= size:
        raise ValueError(f"digit: expected 1 to {size}, the canvas, got {digit}")
    if fastest < 1:
        raise ValueError(f"fastest: expected at least 1, got {fastest}")
    shapes, names = _drawn(split, digit, contrast)
    which = torch.randint(len(shapes), (count, objects), generator=generator)
    room = size - digit
    start = torch.randint(room + 1, (count, objects, 2), generator=generator)
    speed = torch.randint(1, fastest + 1, (count, objects, 2), generator=generator)
    way = 2 * torch.randint(2, (count, objects, 2), generator=generator) - 1
    corners = bounce(start, speed * way, frames, room)
    ink = paste(shapes[which], corners, size)
    return MovingDigits(ink.amax(2), names[which], corners, speed * way)


def bounce(
    start: Int[Tensor, "N n 2"], velocity: Int[Tensor, "N n 2"], frames: int, room: int
) -> Int[Tensor, "N T n 2"]:
    """Where something is that flies between 0 and ``room`` and bounces: a folded straight line."""
    if room == 0:
        return torch.zeros(start.shape[0], frames, *start.shape[1:], dtype=start.dtype)
    time = torch.arange(frames)[:, None, None]
    straight = (start[:, None] + time * velocity[:, None]) % (2 * room)
    return torch.where(straight > room, 2 * room - straight, straight)


def paste(
    shapes: Float[Tensor, "N n d d"], corners: Int[Tensor, "N T n 2"], size: int
) -> Float[Tensor, "N T n size size"]:
    """Each shape on an empty canvas of its own, at each of its places."""
    d, axis = shapes.shape[-1], torch.arange(size)
    at = axis - corners[..., None]  # pixel of the shape that falls on each row and column
    inside = (at >= 0) & (at < d)
    picks = F.one_hot(at.clamp(0, d - 1), d).to(shapes) * inside[..., None].to(shapes)
    rows, columns = picks.unbind(3)
    return rows @ shapes[:, None] @ columns.mT


def shrink(frames: Float[Tensor, "*b H W"], by: int = 2) -> Float[Tensor, "*b h w"]:
    """Frames at a lower resolution: means over squares of ``by`` by ``by`` pixels."""
    flat = frames.reshape(-1, 1, *frames.shape[-2:])
    small = F.avg_pool2d(flat, by)
    return small.reshape(*frames.shape[:-2], *small.shape[-2:])


class DigitMatch(NamedTuple):
    """How well each frame shows a real digit, and which."""

    error: Float[Tensor, "*b"]  # mean square over the canvas, of the best digit at its best place
    label: Int[Tensor, "*b"]
    corner: Float[Tensor, "*b 2"]  # row and column of the digit, in pixels


def digit_match(
    frames: Float[Tensor, "*b H W"], *, digit: int = 8, contrast: float = 3.0
) -> DigitMatch:
    """The training digit and the place that explain each frame best, by mean square.

    ``digit``: the side that digits have in these frames; every place on a grid of half pixels is
    tried, as frames may come from `shrink`.
    """
    templates, labels = _templates(digit, contrast)
    flat = frames.reshape(-1, 1, *frames.shape[-2:]).to(templates)
    windows = F.unfold(F.pad(flat, (0, 1, 0, 1)), digit + 1)  # (n, (digit + 1)^2, places)
    products = torch.einsum("npw,ptq->ntqw", windows, templates)
    ink = (templates**2).sum(0)[None, ..., None]
    left = (flat**2).sum((1, 2, 3))[:, None, None, None] - 2 * products + ink
    best, where = left.flatten(1).min(1)
    places = windows.shape[-1]
    number, phase, place = where // (4 * places), where // places % 4, where % places
    columns = flat.shape[-1] + 1 - digit
    corner = torch.stack([place // columns, place % columns], -1).float()
    corner = corner + 0.5 * torch.tensor(PHASES, dtype=corner.dtype)[phase]
    lead = frames.shape[:-2]
    error = (best / flat[0].numel()).clamp(min=0.0)
    return DigitMatch(error.reshape(lead), labels[number].reshape(lead), corner.reshape(*lead, 2))


@functools.lru_cache(maxsize=8)
def _drawn(split: str, digit: int, contrast: float) -> tuple[Tensor, Tensor]:
    images, labels = digits(split)
    big = images if digit == 8 else upsample(images, digit)
    return ((big - 0.5) * contrast + 0.5).clamp(0.0, 1.0), labels


@functools.lru_cache(maxsize=2)
def _templates(digit: int, contrast: float) -> tuple[Tensor, Tensor]:
    """``((digit + 1)^2, digits, 4)``: the training digits at the four half-pixel places."""
    shapes, labels = _drawn("train", 2 * digit, contrast)
    moved = [F.pad(shapes, (dx, 2 - dx, dy, 2 - dy)) for dy, dx in PHASES]
    small = torch.stack([shrink(x).flatten(1) for x in moved], 1)
    return small.permute(2, 0, 1).contiguous(), labels
