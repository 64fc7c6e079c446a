"""DeepSpeed-Ulysses: swap the sequence for heads, and any attention will do (arXiv 2309.14509).

Idea: activations stay cut along the *sequence*, which norms, projections and MLP never notice.
Around attention, and only there, one all-to-all on each side cuts along the *heads* instead:

    q, k, v   (B, H, n, D) --seq_to_heads-->  (B, H / P, L, D)     all positions of some heads
    out     = core(q, k, v)                                        any attention, unmodified
    out       (B, H / P, L, V) --heads_to_seq--> (B, H, n, V)      some positions of all heads

| here             | paper    | what                                                         |
|:-----------------|:---------|:-------------------------------------------------------------|
| ranks, P         | P        | workers; ``n = L / P`` positions each                        |
| L, C, H          | N, d, h  | length, model width, heads; ``C = H D``                      |
| core             | –        | "agnostic to attention": dense, sparse, a kernel             |
| copies           | –        | how often a key/value head is sent, for grouped queries      |

Exact, forward and backward: a permutation moves numbers and changes none; its gradient is the
permutation back. Cost: each rank sends ``4 L C (P - 1) / P^2`` numbers forward (`comm_volume`) and
as many backward, which stays constant when length and ranks grow together; tensor parallelism sends
``P`` times that. The price: ``P`` has to divide the query heads. A rank still holds no more than
its share, cut the other way while it attends.
Grouped queries: with ``G`` key/value heads that ``P`` does not divide, every head is sent
``P / gcd(G, P)`` times, so that each rank has those that its queries read; with ``P`` dividing
``H`` that always fits. Copies cost bytes (`bytes_sent`). Positions are global: rotate queries and
keys before the call with the stretch's own positions, ``rank * n`` and on.
Left out: ZeRO-3, which cuts weights and optimizer over the same ranks; here weights are on every
rank and their gradients summed (`SequenceParallelAttention.sum_gradients`).
Oracle: attention in one process.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from numbers import Real
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from corelib.primitives import attention
from corelib.primitives._checks import check_attention
from corelib.runtime import all_to_all

from .shared import check_ranks, place_in, stretches

OutMaybeLse = Float[Tensor, "B H n V"] | tuple[Float[Tensor, "B H n V"], Float[Tensor, "B H n"]]
METHODS = ("ulysses", "ring", "tensor parallel")


def ulysses_attention_reference(
    q: Float[Tensor, "B H L D"],
    k: Float[Tensor, "B G L D"],
    v: Float[Tensor, "B G L V"],
    *,
    ranks: int,
    causal: bool,
    scale: Real | None = None,
) -> Float[Tensor, "B H L V"]:
    """All ranks in this process, on the whole sequence: cut, swap, attend, swap back.

    ``ranks`` divides ``L`` and ``H``.
    """
    check_attention(q, k, v, None, 0, scale)
    copies = kv_copies(q.shape[1], k.shape[1], ranks)
    k, v = (x.repeat_interleave(copies, 1) for x in (k, v))
    # sent[x][r][s]: the piece of x that rank r sends to rank s, a stretch of some heads
    sent = [[stretches(part, ranks, 1) for part in stretches(x, ranks)] for x in (q, k, v)]
    outs = []
    for rank in range(ranks):
        whole = [torch.cat([pieces[r][rank] for r in range(ranks)], 2) for pieces in sent]
        outs.append(stretches(attention(*whole, causal=causal, scale=scale), ranks))
    return torch.cat([torch.cat([out[r] for out in outs], 1) for r in range(ranks)], 2)


# --- on ranks -------------------------------------------------------------------------------------


def seq_to_heads(x: Float[Tensor, "B H n D"], group: Any = None) -> Float[Tensor, "B h L D"]:
    """From this rank's stretch of all heads to all positions of this rank's heads, ``h = H / P``.

    One all-to-all; differentiable. Raises ValueError when the ranks do not divide the heads.
    """
    return all_to_all(x, 1, 2, group)


def heads_to_seq(x: Float[Tensor, "B h L D"], group: Any = None) -> Float[Tensor, "B H n D"]:
    """The inverse of `seq_to_heads`. Raises ValueError when the ranks do not divide the length."""
    return all_to_all(x, 2, 1, group)


def ulysses_attention(
    q: Float[Tensor, "B H n D"],
    k: Float[Tensor, "B G n D"],
    v: Float[Tensor, "B G n V"],
    *,
    causal: bool,
    scale: Real | None = None,
    core: Callable = attention,
    group: Any = None,
    return_lse: bool = False,
) -> OutMaybeLse:
    """This rank's rows of attention over the sequence that all ranks of ``group`` hold together.

    Call it on every rank with that rank's stretch, of one length on all ranks, in rank order.
    Forward and backward are collectives.

    Args:
        core: what attends, ``f(q, k, v, *, causal, scale)`` on whole sequences (`AttentionFn`);
            with ``functools.partial`` it takes a window, a mask or a sparse method's options.
        return_lse: also the log-sum-exp ``(B, H, n)``, which ``core`` must then return as well.

    Raises ValueError or TypeError for shapes, dtypes or options that do not fit, or when the ranks
    do not divide the query heads; RuntimeError outside a rank.
    """
    check_attention(q, k, v, None, 0, scale)
    if q.shape[2] != k.shape[2]:
        raise ValueError(f"k: expected the positions of q, {q.shape[2]}, got {k.shape[2]}")
    _, ranks = place_in(group)
    copies = kv_copies(q.shape[1], k.shape[1], ranks)
    if copies > 1:
        k, v = (x.repeat_interleave(copies, 1) for x in (k, v))
    whole = [seq_to_heads(x, group) for x in (q, k, v)]
    if not return_lse:
        return heads_to_seq(core(*whole, causal=causal, scale=scale), group)
    out, lse = core(*whole, causal=causal, scale=scale, return_lse=True)
    return heads_to_seq(out, group), heads_to_seq(lse[..., None], group)[..., 0]


# --- what it costs --------------------------------------------------------------------------------


def kv_copies(H: int, G: int, ranks: int) -> int:
    """How often each of ``G`` key/value heads is sent, so that all query heads find theirs.

    Each rank attends with ``H / ranks`` query heads. 1 when the ranks divide ``G``.

    Raises ValueError unless the ranks divide ``H``.
    """
    check_ranks(ranks)
    if H % ranks:
        raise ValueError(f"ranks: expected a divisor of the {H} query heads, got {ranks}")
    return ranks // math.gcd(G, ranks)


def bytes_sent(n: int, ranks: int, *, B: int, H: int, G: int, D: int, itemsize: int) -> int:
    """Bytes a rank sends forward, and again backward: ``n`` positions each, values ``D`` wide.

    Of each tensor the rank's own ``1 / ranks`` stays. The log-sum-exp is not counted.
    """
    copies = kv_copies(H, G, ranks)
    numbers = B * n * D * (2 * H + 2 * G * copies)
    return numbers * (ranks - 1) // ranks * itemsize


def comm_volume(method: str, L: int, C: int, ranks: int) -> float:
    """Numbers that a rank sends in one layer's forward pass, as many key/value heads as queries.

    ``"ulysses"``: four all-to-alls; ``"ring"``: keys and values to the neighbour, ``P - 1`` times;
    ``"tensor parallel"``: Megatron's with sequence parallelism, two all-gathers and two
    reduce-scatters of whole activations (half of them around the MLP, where others send nothing).
    """
    check_ranks(ranks)
    share = L * C * (ranks - 1) / ranks
    volumes = dict(zip(METHODS, (4 * share / ranks, 2 * share, 4 * share), strict=True))
    if method not in volumes:
        raise ValueError(f"method: expected one of {', '.join(METHODS)}, got {method!r}")
    return volumes[method]


def example() -> dict:
    """Twelve positions and twelve query heads in pairs of two: for 1, 2, 3, 4, 6 or 12 ranks.

    >>> ulysses_attention_reference(**example(), ranks=3, causal=True).shape
    torch.Size([1, 12, 12, 4])
    """
    generator = torch.Generator().manual_seed(0)
    shapes = (1, 12, 12, 4), (1, 6, 12, 4), (1, 6, 12, 4)
    q, k, v = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)
    return dict(q=q, k=k, v=v)
