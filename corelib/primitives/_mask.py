"""What a mask is, how masks combine and how they render; the public face is ``masks``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int8
from torch import Tensor

EMPTY, PARTIAL, FULL = 0, 1, 2
UNKNOWN = -1

Index = int | Tensor
Predicate = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
Corners = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Mask:
    """A predicate with a name, and what is known about its blocks.

    predicate: ``(b, h, i, j) -> bool``, elementwise.
    corners: ``(first i, last i, first j, last j) -> block states`` (inclusive ends), or None where
        nothing is known without looking.
    batch, heads: how many batch rows and heads the predicate tells apart; 1 where they do not
        matter.
    """

    predicate: Predicate
    name: str = "mask"
    corners: Corners | None = None
    batch: int = 1
    heads: int = 1

    def __call__(self, b: Index, h: Index, i: Index, j: Index) -> Tensor:
        return self.predicate(*(torch.as_tensor(x) for x in (b, h, i, j)))

    def __repr__(self) -> str:
        return self.name

    def __and__(self, other: Mask) -> Mask:
        return _combine(self, other, "&", lambda a, b: a & b, _both)

    def __or__(self, other: Mask) -> Mask:
        def either(a: Tensor, b: Tensor) -> Tensor:
            return _opposite(_both(_opposite(a), _opposite(b)))

        return _combine(self, other, "|", lambda a, b: a | b, either)

    def __invert__(self) -> Mask:
        return Mask(
            lambda *at: ~self(*at),
            f"~{self.name}",
            lambda *corners: _opposite(self.block_states(*corners)),
            self.batch,
            self.heads,
        )

    def dense(
        self, L: int, S: int | None = None, *, device: torch.device | str | None = None
    ) -> Bool[Tensor, "*batch_heads L S"]:
        """``(L, S)``, or ``(batch, heads, L, S)`` for a mask that tells rows or heads apart."""
        S = L if S is None else S
        rows = torch.arange(L, device=device) + S - L
        visible = self._render(rows, torch.arange(S, device=device))
        return visible if self.batch * self.heads > 1 else visible[0, 0]

    def blocks(
        self, L: int, S: int | None = None, *, block: int
    ) -> Int8[Tensor, "*batch_heads query_blocks key_blocks"]:
        """`EMPTY`, `PARTIAL` or `FULL` per block of ``block`` queries and ``block`` keys.

        The last blocks may be smaller; their state is about the positions that exist.
        """
        if block < 1:
            raise ValueError(f"block: expected at least 1, got {block}")
        S = L if S is None else S
        i, j = torch.arange(0, L, block), torch.arange(0, S, block)
        i_last, j_last = (i + block - 1).clamp(max=L - 1), (j + block - 1).clamp(max=S - 1)
        offset = S - L
        states = self.block_states((i + offset)[:, None], (i_last + offset)[:, None], j, j_last)
        states = states.expand(self.batch, self.heads, len(i), len(j)).clone()
        for strip in (states == UNKNOWN).any(dim=3).any(dim=1).any(dim=0).nonzero().flatten():
            rows = torch.arange(i[strip], i_last[strip] + 1) + offset
            seen = _strip_states(self._render(rows, torch.arange(S)), block)
            known = states[:, :, strip]
            states[:, :, strip] = torch.where(known == UNKNOWN, seen, known)
        return states if self.batch * self.heads > 1 else states[0, 0]

    def _render(self, i: Tensor, j: Tensor) -> Tensor:
        b = torch.arange(self.batch, device=i.device)[:, None, None, None]
        h = torch.arange(self.heads, device=i.device)[:, None, None]
        return self(b, h, i[:, None], j[None, :]).expand(self.batch, self.heads, len(i), len(j))

    def block_states(self, i: Tensor, i_last: Tensor, j: Tensor, j_last: Tensor) -> Tensor:
        if self.corners is None:
            return torch.full_like(i + j, UNKNOWN, dtype=torch.int8)
        return self.corners(i, i_last, j, j_last)


def state_of(some: Tensor, every: Tensor) -> Tensor:
    return some.to(torch.int8) + (some & every).to(torch.int8)


def _opposite(state: Tensor) -> Tensor:
    return torch.where(state == UNKNOWN, state, FULL - state)


def _both(a: Tensor, b: Tensor) -> Tensor:
    """State of ``&``: two partial blocks may have anything in common."""
    state = torch.where(a == FULL, b, torch.where(b == FULL, a, UNKNOWN))
    return state.masked_fill((a == EMPTY) | (b == EMPTY), EMPTY).to(torch.int8)


def _combine(a: Mask, b: Mask, symbol: str, on_bools: Callable, on_states: Callable) -> Mask:
    if not isinstance(b, Mask):
        return NotImplemented
    for axis, left, right in (("batch", a.batch, b.batch), ("heads", a.heads, b.heads)):
        if left != right and 1 not in (left, right):
            raise ValueError(f"{a} {symbol} {b}: expected one size of {axis}, {left} or {right}")
    return Mask(
        lambda *at: on_bools(a(*at), b(*at)),
        f"({a.name} {symbol} {b.name})",
        lambda *corners: on_states(a.block_states(*corners), b.block_states(*corners)),
        max(a.batch, b.batch),
        max(a.heads, b.heads),
    )


def _strip_states(visible: Tensor, block: int) -> Tensor:
    """``(batch, heads, rows, S) -> (batch, heads, key blocks)``."""
    pieces = visible.split(block, dim=3)
    some = torch.stack([piece.any(dim=3).any(dim=2) for piece in pieces], dim=2)
    every = torch.stack([piece.all(dim=3).all(dim=2) for piece in pieces], dim=2)
    return state_of(some, every)
