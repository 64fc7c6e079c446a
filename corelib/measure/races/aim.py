"""AIM against FastV, pooling and chance on the tiny VLM: answers, FLOPs, bytes, and the clock.

All of them answer the same questions about canvases that the model never saw. FLOPs and bytes are
counted from the numbers of tokens that entered each layer (`corelib.vision_language.accounting`),
scores of importance included; times are CPU times of one prefill of a batch. The methods answer
differently, so that nothing is compared before the clock starts but what the rows say.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...data import digit_canvas as canvas
from ...models import zoo
from ...models.cache import DenseCache
from ...vision_language.accounting import kv_bytes, prefill_flops, score_flops
from ...vision_language.aim import aim_prefill
from ...vision_language.shared import (
    Prefilled,
    Prompt,
    answer,
    fastv,
    make_prompt,
    pool,
    prefill,
    thin,
)
from ..race import race
from . import Row, register, rows

#: A way to read: from a model and a prompt to what decoding goes on with.
Reader = Callable[[Any, Prompt], Prefilled]


class Way(NamedTuple):
    """A reader, and how many rows of the attention map it adds up where it prunes (None: all)."""

    read: Reader
    scored: int | None = 0


def unpruned() -> Way:
    return Way(lambda model, prompt: prefill(model, prompt, DenseCache()))


def by_aim(ratio: float, l1: int, l2: int, most: float = 0.5) -> Way:
    options = dict(ratio=ratio, l1=l1, l2=l2, most=most)
    return Way(lambda model, prompt: aim_prefill(model, prompt, DenseCache(), **options), None)


def by_fastv(ratio: float, after: int = 1) -> Way:
    prune = fastv(ratio, after=after)
    return Way(lambda model, prompt: prefill(model, prompt, DenseCache(), prune), 1)


def by_pooling(side: int) -> Way:
    def read(model: Any, prompt: Prompt) -> Prefilled:
        return prefill(model, pool(prompt, model.config.columns, side), DenseCache())

    return Way(read)


def by_chance(ratio: float) -> Way:
    return Way(lambda model, prompt: prefill(model, thin(prompt, ratio), DenseCache()))


#: Name -> ways from light to heavy. Six layers; most is read in the third.
CONTESTANTS: dict[str, list[Way]] = {
    "AIM, passes of a quarter": [by_aim(r, 2, 4, 0.25) for r in (0.04, 0.08, 0.15, 0.3, 0.6)],
    "AIM, passes of half": [by_aim(r, 2, 4) for r in (0.08, 0.15, 0.3, 0.6)],
    "FastV, 2 layers": [by_fastv(r) for r in (0.0, 0.1, 0.5)],
    "FastV, 3 layers": [by_fastv(r, after=2) for r in (0.0, 0.25)],
    "pooling": [by_pooling(side) for side in (4, 3, 2)],
    "chance": [by_chance(r) for r in (0.08, 0.25, 0.6)],
}


#: What the model has learnt: of an answer to "where" it knows the row only.
KINDS = ("read", "count", "exists", "largest", "smallest")


class Scored(NamedTuple):
    """``right``: share of answers; ``flops``, ``kv``: shares of what reading everything costs."""

    right: float
    flops: float
    kv: float
    counts: list[int]
    hits: Tensor


class Exam(NamedTuple):
    """Prompts, one per question, with their answers; ``kinds`` and ``evidence`` likewise."""

    prompt: Prompt
    answers: Tensor
    kinds: list[str]
    evidence: Tensor
    images: Tensor


@torch.no_grad()
def exam(model: Any, canvases: int, each: int, *, split: str = "test", seed: int = 100) -> Exam:
    """``each`` questions about every one of ``canvases`` images that the model never saw."""
    generator = torch.Generator().manual_seed(seed)
    c = model.config
    drawn = canvas.digit_canvas(canvases, generator, split=split, rows=c.rows, columns=c.columns)
    asked = canvas.ask(drawn.labels, each, generator, KINDS)
    ids = asked.ids.flatten(0, 1)
    start = model.embed(torch.full((len(ids), 1), canvas.START))
    vision = model.see(drawn.images).repeat_interleave(each, 0)
    prompt = make_prompt(start, vision, model.embed(ids))
    kinds = [kind for row in asked.kinds for kind in row]
    images = drawn.images.repeat_interleave(each, 0)
    return Exam(prompt, asked.answers.flatten(0, 1), kinds, asked.evidence.flatten(0, 1), images)


def cost(found: Prefilled, model: Any, text: int, scored: int | None) -> tuple[float, float]:
    """FLOPs and bytes of keys and values, as shares of those of the unpruned prefill."""
    sizes, counts = model.config, found.counts
    flops = prefill_flops(counts, text, sizes)
    for now, then in zip(counts, counts[1:]):
        if then < now and then > 0 and scored != 0:
            flops += score_flops(now + text, sizes, scored)
    whole = [sizes.rows * sizes.columns] * len(counts)
    bytes_held = kv_bytes(counts, text, sizes) / kv_bytes(whole, text, sizes)
    return flops / prefill_flops(whole, text, sizes), bytes_held


def score(model: Any, asked: Exam, way: Way) -> Scored:
    """Read and answer every question of ``asked``; an answer is right when all its words are."""
    found = way.read(model, asked.prompt)
    said = answer(model, found, asked.answers.shape[1])
    hits = ((said == asked.answers) | (asked.answers == canvas.FILL)).all(1)
    flops, kv = cost(found, model, asked.prompt.text, way.scored)
    return Scored(float(hits.float().mean()), flops, kv, found.counts, hits)


@functools.cache
def tiny_vlm() -> Any:
    return zoo.load("tiny_vlm")


@register("aim", "answers of the tiny VLM by share of FLOPs, with the time of a prefill")
def aim(quick: bool) -> Iterator[Row]:
    model = tiny_vlm()
    asked = exam(model, *((4, 4) if quick else (48, 6)))
    few = exam(model, 8, 2)
    ways = {"corelib: all tokens": [unpruned()]} | CONTESTANTS
    picked = {name: row[-1:] if quick else row for name, row in ways.items()}
    flat = {f"{name} {n}": way for name, row in picked.items() for n, way in enumerate(row)}
    scores = {name: score(model, asked, way) for name, way in flat.items()}
    result = race(
        {name: lambda way=way: way.read(model, few.prompt).logits for name, way in flat.items()},
        check=None,
        min_time=0.01 if quick else 0.2,
        ratio_to="corelib: all tokens 0",
    )
    for row in rows(result, what="prefill", corelib="corelib: all tokens 0"):
        s = scores[row.contestant]
        told = f"right {s.right:.0%}, FLOPs {s.flops:.0%}, KV {s.kv:.0%}"
        yield Row(row.what, told, row.contestant, row.seconds, row.ratio)
