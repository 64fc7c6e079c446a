"""LeanAttention: stream-K attention for the decode phase (arXiv 2405.10480).

Idea: partial softmaxes merge associatively, so the keys of all requests and heads can be cut into
equal tiles, laid end to end, and dealt to the processors in equal shares that need not respect
where one request or head ends and the next begins. No processor idles, at any batch or length.

With ``N`` tiles in the line, program ``p`` of ``P`` takes tiles ``p N // P .. (p + 1) N // P``
(`stream_k_schedule`). For each output that its share touches it leaves a partial over the keys
``j`` that it has read:

    peak = max_j s_j       total = sum_j exp(s_j - peak)       weighted = sum_j exp(s_j - peak) v_j

Two partials of an output make one (`merge`), and the last one is normalised:

    total = exp(peak_a - peak) total_a + exp(peak_b - peak) total_b      peak = max(peak_a, peak_b)
    out = weighted / total         lse = peak + log(total)         (weighted adds as total does)

| here                  | paper          | what                                                   |
|:----------------------|:---------------|:-------------------------------------------------------|
| output                | output tile    | one (request, key/value head) pair of H / G * L rows   |
| tile                  | LeanTile, T_n  | keys read in one step of the schedule                  |
| program, programs     | CTA, grid P    | multiprocessors x blocks resident on each              |
| peak, total, weighted | m, l, O~       | (rows,), (rows,), (rows, V)                            |

Exact: equals full attention for every ``tile`` and ``programs``, up to rounding.
Different: in the paper the program with an output's first tile is its host, waits on flags of its
peers and reduces in the same kernel. Here all programs write partials and end, and a second small
kernel merges. Waiting deadlocks where programs run one after another (Triton's interpreter), and
wants all of them resident; the price is one launch. New: grouped heads and several newest queries
are rows of one tile, so that each key is read once for all of them.
Cost: every key and value is read once; shares differ by at most one tile; at most
``outputs + P - 1`` partials of ``rows (V + 2)`` float32 are written and read again.
Oracle: ``torch.nn.functional.scaled_dot_product_attention``; compare ``lean_atten.py`` of ROCm's
aiter. No `nn.Module` here: the paper schedules a layer that exists and brings none of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import gcd
from numbers import Real
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from corelib.primitives import attention, merge_partials
from corelib.primitives._checks import check_attention
from corelib.primitives._flash import forward_op

from .shared import (  # noqa: F401  (with the schedules that it is compared with, and their cost)
    Piece,
    Schedule,
    check_counts,
    fa2_schedule,
    fixed_split_schedule,
    keys_held,
    makespan,
    modelled_decode_time,
    occupancy,
    tiles_of,
    timeline,
)

OutMaybeLse = Float[Tensor, "B H L V"] | tuple[Float[Tensor, "B H L V"], Float[Tensor, "B H L"]]


def stream_k_schedule(lengths: Sequence[int], heads: int, tile: int, programs: int) -> Schedule:
    """LeanAttention's: all outputs' tiles in one line, cut into ``programs`` equal shares.

    ``lengths`` are the keys of each request, ``heads`` its key/value heads.
    """
    check_counts(heads=heads, tile=tile, programs=programs)
    tiles = tiles_of(lengths, tile)
    N = heads * sum(tiles)
    bounds = [p * N // programs for p in range(programs + 1)]
    schedule: Schedule = [[] for _ in range(programs)]
    start = p = 0
    for request, tiles_here in enumerate(tiles):
        for head in range(heads):
            at, stop = start, start + tiles_here
            while at < stop:
                while bounds[p + 1] <= at:
                    p += 1
                end = min(bounds[p + 1], stop)
                schedule[p].append(Piece(request, head, at - start, end - start))
                at = end
            start = stop
    return schedule


class Partial(NamedTuple):
    """The softmax over some of the keys, not yet normalised."""

    peak: Float[Tensor, "*rows"]
    total: Float[Tensor, "*rows"]
    weighted: Float[Tensor, "*rows V"]


def identity(rows: tuple[int, ...], V: int, like: Tensor) -> Partial:
    """The partial over no keys: merging it changes nothing."""
    return Partial(like.new_full(rows, -torch.inf), like.new_zeros(rows), like.new_zeros(*rows, V))


def merge(a: Partial, b: Partial) -> Partial:
    """One partial over the keys of both; associative and commutative."""
    peak = torch.maximum(a.peak, b.peak)
    base = peak.masked_fill(peak == -torch.inf, 0.0)  # neither saw a key: -inf - -inf is no number
    scale_a, scale_b = torch.exp(a.peak - base), torch.exp(b.peak - base)
    return Partial(
        peak,
        scale_a * a.total + scale_b * b.total,
        scale_a[..., None] * a.weighted + scale_b[..., None] * b.weighted,
    )


def partial_over(
    q: Float[Tensor, "*heads L D"],
    k: Float[Tensor, "T D"],
    v: Float[Tensor, "T V"],
    visible: Bool[Tensor, "L T"],
    scale: Real,
) -> Partial:
    """The partial of queries over one tile of keys."""
    scores = (q @ k.T * scale).masked_fill(~visible, -torch.inf)
    peak = scores.amax(-1)
    weights = torch.exp(scores - peak.masked_fill(peak == -torch.inf, 0.0)[..., None])
    return Partial(peak, weights.sum(-1), weights @ v)


def lean_decode_reference(
    q: Float[Tensor, "B H L D"],
    k: Float[Tensor, "B G S D"],
    v: Float[Tensor, "B G S V"],
    lengths: Int[Tensor, B] | None = None,
    *,
    programs: int | None = None,
    tile: int | None = None,
    scale: Real | None = None,
    return_lse: bool = False,
) -> OutMaybeLse:
    """`lean_decode` program by program and tile by tile, as the schedule says."""
    held, programs, tile, scale = _settle(q, k, v, lengths, programs, tile, scale)
    (B, H, L, _), (_, G, _, V) = q.shape, v.shape
    wide = torch.promote_types(q.dtype, torch.float32)
    rows, k_wide, v_wide = q.to(wide).unflatten(1, (G, H // G)), k.to(wide), v.to(wide)
    nothing = identity((H // G, L), V, like=rows)
    merged = {(b, g): nothing for b in range(B) for g in range(G)}
    for pieces in stream_k_schedule(held, G, tile, programs):
        for b, g, first, stop in pieces:
            partial = nothing
            for t in range(first, stop):
                keys = torch.arange(t * tile, min((t + 1) * tile, held[b]), device=q.device)
                places = torch.arange(held[b] - L, held[b], device=q.device)  # of the queries
                visible = keys[None, :] <= places[:, None]
                k_tile, v_tile = k_wide[b, g, keys], v_wide[b, g, keys]
                here = partial_over(rows[b, g], k_tile, v_tile, visible, scale)
                partial = merge(partial, here)
            merged[b, g] = merge(merged[b, g], partial)
    out, lse = q.new_empty(B, H, L, V), rows.new_empty(B, H, L)
    for (b, g), (peak, total, weighted) in merged.items():
        some = total.masked_fill(total == 0, 1.0)  # no key: zeros, and -inf + log(1)
        heads = slice(g * (H // G), (g + 1) * (H // G))
        out[b, heads] = (weighted / some[..., None]).to(q.dtype)
        lse[b, heads] = peak + torch.log(some)
    return (out, lse) if return_lse else out


# --- the fast form --------------------------------------------------------------------------------


def lean_decode(
    q: Float[Tensor, "B H L D"],
    k: Float[Tensor, "B G S D"],
    v: Float[Tensor, "B G S V"],
    lengths: Int[Tensor, B] | None = None,
    *,
    programs: int | None = None,
    tile: int | None = None,
    scale: Real | None = None,
    return_lse: bool = False,
) -> OutMaybeLse:
    """Attention of each request's newest ``L`` queries over the keys it holds.

    Args:
        q: one or a few queries; query ``i`` of request ``b`` sees keys ``0 .. lengths[b] - L + i``.
        k, v: the cache; what lies behind ``lengths`` is never read and may be anything.
        lengths: how many keys each request holds; ``None`` means all ``S``.
        programs: equal shares of the work; ``None`` fills the device (a CPU: one per thread).
        tile: keys in a tile; ``None`` means 256 for heads 64 wide, 128 for heads 128 wide.
        scale: ``None`` means ``D ** -0.5``.

    Returns:
        ``out``, and with ``return_lse`` also ``lse (B, H, L)``, the natural log-sum-exp of the
        scores. Rows that see no key are zeros with ``lse = -inf``.

    On a GPU this is the Triton kernel, without gradients. On a CPU the rows of a group run
    together through PyTorch's blocked kernel, request by request, no key is copied, and keys are
    split where there are fewer outputs than ``programs``; gradients flow.

    Raises ValueError or TypeError for shapes, dtypes, lengths or options that do not fit.
    """
    if q.is_cuda:
        from corelib.kernels.split_kv_decode import stream_k_decode

        options = dict(programs=programs, tile=tile, scale=scale, return_lse=return_lse)
        return stream_k_decode(q, k, v, lengths, **options)
    held, programs, tile, scale = _settle(q, k, v, lengths, programs, tile, scale)
    if len(set(held)) <= 1:  # together; else request by request, each over its own keys only
        out, lse = _decode(q, k, v, max(held, default=0), programs, tile, scale)
    else:
        requests = zip(q.split(1), k.split(1), v.split(1), held, strict=True)
        parts = [_decode(*request, programs, tile, scale) for request in requests]
        out, lse = (torch.cat(part) for part in zip(*parts, strict=True))
    return (out, lse) if return_lse else out


def _decode(q: Tensor, k: Tensor, v: Tensor, n: int, programs: int, tile: int, scale: Real):
    """Requests of ``n`` keys each: the keys that all their rows see, then the newest few."""
    (B, H, L, D), (_, G, S, V) = q.shape, v.shape
    shared = max(n - L + 1, 0)
    splits = programs // gcd(B * G, programs)  # then every program gets equally many
    if splits > 1 and (splits > shared // tile or not _foldable(k, v)):
        splits = 1
    shared -= shared % splits
    keys, values = (k, v) if shared == S else (k[:, :, :shared], v[:, :, :shared])
    out, lse = _attend(q.reshape(B, G, H // G * L, D), keys, values, splits, scale)
    out, lse = out.reshape(B, H, L, V), lse.reshape(B, H, L)
    if shared == n:
        return out, lse
    newest = k[:, :, shared:n], v[:, :, shared:n]  # each query sees some; and what splits left over
    return merge_partials(
        out, lse, *attention(q, *newest, causal=True, scale=scale, return_lse=True)
    )


def _foldable(*caches: Tensor) -> bool:
    """Can ``(B, G)`` become one axis without copying?"""
    return all(x.shape[0] == 1 or x.stride(0) == x.shape[1] * x.stride(1) for x in caches)


def _attend(rows: Tensor, k: Tensor, v: Tensor, splits: int, scale: Real):
    """``rows (B, G, R, D)`` over keys that all of them see, in ``splits`` stretches at a time."""
    if splits > 1:
        k, v = (x.unflatten(2, (splits, -1)).flatten(0, 1) for x in (k, v))
        each = rows.flatten(0, 1)[:, None].expand(-1, splits, -1, -1)
        out, lse = _attend(each, k, v, 1, scale)  # (B * G, splits, R, V)
        share = torch.softmax(lse, 1)[..., None]
        return (share * out).sum(1).to(out.dtype), torch.logsumexp(lse, 1)
    gradients = torch.is_grad_enabled() and any(x.requires_grad for x in (rows, k, v))
    if gradients or 0 in (*rows.shape, k.shape[2]) or k.shape[3] != v.shape[3]:
        return attention(rows, k, v, causal=False, scale=scale, return_lse=True)
    return forward_op(rows, k, v, 0.0, False, scale=scale)  # what it ends in, without its overhead


def _settle(q, k, v, lengths, programs, tile, scale) -> tuple[list[int], int, int, Real]:
    """Check the arguments and put in the defaults; ``lengths`` as a list."""
    check_attention(q, k, v, None, 0, scale)
    (B, _, _, D), (_, _, S, V) = q.shape, v.shape
    width = 1 << (max(D, V) - 1).bit_length()
    programs = torch.get_num_threads() if programs is None else programs
    tile = max(16, 16384 // width) if tile is None else tile
    check_counts(programs=programs, tile=tile)
    return keys_held(lengths, B, S), programs, tile, D**-0.5 if scale is None else scale


def example() -> dict:
    """Three requests of 20, 3 and 11 keys, two heads of keys, 18 tiles for five programs.

    >>> lean_decode(**example()).shape
    torch.Size([3, 4, 1, 8])
    """
    generator = torch.Generator().manual_seed(0)
    shapes = (3, 4, 1, 8), (3, 2, 20, 8), (3, 2, 20, 8)
    q, k, v = (torch.randn(shape, generator=generator) for shape in shapes)
    return dict(q=q, k=k, v=v, lengths=torch.tensor([20, 3, 11]), programs=5, tile=4)
