"""Matrices as pictures: attention weights, masks, states."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from ..style import BLUE, DIVERGING, INK, PAPER, SEQUENTIAL, SKY, axes_or_new, canvas, paper

MOST_NUMBERS = 100  # cells up to which the values are written into them
HIDDEN, HATCH = "#e9e6dc", "#c9c4b6"


def matrix(values: Any, name: str, dimensions: tuple[int, ...] = (2,)) -> np.ndarray:
    """A tensor or nested list as an array of that many dimensions."""
    if hasattr(values, "detach"):
        values = values.detach().cpu()
        values = values if str(values.dtype) == "torch.bool" else values.double()
    array = np.asarray(values)
    if array.ndim not in dimensions or not array.size:
        wanted = " or ".join(map(str, dimensions))
        raise ValueError(
            f"{name} must be a non-empty array of {wanted} dimensions, got shape {array.shape}"
        )
    return array


def attention_map(
    weights: Any,
    *,
    title: str,
    queries: Sequence[str] | None = None,
    keys: Sequence[str] | None = None,
    hidden: Any = None,
    label: str = "attention weight",
    largest: float | None = None,
    ax: Any = None,
) -> Figure:
    """Weights ``(L, S)``: a row per query, a column per key.

    Args:
        weights: numbers ≥ 0, such as the rows of a softmax.
        title: what is shown.
        queries: the queries' names (tokens), by default their positions.
        keys: the keys' names.
        hidden: ``(L, S)``, True where a query may not look; hatched.
        label: of the colour bar.
        largest: the weight of the darkest colour, to compare several maps.
        ax: axes to draw into.
    """
    values = matrix(weights, "weights").astype(float)
    if hidden is not None:
        hidden = matrix(hidden, "hidden").astype(bool)
        if hidden.shape != values.shape:
            raise ValueError(f"hidden must have weights' shape {values.shape}, got {hidden.shape}")
        values = np.where(hidden, np.nan, values)
    with paper():
        ax = axes_or_new(ax, (5.6, 4.4))
        top = np.nanmax(values) if largest is None else largest
        if hidden is not None:  # shows through the cells that are not drawn
            ax.patch.set(facecolor=HIDDEN, edgecolor=HATCH, hatch="////")
        image = _image(ax, values, SEQUENTIAL, 0.0, float(top) or 1.0)
        ax.set(title=title, xlabel="key", ylabel="query")
        _names(ax, "x", keys, values.shape[1])
        _names(ax, "y", queries, values.shape[0])
        _bar(ax, image, label)
    return ax.figure


def mask_plot(
    mask: Any,
    *,
    title: str,
    block: int | None = None,
    queries: Sequence[str] | None = None,
    keys: Sequence[str] | None = None,
    ax: Any = None,
) -> Figure:
    """A mask ``(L, S)``: boolean, or block states 0 empty, 1 partial, 2 full.

    Args:
        mask: True where a query may look, or the states of blocks.
        title: what is shown.
        block: draw the borders of blocks of so many positions.
        queries: the queries' names, by default positions (or block numbers).
        keys: the keys' names.
        ax: axes to draw into.
    """
    values = matrix(mask, "mask")
    states = values.dtype != bool
    if states and not np.isin(values, (0, 1, 2)).all():
        raise ValueError("mask must be boolean or hold the block states 0, 1 and 2")
    kinds = ("empty", "partial", "full") if states else ("hidden", "seen")
    colours = (HIDDEN, SKY, BLUE) if states else (HIDDEN, BLUE)
    with paper():
        ax = axes_or_new(ax, (5.6, 4.4))
        _image(ax, values.astype(float), ListedColormap(colours), 0, len(kinds) - 1, numbers=False)
        unit = " block" if states else ""
        ax.set(title=title, xlabel=f"key{unit}", ylabel=f"query{unit}")
        _names(ax, "x", keys, values.shape[1])
        _names(ax, "y", queries, values.shape[0])
        _borders(ax, values.shape, 1 if states or values.size <= 400 else None, PAPER, 0.8)
        _borders(ax, values.shape, block, INK, 0.9)
        shares = [np.mean(values == i) for i in range(len(kinds))]
        patches = [Patch(facecolor=c, edgecolor=INK, linewidth=0.5) for c in colours]
        texts = [f"{kind}  {share:.0%}" for kind, share in zip(kinds, shares, strict=True)]
        ax.legend(
            patches[::-1],
            texts[::-1],
            loc="upper left",
            bbox_to_anchor=(1.01, 1.0),
            borderaxespad=0,
            handlelength=1.1,
            handleheight=1.1,
        )
    return ax.figure


def state_heatmap(
    state: Any,
    *,
    title: str,
    names: Sequence[str] | None = None,
    label: str = "value",
    xlabel: str = "value channel",
    ylabel: str = "key channel",
    largest: float | None = None,
    ax: Any = None,
) -> Figure:
    """A state ``(K, V)``, or several ``(n, K, V)`` side by side on one scale.

    Args:
        state: signed numbers; white is zero.
        title: what is shown.
        names: a heading for each of several states.
        label: of the colour bar.
        xlabel, ylabel: of the axes.
        largest: the absolute value of the strongest colours.
        ax: axes to draw into (one state only).
    """
    values = matrix(state, "state", (2, 3)).astype(float)
    panels = values[None] if values.ndim == 2 else values
    if ax is not None and len(panels) > 1:
        raise ValueError(f"ax takes one state, got {len(panels)}")
    if names is not None and len(names) != len(panels):
        raise ValueError(f"names must have {len(panels)} entries, got {len(names)}")
    top = float(np.nanmax(np.abs(values)) if largest is None else largest) or 1.0
    with paper():
        if ax is None:
            several = len(panels) > 1
            size = (min(8.6, 1.4 + 2.0 * len(panels)), 2.9) if several else (5.6, 4.4)
            figure, axes = canvas(1, len(panels), size=size, squeeze=False, sharey=True)
            axes = list(axes[0])
        else:
            figure, axes = ax.figure, [ax]
        for i, (panel, one) in enumerate(zip(panels, axes, strict=True)):
            image = _image(one, panel, DIVERGING, -top, top, numbers=len(panels) == 1)
            one.set(xlabel=xlabel, ylabel=ylabel if i == 0 else "")
            if len(panels) > 1:
                heading = names[i] if names else f"{i + 1}"
                one.set_title(heading, loc="center", fontweight="normal", fontsize=10)
        if len(panels) > 1:
            figure.suptitle(title, x=0.01, ha="left", fontweight="bold", fontsize=11.5)
        else:
            axes[0].set_title(title)
        figure.colorbar(image, ax=axes, label=label, shrink=0.9, aspect=18).outline.set_visible(
            False
        )
    return figure


def _image(ax, values, colours, low, high, *, numbers: bool = True):
    rows, columns = values.shape
    aspect = "equal" if 0.4 <= rows / columns <= 2.5 else "auto"
    image = ax.imshow(values, cmap=colours, vmin=low, vmax=high, aspect=aspect, zorder=1)
    ax.spines[:].set_visible(False)
    ax.tick_params(length=0)
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_major_locator(MaxNLocator("auto", integer=True, min_n_ticks=1))
    if numbers and values.size <= MOST_NUMBERS:
        _borders(ax, values.shape, 1, PAPER, 1.2)
        for (row, column), value in np.ndenumerate(values):
            if np.isfinite(value):
                light = _lightness(colours((value - low) / (high - low))) > 0.55
                ax.text(
                    column,
                    row,
                    f"{value:.2f}",
                    ha="center",
                    va="center",
                    fontsize=9,
                    color=INK if light else "white",
                    zorder=3,
                )
    return image


def _lightness(colour) -> float:
    red, green, blue = colour[:3]
    return 0.299 * red + 0.587 * green + 0.114 * blue


def _borders(ax, shape, step: int | None, colour: str, width: float) -> None:
    if step is None:
        return
    rows, columns = shape
    for edge in range(0, columns + step, step):
        ax.axvline(min(edge, columns) - 0.5, color=colour, linewidth=width, zorder=2)
    for edge in range(0, rows + step, step):
        ax.axhline(min(edge, rows) - 0.5, color=colour, linewidth=width, zorder=2)


def _names(ax, axis: str, names: Sequence[str] | None, count: int) -> None:
    """Tick labels: names, or every position while there is room."""
    if names is None:
        if count <= 16:
            getattr(ax, f"set_{axis}ticks")(range(count))
        return
    if len(names) != count:
        which = "keys" if axis == "x" else "queries"
        raise ValueError(f"{which} must have {count} names, got {len(names)}")
    longest = max(map(len, names))
    turn = {"rotation": 45, "ha": "right", "rotation_mode": "anchor"}
    crowded = axis == "x" and longest * count > 44
    getattr(ax, f"set_{axis}ticks")(range(count), names, **(turn if crowded else {}))


def _bar(ax, image, label: str) -> None:
    bar = ax.figure.colorbar(image, ax=ax, label=label, shrink=0.92, aspect=22)
    bar.outline.set_visible(False)
