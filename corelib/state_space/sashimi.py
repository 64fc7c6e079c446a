"""SaShiMi: It's Raw! Audio Generation with State-Space Models (arXiv 2202.09729).

Idea: raw sound has thousands of samples a second, so let most layers run at a fraction of the rate.
A tier of `S4` blocks runs at every sample, one below it at every fourth, one below that at every
sixteenth; each hands its outputs up one pooled step late, so that nothing hears the future.

    z = up(inner(down(x)))            down: (L, C) -> (L / pool, expand C)   (`DownPool`)
    y = x + shift(z)                  up:   (L / pool, expand C) -> (L, C)   (`UpPool`)
    out = y + blocks(y)               shift: right by ``pool`` samples, zeros first

``inner`` is a tier again, or blocks only. With ``shift`` an output at ``t`` depends on the pooled
group that ended at or before ``t - 1``; without it, on up to ``pool - 1`` samples to come. A step
runs the tier below only when a group is complete: tiers of stride 1, 4, 16, ... cost ``1 + 1/4 +
1/16 + ...`` runs a sample.

| here            | paper    | what                                            | default     |
|:----------------|:---------|:------------------------------------------------|:------------|
| width           | H        | channels of the upmost tier                     | 64          |
| pools           | p        | pooling factor of each tier                     | (4, 4)      |
| expand          | q        | by which a tier is wider than the one above     | 2           |
| blocks          |          | in each tier                                    | 8           |

The S4 inside is the tied one (``A = diag(poles) - p p*``, `corelib.state_space.hurwitz` says why).
As released, a block's S4 ends in a gated linear map, and each tier has a skip around its blocks.
Exact: parallel, stepped and in pieces of any length agree to rounding. `TwoSidedTier` is the form
for diffusion models (both directions, blocks on the way down too, no shift). Left out: dropout, and
the diffusion model around it.
Cost: time ``O(L log L)`` for a stretch; a sample ``O(blocks width^2)`` and no cache that grows.
Oracle: `UpPool` and `DownPool` on the whole padded sequence; Jacobians by autograd.
"""

from __future__ import annotations

import itertools
import operator
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from ..contracts import Chooser
from .pooling import DownPool, Pooled, UpPool
from .s4 import S4Block, TwoSidedS4


class Block(nn.Module):
    """An `S4Block`, then LayerNorm, Linear, GELU, Linear, with a skip around each."""

    def __init__(
        self, channels: int, length: int, *, state_size: int = 64, feed: int = 2, **steps: float
    ):
        super().__init__()
        self.mix = S4Block(channels, state_size, length, **steps)
        self.feed = nn.Sequential(
            nn.LayerNorm(channels),
            nn.Linear(channels, feed * channels),
            nn.GELU(),
            nn.Linear(feed * channels, channels),
        )

    def forward(self, x: Tensor, state: Any = None) -> tuple[Tensor, Any]:
        x, state = self.mix(x, state)
        return x + self.feed(x), state

    def step(self, x_t: Tensor, state: Any) -> tuple[Tensor, Any]:
        x_t, state = self.mix.step(x_t, state)
        return x_t + self.feed(x_t), state

    def init_state(self, batch: int) -> Any:
        return self.mix.init_state(batch)


class Tier(nn.Module):
    """What is below, if ``pools`` names any, then ``blocks`` of this rate: a sequence mixer.

    Args:
        channels: width of this tier.
        pools: pooling factor to the tier below, and on to those below it.
        blocks: how many in each tier.
        expand: how much wider the tier below is.
        length: of the sequences it learns from, in steps of this tier.
        options: of each `Block`: ``state_size``, ``feed``, ``step_min``, ``step_max``.
    """

    def __init__(
        self,
        channels: int,
        pools: tuple[int, ...] = (4, 4),
        *,
        blocks: int = 8,
        expand: int = 2,
        length: int = 1024,
        **options: float,
    ):
        super().__init__()
        if blocks < 1:
            raise ValueError(f"blocks: expected at least 1, got {blocks}")
        self.below = None
        if pools:
            sizes = dict(blocks=blocks, expand=expand, length=-(-length // pools[0]))
            inner = Tier(expand * channels, pools[1:], **sizes, **options)
            self.below = Pooled(inner, channels, pools[0], expand)
        self.blocks = nn.ModuleList(Block(channels, length, **options) for _ in range(blocks))

    def forward(
        self, x: Float[Tensor, "B L C"], state: list | None = None
    ) -> tuple[Float[Tensor, "B L C"], list]:
        return self._through(x, itertools.repeat(None) if state is None else state, "forward")

    def step(self, x_t: Float[Tensor, "B C"], state: list) -> tuple[Float[Tensor, "B C"], list]:
        return self._through(x_t, state, "step")

    def init_state(self, batch: int) -> list:
        return [part.init_state(batch) for part in self._parts()]

    def _parts(self) -> list[nn.Module]:
        return ([] if self.below is None else [self.below]) + list(self.blocks)

    def _through(self, x: Tensor, states: Any, how: str) -> tuple[Tensor, list]:
        states, after = iter(states), []
        if self.below is not None:
            z, state = getattr(self.below, how)(x, next(states))
            x, after = x + z, [state]
        y = x
        for block, state in zip(self.blocks, states):
            y, state = getattr(block, how)(y, state)
            after.append(state)
        return x + y, after


class SaShiMi(nn.Module):
    """Codes of sound in, logits of the next code out.

    Args:
        levels: how many codes there are.
        width, pools, options: of the upmost `Tier`.
    """

    def __init__(
        self, levels: int = 256, width: int = 64, pools: tuple[int, ...] = (4, 4), **options: Any
    ):
        super().__init__()
        self.levels = levels
        self.embed = nn.Embedding(levels, width)
        self.body = Tier(width, tuple(pools), **options)
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, levels)

    def forward(
        self, ids: Int[Tensor, "B L"], state: list | None = None
    ) -> tuple[Float[Tensor, "B L levels"], list]:
        """All positions at once; ``state`` is what an earlier stretch or step returned."""
        if ids.dim() != 2:
            raise ValueError(f"ids: expected (B, L), got shape {tuple(ids.shape)}")
        y, state = self.body(self.embed(ids), state)
        return self.head(self.norm(y)), state

    def step(self, ids_t: Int[Tensor, " B"], state: list) -> tuple[Float[Tensor, "B levels"], list]:
        """One sample in, the logits of the next one out."""
        y, state = self.body.step(self.embed(ids_t), state)
        return self.head(self.norm(y)), state

    def init_state(self, batch: int) -> list:
        return self.body.init_state(batch)

    @torch.no_grad()
    def generate(
        self, prompt: Int[Tensor, "B L"], count: int, *, chooser: Chooser
    ) -> Int[Tensor, "B count"]:
        """``count`` codes behind ``prompt``, which is read in parallel; the rest step by step."""
        if prompt.shape[1] < 1 or count < 1:
            got = f"{prompt.shape[1]} and {count}"
            raise ValueError(f"prompt, count: expected at least one code each, got {got}")
        logits, state = self(prompt)
        codes = [chooser(logits[:, -1].softmax(-1))]
        for _ in range(count - 1):
            logits, state = self.step(codes[-1], state)
            codes.append(chooser(logits.softmax(-1)))
        return torch.stack(codes, 1)


def runs_per_sample(pools: tuple[int, ...]) -> list[float]:
    """How often each tier runs for one sample, the upmost first: ``[1, 1/4, 1/16]``."""
    return [1.0, *(1 / stride for stride in itertools.accumulate(pools, operator.mul))]


class TwoSidedBlock(Block):
    """`Block` with `TwoSidedS4`: ``(B, L, C) -> (B, L, C)``, every output hears every input."""

    def __init__(self, channels: int, length: int, *, state_size: int = 64, **options: float):
        super().__init__(channels, length, state_size=state_size, **options)
        options.pop("feed", None)
        self.mix.mixer = TwoSidedS4(channels, state_size, length, **options)

    def forward(self, x: Float[Tensor, "B L C"]) -> Float[Tensor, "B L C"]:
        x = x + self.mix.gated(self.mix.mixer(self.mix.norm(x)))
        return x + self.feed(x)


class TwoSidedTier(nn.Module):
    """`Tier` for models that see everything at once: blocks before pooling and after, no shift.

    The mixer of SaShiMi's diffusion variant: ``(B, L, C) -> (B, L, C)``, any ``L``.
    """

    def __init__(
        self,
        channels: int,
        pools: tuple[int, ...] = (4, 4),
        *,
        blocks: int = 8,
        expand: int = 2,
        length: int = 1024,
        **options: float,
    ):
        super().__init__()
        self.inner = None

        def stack() -> nn.Sequential:
            each = [TwoSidedBlock(channels, length, **options) for _ in range(blocks)]
            return nn.Sequential(*each)

        if pools:
            self.before = stack()
            self.down = DownPool(channels, pools[0], expand)
            self.up = UpPool(channels, pools[0], expand)
            sizes = dict(blocks=blocks, expand=expand, length=-(-length // pools[0]))
            self.inner = TwoSidedTier(expand * channels, pools[1:], **sizes, **options)
        self.blocks = stack()

    def forward(self, x: Float[Tensor, "B L C"]) -> Float[Tensor, "B L C"]:
        if self.inner is None:
            return x + self.blocks(x)
        x = self.before(x)
        padded = nn.functional.pad(x, (0, 0, 0, -x.shape[1] % self.down.pool))
        y = x + self.up.spread(self.inner(self.down(padded)))[:, : x.shape[1]]
        return y + self.blocks(y)


def example() -> dict:
    """Three tiers of width 2, 4 and 8 and six tokens for them.

    >>> given = example()
    >>> given["mixer"](given["x"])[0].shape
    torch.Size([2, 6, 2])
    """
    torch.manual_seed(0)
    mixer = Tier(2, (2, 2), blocks=1, state_size=4, length=8).double()
    return dict(mixer=mixer, x=torch.randn(2, 6, 2, dtype=torch.float64))
