"""Pictures drawn at build time as HTML and SVG that take the theme's colours, light or dark."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable, Sequence
from html import escape

from .plan import Part

SIZE, CELL = 14, 8  # tokens a side, units a token


def _full(i: int, j: int) -> float:
    return 1.0


def _window_and_sinks(i: int, j: int) -> float:
    return float(i - j < 4 or j < 2)


def _blocks(i: int, j: int) -> float:
    chosen = {0: (0,), 1: (0, 1), 2: (1, 2), 3: (0, 3), 4: (0, 2, 4), 5: (1, 5), 6: (0, 4, 6)}
    return float(j // 2 in chosen[i // 2])


def _fading_state(i: int, j: int) -> float:
    return math.exp(-(i - j) / 3.5)


def _kept_entries(i: int, j: int) -> float:
    return float(i - j < 2 or (j in (0, 3, 7) and i >= j))


def _draft_tree(i: int, j: int) -> float:
    parent = {8: 7, 9: 8, 10: 8, 11: 9, 12: 10, 13: 10}
    path = [i]
    while path[-1] in parent:
        path.append(parent[path[-1]])
    return float(j < 8 or j in path)


PATTERNS: list[tuple[str, str, str, Callable[[int, int], float]]] = [
    ("Exact attention", "every token reads all before it", "00_foundations", _full),
    ("A fading state", "the past in one fixed-size memory", "01_state_space", _fading_state),
    (
        "Windows and sinks",
        "near keys, and the very first",
        "03_sparse_attention",
        _window_and_sinks,
    ),
    ("Chosen blocks", "only where the scores are", "03_sparse_attention", _blocks),
    ("A smaller cache", "entries that earned their place", "04_serving", _kept_entries),
    ("A tree of drafts", "several futures in one pass", "05_decoding", _draft_tree),
]


def patterns() -> str:
    """Six small maps of who reads whom: the landing page's picture, each a link to its part."""
    figures = []
    for title, caption, folder, weight in PATTERNS:
        cells = "".join(
            f'<rect x="{j * CELL}" y="{i * CELL}" width="{CELL - 1}" height="{CELL - 1}" rx="1.5"'
            f' opacity="{max(weight(i, j), 0.05):.2f}"/>'
            for i in range(SIZE)
            for j in range(i + 1)
        )
        side = SIZE * CELL - 1
        figures.append(
            f'<a class="pattern" href="parts/{folder}.html">'
            f'<svg viewBox="0 0 {side} {side}" role="img" aria-label="{escape(title)}: a map of '
            f'which earlier tokens (across) each token (down) reads">{cells}</svg>'
            f"<strong>{escape(title)}</strong><span>{escape(caption)}</span></a>"
        )
    return f'<div class="patterns">{"".join(figures)}</div>'


BOX_WIDTH, BOX_HEIGHT, COLUMN, ROW, MARGIN = 146, 72, 170, 92, 6


def part_graph(parts: Sequence[Part]) -> str:
    """The parts as boxes, arrows from what a part needs to the part; boxes link to pages."""
    columns = max(part.place[0] for part in parts)
    rows = max(part.place[1] for part in parts)
    width = columns * COLUMN + BOX_WIDTH + 2 * MARGIN
    height = rows * ROW + BOX_HEIGHT + 2 * MARGIN + 26
    by_folder = {part.folder: part for part in parts}
    arrows = "".join(
        f'<path d="{_arrow(by_folder[need].place, part.place)}" marker-end="url(#arrow-head)"/>'
        for part in parts
        for need in part.needs
    )
    boxes = "".join(_box(part) for part in parts)
    return (
        f'<div class="part-graph"><svg viewBox="0 0 {width} {height}" role="img" aria-label="The '
        'thirteen parts, with an arrow from each part to those that build on it">'
        '<defs><marker id="arrow-head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" '
        'markerHeight="7" orient="auto"><path d="M0,0.8 L7,4 L0,7.2 z"/></marker></defs>'
        f'<g class="arrows">{arrows}</g>{boxes}</svg></div>'
    )


def _corner(place: tuple[int, int]) -> tuple[int, int]:
    return MARGIN + place[0] * COLUMN, MARGIN + place[1] * ROW


def _arrow(source: tuple[int, int], target: tuple[int, int]) -> str:
    """A curve from box to box; one that would run through boxes of its row goes below them."""
    (x0, y0), (x1, y1) = _corner(source), _corner(target)
    if source[1] == target[1] and target[0] - source[0] > 1:
        x0, x1 = x0 + BOX_WIDTH // 2, x1 + BOX_WIDTH // 2
        y0, low = y0 + BOX_HEIGHT, y0 + BOX_HEIGHT + 30
        return (
            f"M{x0},{y0} C{x0},{low} {x0 + 30},{low} {x0 + 90},{low - 2} L{x1 - 90},{low - 2} "
            f"C{x1 - 30},{low} {x1},{low} {x1},{y0 + 2}"
        )
    x0, y0, x1, y1 = x0 + BOX_WIDTH, y0 + BOX_HEIGHT // 2, x1 - 2, y1 + BOX_HEIGHT // 2
    bend = max(16, (COLUMN - BOX_WIDTH) * 0.6)
    return f"M{x0},{y0} C{x0 + bend:.0f},{y0} {x1 - bend:.0f},{y1} {x1},{y1}"


def _box(part: Part) -> str:
    x, y = _corner(part.place)
    built, planned = len(part.built), len(part.labs)
    done = (BOX_WIDTH - 22) * built / planned
    state = "built" if built else "planned"
    title = "".join(
        f'<tspan x="{x + 11}" y="{y + 38 + 15 * line}">{escape(words)}</tspan>'
        for line, words in enumerate(textwrap.wrap(part.title, 16))
    )
    return (
        f'<a class="part {state}" href="{part.document}.html">'
        f'<rect x="{x}" y="{y}" width="{BOX_WIDTH}" height="{BOX_HEIGHT}" rx="5"/>'
        f'<text class="labs" x="{x + 11}" y="{y + 19}">{part.number}</text>'
        f'<text class="labs" x="{x + BOX_WIDTH - 11}" y="{y + 19}" text-anchor="end">'
        f'{built}/{planned} labs</text><text class="name">{title}</text>'
        f'<rect class="bar" x="{x + 11}" y="{y + 62}" width="{BOX_WIDTH - 22}" height="3"/>'
        f'<rect class="done" x="{x + 11}" y="{y + 62}" width="{done:.0f}" height="3"/></a>'
    )
