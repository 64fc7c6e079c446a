"""Counts in a grid: how many of each kind, with the numbers written in."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from ..style import INK, PAPER, SEQUENTIAL, axes_or_new, paper
from .heat import _borders, _lightness, matrix


def count_grid(
    counts: Any,
    *,
    rows: Sequence[str],
    columns: Sequence[str],
    title: str,
    xlabel: str,
    ylabel: str,
    largest: float | None = None,
    ax: Any = None,
) -> Figure:
    """Whole numbers ``(rows, columns)`` as squares: darker is more, and zeros stay empty.

    Args:
        counts: one number for every row and column.
        rows, columns: their names, from the top and from the left.
        title: what is counted.
        xlabel, ylabel: what columns and rows are.
        largest: the count of the darkest colour, to compare several grids.
        ax: axes to draw into.
    """
    values = matrix(counts, "counts").astype(float)
    if values.shape != (len(rows), len(columns)):
        raise ValueError(f"counts must be {(len(rows), len(columns))}, got {values.shape}")
    top = max(values.max() if largest is None else largest, 1.0)
    with paper():
        ax = axes_or_new(ax, (6.4, 1.4 + 0.3 * len(rows)))
        shown = np.where(values > 0, values, np.nan)
        ax.imshow(shown, cmap=SEQUENTIAL, vmin=0, vmax=top, aspect="auto", zorder=1)
        _borders(ax, values.shape, 1, PAPER, 2.0)
        for (row, column), value in np.ndenumerate(values):
            if value:
                light = _lightness(SEQUENTIAL(min(value / top, 1.0))) > 0.55
                colour = INK if light else "white"
                ax.text(
                    column, row, f"{value:.0f}", ha="center", va="center", color=colour, zorder=3
                )
        ax.set(title=title, xlabel=xlabel, ylabel=ylabel)
        ax.set_xticks(range(len(columns)), columns)
        ax.set_yticks(range(len(rows)), rows)
        ax.tick_params(length=0)
        ax.spines[:].set_visible(False)
        ax.grid(False)
    return ax.figure
