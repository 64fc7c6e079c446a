"""Real digits scattered over a canvas, and questions about them with exact answers.

A canvas is a grid of cells of 8 by 8 pixels. Most hold nothing but uneven paper; some hold a
handwritten digit (`corelib.data.digits`), the same digit often more than once; some hold a smudge:
a digit's pixels in random order, as much ink and no shape. Who answers a question needs a few cells
and can do without the others, and does not know which before reading the question.

Every question has five words, so that questions of all kinds go into one batch:

| kind     | question                  | answer                    |
|:---------|:--------------------------|:--------------------------|
| read     | ``digit at r3 c5 ?``      | ``7``, or ``nothing``     |
| where    | ``where is the 7 ?``      | ``r3 c5`` (it is alone)   |
| count    | ``how many 7 here ?``     | ``2``                     |
| exists   | ``is there a 7 ?``        | ``yes`` or ``no``         |
| largest  | ``what digit is largest ?`` | ``9``                   |
| smallest | ``what digit is smallest ?`` | ``0``                  |

`canvas_questions` makes them up. An answer ends with ``.`` and is filled up to `ANSWER_WORDS` words
with ``_``.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from .canvas_questions import KINDS, question
from .images import digits
from .labelled import python_random

CELL = 8  # pixels
BLANK, SMUDGE = -1, -2  # labels of cells without a digit
MOST_LINES = 12  # rows or columns that have a word
QUESTION_WORDS, ANSWER_WORDS = 5, 3
NUMBERS = [str(n) for n in range(10)]
WORDS = (
    ["<start>", "_", ".", "?", *NUMBERS]
    + [f"{axis}{n + 1}" for axis in "rc" for n in range(MOST_LINES)]
    + "a at digit here how is largest many no nothing smallest the there what where yes".split()
)
_ID = {word: number for number, word in enumerate(WORDS)}
START, FILL, STOP = (_ID[word] for word in ("<start>", "_", "."))


class Canvases(NamedTuple):
    """``images (B, 8 R, 8 C)`` from 0 (paper) to 1 (ink); ``labels (B, R, C)``: digit, `BLANK` or
    `SMUDGE`."""

    images: Float[Tensor, "B height width"]
    labels: Int[Tensor, "B R C"]


class Questions(NamedTuple):
    """``ids (B, Q, 5)``, ``answers (B, Q, 3)`` and the kind of each, ``kinds[b][q]``.

    ``evidence (B, Q, R C)``: the cells that one has to see to answer (none, where a digit is
    missing: all of them).
    """

    ids: Int[Tensor, "B Q words"]
    answers: Int[Tensor, "B Q said"]
    evidence: Bool[Tensor, "B Q cells"]
    kinds: list[list[str]]


def to_ids(text: str) -> Int[Tensor, " words"]:
    """The ids of words with spaces between them; raises ``ValueError`` for one that is unknown."""
    unknown = [word for word in text.split() if word not in _ID]
    if unknown:
        raise ValueError(f"text: expected words of WORDS, got {unknown[0]!r}")
    return torch.tensor([_ID[word] for word in text.split()])


def to_text(ids: Int[Tensor, " words"]) -> str:
    """The words of ``ids``, up to the first ``.`` and without filling."""
    words = [WORDS[i] for i in ids.tolist()]
    words = words[: words.index(".")] if "." in words else words
    return " ".join(word for word in words if word != "_")


def digit_canvas(
    batch: int,
    generator: torch.Generator,
    *,
    split: str = "train",
    rows: int = MOST_LINES,
    columns: int = MOST_LINES,
    fewest: int = 5,
    most: int = 11,
    smudges: int = 6,
    noise: float = 0.04,
    augment: bool = False,
) -> Canvases:
    """Canvases of ``rows`` by ``columns`` cells with ``fewest`` to ``most`` digits each.

    The digits of a canvas come from three to six of the ten classes, so that most occur more than
    once. ``smudges``: the most that there are. ``augment``: turn, stretch and move each digit a
    little. Images are those of ``split``.

    Raises ``ValueError`` for sizes that do not fit.
    """
    _check(rows, columns, fewest, most, smudges)
    pictures, classes = digits(split)
    pools = [(classes == n).nonzero().flatten().tolist() for n in range(10)]
    rng = python_random(generator)
    labels = torch.full((batch, rows * columns), BLANK)
    chosen = torch.zeros_like(labels)
    for row, picks in zip(labels, chosen, strict=True):
        _scatter(row, picks, pools, rng, rng.randint(fewest, most), rng.randint(0, smudges))
    ink = torch.zeros(batch, rows * columns, CELL, CELL)
    ink[labels >= 0] = _varied(pictures[chosen[labels >= 0]], generator, augment)
    smudged = pictures[chosen[labels == SMUDGE]].flatten(1)
    order = torch.rand(smudged.shape, generator=generator).argsort(1)
    ink[labels == SMUDGE] = smudged.gather(1, order).unflatten(1, (CELL, CELL))
    images = ink.unflatten(1, (rows, columns)).transpose(2, 3).flatten(3).flatten(1, 2)
    paper = _uneven_paper(batch, *images.shape[1:], generator)
    images = torch.maximum(images, paper) + noise * torch.randn(images.shape, generator=generator)
    return Canvases(images.clamp(0, 1), labels.unflatten(1, (rows, columns)))


def _check(rows: int, columns: int, fewest: int, most: int, smudges: int) -> None:
    for name, lines in (("rows", rows), ("columns", columns)):
        if not 1 <= lines <= MOST_LINES:
            raise ValueError(f"{name}: expected 1 to {MOST_LINES}, got {lines}")
    if not 1 <= fewest <= most:
        raise ValueError(
            f"most: expected at least fewest, {fewest}, and that at least 1; got {most}"
        )
    if most + smudges > rows * columns or smudges < 0:
        raise ValueError(
            f"smudges: expected 0 to {rows * columns - most} beside {most} digits on "
            f"{rows} by {columns} cells, got {smudges}"
        )


def _scatter(
    labels: Tensor, picks: Tensor, pools: list, rng: random.Random, number: int, smudges: int
) -> None:
    """Put digits and smudges on free cells: what each is, and which picture is taken for it."""
    kinds = rng.sample(range(10), rng.randint(3, 6))
    cells = rng.sample(range(len(labels)), number + smudges)
    for n, cell in enumerate(cells):
        digit = rng.choice(kinds)
        labels[cell] = digit if n < number else SMUDGE
        picks[cell] = rng.choice(pools[digit])


def _varied(pictures: Tensor, generator: torch.Generator, augment: bool) -> Tensor:
    """Each picture turned by up to 0.15 radians, stretched by up to 10 % and moved by half a pixel
    or so."""
    if not augment or len(pictures) == 0:
        return pictures
    turn = torch.randn(len(pictures), 4, generator=generator)
    change = torch.eye(2, 3).repeat(len(pictures), 1, 1)
    change[:, 0, 1], change[:, 1, 0] = 0.1 * turn[:, 0], -0.1 * turn[:, 0]
    change[:, :, :2] *= 1 + 0.06 * turn[:, 1, None, None]
    change[:, :, 2] = 0.12 * turn[:, 2:]
    grid = F.affine_grid(change, [len(pictures), 1, CELL, CELL], align_corners=False)
    return F.grid_sample(pictures[:, None], grid, align_corners=False)[:, 0]


def _uneven_paper(batch: int, height: int, width: int, generator: torch.Generator) -> Tensor:
    """Shades from 0 to 0.2 that change slowly over the canvas."""
    coarse = 0.2 * torch.rand(batch, 1, 3, 3, generator=generator)
    options = dict(size=(height, width), mode="bilinear", align_corners=True)
    return F.interpolate(coarse, **options)[:, 0]


def ask(
    labels: Int[Tensor, "B R C"],
    per_canvas: int,
    generator: torch.Generator,
    kinds: Sequence[str] | None = None,
) -> Questions:
    """``per_canvas`` questions about each canvas, of ``kinds`` (all) drawn evenly."""
    kinds = list(KINDS if kinds is None else kinds)
    rng = python_random(generator)
    asked = [
        [question(rng.choice(kinds), canvas, rng) for _ in range(per_canvas)]
        for canvas in labels.tolist()
    ]
    B, cells = len(labels), labels[0].numel()
    evidence = torch.zeros(B, per_canvas, cells, dtype=torch.bool)
    for b, row in enumerate(asked):
        for n, one in enumerate(row):
            evidence[b, n, list(one.evidence)] = True
    ids = torch.stack([torch.stack([to_ids(one.text) for one in row]) for row in asked])
    answers = torch.stack([torch.stack([answer_ids(one.answer) for one in row]) for row in asked])
    return Questions(ids, answers, evidence, [[one.kind for one in row] for row in asked])


def answer_ids(answer: str) -> Int[Tensor, " said"]:
    """``answer``, its full stop and filling."""
    words = [*answer.split(), "."]
    return to_ids(" ".join(words + ["_"] * (ANSWER_WORDS - len(words))))
