"""How a cost grows: fitted exponents and races over lengths.

``cost = a · n^p`` is a straight line in logarithms, so ``p`` is the slope of a least-squares fit
of ``log cost`` on ``log n``; its standard error says how straight the line was.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from numbers import Real
from typing import Any

from .progress import progress
from .race import Missing, Race, format_seconds, race

FEWEST_LENGTHS = 5


@dataclasses.dataclass(frozen=True)
class Exponent:
    """``cost ≈ coefficient · n ** value``; ``stderr`` is the standard error of ``value``."""

    value: float
    stderr: float
    coefficient: float = math.nan

    def __str__(self) -> str:
        return f"{self.value:.2f} ± {self.stderr:.2f}"

    def predict(self, length: Real) -> float:
        """The fitted cost at ``length``."""
        return self.coefficient * length**self.value


def fit_exponent(lengths: Iterable[Real], costs: Iterable[Real]) -> Exponent:
    """Fit ``cost = a · n^p`` over at least five lengths.

    Args:
        lengths: at least five different positive numbers.
        costs: seconds, bytes or operations; positive, one for each length.

    Raises:
        ValueError: fewer than five different lengths, unequal counts, or a number ≤ 0.
    """
    lengths, costs = [float(n) for n in lengths], [float(c) for c in costs]
    if len(lengths) != len(costs):
        raise ValueError(f"lengths and costs must pair up, got {len(lengths)} and {len(costs)}")
    if len(set(lengths)) < FEWEST_LENGTHS:
        raise ValueError(f"a fit needs {FEWEST_LENGTHS} different lengths, got {len(set(lengths))}")
    if not all(0 < number < math.inf for number in lengths + costs):
        raise ValueError("lengths and costs must be positive and finite")
    x, y = [math.log(n) for n in lengths], [math.log(c) for c in costs]
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    spread = sum((a - mean_x) ** 2 for a in x)
    slope = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True)) / spread
    offset = mean_y - slope * mean_x
    residual = sum((b - offset - slope * a) ** 2 for a, b in zip(x, y, strict=True))
    return Exponent(slope, math.sqrt(residual / (len(x) - 2) / spread), math.exp(offset))


@dataclasses.dataclass(frozen=True, repr=False)
class Sweep:
    """Races over lengths: ``races[i]`` was run at ``lengths[i]``."""

    lengths: tuple[int, ...]
    races: tuple[Race, ...]

    @property
    def names(self) -> list[str]:
        """Every contestant that ran at one length at least."""
        return list(dict.fromkeys(name for result in self.races for name in result.times))

    def seconds(self, name: str) -> dict[int, float]:
        """Length -> median seconds, where ``name`` took part."""
        if name not in self.names:
            raise ValueError(f"no contestant {name!r}: there are {', '.join(self.names)}")
        pairs = zip(self.lengths, self.races, strict=True)
        return {n: result.medians[name] for n, result in pairs if name in result.times}

    @property
    def exponents(self) -> dict[str, Exponent]:
        """The fitted exponent of everyone who ran at five lengths or more."""
        points = {name: self.seconds(name) for name in self.names}
        return {
            name: fit_exponent(seconds, seconds.values())
            for name, seconds in points.items()
            if len(seconds) >= FEWEST_LENGTHS
        }

    @property
    def missing(self) -> dict[str, str]:
        """Contestants that never ran, and why."""
        merged = {n: why for result in self.races for n, why in result.missing.items()}
        return {name: why for name, why in merged.items() if name not in self.names}

    def table(self) -> str:
        """A Markdown table: a row per contestant, a column per length, and the exponent."""
        head = ["contestant", *(f"{n:,}" for n in self.lengths), "exponent"]
        lines = ["| " + " | ".join(head) + " |", "|:--|" + "--:|" * (len(head) - 1)]
        exponents = self.exponents
        for name in self.names:
            seconds = self.seconds(name)
            cells = [format_seconds(seconds[n]) if n in seconds else "–" for n in self.lengths]
            lines.append("| " + " | ".join([name, *cells, str(exponents.get(name, "–"))]) + " |")
        for name, why in self.missing.items():
            lines.append("| " + " | ".join([name, why, *["–"] * len(self.lengths)]) + " |")
        return "\n".join([*lines, "", f"*Measured: medians; {self.races[0].machine}.*"])

    def __repr__(self) -> str:
        return self.table()

    def _repr_markdown_(self) -> str:
        return self.table()


def sweep(
    lengths: Sequence[int],
    make: Callable[[int], Mapping[str, Callable[[], Any] | Missing]],
    **options: Any,
) -> Sweep:
    """A race at every length.

    Args:
        lengths: the lengths, in any order; five or more give exponents.
        make: length -> contestants (a contestant that is hopeless at a length may be left out).
        options: passed on to `race`.
    """
    if not lengths:
        raise ValueError("sweep needs at least one length")
    races = tuple(race(make(n), **options) for n in progress(lengths, "racing"))
    return Sweep(tuple(lengths), races)
