"""Masks as predicates: which key a query may see, without an ``L x S`` matrix.

A `Mask` answers ``mask(b, h, i, j) -> bool`` for batch row ``b``, query head ``h``, query position
``i`` and key position ``j``, each an int or an integer tensor (they broadcast). Masks combine with
``&``, ``|`` and ``~`` and render in two ways:

* ``mask.dense(L, S)``: the boolean matrix, for small sizes, references and pictures;
* ``mask.blocks(L, S, block)``: a state per block, `EMPTY` (skip it), `FULL` (no masking needed) or
  `PARTIAL`. Structured masks know this by arithmetic on the block's corners; only blocks that a
  combination leaves undecided are looked at element by element, a strip of rows at a time.

The signature is the one of ``mask_mod`` in ``torch.nn.attention.flex_attention``, so that a mask
can be given to ``create_block_mask`` as it is (for ``L == S``). In the renderings queries align
with the last keys: row ``r`` has position ``i = r + S - L``.

>>> longformer = sliding_window(3) | global_tokens([0])
>>> longformer.blocks(8, 8, block=4)
tensor([[1, 1],
        [1, 1]], dtype=torch.int8)
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce

import torch
import torch.nn.functional as F
from jaxtyping import Int
from torch import Tensor

from ._mask import EMPTY, FULL, PARTIAL, UNKNOWN, Mask, state_of

__all__ = [
    "EMPTY",
    "FULL",
    "PARTIAL",
    "Mask",
    "attention_mask",
    "block_causal",
    "causal",
    "document",
    "global_tokens",
    "per_head",
    "prefix",
    "sinks",
    "sliding_window",
    "strided",
]


def attention_mask(*, causal: bool, window: int | None = None, sinks: int = 0) -> Mask:
    """The mask of `attention` with these options."""
    _at_least("sinks", sinks, 0)
    past = _band(torch.inf, 0 if causal else torch.inf, "causal" if causal else "all")
    return past if window is None else past & (sliding_window(window) | _first_keys(sinks))


def causal() -> Mask:
    """Keys at or before the query."""
    return _band(torch.inf, 0, "causal")


def sliding_window(window: int) -> Mask:
    """Keys with ``|i - j| < window``; ``causal() & sliding_window(w)`` looks back only."""
    _at_least("window", window, 1)
    return _band(window - 1, window - 1, f"sliding_window({window})")


def sinks(n: int) -> Mask:
    """The first ``n`` keys, from everywhere: attention sinks (StreamingLLM, arXiv 2309.17453)."""
    return _first_keys(n)


def prefix(n: int) -> Mask:
    """Prefix language model: everything sees the first ``n`` keys, the rest is causal."""
    mask = causal() | _first_keys(n)
    return Mask(mask.predicate, f"prefix({n})", mask.corners)


def block_causal(size: int) -> Mask:
    """Blocks of ``size`` positions see themselves whole, and all blocks before."""
    _at_least("size", size, 1)
    return Mask(
        lambda b, h, i, j: j // size <= i // size,
        f"block_causal({size})",
        lambda i, i_last, j, j_last: state_of(
            j // size <= i_last // size, j_last // size <= i // size
        ),
    )


def strided(stride: int) -> Mask:
    """Keys whose distance is a multiple of ``stride`` (Sparse Transformer, arXiv 1904.10509).

    With ``& sliding_window(w)`` a dilated window, as in Longformer.
    """
    _at_least("stride", stride, 1)

    def corners(i: Tensor, i_last: Tensor, j: Tensor, j_last: Tensor) -> Tensor:
        low, high = i - j_last, i_last - j
        return state_of(high // stride * stride >= low, (low == high) | (stride == 1))

    return Mask(lambda b, h, i, j: (i - j) % stride == 0, f"strided({stride})", corners)


def global_tokens(positions: Sequence[int]) -> Mask:
    """Listed positions see everything and everything sees them (Longformer, arXiv 2004.05150)."""
    listed = sorted({int(position) for position in positions})
    table = torch.tensor(listed, dtype=torch.long)

    def predicate(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        nothing = (i != i) | (j != j)  # False, in the shape of the answer
        return reduce(lambda seen, p: seen | (i == p) | (j == p), listed, nothing)

    def count(first: Tensor, last: Tensor) -> Tensor:
        return torch.searchsorted(table, last, right=True) - torch.searchsorted(table, first)

    def corners(i: Tensor, i_last: Tensor, j: Tensor, j_last: Tensor) -> Tensor:
        rows, keys = count(i, i_last), count(j, j_last)
        every = (rows == i_last - i + 1) | (keys == j_last - j + 1)
        return state_of((rows > 0) | (keys > 0), every)

    return Mask(predicate, f"global_tokens({listed})", corners)


def document(ids: Int[Tensor, "*batch S"]) -> Mask:
    """Keys of the query's own document, for documents packed one after another.

    ``ids (S,)`` or ``(B, S)`` names each position's document and never falls. Positions outside
    ``0..S-1`` see nothing. ``causal() & document(ids)`` is causal attention on packed sequences.
    """
    if ids.dim() not in (1, 2) or ids.shape[-1] == 0 or ids.is_floating_point():
        raise ValueError(f"ids: expected integers (S,) or (B, S), got {ids.dtype} {ids.shape}")
    steps = ids.diff(dim=-1)
    if (steps < 0).any():
        raise ValueError("ids: expected numbers that never fall along a row, got a fall")
    rows = F.pad((steps > 0).cumsum(-1), (1, 0)).reshape(-1, ids.shape[-1])
    batch, length = rows.shape

    def look(b: Tensor, position: Tensor, outside: int) -> Tensor:
        inside = (position >= 0) & (position < length)
        found = rows.to(position.device)[
            b if batch > 1 else 0 * position, position.clamp(0, length - 1)
        ]
        return torch.where(inside, found, outside)

    def corners(i: Tensor, i_last: Tensor, j: Tensor, j_last: Tensor) -> Tensor:
        b = torch.arange(batch)[:, None, None, None]
        i, i_last = look(b, i, -1), look(b, i_last, -1)
        j, j_last = look(b, j, -2), look(b, j_last, -2)
        known = (i >= 0) & (i_last >= 0) & (j_last >= 0)  # blocks that reach outside are looked at
        states = state_of((i <= j_last) & (j <= i_last), (i == j_last) & (j == i_last))
        return states.masked_fill(~known, UNKNOWN)

    return Mask(
        lambda b, h, i, j: look(b, i, -1) == look(b, j, -2), "document", corners, batch=batch
    )


def per_head(masks: Sequence[Mask]) -> Mask:
    """A mask of its own for each head: ``masks[h]`` for head ``h``."""
    masks = list(masks)
    if not masks or any(mask.heads > 1 for mask in masks):
        raise ValueError("masks: expected at least one mask, none with heads of its own")

    def predicate(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return reduce(
            lambda seen, pair: seen | (pair[1](b, h, i, j) & (h == pair[0])),
            enumerate(masks),
            (i != i) | (j != j),
        )

    def corners(*ends: Tensor) -> Tensor:
        return torch.stack([mask.block_states(*ends) for mask in masks], dim=-3)

    name = f"per_head({', '.join(mask.name for mask in masks)})"
    batch = max(mask.batch for mask in masks)
    return Mask(predicate, name, corners if batch == 1 else None, batch, len(masks))


def _first_keys(n: int) -> Mask:
    _at_least("sinks", n, 0)
    return Mask(
        lambda b, h, i, j: (j < n) | (i != i),
        f"sinks({n})",
        lambda i, i_last, j, j_last: state_of((j < n) | (i != i), (j_last < n) | (i != i)),
    )


def _band(left: float, right: float, name: str) -> Mask:
    """Distances ``-right <= i - j <= left``."""

    def corners(i: Tensor, i_last: Tensor, j: Tensor, j_last: Tensor) -> Tensor:
        low, high = i - j_last, i_last - j
        return state_of((low <= left) & (high >= -right), (low >= -right) & (high <= left))

    return Mask(lambda b, h, i, j: (i - j <= left) & (i - j >= -right), name, corners)


def _at_least(name: str, value: int, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}: expected an int, got {type(value).__name__}")
    if value < least:
        raise ValueError(f"{name}: expected at least {least}, got {value}")
