"""Sizes and tables of `monarch_fft_conv`: which circles fit on the chip, split how, by how many.

The transform of a matrix of signal ``X[n1, n2]``, ``n = n1 N2 + n2``, is
``((first @ X) * twiddle) @ second``, unitary; here its three tables are made, in float64 first.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from corelib.kernels._shared import padded

#: Points of the circle -> N1, N2.
SIDES = {256: (16, 16), 512: (32, 16), 1024: (32, 32), 2048: (64, 32), 4096: (128, 32)}
LONGEST = {torch.float16: 4096, torch.bfloat16: 4096, torch.float32: 512}


class Plan(NamedTuple):
    """Sizes of one launch: rows that hold signal, rows and columns of the spectrum's grid."""

    N1: int
    N2: int
    rows: int
    K1: int
    K2: int

    @property
    def constants(self) -> dict[str, int]:
        return dict(N2=self.N2, ROWS=self.rows, K1=self.K1, K2=self.K2)

    @property
    def table_numbers(self) -> int:
        return 2 * (self.K1 * self.rows + self.K1 * self.N2 + self.N2 * self.K2)


def circle_for(points: int, dtype: torch.dtype) -> int | None:
    """The smallest circle with at least this many points, or None where none fits on the chip."""
    return min((N for N in SIDES if points <= N <= LONGEST.get(dtype, 0)), default=None)


def plan_of(L: int, N: int, rows: int | None = None, columns: int | None = None) -> Plan:
    """For ``L`` steps on a circle of ``N``; ``rows`` and ``columns`` of the spectrum are kept."""
    N1, N2 = SIDES[N]
    held = min(N1, padded(-(-L // N2)))
    return Plan(N1, N2, held, padded(rows or N1), padded(columns or N2))


@lru_cache(maxsize=64)
def tables(
    plan: Plan, rows: tuple[int, ...], columns: tuple[int, ...], dtype: torch.dtype, device: str
) -> tuple[Tensor, Tensor, Tensor]:
    """``first (2, K1, rows)``, ``twiddle (2, K1, N2)``, ``second (2, N2, K2)``."""
    k1 = F.pad(torch.tensor(rows), (0, plan.K1 - len(rows))).double()
    k2 = F.pad(torch.tensor(columns), (0, plan.K2 - len(columns))).double()
    n1, n2 = torch.arange(plan.rows).double(), torch.arange(plan.N2).double()
    turns = (
        torch.outer(k1, n1) / plan.N1,
        torch.outer(k1, n2) / (plan.N1 * plan.N2),
        torch.outer(n2, k2) / plan.N2,
    )
    sizes = plan.N1**-0.5, 1.0, plan.N2**-0.5
    angles = [-2 * math.pi * (turn % 1.0) for turn in turns]
    parts = [torch.stack([a.cos(), a.sin()]) * size for a, size in zip(angles, sizes, strict=True)]
    return tuple(part.to(dtype).to(device) for part in parts)


def spectrum_grid(kernel: Tensor, N: int) -> Tensor:
    """The spectrum of ``kernel (H, K)`` as ``(H, 2, N1, N2)``: frequency ``k1 + N1 k2``."""
    N1, N2 = SIDES[N]
    spectrum = torch.fft.fft(kernel.float(), n=N).unflatten(1, (N2, N1)).mT
    return torch.stack([spectrum.real, spectrum.imag], 1)


def kept_grid(N1: int, N2: int, keep1: int, keep2: int) -> Tensor:
    """``(N1, N2)``, true at the first ``keep1`` rows' first ``keep2`` columns and the negatives of
    their frequencies."""
    frequencies = torch.arange(N1)[:, None] + N1 * torch.arange(N2)
    block = frequencies[:keep1, :keep2].flatten()
    kept = torch.zeros(N1 * N2, dtype=torch.bool)
    kept[block] = True
    kept[-block % (N1 * N2)] = True
    return kept[frequencies]


def warps_for(plan: Plan, dtype: torch.dtype, target: str | None = None) -> int:
    """By the size of the grid, on a compile target or here: a thread holds 16 of its numbers, of
    float32's 8. An AMD wavefront is twice a warp, and four of them have twice the registers."""
    amd = torch.version.hip is not None if target is None else target.startswith("gfx")
    numbers = 256 if dtype == torch.float32 else 512
    return max(1, min(4 if amd else 8, plan.N1 * plan.N2 // numbers))
