"""Canvases of digits: what is drawn is what is labelled, and every answer follows from labels."""

from __future__ import annotations

import random

import pytest
import torch

from corelib.data import digit_canvas as canvas
from corelib.data import digits
from corelib.data.digit_canvas import BLANK, CELL, KINDS, SMUDGE, ask, digit_canvas, question


def gen(seed=0):
    return torch.Generator().manual_seed(seed)


def cells_of(images, rows, columns):
    return images.unflatten(1, (rows, CELL)).unflatten(3, (columns, CELL)).transpose(2, 3)


def test_digits_stand_where_the_labels_say():
    drawn = digit_canvas(8, gen(), split="test", noise=0.0, rows=5, columns=7)
    assert drawn.images.shape == (8, 40, 56) and drawn.labels.shape == (8, 5, 7)
    pictures, classes = digits("test")
    cells = cells_of(drawn.images, 5, 7)
    for digit in range(10):
        known = pictures[classes == digit].flatten(1)
        for cell in cells[drawn.labels == digit].flatten(1):
            ink = known > 0.3  # above what uneven paper can be
            assert ((cell - known).abs() * ink).amax(1).min() < 1e-6
    assert cells[drawn.labels == BLANK].max() < 0.21


def test_smudges_have_ink_and_no_shape():
    drawn = digit_canvas(40, gen(1), noise=0.0)
    cells = cells_of(drawn.images, 12, 12)
    smudges = cells[drawn.labels == SMUDGE].flatten(1)
    pictures = digits("train")[0].flatten(1)
    sorted_ink = smudges.sort(1).values[:, None, 32:]
    nearest = (sorted_ink - pictures.sort(1).values[:, 32:]).abs().amax(2).min(1).values
    assert (nearest < 0.21).all()
    in_place = (smudges[:, None] - pictures).abs().amax(2).min(1).values
    assert (in_place > 0.3).all()


def test_numbers_are_within_bounds_and_digits_repeat():
    drawn = digit_canvas(50, gen(2), fewest=6, most=9, smudges=3)
    held = (drawn.labels >= 0).flatten(1)
    assert held.sum(1).min() == 6 and held.sum(1).max() == 9
    assert (drawn.labels == SMUDGE).flatten(1).sum(1).unique().tolist() == [0, 1, 2, 3]
    kinds = [len(set(row[row >= 0].tolist())) for row in drawn.labels.flatten(1)]
    assert max(kinds) <= 6 and sum(kinds) < 0.8 * held.sum()
    assert drawn.images.min() >= 0 and drawn.images.max() <= 1


def test_a_seed_names_the_data_and_splits_differ():
    for x, y in zip(digit_canvas(2, gen(3)), digit_canvas(2, gen(3)), strict=True):
        assert torch.equal(x, y)
    other = digit_canvas(2, gen(3), augment=True)
    assert torch.equal(other.labels, digit_canvas(2, gen(3)).labels)
    assert not torch.equal(other.images, digit_canvas(2, gen(3)).images)


LABELS = [[3, BLANK, 7], [SMUDGE, 3, 0]]


def solve(text, labels):
    """The answer, and the cells that it rests on, from the words alone."""
    words = text.split()
    cells = [label for row in labels for label in row]
    held = sorted(label for label in cells if label >= 0)
    if words[0] == "digit":
        r, c = int(words[2][1:]) - 1, int(words[3][1:]) - 1
        label = labels[r][c]
        return (str(label) if label >= 0 else "nothing"), {r * len(labels[0]) + c}
    if words[0] == "what":
        digit = held[-1 if words[3] == "largest" else 0]
        return str(digit), {n for n, label in enumerate(cells) if label == digit}
    digit = int(words[3] if words[0] != "how" else words[2])
    there = {n for n, label in enumerate(cells) if label == digit}
    if words[0] == "is":
        return ("yes" if there else "no"), there
    if words[0] == "how":
        return str(len(there)), there
    (cell,) = there
    return f"r{cell // len(labels[0]) + 1} c{cell % len(labels[0]) + 1}", there


@pytest.mark.parametrize("kind", KINDS)
def test_answers_follow_from_the_labels(kind):
    rng, texts = random.Random(0), set()
    for _ in range(60):
        one = question(kind, LABELS, rng)
        assert one.kind == kind and len(one.text.split()) == canvas.QUESTION_WORDS
        assert (one.answer, set(one.evidence)) == solve(one.text, LABELS)
        texts.add(one.text)
    assert len(texts) == {"read": 6, "where": 2, "count": 10, "exists": 10}.get(kind, 1)


def test_where_needs_a_digit_that_is_alone():
    assert question("where", [[4, 4]], random.Random(0)).kind == "read"


def test_questions_of_many_canvases():
    drawn = digit_canvas(6, gen(4))
    asked = ask(drawn.labels, 5, gen(5))
    assert asked.ids.shape == (6, 5, 5) and asked.answers.shape == (6, 5, 3)
    assert asked.evidence.shape == (6, 5, 144)
    for b in range(6):
        for n in range(5):
            text, said = canvas.to_text(asked.ids[b, n]), canvas.to_text(asked.answers[b, n])
            cells = set(asked.evidence[b, n].nonzero().flatten().tolist())
            assert (said, cells) == solve(text, drawn.labels[b].tolist())
            assert asked.answers[b, n].tolist().count(canvas.STOP) == 1
    assert len({kind for row in asked.kinds for kind in row}) >= 5
    only = ask(drawn.labels, 5, gen(5), kinds=["count", "read"]).kinds
    assert {kind for row in only for kind in row} == {"count", "read"}


def test_words_and_ids():
    assert canvas.to_text(canvas.to_ids("where is the 7 ?")) == "where is the 7 ?"
    assert canvas.to_text(canvas.answer_ids("r3 c5")) == "r3 c5"
    assert canvas.answer_ids("9").tolist()[1:] == [canvas.STOP, canvas.FILL]
    assert len(set(canvas.WORDS)) == len(canvas.WORDS) <= 64


@pytest.mark.no_shape_checks
def test_errors_name_what_is_wrong():
    with pytest.raises(ValueError, match="rows: expected 1 to 12, got 13"):
        digit_canvas(1, gen(), rows=13)
    with pytest.raises(ValueError, match="most: expected at least fewest, 5"):
        digit_canvas(1, gen(), most=4)
    with pytest.raises(ValueError, match="smudges: expected 0 to 5 beside 4 digits on 3 by 3"):
        digit_canvas(1, gen(), rows=3, columns=3, fewest=1, most=4, smudges=6)
    with pytest.raises(ValueError, match="text: expected words of WORDS, got 'cat'"):
        canvas.to_ids("a cat")
    with pytest.raises(ValueError, match="kind: expected one of read"):
        question("why", LABELS, random.Random(0))
