"""The haystacks and questions of needle threading (`needle_threading` says what they are)."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import random
from collections.abc import Callable, Iterator, Sequence
from uuid import UUID

from .shared import Question

Draw = Callable[[random.Random], str]
Value = str | list[str]

WORDING = {
    "single": "The value of this key is wanted.",
    "multiple": "The values of these keys are wanted, as a list.",
    "conditional": "The values of all keys that contain this are wanted, as a list.",
    "thread": "A value may itself be a key. Where does the thread from this key end?",
    "multi_thread": "A value may itself be a key. Where do the threads from these keys end?",
    "branched": "Values may list several keys. Where does the longest path from this key end?",
}
DIRECTIONS = ("forward", "backward", "random")
PAIR_CHARACTERS = 80


# ---- identifiers


def uuid(rng: random.Random) -> str:
    """36 characters, 128 random bits."""
    return str(UUID(int=rng.getrandbits(128)))


def short_id(length: int, alphabet: str = "0123456789abcdef") -> Draw:
    """Draws ``length`` characters of ``alphabet``."""
    return lambda rng: "".join(rng.choice(alphabet) for _ in range(length))


def word_of(words: Sequence[str]) -> Draw:
    """Draws one of ``words``."""
    return lambda rng: rng.choice(words)


def _fresh(draw: Draw, rng: random.Random) -> Iterator[str]:
    """Identifiers that have not come before: no two keys are equal, no value is a key by chance."""
    seen: set[str] = set()
    while True:
        for _ in range(1000):
            if (one := draw(rng)) not in seen:
                break
        else:
            raise ValueError(f"draw: found no more than {len(seen)} different identifiers")
        seen.add(one)
        yield one


def haystack(pairs: int, rng: random.Random, draw: Draw = uuid) -> list[list[str]]:
    """``[key, value]``, all different."""
    if pairs < 1:
        raise ValueError(f"pairs: expected at least 1, got {pairs}")
    drawn = _fresh(draw, rng)
    return [[next(drawn), next(drawn)] for _ in range(pairs)]


def pairs_for(characters: int) -> int:
    """How many pairs of UUIDs a haystack of so many characters holds."""
    if characters < PAIR_CHARACTERS:
        raise ValueError(f"characters: expected at least {PAIR_CHARACTERS}, got {characters}")
    return characters // PAIR_CHARACTERS


def _ask(task: str, pairs: Sequence[Sequence[Value]], asked: Value, answer, chance, **about):
    flat = [v for _, value in pairs for v in ([value] if isinstance(value, str) else value)]
    return Question(
        text=json.dumps(dict(pairs)),
        query=f"\n{WORDING[task]}\n{json.dumps(asked)}: ",
        answer=tuple(answer),
        chance=chance,
        choices=tuple(flat),
        about={"task": task, "pairs": len(pairs), **about},
    )


def _places(n: int, pairs: int, clustered: bool, rng: random.Random) -> list[int]:
    """``n`` different positions, in order; side by side when ``clustered``."""
    if not 1 <= n <= pairs:
        raise ValueError(f"needles: expected 1 to {pairs} (the pairs), got {n}")
    if clustered:
        first = rng.randint(0, pairs - n)
        return list(range(first, first + n))
    return sorted(rng.sample(range(pairs), n))


# ---- the tasks


def single(
    pairs: int, rng: random.Random, *, depth: float | None = None, draw: Draw = uuid
) -> Question:
    """One needle at ``depth``: 0 is the first pair, 1 the last; drawn when None."""
    if depth is not None and not 0 <= depth <= 1:
        raise ValueError(f"depth: expected 0 to 1, got {depth}")
    stack = haystack(pairs, rng, draw)
    at = rng.randrange(pairs) if depth is None else round(depth * (pairs - 1))
    return _ask("single", stack, stack[at][0], [stack[at][1]], 1 / pairs, depth=depth)


def multiple(
    pairs: int, rng: random.Random, *, needles: int, clustered: bool = False, draw: Draw = uuid
) -> Question:
    """Several needles, asked for in a random order."""
    stack = haystack(pairs, rng, draw)
    at = _places(needles, pairs, clustered, rng)
    rng.shuffle(at)
    keys, values = zip(*(stack[i] for i in at))
    chance = 1 / math.perm(pairs, needles)
    return _ask("multiple", stack, list(keys), values, chance, needles=needles, clustered=clustered)


def conditional(
    pairs: int,
    rng: random.Random,
    *,
    needles: int,
    clustered: bool = False,
    mark: str = "*",
    draw: Draw = uuid,
) -> Question:
    """Needles are known by ``mark`` only, which replaces one character of their keys."""
    stack = haystack(pairs, rng, draw)
    if any(mark in key for key, _ in stack):
        raise ValueError(f"mark: expected what no identifier contains, got {mark!r}")
    at = _places(needles, pairs, clustered, rng)
    for i in at:
        stack[i][0] = _marked(stack[i][0], mark, {key for key, _ in stack}, rng)
    chance = 1 / math.comb(pairs, needles)
    values = [stack[i][1] for i in at]
    return _ask("conditional", stack, mark, values, chance, needles=needles, clustered=clustered)


def _marked(key: str, mark: str, taken: set[str], rng: random.Random) -> str:
    """``key`` with ``mark`` for one of its characters, and still unlike all others."""
    ways = [key[:i] + mark + key[i + 1 :] for i in range(len(key))]
    ways = [way for way in ways if way not in taken]
    if not ways:
        raise ValueError(f"draw: identifiers are too short to stay different with {mark!r} in them")
    return rng.choice(ways)


def every_needle(pairs: int, rng: random.Random, draw: Draw = uuid) -> list[Question]:
    """`single` for each pair of one haystack, from the first: all depths for one reading."""
    stack = haystack(pairs, rng, draw)
    depths = [i / max(pairs - 1, 1) for i in range(pairs)]
    return [_ask("single", stack, k, [v], 1 / pairs, depth=d) for (k, v), d in zip(stack, depths)]


def thread(
    pairs: int,
    rng: random.Random,
    *,
    hops: int,
    direction: str = "forward",
    draw: Draw = uuid,
) -> Question:
    """One start; ``hops=1`` is a single needle."""
    found = multi_thread(pairs, rng, threads=1, hops=hops, direction=direction, draw=draw)
    (start,) = found.about["starts"]
    query = f"\n{WORDING['thread']}\n{json.dumps(start)}: "
    return dataclasses.replace(found, query=query, about={**found.about, "task": "thread"})


def multi_thread(
    pairs: int,
    rng: random.Random,
    *,
    threads: int,
    hops: int,
    direction: str = "forward",
    draw: Draw = uuid,
) -> Question:
    """``threads`` chains of ``hops`` pairs each, at random places of one haystack."""
    if direction not in DIRECTIONS:
        raise ValueError(f"direction: expected one of {DIRECTIONS}, got {direction!r}")
    if hops < 1 or threads < 1 or threads * hops > pairs:
        raise ValueError(
            f"threads, hops: expected at least 1 and threads * hops <= pairs ({pairs}), "
            f"got {threads} and {hops}"
        )
    stack = haystack(pairs, rng, draw)
    places = rng.sample(range(pairs), threads * hops)
    starts, ends, paths = [], [], []
    for t in range(threads):
        path = places[t * hops : (t + 1) * hops]
        if direction != "random":
            path = sorted(path, reverse=direction == "backward")
        for here, following in itertools.pairwise(path):
            stack[here][1] = stack[following][0]
        starts, ends = [*starts, stack[path[0]][0]], [*ends, stack[path[-1]][1]]
        paths.append(path)
    about = {"threads": threads, "hops": hops, "direction": direction}
    about |= {"paths": paths, "starts": starts}
    return _ask("multi_thread", stack, starts, ends, 1 / math.perm(pairs, threads), **about)


def branched(
    pairs: int, rng: random.Random, *, hops: int, branches: int = 2, draw: Draw = uuid
) -> Question:
    """Values list ``branches`` keys, of which one goes on; the others end one pair further.

    The last but one value lists a single key, so that no other path is as long.
    """
    needed = hops + (branches - 1) * max(hops - 2, 0)
    if hops < 1 or branches < 1 or needed > pairs:
        raise ValueError(
            f"hops, branches: expected at least 1 and {needed} pairs or more, "
            f"got {hops}, {branches} and {pairs} pairs"
        )
    stack = haystack(pairs, rng, draw)
    places = rng.sample(range(pairs), needed)
    path, ends = places[:hops], iter(places[hops:])
    for step, (here, following) in enumerate(itertools.pairwise(path)):
        dead = [next(ends) for _ in range(branches - 1)] if step < hops - 2 else []
        keys = [stack[i][0] for i in [following, *dead]]
        rng.shuffle(keys)
        stack[here][1] = keys
    answer, start = stack[path[-1]][1], stack[path[0]][0]
    choices = sum(len(v) if isinstance(v, list) else 1 for _, v in stack)
    about = {"hops": hops, "branches": branches, "paths": [path]}
    return _ask("branched", stack, start, [answer], 1 / choices, **about)


TASKS = {f.__name__: f for f in (single, multiple, conditional, thread, multi_thread, branched)}
