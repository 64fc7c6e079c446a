"""A unified view of long-sequence models (arXiv 2302.06218): one template, and a system for it.

Idea: attention, convolutions, recurrences and Fourier layers all do one thing, they mix tokens:

    y = P(x) v(x)          P (L, L) mixes positions, v (L, V) is made of each position alone

What differs is where ``P`` comes from (a kernel of the content, positions, parameters, a basis) and
what structure it has, for the structure is what makes it fast. `TAXONOMY` is that table, a
`MixerSpec` for each kind, every one of them runnable (`corelib.foundations.mixers`), and nothing in
it has to be believed: `measure` pushes the unit vectors through a mixer, gets its ``P``, and finds
rank, band, state size and the rest; `disagreements` holds that against what the row claims.

The system: attention over millions of positions, whose scores no machine can hold. It is in
`corelib.foundations.sharded_attention`: stretches of positions on as many workers, keys and values
streaming by in tiles, exact, with all gradients, ``O(L D)`` bytes sent by each worker.

| here            | paper                    | what                                  |
|:----------------|:-------------------------|:--------------------------------------|
| P               | P(.), token mixing       | (L, L), may depend on the content     |
| content kernel  | G, Gram matrix, k(.)     | softmax(q k^T), phi(q) phi(k)^T       |
| fourier         | F^s, Vandermonde matrix  | (L, L), powers of a root of unity     |
| convolution     | W^c                      | (L, L), Toeplitz                      |
| worker          | GPU                      | a rank of `corelib.runtime`           |

Our reconstruction: of the paper we know the abstract and its list of symbols, not its table nor the
distribution algorithm. Exact: every statement of the table about the mixers as built here, at
`SIZES`. Left out: depth (a network mixes with products of such matrices), and training.
Cost: of each mixer, in its row. Of `measure`: ``L`` mixings and ``2 L`` singular value
decompositions, so some hundred positions. Oracle: each mixer's matrix written out, and scipy.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial

import torch
from jaxtyping import Float
from torch import Tensor

from corelib.measure.structure import Structure, materialize, structure_report
from corelib.primitives import attention

from . import mixers
from .sharded_attention import (  # noqa: F401  (the system part)
    ShardedMultiHeadAttention,
    bytes_per_worker,
    sharded_attention,
    sharded_attention_reference,
    worker_steps,
)

#: Sizes of the table's mixers: head width, window, stride, rank, random features, state, taps.
SIZES = dict(D=8, window=8, stride=4, rank=6, features=16, state=4, taps=4)
Mix = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class MixerSpec:
    """One row of the template's table: a mixer and what is claimed of its ``P``.

    Attributes:
        name, source: what it is, and what ``P`` is made of.
        mix: ``(q, k, v) -> y`` on ``(B, H, L, ·)``; most use part of their arguments.
        content: ``P`` changes with the content (queries and keys).
        positional: permuting the tokens does not just permute ``P``: positions matter.
        normalised: rows of ``P`` sum to one. causal: nothing above the diagonal.
        rank, state, band: of ``P``, at `SIZES`; None: grows with the length.
        structure: ``"toeplitz"``, ``"vandermonde"``, ``"sparse"`` or ``""``.
        time, memory: growth with ``L`` of the fast form, and of what decoding keeps per head.
        rows: catalog slugs of papers about it.
    """

    name: str
    source: str
    mix: Mix
    content: bool = False
    positional: bool = True
    normalised: bool = False
    causal: bool = False
    rank: int | None = None
    state: int | None = None
    band: int | None = None
    structure: str = ""
    time: str = "L"
    memory: str = "L D"
    rows: tuple[str, ...] = ()


@lru_cache(maxsize=16)
def learned(*shape: int, seed: int = 0) -> Tensor:
    """Stands in for a trained parameter: random, the same every time."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def _low_rank(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    L = v.shape[2]
    return mixers.low_rank_attention(q, k, v, (learned(SIZES["rank"], L) / L**0.5).to(v))


def _random_features(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    directions = learned(SIZES["features"], q.shape[-1]).to(v)
    return mixers.kernel_attention(q, k, v, mixers.positive_random_features(directions))


def _decayed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The content sets the decay: one gate per position, here from the key."""
    return mixers.decayed_attention(q, k, v, torch.nn.functional.logsigmoid(2 + k.sum(-1)))


def _state_space(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    shape = v.shape[1], SIZES["state"]
    decay, weight = 0.5 + 0.48 * learned(*shape).sigmoid(), learned(*shape, seed=1)
    kernel = mixers.state_space_kernel(decay, weight, v.shape[2])
    return mixers.long_convolution(v, kernel.to(v))


def _long_convolution(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    L = v.shape[2]
    kernel = learned(v.shape[1], L) * torch.exp(-3 * torch.arange(L) / L)
    return mixers.long_convolution(v, kernel.to(v))


def _short_convolution(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return mixers.short_convolution(v, learned(v.shape[1], SIZES["taps"]).to(v))


def _learned_matrix(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    L = v.shape[2]
    return mixers.learned_mixing(v, (learned(v.shape[1], L, L) / L**0.5).to(v))


_CAUSAL = partial(attention, causal=True)
_WINDOW = partial(attention, causal=True, window=SIZES["window"])
_ROWS = [
    MixerSpec("attention", "softmax of the content", partial(attention, causal=False),
              content=True, positional=False, normalised=True, time="L^2",
              rows=("lean_attention",)),
    MixerSpec("causal attention", "softmax of the content, a mask", _CAUSAL,
              content=True, normalised=True, causal=True, time="L^2",
              rows=("lean_attention", "longctx_peak")),
    MixerSpec("sliding window", "softmax of the content, a mask", _WINDOW,
              content=True, normalised=True, causal=True, state=7, band=7, structure="sparse",
              memory="W D", rows=("clinical_longformer", "longgen", "lm_infinite")),
    MixerSpec("strided", "softmax of the content, a mask",
              partial(mixers.strided_attention, stride=SIZES["stride"]),
              content=True, normalised=True, structure="sparse", time="L^2",
              rows=("masformer", "cswin")),
    MixerSpec("low rank", "softmax of the content, learned E", _low_rank,
              content=True, rank=6, state=6, rows=("greenformers",)),
    MixerSpec("kernel", "features of the content", lambda q, k, v: mixers.kernel_attention(q, k, v),
              content=True, positional=False, normalised=True, rank=8, state=8,
              rows=("lit", "spikingbrain")),
    MixerSpec("random features", "features of the content", _random_features,
              content=True, positional=False, normalised=True, rank=16, state=16,
              rows=("nprf_rpe", "sea")),
    MixerSpec("causal kernel", "features of the content, a mask",
              lambda q, k, v: mixers.causal_kernel_attention(q, k, v),
              content=True, normalised=True, causal=True, state=8, memory="D V",
              rows=("lightning2", "jrt")),
    MixerSpec("gated recurrence", "features and gates of the content", _decayed,
              content=True, causal=True, state=8, memory="D V",
              rows=("mom", "lawcat", "hydra", "quamba")),
    MixerSpec("state space", "learned recurrence", _state_space,
              causal=True, state=4, structure="toeplitz", time="L log L", memory="N V",
              rows=("s4", "s4_survey", "ptd")),
    MixerSpec("long convolution", "learned kernel", _long_convolution,
              causal=True, structure="toeplitz", time="L log L", memory="L V",
              rows=("sgconv", "long_conv", "flashfftconv")),
    MixerSpec("short convolution", "learned kernel", _short_convolution,
              causal=True, state=3, band=3, structure="toeplitz", memory="W V",
              rows=("lawcat",)),
    MixerSpec("pooling", "positions alone", lambda q, k, v: mixers.pooling(v, window=3),
              normalised=True, state=2, band=2, structure="sparse", memory="-", rows=("ponet",)),
    MixerSpec("Fourier", "a fixed basis", lambda q, k, v: mixers.fourier(v),
              structure="vandermonde", time="L log L", memory="-", rows=("flashfftconv",)),
    MixerSpec("learned matrix", "parameters, one per pair", _learned_matrix,
              time="L^2", memory="-", rows=("mambamixer",)),
]  # fmt: skip
#: Name -> row: the ways to make and to structure ``P``.
TAXONOMY: dict[str, MixerSpec] = {row.name: row for row in _ROWS}


# --- nothing in the table has to be believed ------------------------------------------------------


@dataclass(frozen=True)
class Facts:
    """What `measure` found: ``P (L, L)``, its structure, and what it depends on."""

    P: Tensor
    structure: Structure
    content: bool
    positional: bool


def example(
    length: int = 48, seed: int = 0
) -> tuple[Float[Tensor, "1 1 L D"], Float[Tensor, "1 1 L D"]]:
    """Queries and keys of one head, float64."""
    q, k = learned(2, 1, 1, length, SIZES["D"], seed=100 + seed)
    return q, k


def measure(mixer: MixerSpec | Mix, length: int = 48) -> Facts:
    """The matrix of a mixer at `example` content, and what can be seen from it.

    Whether it depends on the content is seen with a second content, whether on positions by
    permuting the first. Raises ValueError when the mixer is not linear in its values.
    """
    mix = mixer.mix if isinstance(mixer, MixerSpec) else mixer
    (q, k), generator = example(length), torch.Generator().manual_seed(0)
    order = torch.randperm(length, generator=generator)

    def matrix(q: Tensor, k: Tensor) -> Tensor:
        return materialize(lambda v: mix(q, k, v), length)[0, 0]

    P, other, permuted = (
        matrix(*content)
        for content in ((q, k), example(length, 1), (q[:, :, order], k[:, :, order]))
    )
    content, positional = _differ(P, other), _differ(P[order][:, order], permuted)
    return Facts(P, structure_report(P), content, positional)


def _differ(a: Tensor, b: Tensor) -> bool:
    return (a - b).abs().max().item() > 1e-9 * a.abs().max().item()


def disagreements(spec: MixerSpec, facts: Facts) -> list[str]:
    """Where a row of the table and the measurement differ, in words; empty when nowhere.

    A number must be met exactly; None, "grows with the length", means a quarter of it at least.
    """
    seen, L = facts.structure, facts.structure.length
    band = max(seen.below, seen.above)
    pairs = {
        "content": (spec.content, facts.content),
        "positional": (spec.positional, facts.positional),
        "normalised": (spec.normalised, seen.normalised),
        "causal": (spec.causal, seen.causal),
        "toeplitz": (spec.structure == "toeplitz", seen.toeplitz < 1e-9),
        "vandermonde": (spec.structure == "vandermonde", seen.vandermonde < 1e-9),
        "sparse": (spec.structure == "sparse" or spec.band is not None, seen.density < 0.4),
    }
    for name, claimed, found in (
        ("rank", spec.rank, seen.rank),
        ("state", spec.state, max(seen.state_forward, seen.state_backward)),
        ("band", spec.band, band),
    ):
        pairs[name] = ("grows" if claimed is None else claimed,
                       "grows" if claimed is None and found >= L // 4 else found)  # fmt: skip
    return [
        f"{spec.name}: {what} is claimed to be {claimed}, measured {found}"
        for what, (claimed, found) in pairs.items()
        if claimed != found
    ]
