"""The template's mixers over length, and attention on several processes, on this machine.

The mixers compute different things, so they are not compared with each other's results; each is
held against its own matrix first, at a short length. What the race shows is how they grow.
Sharded attention computes what the others do, and is checked. Its processes share this machine's
cores with each other: how it scales says more about the machine than about the method.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from ...foundations.unified_mixing import TAXONOMY, sharded_attention
from ...primitives import attention
from ...runtime import Ranks
from ...testing import assert_same
from ..race import race
from ..scaling import sweep
from ..structure import materialize
from . import Row, register, rows

H, D = 4, 32
RACED = [
    "causal attention",
    "sliding window",
    "low rank",
    "kernel",
    "random features",
    "gated recurrence",
    "state space",
    "short convolution",
    "pooling",
    "Fourier",
]


def _content(L: int, heads: int = H, width: int = D) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return list(torch.randn(3, 1, heads, L, width, generator=generator))


def check_against_matrix(name: str, L: int = 48) -> None:
    """The mixer equals its matrix times the values, in float64."""
    mix = TAXONOMY[name].mix
    q, k, v = (x.double() for x in _content(L))
    P = materialize(lambda v: mix(q, k, v), L, batch=(1, H))
    assert_same(mix(q, k, v).abs(), (P @ v.to(P.dtype)).abs(), what=name)


@register("mixers", "every way of mixing tokens, over the length")
def mixers_over_length(quick: bool) -> Iterator[Row]:
    for name in RACED:
        check_against_matrix(name)
    lengths = (128, 256) if quick else (256, 512, 1024, 2048, 4096)

    def contestants(L: int) -> dict[str, Callable]:
        q, k, v = _content(L)
        return {name: lambda mix=TAXONOMY[name].mix: mix(q, k, v) for name in RACED}

    with torch.no_grad():
        result = sweep(lengths, contestants, check=None, min_time=0.02 if quick else 0.1)
    shape = f"B1 H{H} D{D} float32"
    yield from rows(result, what="mixing", shape=shape, corelib="causal attention")


def vanilla_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """All scores written down, as in the paper's baseline."""
    return (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1) @ v


def _stretch(rank: int, L: int, workers: int) -> Tensor:
    q, k, v = (x.tensor_split(workers, 2)[rank] for x in _content(L, 8, 64))
    with torch.no_grad():
        return sharded_attention(q, k, v, causal=False)


@register("sharded-attention", "one sequence on two processes, against one process")
def sharded(quick: bool) -> Iterator[Row]:
    L = 256 if quick else 4096
    q, k, v = _content(L, 8, 64)
    with Ranks(2) as ranks, torch.no_grad():
        contestants = {
            "corelib, 2 processes": lambda: torch.cat(ranks.run(_stretch, L, 2), 2),
            "corelib, 1 process": lambda: attention(q, k, v, causal=False),
            "torch SDPA, 1 process": lambda: F.scaled_dot_product_attention(q, k, v),
            "scores written down": lambda: vanilla_attention(q, k, v),
        }
        result = race(contestants)
    yield from rows(
        result,
        what="forward, inputs made by each process",
        shape=f"B1 H8 D64 L{L} float32",
        corelib="corelib, 2 processes",
    )
