"""MInference's prefill on this machine: planted heads, and the length from which it pays.

The time of a sparse prefill has a part that no pattern saves (estimating, building lists,
gathering) and a part that grows with the kept scores, so that it pays from some length on. Outputs
differ from dense by what is not kept; the races check that the difference is small.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch.nn.functional as F
from torch import Tensor

from ...primitives.block_scores import relative_error
from ...sparse_attention.minference import (
    a_shape,
    block_sparse,
    minference_attention,
    vertical_slash,
)
from ...sparse_attention.shared import planted_heads
from ..race import Missing, race
from ..scaling import sweep
from . import Row, peer, register, rows

KINDS = ("a_shape", "vertical_slash", "block", "vertical_slash")

#: Lines that hold the attention up to the longest prompt. With the defaults of `planted_heads` (64
#: channels, 3 distances) they keep half of it at 16,384 positions, and no few lines are near dense.
PLANTED = dict(D=128, strength=12.0, distances=2)

#: Scores are planted for a scale of 1; few ends come before other lines, the prompts are short.
OPTIONS = dict(scale=1.0, forced=(4, 16))

#: A shape for each of `KINDS`. They hold the planted patterns at every length: none grows with it.
PATTERNS = [a_shape(16, 256), vertical_slash(16, 24), block_sparse(12), vertical_slash(16, 24)]


def close(result: Tensor, dense: Tensor) -> None:
    """Raise where a sparse output is more than a quarter off."""
    error = float(relative_error(result, dense))
    if error > 0.25:
        raise ValueError(f"the sparse prefill is {error:.0%} off dense attention")


@register("minference-prefill", "four planted heads: sparse prefill against dense attention")
def minference_prefill(quick: bool) -> Iterator[Row]:
    lengths = (512, 1024) if quick else (1024, 2048, 4096, 8192, 16384)

    def contestants(L: int) -> dict[str, Callable | Missing]:
        q, k, v = planted_heads(KINDS, L, **PLANTED)[:3]
        return {
            "corelib": lambda: minference_attention(q, k, v, PATTERNS, **OPTIONS),
            "torch, dense": lambda: F.scaled_dot_product_attention(
                q, k, v, is_causal=True, scale=1.0
            ),
            "MInference's package": Missing("its kernels need a CUDA device")
            if not isinstance(peer("minference"), Missing)
            else peer("minference"),
        }

    result = sweep(lengths, contestants, check=close, min_time=0.02, repeats=3)
    shape = "B1 H4 D128 float32, planted"
    yield from rows(result, what="prefill", shape=shape)


@register("minference-shapes", "each shape alone at 8192 tokens, against dense attention")
def minference_shapes(quick: bool) -> Iterator[Row]:
    L = 512 if quick else 8192
    for kind, pattern in zip(KINDS[:3], PATTERNS[:3], strict=True):
        q, k, v = planted_heads([kind] * 4, L, **PLANTED)[:3]
        result = race(
            {
                "corelib": lambda: minference_attention(q, k, v, pattern, **OPTIONS),  # noqa: B023
                "torch, dense": lambda: F.scaled_dot_product_attention(
                    q, k, v, is_causal=True, scale=1.0  # noqa: B023
                ),
            },
            check=close, min_time=0.05,
        )  # fmt: skip
        yield from rows(result, what=f"prefill, {kind}", shape=f"B1 H4 L{L} D128 float32")
