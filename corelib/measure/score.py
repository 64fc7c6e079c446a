"""Scores: how many were right, where the truth may lie, what guessing would have given."""

from __future__ import annotations

import dataclasses
import math

__all__ = ["Score", "wilson"]


def wilson(right: int, n: int, z: float = 1.96) -> tuple[float, float]:
    """Where the true accuracy lies when ``right`` of ``n`` were right (Wilson 1927; 95 %)."""
    if not 0 <= right <= n or n < 1:
        raise ValueError(f"right, n: expected 0 <= right <= n and n >= 1, got {right} and {n}")
    share, extra = right / n, z * z / n
    centre = (share + extra / 2) / (1 + extra)
    half = z * math.sqrt(share * (1 - share) / n + extra / (4 * n)) / (1 + extra)
    return max(0.0, centre - half), min(1.0, centre + half)


@dataclasses.dataclass(frozen=True)
class Score:
    """``right`` of ``n`` examples; ``chance`` is what somebody scores who does not read them."""

    right: int
    n: int
    chance: float

    @property
    def accuracy(self) -> float:
        return self.right / self.n

    @property
    def interval(self) -> tuple[float, float]:
        return wilson(self.right, self.n)

    @property
    def above_chance(self) -> bool:
        """Whether all of the interval lies above chance."""
        return self.interval[0] > self.chance

    def __str__(self) -> str:
        low, high = self.interval
        return f"{self.accuracy:.1%} [{low:.1%}, {high:.1%}], chance {self.chance:.1%}"
