"""The roofline: what a machine allows at each arithmetic intensity."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, FuncFormatter

from ...measure import HardwareSpec
from ..style import CYCLE, INK, MARKERS, MUTED, PAPER, axes_or_new, paper


def roofline_plot(
    spec: HardwareSpec,
    points: Mapping[str, Sequence[float]],
    *,
    title: str,
    dtype: str = "bfloat16",
    ax: Any = None,
) -> Figure:
    """Operations per second over operations per byte, with the roof of ``spec``.

    Args:
        spec: the machine.
        points: name -> (FLOP, bytes), drawn hollow on the roof: *modelled*; or name -> (FLOP,
            bytes, seconds), drawn solid where it was *measured*.
        title: what is shown.
        dtype: whose peak is the roof.
        ax: axes to draw into.

    Raises:
        ValueError: a point that has not two or three positive numbers.
    """
    placed = {name: _place(spec, dtype, name, point) for name, point in points.items()}
    ridge, peak = spec.ridge(dtype), spec.peak(dtype)
    everywhere = [ridge, *(intensity for intensity, _, _ in placed.values())]
    x = np.geomspace(min(everywhere) / 4, max(everywhere) * 6, 200)
    with paper():
        ax = axes_or_new(ax, (6.4, 4.0))
        roof = np.minimum(peak, x * spec.bandwidth)
        ax.fill_between(x, roof, roof.min() / 30, color=MUTED, alpha=0.08, linewidth=0)
        ax.plot(x, roof, color=INK, linestyle="-")
        ax.axvline(ridge, color=MUTED, linestyle=":", linewidth=1.1)
        lowest = min([roof.min(), *(rate for _, rate, _ in placed.values())])
        for i, (name, place) in enumerate(placed.items()):
            _mark(ax, i, name, *place)
        ax.set(title=title, xscale="log", yscale="log", xlim=(x[0], x[-1]))
        ax.set(xlabel="arithmetic intensity (FLOP per byte)", ylabel="FLOP per second")
        ax.set_ylim(lowest / 3, peak * 4)
        ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
        ax.yaxis.set_major_formatter(EngFormatter(sep=" "))
        words = f"ridge: {ridge:.0f} FLOP per byte "
        ax.text(ridge, lowest / 2.6, words, color=MUTED, fontsize=9, ha="right")
        ax.text(x[-1], peak * 1.45, f"{spec.name}, {dtype} ", ha="right", va="bottom", fontsize=9)
        ax.grid(True)
        ax.legend(loc="lower right")
    return ax.figure


def _place(spec: HardwareSpec, dtype: str, name: str, point: Sequence[float]) -> tuple:
    """Intensity, rate, and whether the rate was measured."""
    if len(point) not in (2, 3) or min(point) <= 0:
        raise ValueError(f"point {name!r} must be positive (FLOP, bytes[, seconds]), got {point}")
    flops, moved = float(point[0]), float(point[1])
    intensity = flops / moved
    if len(point) == 3:
        return intensity, flops / float(point[2]), True
    return intensity, min(spec.peak(dtype), intensity * spec.bandwidth), False


def _mark(ax: Any, i: int, name: str, intensity: float, rate: float, measured: bool) -> None:
    colour = CYCLE[i % len(CYCLE)]
    ax.plot(
        [intensity],
        [rate],
        linestyle="",
        marker=MARKERS[i % len(MARKERS)],
        markersize=8.5,
        color=colour,
        markerfacecolor=colour if measured else PAPER,
        markeredgewidth=1.8,
        label=f"{name} ({'measured' if measured else 'modelled'})",
        zorder=4,
    )
