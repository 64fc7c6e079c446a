"""GriDiT's second stage: one small frame becomes a sharp one (arXiv 2512.21276).

A `DiT` takes the noise from a large frame and reads the small one beside it, as a second channel of
its patches. It sees no other frame, so that the work is linear in the frames, and frames may come
in any order or number. The first stage, and what both are for, is in `gridit`.
"""

from __future__ import annotations

import dataclasses

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from .diffusion import Schedule, noise_from_velocity, sample
from .dit import DiT, DiTConfig, patchify, unpatchify


@dataclasses.dataclass(frozen=True)
class SRConfig:
    """Sizes of a `FrameSR`: from ``side`` by ``side`` pixels to ``by`` times as many each way."""

    side: int = 12
    by: int = 2
    patch: int = 6
    width: int = 60
    layers: int = 3
    heads: int = 2
    condition: int = 32

    @property
    def dit(self) -> DiTConfig:
        shared = {k: getattr(self, k) for k in ("width", "layers", "heads", "condition")}
        return DiTConfig(patch=2 * self.patch**2, out=self.patch**2, **shared)


class FrameSR(nn.Module):
    """Stage 2: the velocity of one noisy sharp frame, given the small one."""

    def __init__(self, config: SRConfig, seed: int | None = 0):
        super().__init__()
        self.config, self.dit = config, DiT(config.dit, seed)
        per_side = config.side * config.by // config.patch
        side = torch.arange(per_side)
        positions = torch.cartesian_prod(torch.zeros(1, dtype=torch.long), side, side)
        self.register_buffer("positions", positions, persistent=False)

    @property
    def n_parameters(self) -> int:
        return self.dit.n_parameters

    def forward(
        self,
        x: Float[Tensor, "B 1 H H"],
        t: Int[Tensor, " B"],
        small: Float[Tensor, "B 1 h h"],
    ) -> Float[Tensor, "B 1 H H"]:
        wide = F.interpolate(small, size=x.shape[2:], mode="bilinear", align_corners=False)
        patches = patchify(torch.cat([x, wide], 1), self.config.patch)
        out = self.dit(patches, self.positions, t)
        return unpatchify(out, self.config.patch, *x.shape[2:])


def super_resolve(
    model: FrameSR,
    frames: Float[Tensor, "B T 1 h h"],
    schedule: Schedule,
    steps: int,
    *,
    noise: Float[Tensor, "B T 1 H H"],
    clip: float | None = 1.0,
) -> Float[Tensor, "B T 1 H H"]:
    """Each frame on its own, from its own noise: frames may come in any order or number."""
    if noise.shape[:3] != frames.shape[:3]:
        raise ValueError(
            f"noise: expected {tuple(frames.shape[:3])} pictures, got {tuple(noise.shape[:3])}"
        )
    small = frames.flatten(0, 1)

    def denoiser(x: Tensor, t: Tensor) -> Tensor:
        return noise_from_velocity(schedule, x, model(x, t, small), t)

    return sample(denoiser, noise.flatten(0, 1), schedule, steps, clip=clip).view(noise.shape)
