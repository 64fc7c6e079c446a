"""Pictures in rows: the frames of a clip, or the same picture at several moments."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from ..style import MUTED, VERMILLION, canvas, paper


def picture_strips(
    strips: Mapping[str, Any],
    *,
    title: str,
    xlabel: str = "frame",
    columns: Sequence[str] | None = None,
    marked: Mapping[str, Sequence[int]] | None = None,
    lowest: float = 0.0,
    highest: float = 1.0,
    size: float = 1.0,
) -> Figure:
    """A row of grey pictures for each name, paper at ``lowest`` and ink at ``highest``.

    Args:
        strips: name -> ``(n, height, width)``; rows may have different numbers of pictures.
        title: what is shown.
        xlabel: what changes from left to right.
        columns: the names of the columns, below the last row; by default 1, 2, ….
        marked: name -> the pictures of that row that get a frame in colour.
        lowest, highest: values of paper and of ink.
        size: side of a picture, in inches.

    Raises:
        ValueError: no row, a row that is not made of pictures, or a mark for no row.
    """
    rows = {name: _pictures(name, values) for name, values in strips.items()}
    if not rows:
        raise ValueError("picture_strips needs at least one row")
    marked = dict(marked or {})
    if unknown := set(marked) - set(rows):
        raise ValueError(f"marked must be for {list(rows)}, got some for {sorted(unknown)}")
    most = max(len(pictures) for pictures in rows.values())
    names = [str(i + 1) for i in range(most)] if columns is None else list(columns)
    with paper():
        room = (size * most + 1.5, (size + 0.08) * len(rows) + 0.95)
        figure, axes = canvas(len(rows), most, size=room, squeeze=False)
        for line, (name, pictures) in zip(axes, rows.items(), strict=True):
            for i, ax in enumerate(line):
                if i >= len(pictures):
                    ax.set_visible(False)
                    continue
                ax.imshow(pictures[i], cmap="gray_r", vmin=lowest, vmax=highest)
                ax.set_xticks([])
                ax.set_yticks([])
                special = i in marked.get(name, ())
                ax.spines[:].set(
                    visible=True,
                    color=VERMILLION if special else MUTED,
                    linewidth=2.2 if special else 0.6,
                )
                if line is axes[-1] and i < len(names):
                    ax.set_xlabel(names[i], fontsize=8.5)
            line[0].set_ylabel(name, rotation=0, ha="right", va="center", fontsize=9)
        figure.suptitle(title, x=0.01, ha="left", fontweight="bold", fontsize=11.5)
        figure.supxlabel(xlabel, fontsize=9)
    return figure


def _pictures(name: str, values: Any) -> np.ndarray:
    values = values.detach().cpu().numpy() if hasattr(values, "detach") else np.asarray(values)
    if values.ndim != 3 or not len(values):
        raise ValueError(f"{name}: expected pictures (n, height, width), got {values.shape}")
    return values.astype(float)
