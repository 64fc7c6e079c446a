"""A text, token by token: a number as the colour of each, and how far each may move."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure

from ..style import DIVERGING, INK, MUTED, axes_or_new, paper

MOST_TOKENS = 48


def token_intervals(
    words: Sequence[str],
    values: Sequence[float],
    low: Sequence[float],
    high: Sequence[float],
    *,
    title: str,
    ylabel: str,
    xlabel: str = "token",
    label: str = "value",
    usual: tuple[float, float] | None = None,
    ax: Any = None,
) -> Figure:
    """A bar from ``low`` to ``high`` above every word, in the colour of its value.

    Args:
        words: the tokens, from left to right, at most 48.
        values: from -1 to 1; blue is negative, orange positive, white zero.
        low, high: the ends of every token's bar.
        title: what is shown.
        ylabel: what the bars span.
        xlabel: what the words are.
        label: of the colour bar.
        usual: ends that would hold for all tokens alike, as dashed lines.
        ax: axes to draw into.
    """
    if not 1 <= len(words) <= MOST_TOKENS:
        raise ValueError(f"words: expected 1 to {MOST_TOKENS}, got {len(words)}")
    given = {"values": values, "low": low, "high": high}
    numbers = {name: [float(x) for x in given[name]] for name in given}
    for name, row in numbers.items():
        if len(row) != len(words):
            raise ValueError(f"{name}: expected one for each of {len(words)} words, got {len(row)}")
    scale = ScalarMappable(Normalize(-1, 1), DIVERGING)
    heights = [b - a for a, b in zip(numbers["low"], numbers["high"], strict=True)]
    with paper():
        ax = axes_or_new(ax, (min(8.6, 3.6 + 0.25 * len(words)), 3.1))
        look = dict(width=0.8, edgecolor=INK, linewidth=0.6, color=scale.to_rgba(numbers["values"]))
        ax.bar(range(len(words)), heights, bottom=numbers["low"], **look)
        for edge in usual or ():
            ax.axhline(edge, color=INK, linestyle="--", linewidth=1.0, zorder=0)
        ax.set_xticks(range(len(words)), list(words), fontsize=8)
        ax.tick_params(axis="x", length=0)
        ax.set(title=title, xlabel=xlabel, ylabel=ylabel, xlim=(-0.7, len(words) - 0.3))
        lowest, highest = min(numbers["low"]), max(numbers["high"])
        ax.set_ylim(lowest - 0.06 * (highest - lowest), highest + 0.06 * (highest - lowest))
        bar = ax.figure.colorbar(scale, ax=ax, label=label, fraction=0.035, pad=0.015)
        bar.outline.set_edgecolor(MUTED)
    return ax.figure
