"""Cutting a visibility pattern into parts that a blocked CPU kernel can run.

PyTorch's CPU flash kernel knows two patterns: every query sees every key, and a triangle aligned
at the top left. Everything that `attention` promises (queries aligned with the last keys, windows
on one or both sides, sinks, empty rows) is a union of those, mirrored triangles and bands. A group
is a range of rows and the parts whose disjoint key ranges make up what these rows see.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

SMALL_MASK = 1 << 18  # numbers in a mask that costs less than merging two parts


class Part(NamedTuple):
    """Keys ``start:stop`` as seen by the rows of its group.

    pattern: ``full`` (all), ``causal`` (row i of the group sees the first i + 1 keys),
    ``anticausal`` (all but the first i keys), ``band`` (keys i to i + stop - start - rows) or
    ``shifted`` (the first keys up to i + stop - start - rows).
    """

    pattern: str
    start: int
    stop: int


class Group(NamedTuple):
    """Rows ``start:stop`` (query indices) and the parts that they see."""

    start: int
    stop: int
    parts: tuple[Part, ...]


@lru_cache(maxsize=1024)
def plan(L: int, S: int, *, causal: bool, window: int | None, sinks: int) -> tuple[Group, ...]:
    """The groups, in the order of their rows; rows in no group see nothing.

    In positions ``p = i + S - L``, a row sees ``[p - left, p + right]`` and the first ``n`` keys
    (causal: those up to ``p``). Going down the rows: before ``first`` they see nothing or only
    sinks; up to ``grown`` all keys up to a right end; from there a window, and from ``edge`` on
    the window is cut off by the last key.
    """
    if S == 0 or L == 0:
        return ()
    offset = S - L
    left = L + S if window is None else min(window - 1, L + S)
    right = 0 if causal else left
    n = 0 if window is None else min(sinks, S)
    ahead = 0 if causal else n  # sinks that a row sees although they lie beyond its window

    def clamp(p: int) -> int:
        return min(max(p, offset), S)

    first = clamp(ahead - right)
    grown = max(first, clamp(left + n + 1))
    edge = max(first, clamp(S - right))
    middle, last = min(grown, edge), max(grown, edge)

    groups = []
    if ahead:
        groups.append((offset, first, [Part("full", 0, ahead)]))
    groups.append((first, middle, _prefix(first, middle, right)))
    sink = [Part("full", 0, n)] if n else []
    if edge < grown:
        groups.append((middle, last, [Part("full", 0, S)]))
    else:
        groups.append((middle, last, sink + [Part("band", middle - left, last + right)]))
    groups.append((last, S, sink + _suffix(last, S, left)))
    return tuple(
        Group(a - offset, b - offset, tuple(p for p in parts if p.start < p.stop))
        for a, b, parts in groups
        if a < b
    )


def _prefix(a: int, b: int, right: int) -> list[Part]:
    """Rows at positions a to b see all keys up to their own right end."""
    if b - a == 1:
        return [Part("full", 0, b + right)]
    if a + right > 0 and (b - a) * (b + right) <= SMALL_MASK:
        return [Part("shifted", 0, b + right)]
    return [Part("full", 0, a + right), Part("causal", a + right, b + right)]


def _suffix(a: int, S: int, left: int) -> list[Part]:
    """Rows at positions a to S see all keys from their own left end on."""
    if S - a == 1:
        return [Part("full", a - left, S)]
    return [Part("anticausal", a - left, S - left), Part("full", S - left, S)]
