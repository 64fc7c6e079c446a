"""Exercises that check themselves and never stop a notebook.

>>> merge = exercise(merge_partials, cases=[(a, la, b, lb)], hints=["Which maximum do you take?"])
>>> @merge
... def my_merge(out_a, lse_a, out_b, lse_b):
...     raise NotImplementedError          # the learner's work goes here
my_merge: not solved yet, the notebook goes on with the reference

The decorated name is the learner's function when it is right and the reference otherwise. The
folded solution is held to the same cases, strictly:

>>> @merge.solution
... def my_merge(out_a, lse_a, out_b, lse_b): ...
"""

from __future__ import annotations

import collections
import copy
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .compare import differs, summary

SEED = 0
# Wrong attempts by function name: running a cell again makes a new exercise, the hints go on.
_ATTEMPTS: collections.Counter[str] = collections.Counter()


class ExerciseFailed(AssertionError):
    """A solution that ships with a lab is wrong."""


class Exercise:
    """A task: compares a function with ``reference`` on ``cases``. Make one with `exercise`."""

    def __init__(
        self,
        reference: Callable,
        cases: Iterable | Callable,
        hints: Sequence[str] = (),
        tolerance: float | None = None,
        trials: int = 20,
    ):
        if not callable(reference):
            raise TypeError(f"reference: expected a function, got {type(reference).__name__}")
        if isinstance(hints, str):
            raise TypeError("hints: expected a list of strings, got one string")
        self.reference, self.tolerance = reference, tolerance
        self.hints = list(hints)
        self.cases = _cases(cases, trials)

    def __call__(self, function: Callable) -> Callable:
        """Check the learner's ``function``, say how it went, return it or the reference."""
        name = function.__name__
        try:
            trouble = self.trouble(function)
        except NotImplementedError:
            print(f"{name}: not solved yet, the notebook goes on with the reference")
            return self.reference
        if trouble is None:
            _ATTEMPTS.pop(name, None)
            print(f"✓ {name}: solved, it is the reference on {_count(self.cases)}")
            return function
        print(f"✗ {name}: {trouble}")
        if self.hints:
            print(f"  Hint: {self.hints[min(_ATTEMPTS[name], len(self.hints) - 1)]}")
        print("  The notebook goes on with the reference.")
        _ATTEMPTS[name] += 1
        return self.reference

    def solution(self, function: Callable) -> Callable:
        """Check a solution that ships with the lab.

        Raises:
            ExerciseFailed: it differs from the reference, or is not written.
        """
        try:
            trouble = self.trouble(function)
        except NotImplementedError:
            trouble = "raises NotImplementedError"
        if trouble is not None:
            raise ExerciseFailed(f"{function.__name__}: {trouble}")
        print(f"✓ {function.__name__}: this solution is the reference on {_count(self.cases)}")
        return function

    def trouble(self, function: Callable) -> str | None:
        """The first case in which ``function`` differs, in words; None when it never does.

        Raises:
            NotImplementedError: the function says so itself.
        """
        for number, case in enumerate(self.cases, 1):
            expected = _run(self.reference, case)
            try:
                happened = differs(_run(function, case), expected, self.tolerance)
            except NotImplementedError:
                raise
            except Exception as error:
                happened = f"raised {type(error).__name__}: {error}"
            if happened:
                return f"case {number} of {len(self.cases)}, {_call(case)}: {happened}"
        return None


def exercise(
    reference: Callable,
    cases: Iterable | Callable,
    hints: Sequence[str] = (),
    *,
    tolerance: float | None = None,
    trials: int = 20,
) -> Exercise:
    """A decorator that holds a learner's function to ``reference``.

    Args:
        reference: the function to agree with; also the fallback.
        cases: inputs. A list whose entries are tuples of positional arguments, or dictionaries of
            keyword arguments, or a single argument that is neither; or a function of a
            ``torch.Generator`` that draws one such entry.
        hints: each wrong attempt shows the next one, the last one again and again.
        tolerance: largest absolute difference of floating numbers, see `corelib.teach.check`.
        trials: how many entries to draw when ``cases`` is a function.
    """
    return Exercise(reference, cases, hints, tolerance, trials)


def solution(
    reference: Callable, cases: Iterable | Callable, *, tolerance: float | None = None
) -> Callable[[Callable], Callable]:
    """A decorator for a folded solution: raises `ExerciseFailed` when it is wrong."""
    return Exercise(reference, cases, tolerance=tolerance).solution


def _cases(cases: Iterable | Callable, trials: int) -> list[tuple[tuple, dict]]:
    """Every case as positional and keyword arguments."""
    if callable(cases):
        generator = torch.Generator().manual_seed(SEED)
        entries = [cases(generator) for _ in range(trials)]
    else:
        entries = list(cases)
    if not entries:
        raise ValueError("cases: expected at least one, got none")
    listed = []
    for entry in entries:
        if isinstance(entry, Mapping):
            listed.append(((), dict(entry)))
        else:
            listed.append((entry if isinstance(entry, tuple) else (entry,), {}))
    return listed


def _run(function: Callable, case: tuple[tuple, dict]) -> Any:
    """Call on copies of the inputs, with the same random numbers every time."""
    args, kwargs = _copy(case)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        return function(*args, **kwargs)


def _copy(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().clone().requires_grad_(value.requires_grad)
    if isinstance(value, dict):
        return {name: _copy(item) for name, item in value.items()}
    if type(value) in (tuple, list):
        return type(value)(_copy(item) for item in value)
    return value if inspect.isroutine(value) else copy.deepcopy(value)


def _call(case: tuple[tuple, dict]) -> str:
    args, kwargs = case
    words = [summary(arg) for arg in args]
    words += [f"{name}={summary(value)}" for name, value in kwargs.items()]
    return f"inputs ({', '.join(words)})"


def _count(cases: list) -> str:
    return "1 case" if len(cases) == 1 else f"{len(cases)} cases"
