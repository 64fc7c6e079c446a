"""Questions about the digits on one canvas, in words, with the answer and the cells it rests on.

`digit_canvas` has the canvases, the table of the kinds and the batches. A canvas is here a list of
rows of labels: a digit, or a negative number for a cell that holds none. ``KINDS[kind]`` makes up
one question from the cells in reading order, the digits among them, and the number of columns.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import NamedTuple


class Question(NamedTuple):
    """One question in words, with the numbers of the cells that its answer rests on."""

    kind: str
    text: str
    answer: str
    evidence: tuple[int, ...]


def question(kind: str, canvas: list[list[int]], rng: random.Random) -> Question:
    """A question about the labels of one canvas.

    Where no digit is alone, ``where`` becomes ``read``. Raises ``ValueError`` for an unknown kind.
    """
    if kind not in KINDS:
        raise ValueError(f"kind: expected one of {', '.join(KINDS)}; got {kind!r}")
    cells = [label for row in canvas for label in row]
    held = [label for label in cells if label >= 0]
    if kind == "where" and not any(held.count(digit) == 1 for digit in held):
        kind = "read"
    return Question(kind, *KINDS[kind](cells, held, len(canvas[0]), rng))


Asked = tuple[str, str, tuple[int, ...]]


def _of(digit: int, cells: list[int]) -> tuple[int, ...]:
    return tuple(place for place, label in enumerate(cells) if label == digit)


def _word(cell: int, columns: int) -> str:
    return f"r{cell // columns + 1} c{cell % columns + 1}"


def _read(cells: list[int], held: list[int], columns: int, rng: random.Random) -> Asked:
    """Four times in five about a cell with a digit, else about any other."""
    with_digit = rng.random() < 0.8 or len(held) == len(cells)
    cell = rng.choice([n for n, label in enumerate(cells) if (label >= 0) == with_digit])
    answer = str(cells[cell]) if with_digit else "nothing"
    return f"digit at {_word(cell, columns)} ?", answer, (cell,)


def _where(cells: list[int], held: list[int], columns: int, rng: random.Random) -> Asked:
    digit = rng.choice([digit for digit in held if held.count(digit) == 1])
    cell = cells.index(digit)
    return f"where is the {digit} ?", _word(cell, columns), (cell,)


def _count(cells: list[int], held: list[int], columns: int, rng: random.Random) -> Asked:
    digit = rng.choice(held) if rng.random() < 0.5 else rng.randrange(10)
    return f"how many {digit} here ?", str(min(held.count(digit), 9)), _of(digit, cells)


def _exists(cells: list[int], held: list[int], columns: int, rng: random.Random) -> Asked:
    present = rng.random() < 0.5
    digit = rng.choice([digit for digit in range(10) if (digit in held) == present])
    return f"is there a {digit} ?", "yes" if present else "no", _of(digit, cells)


def _largest(cells: list[int], held: list[int], columns: int, rng: random.Random) -> Asked:
    return "what digit is largest ?", str(max(held)), _of(max(held), cells)


def _smallest(cells: list[int], held: list[int], columns: int, rng: random.Random) -> Asked:
    return "what digit is smallest ?", str(min(held)), _of(min(held), cells)


KINDS: dict[str, Callable[..., Asked]] = {
    "read": _read,
    "where": _where,
    "count": _count,
    "exists": _exists,
    "largest": _largest,
    "smallest": _smallest,
}
