"""Races: several ways to compute one thing, timed fairly.

Contestants take turns in one process, so that a machine that slows down slows all of them; before
the clock starts they must agree on the result. The order is drawn anew in each round: whoever
always came after one that fills the caches and gives back much memory would be up to 1.6 times as
slow for it. What is reported is the median of each and the ratio of medians, with the machine they
ran on.

>>> result = race({"corelib": lambda: attention(q, k, v, causal=True),
...                "torch": lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True)})
>>> result.ratios["torch"]      # torch's time over that of the first contestant, corelib
"""

from __future__ import annotations

import dataclasses
import json
import math
import random
import statistics
import time
from collections.abc import Callable, Mapping
from numbers import Real
from typing import Any

from .agreement import agreement
from .machine import machine, synchronize

SAMPLE_SECONDS = 5e-4  # shorter calls are repeated inside one sample: the clock itself costs time
MAX_CALLS = 1000  # in one sample
MAX_ROUNDS = 1000


@dataclasses.dataclass(frozen=True)
class Missing:
    """Stands in for a contestant that cannot run here, and says why."""

    reason: str


@dataclasses.dataclass(frozen=True, repr=False)
class Race:
    """The outcome of `race`. Times are seconds per call.

    ``times``: every sample of every contestant; ``baseline``: the contestant that ``ratios``
    compare with; ``missing``: contestants that could not run, and why; ``agreement``: the largest
    difference between results, relative to the largest value (None when not compared).
    """

    times: dict[str, list[float]]
    baseline: str
    machine: str
    agreement: float | None = None
    missing: dict[str, str] = dataclasses.field(default_factory=dict)

    @property
    def medians(self) -> dict[str, float]:
        """Median seconds per call of each contestant."""
        return {name: statistics.median(samples) for name, samples in self.times.items()}

    @property
    def ratios(self) -> dict[str, float]:
        """Each median over the baseline's: 2.0 means twice as slow."""
        medians = self.medians
        return {name: seconds / medians[self.baseline] for name, seconds in medians.items()}

    @property
    def fastest(self) -> str:
        medians = self.medians
        return min(medians, key=medians.__getitem__)

    def speedup(self, name: str, over: str) -> float:
        """How many times faster ``name`` is than ``over``."""
        for given in (name, over):
            if given not in self.times:
                raise ValueError(f"no contestant {given!r}: there are {', '.join(self.times)}")
        return self.medians[over] / self.medians[name]

    def table(self) -> str:
        """A Markdown table with a line below it on how the times were taken."""
        lines = [f"| contestant | median | time ÷ {self.baseline} |", "|:--|--:|--:|"]
        medians, ratios = self.medians, self.ratios
        lines += [f"| {n} | {format_seconds(medians[n])} | {ratios[n]:.2f} |" for n in medians]
        lines += [f"| {name} | {reason} | – |" for name, reason in self.missing.items()]
        return "\n".join([*lines, "", f"*{self._how()}*"])

    def _how(self) -> str:
        rounds = min(len(samples) for samples in self.times.values())
        if self.agreement is None:
            agree = "results not compared"
        elif self.agreement == 0.0:
            agree = "results equal"
        else:
            agree = f"results agree to {self.agreement:.0e}"
        return f"Measured: {rounds} interleaved rounds, {agree}; {self.machine}."

    def to_json(self) -> str:
        """The race as a JSON object."""
        fields = dataclasses.asdict(self) | {"medians": self.medians, "ratios": self.ratios}
        return json.dumps(fields, sort_keys=True)

    def __repr__(self) -> str:
        return self.table()

    def _repr_markdown_(self) -> str:
        return self.table()


def race(
    contestants: Mapping[str, Callable[[], Any] | Missing],
    *,
    check: str | Callable[[Any, Any], Any] | None = "allclose",
    reference: Any = None,
    tolerance: Real | None = None,
    repeats: int = 5,
    min_time: Real = 0.1,
    ratio_to: str | None = None,
) -> Race:
    """Time contestants against each other.

    Args:
        contestants: name -> function without arguments (or `Missing`).
        check: what "the same thing" means: ``"allclose"`` compares nested tensors and numbers
            within ``tolerance``; a function ``(result, reference)`` raises or returns False;
            None leaves it out, and the table says so.
        reference: what results are compared with; by default the first contestant's.
        tolerance: largest difference over largest value; by default from the coarser dtype.
        repeats: rounds at least.
        min_time: rounds go on until every contestant has run for so many seconds.
        ratio_to: the contestant that ratios refer to, or ``"fastest"``; by default the first.

    Raises:
        ValueError: nobody can run, unknown ``ratio_to``, or results differ.
    """
    runners = {n: fn for n, fn in contestants.items() if not isinstance(fn, Missing)}
    missing = {n: fn.reason for n, fn in contestants.items() if isinstance(fn, Missing)}
    _check_arguments(runners, missing, check, repeats, min_time, ratio_to)
    agreed = _first_run(runners, check, reference, tolerance)
    times = _interleave(runners, repeats, min_time)
    result = Race(times, next(iter(times)), machine(), agreed, missing)
    baseline = result.fastest if ratio_to == "fastest" else ratio_to or result.baseline
    return dataclasses.replace(result, baseline=baseline)


def _check_arguments(runners, missing, check, repeats, min_time, ratio_to) -> None:
    if not runners:
        why = "; ".join(f"{n}: {reason}" for n, reason in missing.items()) or "none was given"
        raise ValueError(f"race needs a contestant that can run ({why})")
    for name, fn in runners.items():
        if not callable(fn):
            raise TypeError(f"contestant {name!r} must be a function, got {type(fn).__name__}")
    if not (check is None or check == "allclose" or callable(check)):
        raise ValueError(f"check must be 'allclose', a function or None, got {check!r}")
    if repeats < 1:
        raise ValueError(f"repeats must be at least 1, got {repeats}")
    if not 0 <= min_time < math.inf:
        raise ValueError(f"min_time must be a number of seconds ≥ 0, got {min_time}")
    if ratio_to not in (None, "fastest", *runners):
        raise ValueError(f"ratio_to must be 'fastest' or one of {list(runners)}, got {ratio_to!r}")


def _first_run(runners, check, reference, tolerance) -> float | None:
    """Run everyone once (warm-up, compilation) and compare what they return."""
    worst = None
    for name, fn in runners.items():
        result = fn()
        if check is None:
            continue
        if reference is None:
            reference = result
        elif check == "allclose":
            worst = max(worst or 0.0, agreement(result, reference, tolerance, name))
        elif check(result, reference) is False:
            raise ValueError(f"contestant {name!r} computes something else than the reference")
    return worst


def _interleave(runners, repeats: int, min_time: Real) -> dict[str, list[float]]:
    """Samples of everyone in turns, after a second warm-up that also sets calls per sample."""
    calls = {}
    for name, fn in runners.items():
        once = max(_sample(fn, 1), SAMPLE_SECONDS / MAX_CALLS)
        calls[name] = math.ceil(SAMPLE_SECONDS / once)
    times: dict[str, list[float]] = {name: [] for name in runners}
    spent, order, draw = dict.fromkeys(runners, 0.0), list(runners), random.Random(0)
    for done in range(MAX_ROUNDS):
        if done >= repeats and min(spent.values()) >= min_time:
            break
        draw.shuffle(order)
        for name in order:
            seconds = _sample(runners[name], calls[name])
            times[name].append(seconds)
            spent[name] += seconds * calls[name]
    return times


def _sample(fn: Callable[[], Any], calls: int) -> float:
    """Seconds per call, over ``calls`` calls."""
    synchronize()
    start = time.perf_counter()
    for _ in range(calls):
        fn()
    synchronize()
    return (time.perf_counter() - start) / calls


def format_seconds(seconds: float) -> str:
    """Three digits and a unit: ``1.23 ms``."""
    for unit, size in (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6)):
        if seconds >= 0.9995 * size:
            number = seconds / size
            return f"{number:.3g} {unit}" if number < 999.5 else f"{number:.0f} {unit}"
    return f"{seconds * 1e9:.3g} ns"
