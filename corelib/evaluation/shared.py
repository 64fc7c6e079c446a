"""What benchmarks share: questions, the `Benchmark` protocol, ways to answer, a world of facts.

A benchmark draws questions from a seed, reads an answer out of what was said, and judges it. How
likely a guess is right stands on every question, so that each score carries its own floor:

    score = run(benchmark, answer, n=200)      # a `corelib.measure.score.Score`
    print(score)                               # accuracy, 95 % interval, chance

Whatever maps questions to strings can answer: an exact solver, `guesser`, `copying`, or a language
model through `language_model`, which takes any model that keeps `corelib.contracts.LanguageModel`.

`FactWorld` and `pack` make long documents whose facts, and their places, are known.
"""

from __future__ import annotations

import dataclasses
import json
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from ..measure.score import Score

__all__ = [
    "Answerer",
    "Benchmark",
    "Document",
    "FactWorld",
    "Question",
    "copying",
    "guesser",
    "language_model",
    "pack",
    "run",
]


@dataclasses.dataclass(frozen=True)
class Question:
    """Read ``text``, then ``query``; say ``answer``.

    Attributes:
        answer: one string, or several in order (for some tasks the order does not count).
        chance: the probability that somebody who knows the form, but reads nothing, is right.
        choices: what such a guesser picks from.
        about: what it was made with (task, depth, …), to sort scores by.
    """

    text: str
    query: str
    answer: tuple[str, ...]
    chance: float
    choices: tuple[str, ...] = ()
    about: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@runtime_checkable
class Benchmark(Protocol):
    """Questions from a seed, and what counts as right."""

    def generate(self, n: int, seed: int) -> list[Question]: ...

    def parse(self, said: str) -> tuple[str, ...]:
        """The answer in what was said; empty when there is none."""
        ...

    def right(self, parsed: tuple[str, ...], question: Question) -> bool: ...


Answerer = Callable[[Sequence[Question]], Sequence[str]]


def run(benchmark: Benchmark, answer: Answerer, *, n: int = 100, seed: int = 0) -> Score:
    """Ask ``n`` questions; chance is the mean of theirs."""
    if n < 1:
        raise ValueError(f"n: expected at least 1 question, got {n}")
    questions = benchmark.generate(n, seed)
    said = answer(questions)
    if len(said) != n:
        raise ValueError(f"answer: expected {n} answers, got {len(said)}")
    right = sum(benchmark.right(benchmark.parse(s), q) for s, q in zip(said, questions))
    return Score(right, n, sum(q.chance for q in questions) / n)


# ---- ways to answer


def guesser(seed: int = 0) -> Answerer:
    """Says as many of a question's choices as are asked for, at random, without reading."""

    def answer(questions: Sequence[Question]) -> list[str]:
        rng = random.Random(f"guess {seed}")  # a stream that no benchmark draws from
        drawn = [rng.sample(q.choices, len(q.answer)) for q in questions]
        return [json.dumps(one if len(one) > 1 else one[0]) for one in drawn]

    return answer


def copying(least: int = 6, characters: int = 80) -> Answerer:
    """Says what followed the last time that the end of the question was in the text.

    The longest such end counts, of at least ``least`` characters; with none it says nothing. No
    model: this is what a perfect repetition of what has been seen is worth.
    """

    def one(question: Question) -> str:
        for start in range(len(question.query) - least + 1):
            end = question.query[start:]
            place = question.text.rfind(end)
            if place >= 0:
                first = place + len(end)
                return question.text[first : first + characters]
        return ""

    return lambda questions: [one(q) for q in questions]


def language_model(
    model: Callable[..., Tensor],
    encode: Callable[[Question], tuple[list[int], list[int]]],
    decode: Callable[[list[int]], str],
    *,
    new_cache: Callable[[], Any],
    tokens: int,
    rows: int = 16,
) -> Answerer:
    """Greedy answers of ``tokens`` tokens from any `corelib.contracts.LanguageModel`.

    ``encode(question)``: the ids of the text and those of the query, in whatever form the model can
    read. A text is read once, ``rows`` texts of one length at a time, however many questions there
    are on it.
    """
    if tokens < 1 or rows < 1:
        raise ValueError(f"tokens, rows: expected at least 1, got {tokens} and {rows}")

    @torch.no_grad()
    def answer(questions: Sequence[Question]) -> list[str]:
        prompts = [tuple(map(tuple, encode(q))) for q in questions]
        said = [""] * len(prompts)
        for numbers, texts in _alike(prompts, rows):
            cache = new_cache()
            model(torch.tensor(texts), cache)
            cache.gather_rows(torch.tensor([texts.index(prompts[i][0]) for i in numbers]))
            ids = _greedy(model, torch.tensor([prompts[i][1] for i in numbers]), cache, tokens)
            for i, one in zip(numbers, ids):
                said[i] = decode(one)
        return said

    return answer


def _alike(prompts: list[tuple], rows: int) -> Iterator[tuple[list[int], list[tuple]]]:
    """Prompts whose two parts are of equal lengths, at most ``rows`` texts together."""
    by_lengths: dict[tuple[int, int], dict[tuple, list[int]]] = {}
    for i, (text, query) in enumerate(prompts):
        by_lengths.setdefault((len(text), len(query)), {}).setdefault(text, []).append(i)
    for group in by_lengths.values():
        texts = list(group)
        for first in range(0, len(texts), rows):
            chunk = texts[first : first + rows]
            yield [i for text in chunk for i in group[text]], chunk


@torch.no_grad()
def _greedy(model, ids: Tensor, cache: Any, tokens: int) -> list[list[int]]:
    said = []
    for _ in range(tokens):
        ids = model(ids, cache)[:, -1].argmax(-1)[:, None]
        said.append(ids)
    return torch.cat(said, 1).tolist()


# ---- facts in a long document


@dataclasses.dataclass(frozen=True)
class FactWorld:
    """``relations``: what can be said, with ``{subject}`` and ``{value}`` in it, one of each.

    `facts` draws, for every subject and relation, one value: a fact is looked up unambiguously.
    """

    subjects: tuple[str, ...]
    relations: Mapping[str, str]
    draw: Callable[[random.Random], str]

    def facts(self, seed: int) -> dict[tuple[str, str], str]:
        """(subject, relation) -> value, in a random order."""
        rng = random.Random(seed)
        keys = [(s, r) for s in self.subjects for r in self.relations]
        rng.shuffle(keys)
        return {key: self.draw(rng) for key in keys}

    def sentence(self, subject: str, relation: str, value: str) -> str:
        return self.relations[relation].format(subject=subject, value=value)

    def look_up(self, text: str, subject: str, relation: str) -> str:
        """What ``text`` says, found by reading it; empty when it does not say."""
        before, _, after = self.relations[relation].partition("{value}")
        _, found, rest = text.partition(before.format(subject=subject))
        stop = rest.find(after) if after else len(rest)
        return rest[:stop] if found and stop >= 0 else ""


@dataclasses.dataclass(frozen=True)
class Document:
    """``text``, and where in it each inserted sentence stands: ``text[first:stop]``."""

    text: str
    spans: tuple[tuple[int, int], ...]


def pack(
    sentences: Sequence[str],
    filler: str,
    characters: int,
    *,
    rng: random.Random,
    depths: Sequence[float] | None = None,
) -> Document:
    """``sentences``, in order, within so much of ``filler`` that there are ``characters`` in all.

    ``filler`` is cut at a random place; sentences go in at ``depths`` from 0 to 1 (rising; drawn
    when None), always between two words.
    """
    room = characters - sum(map(len, sentences))
    if not 0 <= room <= len(filler):
        raise ValueError(
            f"characters: the sentences and the filler allow {characters - room} to "
            f"{characters - room + len(filler)}, got {characters}"
        )
    depths = sorted(rng.random() for _ in sentences) if depths is None else list(depths)
    if len(depths) != len(sentences) or any(not 0 <= d <= 1 for d in depths):
        raise ValueError(f"depths: expected {len(sentences)} from 0 to 1, got {depths}")
    start = rng.randint(0, len(filler) - room)
    filler = filler[start : start + room]
    text, spans, done = "", [], 0
    for sentence, depth in zip(sentences, depths):
        cut = max(done, filler.rfind(" ", 0, round(depth * room) + 1) + 1)
        text += filler[done:cut]
        spans.append((len(text), len(text) + len(sentence)))
        text, done = text + sentence, cut
    return Document(text + filler[done:], tuple(spans))
