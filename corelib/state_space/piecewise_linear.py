"""Activations as tables of straight lines: ActiBA of XAMBA (arXiv 2502.06924).

    f(x) = a[i] x + b[i]         the i-th of K segments on -R .. R; outside 0 and x

One comparison, one look-up, one multiplication and one addition, which the output stage of a unit
for matrix products can do. Off by at most ``h^2 max|f''| / 8`` inside, ``h = 2 R / K``. The knots
are even: our reconstruction, see `xamba`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor, nn

Values = Float[Tensor, "*any"]


class PiecewiseLinear(nn.Module):
    """``function`` by ``segments`` straight lines between its values on ``-radius .. radius``.

    Left of it the result is 0 and right of it ``x``, as SiLU and softplus have it.
    """

    def __init__(self, function: Callable[[Tensor], Tensor], segments: int, radius: float = 8.0):
        super().__init__()
        if segments < 1:
            raise ValueError(f"segments: expected at least 1, got {segments}")
        if not radius > 0:
            raise ValueError(f"radius: expected more than 0, got {radius}")
        self.segments, self.radius = segments, radius
        knots = torch.linspace(-radius, radius, segments + 1, dtype=torch.float64)
        values = function(knots)
        slopes = values.diff() / knots.diff()
        nothing, one = torch.zeros(1, dtype=torch.float64), torch.ones(1, dtype=torch.float64)
        offsets = values[:-1] - slopes * knots[:-1]
        self.register_buffer("slopes", torch.cat([nothing, slopes, one]))
        self.register_buffer("offsets", torch.cat([nothing, offsets, nothing]))

    def forward(self, x: Values) -> Values:
        place = (x + self.radius) * (self.segments / (2 * self.radius))
        segment = (place.floor() + 1).clamp(0, self.segments + 1).long()
        return self.slopes.to(x.dtype)[segment] * x + self.offsets.to(x.dtype)[segment]


def table_error(segments: int, radius: float = 8.0, *, curvature: float = 0.25) -> float:
    """Most that a table is off inside its range; ``curvature`` is the largest ``|f''|``: 1/4 for
    softplus, 1/2 for SiLU."""
    return (2 * radius / segments) ** 2 * curvature / 8
