"""Needle Threading: Can LLMs Follow Threads through Near-Million-Scale Haystacks?
(Roberts, Han & Albanie, arXiv 2411.05000).

A haystack of random identifiers, written as one JSON object, in which nothing can be guessed. To
find one value is a needle; a *thread* is a chain of them, where each value is the next key:

    value_1 = text[start],  value_2 = text[value_1],  …  answer = value_hops

==================  ==============================================  =======================
code                question                                        answer
==================  ==============================================  =======================
`single`            the value of a key, at a chosen depth           a value
`multiple`          the values of several keys                      values, in order
`conditional`       the values of all keys that contain a mark      values, in any order
`thread`            where does the thread from this key end?        a value
`multi_thread`      the same for several starts                     values, in order
`branched`          values list several keys; follow the longest    a value
==================  ==============================================  =======================

``pairs`` ↔ key-value pairs, 25 for its 2,000 characters (a pair of UUIDs takes 80); ``hops`` ↔
thread length; ``depth`` ↔ needle depth in percent / 100; ``clustered`` ↔ needle placement;
``direction`` ↔ forward (each next pair stands later), backward, random. Exact: with `uuid` and seed
0 our 25 pairs are those of its published data. From memory, not from the paper's text: that a mark
replaces a character of a key, how branches are drawn, the threshold of 75 %. Left out: its 17
models, which are services. The wording of questions is ours.

Cost: a haystack is O(pairs). Oracles: `solve`, which
sees only text and query; the first row of its data.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import random
import re
from collections.abc import Callable, Mapping, Sequence

from .needle_tasks import (
    TASKS,
    WORDING,
    Value,
    branched,
    conditional,
    every_needle,
    haystack,
    multi_thread,
    multiple,
    pairs_for,
    short_id,
    single,
    thread,
    uuid,
    word_of,
)
from .shared import Answerer, Question

__all__ = [
    "TASKS",
    "NeedleThreading",
    "branched",
    "conditional",
    "effective_limit",
    "every_needle",
    "example",
    "haystack",
    "multi_thread",
    "multiple",
    "pairs_for",
    "parse",
    "plain_ids",
    "short_id",
    "single",
    "solve",
    "solver",
    "thread",
    "tokenizer_ratio",
    "uuid",
    "word_of",
    "written_out",
]


# ---- reading answers, and the exact solver


def parse(said: str) -> tuple[str, ...]:
    """The answer in what was said: a JSON string or list, or else the first word."""
    try:
        found, _ = json.JSONDecoder().raw_decode(said.strip())
    except json.JSONDecodeError:
        found = re.findall(r'"([^"\n]*)"', said) or said.split()[:1]
    if found is None or isinstance(found, (bool, int, float)):
        found = said.split()[:1]  # a word or number that happens to be JSON
    found = [found] if isinstance(found, str) else found
    return tuple(map(str, found)) if isinstance(found, list) else ()


def _ends(stack: Mapping[str, Value], key: str) -> tuple[int, str]:
    """The longest path from ``key``: how many lookups, and the value at its end."""
    steps, value = 0, key
    while isinstance(value, str) and value in stack:
        steps, value = steps + 1, stack[value]
        if steps > len(stack):
            raise ValueError(f"text: expected threads that end, got a cycle behind {key!r}")
    if isinstance(value, str):
        return steps, value
    further, end = max(_ends(stack, one) for one in value)
    return steps + further, end


def solve(text: str, query: str) -> str:
    """The right answer, as JSON, from what a model is given and nothing else."""
    _, wording, asked = query.split("\n")
    stack, asked = json.loads(text), json.loads(asked.rstrip(": "))
    task = next(name for name, words in WORDING.items() if words == wording)
    if task in ("single", "multiple"):
        return json.dumps([stack[k] for k in asked] if task == "multiple" else stack[asked])
    if task == "conditional":
        return json.dumps([value for key, value in stack.items() if asked in key])
    ends = [_ends(stack, k)[1] for k in ([asked] if isinstance(asked, str) else asked)]
    return json.dumps(ends if task == "multi_thread" else ends[0])


def solver(questions: Sequence[Question]) -> list[str]:
    """Answers by `solve`: 100 % on every task."""
    return [solve(q.text, q.query) for q in questions]


def written_out(answer: Answerer) -> Answerer:
    """Threads asked for hop by hop: each answer becomes the next question's key.

    For whoever can look a key up and no more. A hop that finds nothing ends the thread.
    """

    def follow(questions: Sequence[Question]) -> list[str]:
        at = [list(q.about["starts"]) for q in questions]
        for hop in range(max(q.about["hops"] for q in questions)):
            going = [
                (i, t)
                for i, q in enumerate(questions)
                for t in range(len(at[i]))
                if hop < q.about["hops"] and at[i][t]
            ]
            said = answer([_look_up(questions[i], at[i][t]) for i, t in going])
            for (i, t), one in zip(going, said):
                at[i][t] = next(iter(parse(one)), "")
        return [json.dumps(ends) for ends in at]

    return follow


def _look_up(question: Question, key: str) -> Question:
    query = f"\n{WORDING['single']}\n{json.dumps(key)}: "
    return dataclasses.replace(question, query=query, about={**question.about, "task": "single"})


def plain_ids(
    question: Question, encode: Callable[[str], list[int]], *, start: Sequence[int], ask: int
) -> tuple[list[int], list[int]]:
    """``start k v k v …`` and ``ask k``: a haystack and one of its keys without any JSON.

    What a model reads that learnt associative recall (`corelib.data.synthetic.mqar`), and so has
    never been told what a question is. Every identifier gets a blank before it.
    """
    stack, key = json.loads(question.text), json.loads(question.query.split("\n")[2].rstrip(": "))
    if not isinstance(key, str) or not all(isinstance(v, str) for v in stack.values()):
        raise ValueError("question: expected one key and plain values, got lists")
    body = [i for k, v in stack.items() for word in (k, v) for i in encode(f" {word}")]
    return [*start, *body], [ask, *encode(f" {key}")]


@dataclasses.dataclass(frozen=True)
class NeedleThreading:
    """One task of one size as a `corelib.evaluation.shared.Benchmark`.

    >>> run(NeedleThreading("thread", 25, {"hops": 4}), solver, n=50).accuracy
    1.0
    """

    task: str
    pairs: int
    options: Mapping[str, object] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.task not in TASKS:
            raise ValueError(f"task: expected one of {', '.join(TASKS)}; got {self.task!r}")

    def generate(self, n: int, seed: int) -> list[Question]:
        """``n`` questions, each on a haystack of its own."""
        rng = random.Random(seed)
        return [TASKS[self.task](self.pairs, rng, **self.options) for _ in range(n)]

    def parse(self, said: str) -> tuple[str, ...]:
        return parse(said)

    def right(self, parsed: tuple[str, ...], question: Question) -> bool:
        """Exactly the answer; only for `conditional` does the order not count."""
        if self.task == "conditional":
            return sorted(parsed) == sorted(question.answer)
        return parsed == question.answer


# ---- what the scores say


def effective_limit(
    sizes: Sequence[int], accuracy: Sequence[Sequence[float]], threshold: float = 0.75
) -> list[int]:
    """By column, the largest of the rising ``sizes`` up to which accuracy stays above threshold.

    ``accuracy``: a row per size, a column per depth, number of needles or thread length. 0 where
    it is below from the start.
    """
    if len(sizes) != len(accuracy) or list(sizes) != sorted(sizes):
        raise ValueError(
            f"sizes: expected {len(accuracy)} rising numbers (the rows of accuracy), got {sizes}"
        )
    limits = []
    for column in zip(*accuracy):
        kept = list(itertools.takewhile(lambda pair: pair[1] >= threshold, zip(sizes, column)))
        limits.append(kept[-1][0] if kept else 0)
    return limits


def tokenizer_ratio(encode: Callable[[str], Sequence[int]], text: str) -> float:
    """Characters of ``text`` per token: what one token of this tokenizer is worth here."""
    if not text:
        raise ValueError("text: expected some characters, got none")
    return len(text) / len(encode(text))


def example() -> Question:
    """Six pairs of four characters with a thread of three hops, the same every time."""
    return thread(6, random.Random(131), hops=3, draw=short_id(4))
