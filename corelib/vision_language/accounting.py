"""What a prefill and its cache cost when layers see different numbers of tokens.

Costs are counted from the sizes of the decoder and the number of vision tokens that enter each
layer, so that every method of the family stands on one axis. ``sizes`` is anything that has
``width``, ``heads``, ``kv_heads``, ``head_width`` and ``hidden``: a
`corelib.models.decoder.DecoderConfig`, or a namespace of your own.

A layer with ``n`` tokens, ``C`` wide, ``H`` query and ``G`` key/value heads of ``D``, multiplies

    n C (2 H D + 2 G D)  +  2 n^2 H D  +  3 n C hidden

numbers (projections, the whole attention map and its values, a gated MLP; with H D = G D = C it is
the 4 n C^2 + 2 n^2 C + 3 n C hidden that papers on token pruning use). A FLOP is a multiplication
or an addition, so there are twice as many.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable


@runtime_checkable
class Sizes(Protocol):
    """Widths and heads of a decoder layer."""

    width: int
    heads: int
    kv_heads: int
    head_width: int
    hidden: int


def layer_flops(n: int, sizes: Sizes) -> int:
    """FLOPs of one layer over ``n`` tokens."""
    C, D = sizes.width, sizes.head_width
    projections = n * C * D * 2 * (sizes.heads + sizes.kv_heads)
    attention = 2 * n * n * sizes.heads * D
    return 2 * (projections + attention + 3 * n * C * sizes.hidden)


def score_flops(n: int, sizes: Sizes, rows: int | None = None) -> int:
    """FLOPs of an importance score: the products of ``rows`` queries (all) with ``n`` keys, anew.

    What `corelib.primitives.column_sums` costs where the map was not kept.
    """
    return 2 * (n if rows is None else rows) * n * sizes.heads * sizes.head_width


def prefill_flops(counts: Sequence[int], text: int, sizes: Sizes) -> int:
    """FLOPs of all layers; ``counts[l]`` vision tokens and ``text`` others enter layer ``l``."""
    _check(counts, text)
    return sum(layer_flops(n + text, sizes) for n in counts)


def kv_bytes(counts: Sequence[int], text: int, sizes: Sizes, itemsize: int = 2) -> int:
    """Bytes of keys and values that the prefill leaves behind."""
    _check(counts, text)
    held = sum(n + text for n in counts)
    return 2 * held * sizes.kv_heads * sizes.head_width * itemsize


def _check(counts: Sequence[int], text: int) -> None:
    if len(counts) == 0 or min(counts) < 0:
        raise ValueError(f"counts: expected a number of at least 0 per layer, got {list(counts)}")
    if text < 0:
        raise ValueError(f"text: expected at least 0 tokens, got {text}")
