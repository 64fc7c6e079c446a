"""A map of kinds: which of a few things each cell is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from ..style import CYCLE, GRID, INK, axes_or_new, paper
from .heat import HIDDEN, matrix


def category_map(
    values: Any,
    kinds: Sequence[str],
    *,
    title: str,
    xlabel: str,
    ylabel: str,
    rows: Sequence[str] | None = None,
    ax: Any = None,
) -> Figure:
    """Cells ``(rows, columns)`` in the colour of their kind; the legend lies below.

    Args:
        values: whole numbers, an index into ``kinds`` for each cell; -1 leaves it empty.
        kinds: their names, at most as many as there are colours (8).
        title: what is shown.
        xlabel, ylabel: what columns and rows are.
        rows: the rows' names, from the top; by default 1, 2, ….
        ax: axes to draw into.

    Raises:
        ValueError: too many kinds, a number that is none of them, or too few names of rows.
    """
    cells = matrix(values, "values")
    if not 1 <= len(kinds) <= len(CYCLE):
        raise ValueError(f"kinds: expected 1 to {len(CYCLE)}, got {len(kinds)}")
    if not np.isin(cells, range(-1, len(kinds))).all():
        raise ValueError(
            f"values: expected -1 to {len(kinds) - 1}, got {cells.min()} to {cells.max()}"
        )
    names = [str(i + 1) for i in range(len(cells))] if rows is None else list(rows)
    if len(names) != len(cells):
        raise ValueError(f"rows: expected {len(cells)} names, got {len(names)}")
    colours = [HIDDEN, *CYCLE[: len(kinds)]]
    with paper():
        ax = axes_or_new(ax, (7.0, min(6.0, 1.5 + 0.24 * len(cells))))
        look = dict(cmap=ListedColormap(colours), vmin=-1.5, vmax=len(kinds) - 0.5)
        ax.imshow(cells, aspect="auto", interpolation="nearest", **look)
        for edge in range(1, len(cells)):
            ax.axhline(edge - 0.5, color=GRID, linewidth=1.2)
        ax.set(title=title, xlabel=xlabel, ylabel=ylabel)
        ax.set_yticks(range(len(cells)), names)
        ax.xaxis.set_major_locator(MaxNLocator("auto", integer=True))
        ax.tick_params(length=0)
        ax.spines[:].set_visible(False)
        shown = [(i, kind) for i, kind in enumerate(kinds) if (cells == i).any()]
        patches = [
            Patch(facecolor=CYCLE[i], edgecolor=INK, linewidth=0.5, label=kind) for i, kind in shown
        ]
        ax.figure.legend(handles=patches, loc="outside lower center", ncols=max(1, len(shown)))
    return ax.figure
