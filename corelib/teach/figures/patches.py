"""An image cut into patches: which of them are still there, and which matter."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from ..style import INK, PAPER, SKY, VERMILLION, axes_or_new, paper
from .heat import matrix

GONE = 0.82  # how much of what is gone is covered


def patch_grid(
    image: Any,
    *,
    title: str,
    patch: int,
    kept: Any = None,
    shade: Any = None,
    marked: Iterable[int] = (),
    ax: Any = None,
) -> Figure:
    """A grey image ``(R patch, C patch)``, dark where it is 1, with a grid over its patches.

    Args:
        image: values from 0 (paper) to 1 (ink).
        title: what is shown.
        patch: pixels on a side.
        kept: ``(R, C)`` or ``(R C,)``, True for patches that are there; others are covered.
        shade: numbers ≥ 0 of the same shape, as a blue wash: the largest is the strongest.
        marked: numbers of patches, in the order of reading, that get a frame.
        ax: axes to draw into.
    """
    pixels = matrix(image, "image").astype(float)
    rows, columns = (n // patch for n in pixels.shape)
    if (rows * patch, columns * patch) != pixels.shape:
        raise ValueError(f"image must hold whole patches of {patch}, got shape {pixels.shape}")
    with paper():
        ax = axes_or_new(ax, (4.6, 4.4))
        options = dict(extent=(0.5, columns + 0.5, rows + 0.5, 0.5), interpolation="nearest")
        ax.imshow(pixels, cmap="Greys", vmin=0, vmax=1.15, **options)
        if shade is not None:
            wash = _on_grid(shade, "shade", rows, columns).astype(float)
            strength = wash / max(float(wash.max()), 1e-12)
            _cover(ax, strength, SKY, 0.75, options)
        if kept is not None:
            gone = ~_on_grid(kept, "kept", rows, columns).astype(bool)
            _cover(ax, gone.astype(float), "#4d4a42", GONE, options)
        for edge in range(columns + 1):
            ax.axvline(edge + 0.5, color=PAPER, linewidth=0.6)
        for edge in range(rows + 1):
            ax.axhline(edge + 0.5, color=PAPER, linewidth=0.6)
        for number in marked:
            corner = number % columns + 0.5, number // columns + 0.5
            frame = Rectangle(corner, 1, 1, fill=False, edgecolor=VERMILLION, linewidth=2.2)
            ax.add_patch(frame)
        ax.set(title=title, xlabel="column", ylabel="row")
        ax.set_xticks(range(1, columns + 1))
        ax.set_yticks(range(1, rows + 1))
        ax.tick_params(length=0, labelsize=8, colors=INK)
        ax.spines[:].set_visible(False)
    return ax.figure


def _on_grid(values: Any, name: str, rows: int, columns: int) -> np.ndarray:
    array = matrix(values, name, (1, 2))
    if array.size != rows * columns:
        raise ValueError(f"{name} must have {rows} x {columns} entries, got shape {array.shape}")
    return array.reshape(rows, columns)


def _cover(ax: Any, strength: np.ndarray, colour: str, most: float, options: dict) -> None:
    """A layer of one colour, as opaque as ``strength`` says."""
    from matplotlib.colors import to_rgb

    layer = np.empty((*strength.shape, 4))
    layer[..., :3], layer[..., 3] = to_rgb(colour), most * strength
    ax.imshow(layer, zorder=1.5, **options)
