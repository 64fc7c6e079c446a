"""Bars with their values written out."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from matplotlib.figure import Figure

from ..style import BLUE, GREY, INK, MUTED, axes_or_new, paper


def bars(
    values: Mapping[str, float],
    *,
    title: str,
    xlabel: str,
    ylabel: str = "",
    highlight: str | None = None,
    text: Callable[[float], str] = "{:.3g}".format,
    mark: tuple[float, str] | None = None,
    log: bool = False,
    ax: Any = None,
) -> Figure:
    """A horizontal bar per name, longest names on the left, values at the bars' ends.

    Args:
        values: name -> number, from top to bottom.
        title: what is shown.
        xlabel: of the numbers, with their unit.
        ylabel: what the names are; may stay empty where they speak for themselves.
        highlight: the name to set off; without it all bars have the same colour.
        text: how a number is written.
        mark: a number and its name, for a dashed line there (a baseline, a bound).
        log: a logarithmic axis.
        ax: axes to draw into.
    """
    if not values:
        raise ValueError("bars needs at least one value")
    if highlight is not None and highlight not in values:
        raise ValueError(f"highlight must be one of {list(values)}, got {highlight!r}")
    names, numbers = list(values), [float(value) for value in values.values()]
    colours = [BLUE if highlight in (None, name) else GREY for name in names]
    with paper():
        ax = axes_or_new(ax, (6.4, 1.3 + 0.38 * len(names)))
        drawn = ax.barh(range(len(names)), numbers, height=0.68, color=colours)
        ax.bar_label(drawn, [text(number) for number in numbers], padding=4, color=INK, fontsize=9)
        if mark is not None:
            ax.axvline(mark[0], color=INK, linestyle="--", linewidth=1.1, label=mark[1])
            ax.legend()
        if log:
            ax.set_xscale("log")
        ax.set_yticks(range(len(names)), names)
        ax.set(title=title, xlabel=xlabel, ylabel=ylabel, ylim=(len(names) - 0.4, -0.6))
        ax.margins(x=0.12)
        ax.tick_params(axis="y", length=0)
        ax.spines["left"].set_color(MUTED)
        ax.grid(axis="x")
    return ax.figure
