"""An exercise says where an answer differs, never stops a notebook, and always goes on."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch

from corelib.teach import ExerciseFailed, exercise, solution
from corelib.teach.compare import differs, summary


def double(x):
    return 2 * x


CASES = [torch.tensor([1.0, 2.0]), torch.tensor([-1.0])]


def test_an_unsolved_exercise_goes_on_with_the_reference(capsys):
    @exercise(double, CASES)
    def unsolved(x):
        raise NotImplementedError

    assert unsolved is double
    line = "unsolved: not solved yet, the notebook goes on with the reference\n"
    assert capsys.readouterr().out == line


def test_a_right_answer_is_kept(capsys):
    @exercise(double, CASES)
    def right(x):
        return x + x

    assert right is not double and right.__name__ == "right"
    assert capsys.readouterr().out == "✓ right: solved, it is the reference on 2 cases\n"


def test_a_wrong_answer_names_the_first_differing_case(capsys):
    @exercise(abs, [3, torch.tensor([1.0, -2.0]), -1], hints=["Mind the sign."])
    def wrong(x):
        return x

    assert wrong is abs
    text = capsys.readouterr().out
    assert "case 2 of 3, inputs ([1, -2]): returned [1, -2], expected [1, 2]" in text
    assert "furthest apart at (1,): -2 against 2; largest difference 4" in text
    assert "Hint: Mind the sign." in text and "goes on with the reference" in text


def test_each_attempt_brings_the_next_hint(capsys):
    hints = ["first", "second"]
    for expected in ("first", "second", "second"):

        @exercise(double, CASES, hints=hints)  # running the cell again makes a new exercise
        def stubborn(x):
            return x

        assert f"Hint: {expected}\n" in capsys.readouterr().out

    @exercise(double, CASES, hints=hints)
    def stubborn(x):  # noqa: F811
        return 2 * x

    @exercise(double, CASES, hints=hints)
    def stubborn(x):  # noqa: F811
        return x

    assert "Hint: first\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (lambda x: 1 / 0, "raised ZeroDivisionError: division by zero"),
        (lambda x: None, "returned None, expected .*is a return missing"),
        (lambda x, y: x, "raised TypeError"),
        (lambda x: x.repeat(2), r"returned shape \(4,\), expected \(2,\)"),
        (lambda x: x * torch.nan, "largest difference nan"),
        (lambda x: np.array([object(), object()]), "raised TypeError"),
    ],
)
def test_no_answer_stops_the_notebook(capsys, body, words):
    body.__name__ = "body"
    assert exercise(double, CASES)(body) is double
    out = capsys.readouterr().out
    assert re.search(f"✗ body: case 1 of 2, .*{words}", out), out


def test_cases_may_be_drawn_at_random():
    def draw(generator):
        return torch.randn(3, generator=generator), 2.0

    task = exercise(lambda x, y: x * y, draw, trials=7)
    again = exercise(lambda x, y: x * y, draw, trials=7)
    assert len(task.cases) == 7
    for (one, _), (other, _) in zip(task.cases, again.cases, strict=True):
        assert torch.equal(one[0], other[0])
    assert not torch.equal(task.cases[0][0][0], task.cases[1][0][0])


def test_cases_may_be_keyword_arguments(capsys):
    task = exercise(torch.softmax, [{"input": torch.arange(3.0), "dim": 0}])

    @task
    def by_name(input, dim):
        return input

    assert "inputs (input=[0, 1, 2], dim=0)" in capsys.readouterr().out


def test_answers_get_copies_and_the_same_random_numbers():
    x = torch.zeros(3)

    def reference(x):
        return x + torch.rand(3)

    before = torch.random.get_rng_state()

    @exercise(reference, [x])
    def in_place(x):
        x += torch.rand(3)
        return x

    assert in_place is not reference
    assert torch.equal(x, torch.zeros(3))
    assert torch.equal(before, torch.random.get_rng_state())


def test_random_numbers_do_not_depend_on_the_notebook():
    drawn = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        exercise(lambda: drawn.append(torch.rand(1).item()), [()])(lambda: None)
    assert drawn[0] == drawn[1]


def test_answers_may_need_gradients():
    x = torch.ones(2, requires_grad=True)

    @exercise(lambda x: 2 * x.detach(), [x])
    def slope(x):
        (grad,) = torch.autograd.grad((x * x).sum(), x)
        return grad

    assert slope.__name__ == "slope" and x.grad is None


def test_a_tolerance_can_be_named():
    assert exercise(double, CASES)(lambda x: 2.01 * x) is double
    assert exercise(double, CASES, tolerance=0.1)(lambda x: 2.01 * x) is not double


def test_a_solution_is_held_strictly(capsys):
    task = exercise(double, CASES)

    @task.solution
    def answer(x):
        return x + x

    assert answer(3) == 6 and "✓ answer: this solution is the reference" in capsys.readouterr().out
    with pytest.raises(ExerciseFailed, match="case 1 of 2"):
        task.solution(lambda x: x)
    with pytest.raises(ExerciseFailed, match="raises NotImplementedError"):

        @solution(double, CASES)
        def unwritten(x):
            raise NotImplementedError


def test_an_error_in_the_reference_is_the_authors():
    with pytest.raises(ZeroDivisionError):
        exercise(lambda x: 1 / 0, CASES)(double)


def test_bad_exercises_are_refused():
    with pytest.raises(TypeError, match="reference: expected a function, got int"):
        exercise(3, CASES)
    with pytest.raises(TypeError, match="hints: expected a list of strings"):
        exercise(double, CASES, hints="one hint")
    with pytest.raises(ValueError, match="cases: expected at least one"):
        exercise(double, [])


@pytest.mark.parametrize(
    ("got", "expected"),
    [
        (1, 1.0),
        (1.0 + 1e-9, 1.0),
        ([1, None, "a"], (1, None, "a")),
        ((torch.ones(2), [1.0]), (torch.ones(2), [1.0])),
        (np.ones(2), torch.ones(2)),
        ({"a": 1.0}, {"a": 1.0}),
        (torch.tensor([True]), torch.tensor([True])),
        (torch.tensor(-torch.inf), torch.tensor(-torch.inf)),
        (None, None),
        ([], ()),
    ],
)
def test_what_is_the_same(got, expected):
    assert differs(got, expected) is None


@pytest.mark.parametrize(
    ("got", "expected", "words"),
    [
        (1, 2, "returned 1, expected 2; largest difference 1"),
        ((1, 2), (1, 3), "[1] returned 2, expected 3"),
        ((1, 2), (1, 2, 3), "returned 2 values, expected 3"),
        (1, (1, 2), "returned 1, expected (1, 2)"),
        ([1, [2.0, None]], [1, [2.0, 3]], "[1] [1] returned None, expected 3"),
        ({"a": 1}, {"b": 1}, "returned the keys ['a'], expected ['b']"),
        ({"a": 1}, {"a": 2}, "['a'] returned 1, expected 2"),
        ("a", "b", "returned 'a', expected 'b'"),
        ("1", 1, "returned '1', expected 1"),
        (1, None, "returned 1, expected None"),
        (torch.ones(1), 1.0, "returned shape (1,), expected ()"),
        (True, False, "returned True, expected False"),
    ],
)
def test_what_differs_is_put_in_words(got, expected, words):
    assert words in differs(got, expected)


def test_large_inputs_are_summarised():
    assert summary(torch.zeros(64, 64)) == "tensor (64, 64) from 0 to 0"
    assert summary(torch.zeros(0)) == "[]"
    assert summary("x" * 100).endswith("…") and len(summary("x" * 100)) == 60
    assert summary([1.23456789, double, (None,)]) == "[1.23457, double, (None)]"
