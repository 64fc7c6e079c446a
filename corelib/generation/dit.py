"""A small diffusion transformer, DiT with adaLN-Zero (arXiv 2212.09748, section 3.2).

Idea: cut a picture into patches, add positions, and let plain transformer blocks denoise them; the
level of noise and the class act only through the blocks' layer norms.

    shift, scale, gate = modulation(silu(condition))          twice a block, all zero at the start
    x = x + gate attention(norm(x) (1 + scale) + shift)       the same with the MLP

It works on patches ``(B, L, P)`` with positions ``(L, 3)``: frame, row, column. Whether the patches
were cut from a grid of frames or from a stack of them, it cannot tell (see `gridit`).

| here        | paper      | what                                                     |
|:------------|:-----------|:---------------------------------------------------------|
| positions   | sin-cos    | ``(L, 3)`` whole numbers; a third of the width each      |
| condition   | c          | ``(B, condition)``: level of noise, plus class           |
| labels      | y, null    | classes; ``labels`` itself is "no class"                 |

Every block is two adaptive norms of `corelib.primitives.adaln`. Different from the paper: narrow
conditions (``condition < width``), no learned variance, and what is predicted is up to the caller.
"""

from __future__ import annotations

import dataclasses
import math

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, Real
from torch import Tensor, nn

from corelib.primitives import attention
from corelib.primitives.adaln import adaln, gated_adaln

SHORT = 256  # patches


@dataclasses.dataclass(frozen=True)
class DiTConfig:
    """Sizes of a `DiT`; ``patch`` values go in per patch and ``out`` (None: as many) come out."""

    patch: int
    width: int = 96
    layers: int = 6
    heads: int = 3
    condition: int = 64
    labels: int = 0
    expansion: int = 4
    out: int | None = None

    def __post_init__(self) -> None:
        if self.width % self.heads or self.width % 6:
            raise ValueError(
                f"width: expected a multiple of 6 and of heads {self.heads}, got {self.width}"
            )


def sincos(values: Real[Tensor, " n"], width: int, *, base: float = 1e4) -> Float[Tensor, "n c"]:
    """Sines and cosines of ``values``, ``width / 2`` frequencies from 1 down to ``1 / base``."""
    if width % 2:
        raise ValueError(f"width: expected an even number, got {width}")
    steps = torch.arange(width // 2, dtype=torch.float64, device=values.device)
    angles = values.double()[:, None] * base ** (-2 * steps / width)
    return torch.cat([angles.sin(), angles.cos()], -1)


def sincos_positions(positions: Int[Tensor, "L axes"], width: int) -> Float[Tensor, "L C"]:
    """The sines and cosines of each axis side by side, an equal part of the width each."""
    axes = positions.shape[1]
    if width % (2 * axes):
        raise ValueError(f"width: expected a multiple of {2 * axes}, got {width}")
    return torch.cat([sincos(p.double(), width // axes) for p in positions.unbind(1)], -1)


def patchify(pictures: Float[Tensor, "B c H W"], patch: int) -> Float[Tensor, "B L P"]:
    """Squares of ``patch`` by ``patch`` pixels in raster order, ``P = c patch^2`` values each."""
    H, W = pictures.shape[2:]
    if H % patch or W % patch:
        raise ValueError(f"patch: expected a divisor of {H} and {W}, got {patch}")
    return F.unfold(pictures, patch, stride=patch).mT


def unpatchify(
    patches: Float[Tensor, "B L P"], patch: int, height: int, width: int
) -> Float[Tensor, "B c height width"]:
    """The inverse of `patchify`."""
    return F.fold(patches.mT, (height, width), patch, stride=patch)


class Block(nn.Module):
    """Attention and an MLP, each behind an adaptive norm and a gate."""

    def __init__(self, config: DiTConfig):
        super().__init__()
        C, self.heads = config.width, config.heads
        self.qkv, self.project = nn.Linear(C, 3 * C), nn.Linear(C, C)
        self.up = nn.Linear(C, config.expansion * C)
        self.down = nn.Linear(config.expansion * C, C)

    def attend(self, x: Float[Tensor, "B L C"]) -> Float[Tensor, "B L C"]:
        B, L, C = x.shape
        q, k, v = self.qkv(x).view(B, L, 3, self.heads, C // self.heads).permute(2, 0, 3, 1, 4)
        out = _attend(q, k, v)
        return self.project(out.transpose(1, 2).reshape(B, L, C))

    def forward(
        self, x: Float[Tensor, "B L C"], modulation: Float[Tensor, "B six_C"]
    ) -> Float[Tensor, "B L C"]:
        shift, scale, gate, shift_2, scale_2, gate_2 = (
            m.to(x.dtype) for m in modulation[:, None].chunk(6, -1)
        )
        branch = self.attend(adaln(x, shift, scale)).to(x.dtype)
        x, y = gated_adaln(x, branch, gate, shift_2, scale_2)
        branch = self.down(F.gelu(self.up(y), approximate="tanh")).to(x.dtype)
        return torch.addcmul(x, gate_2, branch)


def _attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Every patch sees every patch. For few patches on a CPU two plain products are faster than
    the tiled form, above all backward."""
    if q.is_cuda or q.shape[2] > SHORT:
        return attention(q, k, v, causal=False)
    return (q @ k.mT * q.shape[3] ** -0.5).softmax(-1).to(v.dtype) @ v


class DiT(nn.Module):
    """``(patches, positions, t, label) -> patches``; all zero before training."""

    def __init__(self, config: DiTConfig, seed: int | None = 0):
        super().__init__()
        self.config = config
        C, narrow = config.width, config.condition
        generator = None if seed is None else torch.Generator().manual_seed(seed)
        self.embed = nn.Linear(config.patch, C)
        self.time = nn.Sequential(nn.Linear(narrow, narrow), nn.SiLU(), nn.Linear(narrow, narrow))
        self.label = nn.Embedding(config.labels + 1, narrow)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.modulations = nn.ModuleList(nn.Linear(narrow, 6 * C) for _ in range(config.layers))
        self.last_modulation = nn.Linear(narrow, 2 * C)
        self.read = nn.Linear(C, config.patch if config.out is None else config.out)
        if generator is not None:
            self._start(generator)

    @torch.no_grad()
    def _start(self, generator: torch.Generator) -> None:
        """Xavier for matrices, zero for what the paper starts at zero."""
        for p in self.parameters():
            if p.dim() == 2:
                bound = math.sqrt(6 / sum(p.shape))
                p.copy_((2 * torch.rand(p.shape, generator=generator) - 1) * bound)
            else:
                p.zero_()
        self.label.weight.mul_(0.1)
        for zero in (*self.modulations, self.last_modulation, self.read):
            zero.weight.zero_()

    @property
    def n_parameters(self) -> int:
        return sum(p.numel() for p in self.parameters())

    def condition(self, t: Int[Tensor, " B"], label: Int[Tensor, " B"] | None) -> Tensor:
        """``(B, condition)``: the level of noise and the class."""
        if label is None:
            label = torch.full_like(t, self.config.labels)
        time = sincos(t, self.config.condition).to(self.embed.weight.dtype)
        return F.silu(self.time(time) + self.label(label))

    def forward(
        self,
        patches: Float[Tensor, "B L P"],
        positions: Int[Tensor, "L axes"],
        t: Int[Tensor, " B"],
        label: Int[Tensor, " B"] | None = None,
    ) -> Float[Tensor, "B L out"]:
        """``label=None`` is no class, for all of them."""
        if len(positions) != patches.shape[1]:
            raise ValueError(
                f"positions: expected one for each of {patches.shape[1]} patches, "
                f"got {len(positions)}"
            )
        c = self.condition(t, label)
        place = sincos_positions(positions, self.config.width)
        x = self.embed(patches).to(patches.dtype) + place.to(patches)
        for block, modulation in zip(self.layers, self.modulations, strict=True):
            x = block(x, modulation(c))
        shift, scale = (m.to(x.dtype) for m in self.last_modulation(c)[:, None].chunk(2, -1))
        return self.read(adaln(x, shift, scale))


def dit_flops(config: DiTConfig, length: int) -> int:
    """Multiplications and additions of one forward pass over ``length`` patches, matrices only."""
    C, narrow = config.width, config.condition
    out = config.patch if config.out is None else config.out
    token = 2 * C * (config.patch + out) + config.layers * 2 * C * C * (4 + 2 * config.expansion)
    pairs = config.layers * 2 * 2 * C
    once = 4 * narrow**2 + 2 * narrow * C * (6 * config.layers + 2)
    return length * token + length**2 * pairs + once


def example() -> tuple[DiT, dict]:
    """A DiT of two blocks, its zeros replaced, and inputs: 2 pictures of 3 by 3 patches."""
    generator = torch.Generator().manual_seed(0)
    model = DiT(DiTConfig(patch=4, width=12, layers=2, heads=2, condition=8, labels=3)).double()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.2 * torch.randn(p.shape, generator=generator, dtype=p.dtype))
    rows = torch.arange(3)
    positions = torch.cartesian_prod(torch.zeros(1, dtype=torch.long), rows, rows)
    patches = torch.randn(2, 9, 4, generator=generator, dtype=torch.float64)
    return model, dict(
        patches=patches, positions=positions, t=torch.tensor([3, 700]), label=torch.tensor([0, 3])
    )
