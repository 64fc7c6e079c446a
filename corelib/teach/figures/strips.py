"""Pictures in rows: the frames of a clip, or the same picture at several moments."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from ..style import MUTED, VERMILLION, canvas, paper


def picture_strips(
    strips: Mapping[str, Any],
    *,
    title: str,
    xlabel: str = "frame",
    ylabel: str = "",
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
        xlabel, ylabel: what changes from left to right; what the rows are, where names do not say.
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
    height, width = (max(p.shape[axis] for p in rows.values()) for axis in (1, 2))
    gap = max(1, width // 6)
    sheet = np.full(((height + gap) * len(rows) + gap, (width + gap) * most + gap), np.nan)
    with paper():
        room = (size * most + 1.7, size * len(rows) * (height + gap) / (width + gap) + 1.0)
        figure, ax = canvas(1, 1, size=room)
        for line, (name, pictures) in enumerate(rows.items()):
            for i, picture in enumerate(pictures):
                y, x = gap + line * (height + gap), gap + i * (width + gap)
                sheet[y : y + picture.shape[0], x : x + picture.shape[1]] = picture
                _outline(ax, x, y, picture.shape, i in marked.get(name, ()))
        ax.imshow(sheet, cmap="gray_r", vmin=lowest, vmax=highest)
        middle = gap - 0.5 + np.array([height, width]) / 2
        ax.set_xticks([middle[1] + i * (width + gap) for i in range(len(names))], names)
        ax.set_yticks([middle[0] + i * (height + gap) for i in range(len(rows))], list(rows))
        ax.tick_params(length=0)
        ax.spines[:].set_visible(False)
        ax.set(title=title, xlabel=xlabel, ylabel=ylabel)
    return figure


def _outline(ax: Any, x: int, y: int, shape: tuple[int, ...], special: bool) -> None:
    """A thin line round a picture, or a thick coloured one."""
    look = dict(edgecolor=VERMILLION, linewidth=2.0) if special else dict(edgecolor=MUTED)
    ax.add_patch(
        Rectangle((x - 0.5, y - 0.5), shape[1], shape[0], **{"linewidth": 0.5} | look, fill=False)
    )


def _pictures(name: str, values: Any) -> np.ndarray:
    values = values.detach().cpu().numpy() if hasattr(values, "detach") else np.asarray(values)
    if values.ndim != 3 or not len(values):
        raise ValueError(f"{name}: expected pictures (n, height, width), got {values.shape}")
    return values.astype(float)
