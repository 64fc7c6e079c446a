"""Many small matrices side by side, to be compared at a glance."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from ..style import DIVERGING, MUTED, canvas, paper
from .heat import matrix


def matrix_gallery(
    matrices: Mapping[str, Any],
    *,
    title: str,
    columns: int = 5,
    notes: Mapping[str, str] | None = None,
    xlabel: str = "from position j",
    ylabel: str = "to position i",
) -> Figure:
    """Square matrices by name, each on its own scale: white is zero, the two colours are the signs.

    Args:
        matrices: name -> ``(L, L)``; of complex ones the real part is drawn.
        title: what is shown.
        columns: panels in a row.
        notes: name -> a few words under the panel.
        xlabel, ylabel: what columns and rows are, for all panels.

    Raises:
        ValueError: no matrix, or a note for one that is not there.
    """
    if not matrices:
        raise ValueError("matrix_gallery needs at least one matrix")
    notes = dict(notes or {})
    if unknown := set(notes) - set(matrices):
        raise ValueError(f"notes must be for {list(matrices)}, got some for {sorted(unknown)}")
    columns = min(columns, len(matrices))
    rows = -(-len(matrices) // columns)
    with paper():
        figure, axes = canvas(
            rows, columns, size=(1.62 * columns + 0.4, 1.95 * rows + 0.6), squeeze=False
        )
        for ax in axes.flat[len(matrices) :]:
            ax.set_visible(False)
        for ax, (name, values) in zip(axes.flat, matrices.items(), strict=False):
            values = values.real if getattr(values, "dtype", None) is not None else values
            panel = matrix(values, name).astype(float)
            top = float(np.abs(panel).max()) or 1.0
            ax.imshow(panel, cmap=DIVERGING, vmin=-top, vmax=top)
            ax.set_title(name, fontsize=9.5, loc="left")
            ax.set_xticks([])
            ax.set_yticks([])
            ax.set_xlabel(notes.get(name, ""), fontsize=8.5, color=MUTED, loc="left")
            ax.spines[:].set_color(MUTED)
            ax.spines[:].set_visible(True)
        figure.suptitle(title, x=0.01, ha="left", fontweight="bold", fontsize=11.5)
        figure.supxlabel(xlabel, fontsize=9)
        figure.supylabel(ylabel, fontsize=9)
    return figure
