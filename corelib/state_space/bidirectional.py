"""Causal mixers in both directions: run one from the left, one from the right, and combine.

Where all the input is there at once (images, masked words, spectra) a position may look ahead. The
usual way is to run a causal mixer over the sequence and over its mirror image. What remains is how
to put the two results together, and there are several answers:

    Add             past + future                        Vision Mamba, most others
    Multiply        past * future
    Concatenate     W [past; future]
    Gate            g past + (1 - g) future              g = sigmoid(W x)
    Quasiseparable  shift(past) + unshift(future) + (d + W x) x                            Hydra

In all but the last a position meets itself twice, once from each side. `Quasiseparable` moves both
results by one step, so that they hold what lies strictly before and strictly behind, and gives the
position itself a weight of its own (Hydra, arXiv 2407.09941, section 3). Around whole blocks it is
only that idea; inside, on the scan itself, it is in `corelib.state_space.hydra`.

`Bidirectional` wraps any mixer of the contract. It sees the future, so it has no state and no
``step``, and returns ``y`` alone. Cost: both directions. With one set of weights for both they run
as one batch of twice the size.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

Sequence = Float[Tensor, "B L C"]


def shift(x: Float[Tensor, "*batch L C"]) -> Float[Tensor, "*batch L C"]:
    """One step later: ``y_i = x_(i-1)``, and ``y_0 = 0``."""
    return F.pad(x[..., :-1, :], (0, 0, 1, 0)) if x.shape[-2] else x


def unshift(x: Float[Tensor, "*batch L C"]) -> Float[Tensor, "*batch L C"]:
    """One step earlier: ``y_i = x_(i+1)``, and the last is 0."""
    return F.pad(x[..., 1:, :], (0, 0, 0, 1)) if x.shape[-2] else x


# --- ways to combine: (x, past, future) -> y ------------------------------------------------------


class Add(nn.Module):
    """``past + future``: a position's own input comes in from both sides."""

    def forward(self, x: Sequence, past: Sequence, future: Sequence) -> Sequence:
        return past + future


class Multiply(nn.Module):
    """``past * future``: something must be found on both sides."""

    def forward(self, x: Sequence, past: Sequence, future: Sequence) -> Sequence:
        return past * future


class Concatenate(nn.Module):
    """``W [past; future]``, back to the width C."""

    def __init__(self, width: int):
        super().__init__()
        self.out = nn.Linear(2 * width, width, bias=False)

    def forward(self, x: Sequence, past: Sequence, future: Sequence) -> Sequence:
        return self.out(torch.cat([past, future], -1))


class Gate(nn.Module):
    """Each channel of each position chooses a side: ``g past + (1 - g) future``."""

    def __init__(self, width: int):
        super().__init__()
        self.choose = nn.Linear(width, width)

    def forward(self, x: Sequence, past: Sequence, future: Sequence) -> Sequence:
        return torch.lerp(future, past, torch.sigmoid(self.choose(x)))


class Quasiseparable(nn.Module):
    """What is strictly before, what is strictly behind, and a free weight for the position itself.

    ``heads`` weights ``d + W x`` a position, each for its share of the channels.
    """

    def __init__(self, width: int, heads: int = 1):
        super().__init__()
        if width % heads:
            raise ValueError(f"heads: expected a number that divides {width}, got {heads}")
        self.own = nn.Linear(width, heads)
        nn.init.ones_(self.own.bias)

    def forward(self, x: Sequence, past: Sequence, future: Sequence) -> Sequence:
        own = self.own(x).repeat_interleave(x.shape[-1] // self.own.out_features, -1)
        return shift(past) + unshift(future) + own * x


# --- the wrapper ----------------------------------------------------------------------------------


class Bidirectional(nn.Module):
    """``(B, L, C) -> (B, L, C)``: ``past`` from the left, ``future`` from the right, combined.

    Args:
        past: a mixer of the contract, ``x -> (y, state)``.
        future: another one, for the other direction; None shares the weights of ``past``.
        combine: a module ``(x, past, future) -> y``; None is `Add`.
    """

    def __init__(
        self, past: nn.Module, future: nn.Module | None = None, combine: nn.Module | None = None
    ):
        super().__init__()
        self.past, self.future = past, future
        self.combine = Add() if combine is None else combine

    def forward(self, x: Sequence) -> Sequence:
        return self.combine(x, *self.directions(x))

    def directions(self, x: Sequence) -> tuple[Sequence, Sequence]:
        """Both mixers' outputs, each in the order of ``x``."""
        if x.dim() != 3:
            raise ValueError(f"x: expected 3 axes (B, L, C), got shape {tuple(x.shape)}")
        mirrored = x.flip(1)
        if self.future is None:
            past, future = self.past(torch.cat([x, mirrored]))[0].chunk(2)
        else:
            past, future = self.past(x)[0], self.future(mirrored)[0]
        return past, future.flip(1)
