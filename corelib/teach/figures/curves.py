"""Curves: plain ones, and races over lengths with their exponents."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullLocator

from ...measure import Sweep, fit_exponent, format_seconds
from ...measure.scaling import FEWEST_LENGTHS
from ..style import CYCLE, DASHES, MARKERS, axes_or_new, paper


def lines(
    x: Any,
    series: Mapping[str, Any],
    *,
    title: str,
    xlabel: str,
    ylabel: str,
    log: str = "",
    markers: bool | None = None,
    ax: Any = None,
) -> Figure:
    """Series over a common ``x``.

    Args:
        x: the common abscissae.
        series: name -> ordinates (one for each ``x``).
        title: what is shown.
        xlabel, ylabel: with their units.
        log: which axes are logarithmic: ``""``, ``"x"``, ``"y"`` or ``"xy"``.
        markers: mark the points; by default up to 20 of them.
        ax: axes to draw into.
    """
    if log not in ("", "x", "y", "xy"):
        raise ValueError(f"log must be '', 'x', 'y' or 'xy', got {log!r}")
    if not series:
        raise ValueError("lines needs at least one series")
    x = _numbers(x)
    curves = {name: (x, _numbers(y)) for name, y in series.items()}
    for name, (_, y) in curves.items():
        if len(y) != len(x):
            raise ValueError(f"series {name!r} must have {len(x)} values, got {len(y)}")
    with paper():
        ax = axes_or_new(ax, (6.4, 3.6))
        _draw(ax, curves, list(curves), len(x) <= 20 if markers is None else markers)
        ax.set(title=title, xlabel=xlabel, ylabel=ylabel)
        for axis in log:
            getattr(ax, f"set_{axis}scale")("log")
        if len(series) > 1:
            ax.legend()
    return ax.figure


def race_plot(
    races: Sweep | Mapping[str, Any],
    *,
    title: str,
    xlabel: str = "length (tokens)",
    ylabel: str = "median time",
    ax: Any = None,
) -> Figure:
    """Time over length, both logarithmic; the legend names each fitted exponent.

    Args:
        races: a `corelib.measure.Sweep`, or name -> {length: seconds}, or name -> (lengths,
            seconds).
        title: what is shown.
        xlabel, ylabel: the labels of the axes.
        ax: axes to draw into.
    """
    curves = _curves(races)
    with paper():
        ax = axes_or_new(ax, (6.4, 3.9))
        _draw(ax, curves, [_with_exponent(n, *curve) for n, curve in curves.items()], True)
        ax.set(title=title, xlabel=xlabel, ylabel=ylabel, xscale="log", yscale="log")
        lengths = sorted({n for xs, _ in curves.values() for n in xs})
        ax.set_xticks(_thinned(lengths), [_short(n) for n in _thinned(lengths)])
        ax.xaxis.set_minor_locator(NullLocator())
        ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: format_seconds(value)))
        ax.yaxis.set_minor_formatter(FuncFormatter(lambda value, _: ""))
        ax.legend()
    return ax.figure


def _numbers(values: Any) -> list[float]:
    values = values.detach().cpu() if hasattr(values, "detach") else values
    return [float(value) for value in values]


def _curves(races: Any) -> dict[str, tuple[list[float], list[float]]]:
    if isinstance(races, Sweep):
        races = {name: races.seconds(name) for name in races.names}
    if not races:
        raise ValueError("race_plot needs at least one contestant")
    curves = {}
    for name, points in races.items():
        pairs = points.items() if isinstance(points, Mapping) else zip(*points, strict=True)
        xs, ys = zip(*sorted((float(n), float(seconds)) for n, seconds in pairs), strict=True)
        curves[name] = (list(xs), list(ys))
    return curves


def _draw(ax: Any, curves: Mapping[str, tuple], labels: Sequence[str], markers: bool) -> None:
    looks = itertools.cycle(zip(CYCLE, DASHES, MARKERS, strict=True))
    for (x, y), label, (colour, dash, marker) in zip(curves.values(), labels, looks, strict=False):
        ax.plot(x, y, color=colour, linestyle=dash, marker=marker if markers else "", label=label)
    ax.grid(True)


def _with_exponent(name: str, lengths: Sequence[float], seconds: Sequence[float]) -> str:
    if len(set(lengths)) < FEWEST_LENGTHS:
        return name
    return f"{name}  $\\propto n^{{{fit_exponent(lengths, seconds).value:.2f}}}$"


def _thinned(lengths: list[float], most: int = 9) -> list[float]:
    step = -(-len(lengths) // most)
    return lengths[::-1][::step][::-1]  # the longest is always named


def _short(n: float) -> str:
    """512, 4K, 1M: powers of two by their usual names, other lengths in full."""
    for size, letter in ((1 << 20, "M"), (1 << 10, "K")):
        if n >= size and n % size == 0:
            return f"{n / size:g}{letter}"
    return f"{n:,g}"
