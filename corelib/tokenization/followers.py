"""Which ids may follow which in an encoding, for byte-pair encoding without encoding anything.

Two tokens stand side by side exactly if no merge joins parts of both. While they grow, the right
edge of the first is one of the tokens on its *right spine* (itself, its right half, the right half
of that, …) and the left edge of the second is on its *left spine*. A part is there until the merge
that swallows it, and merges happen in the order learnt, equal ones from the left. So the pair
``(r, l)`` of rank ``m`` joins them if neither is swallowed before ``m``:

    crosses(first, second) = any(m < swallowed(r) and m <= swallowed(l)  for r, l on the spines)

and a sequence within a piece is an encoding if all neighbours are. `Followers.after` adds the
boundary policy. Checked against `corelib.tokenization.shared.reachable`, which encodes.
"""

from __future__ import annotations

import functools
import math
from collections import defaultdict
from collections.abc import Sequence

import torch
from jaxtyping import Bool
from torch import Tensor

from .shared import Boundary, Tokenizer, boundary_of, decode_bytes, reachable


def spine(merges: Sequence[Sequence[int]], v: int, side: int) -> list[tuple[int, float]]:
    """The parts at the left (``side=0``) or right (1) edge of id ``v``, each with the rank of the
    merge that swallows it: ``v`` itself never."""
    parts, swallowed = [], math.inf
    while True:
        parts.append((v, swallowed))
        if v < 256:
            return parts
        swallowed = v - 256
        v = merges[swallowed][side]


class Followers:
    """``after(tail)``: which ids may come behind the ids ``tail`` (of a text, or since a cut).

    Tokenizers with ``merges`` (ids ``256 + rank``) take the fast way; others, and places where the
    last cut is still open, are encoded with every id once and remembered.
    """

    def __init__(self, tokenizer: Tokenizer, boundary: Boundary | None = None):
        self.tokenizer, self.boundary = tokenizer, boundary_of(tokenizer, boundary)
        self.words = words = tokenizer.bytes
        self.merges = getattr(tokenizer, "merges", None)
        self.alone = self._encoded(())
        self.first = torch.tensor([word[0] if word else 0 for word in words])
        self.partners: dict[int, list[tuple[int, int]]] = defaultdict(list)  # r -> (l, rank)
        self.holders: dict[int, list[tuple[int, float]]] = defaultdict(list)  # l -> (v, swallowed)
        for rank, (r, l) in enumerate(self.merges or ()):
            self.partners[int(r)].append((int(l), rank))
        for v in range(256 + len(self.merges) if self.merges is not None else 0):
            for l, swallowed in spine(self.merges, v, 0):
                self.holders[l].append((v, swallowed))
        self._slow = functools.lru_cache(maxsize=4096)(self._encoded)
        self._crossing = functools.lru_cache(maxsize=4096)(self._crosses)
        self._joined = functools.lru_cache(maxsize=256)(self._joins)

    def after(self, tail: tuple[int, ...]) -> Bool[Tensor, " vocab"]:
        """True for every id that some encoding has behind ``tail``; special ids never are."""
        if not tail:
            return self.alone
        last = self.words[tail[-1]]
        if self.merges is None or self.boundary.continuations(last):
            return self._slow(self._since_cut(tail))
        return self.alone & ~(self._joined(last[-1]) & self._crossing(tail[-1]))

    def _since_cut(self, tail: tuple[int, ...]) -> tuple[int, ...]:
        """What is left of ``tail`` behind the last safe cut: nothing before matters."""
        left, n = self.boundary.safe_cut(decode_bytes(self.tokenizer, tail)), 0
        while left > 0:
            left -= len(self.words[tail[n]])
            n += 1
        return tail[n:]

    def _encoded(self, tail: tuple[int, ...]) -> Tensor:
        every = enumerate(self.words)
        fits = [bool(w) and reachable(self.tokenizer, (*tail, v), self.boundary) for v, w in every]
        return torch.tensor(fits)

    def _crosses(self, a: int) -> Tensor:
        """The ids that a merge joins with ``a`` when no cut is between them."""
        crossing = torch.zeros(len(self.words), dtype=torch.bool)
        hit = [
            v
            for r, swallowed in spine(self.merges, a, 1)
            for l, rank in self.partners.get(r, ())
            if rank < swallowed
            for v, until in self.holders[l]
            if rank <= until
        ]
        crossing[hit] = True
        return crossing

    def _joins(self, last: int) -> Tensor:
        """The ids that go on with the piece that ends in this byte."""
        pairs = (bytes([last, byte]) for byte in range(256))
        return torch.tensor([len(self.boundary.split(pair)) == 1 for pair in pairs])[self.first]

    def may_end(self, tail: tuple[int, ...]) -> bool:
        """Whether a text may end behind ``tail``: it is the whole encoding."""
        tail = self._since_cut(tail)
        return self.tokenizer.encode(decode_bytes(self.tokenizer, tail)) == list(tail)
