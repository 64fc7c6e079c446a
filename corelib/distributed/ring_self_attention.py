"""Ring self-attention: sequence parallelism with complete score rows (arXiv 2105.13120).

Idea: cut the *sequence* among ranks instead of the heads or the weights. Every rank keeps its
queries; keys go once round a ring and fill its strip of scores, then values go round:

    scores[:, stretch s] = scale * q @ k_s^T        as k_s comes by, N - 1 hops
    weights              = softmax(scores)           complete rows: an ordinary softmax
    out                  = sum_s weights[:, stretch s] @ v_s       as v_s comes by, N - 1 hops

| here             | paper              | shape                                        |
|:-----------------|:-------------------|:---------------------------------------------|
| ranks            | N                  | devices of the ring                          |
| q, k, v          | Q^n, K^n, V^n      | (B, H or G, n, D), n = L / N on every rank   |
| scores           | S^n                | (B, H, n, L)                                 |
| H, D             | Z, A               | heads and their width                        |
| project_k        | E (Linformer)      | (R, n): this rank's columns                  |

Exact: equals attention over the whole sequence, forward and backward, with more ranks than heads
too. The rows are whole, so no online softmax is needed, at the price of ``H L^2 / N`` scores a
rank, kept for the backward pass (`memory_model`): the later rings keep ``L / N``. With Linformer's
projections (`linformer_sp`, arXiv 2006.04768) every term is linear in ``L / N``; that is another,
approximate attention, computed exactly.
Different: the paper is bidirectional (BERT); ``causal`` here masks the strip and still computes all
of it. The paper sums ``dk`` and ``dv`` over ranks with all-reduce; here the sums travel with the
ring, which sends half as much: in units of ``B H n D`` numbers a rank, forward 2 (N - 1), backward
4 (N - 1) instead of the paper's 6 (N - 1) (`bytes_sent`, `paper_bytes_sent`).
Cost: ``4 B H n L D`` operations a rank. Oracle: dense attention in one process.
"""

from __future__ import annotations

from numbers import Real
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from corelib.primitives import attention
from corelib.primitives._checks import check_attention
from corelib.runtime import all_reduce

from .shared import check_ranks, place_in, ring_pass, ring_sum, stretches

OutMaybeLse = Float[Tensor, "B H n V"] | tuple[Float[Tensor, "B H n V"], Float[Tensor, "B H n"]]


def ring_self_attention_reference(
    q: Float[Tensor, "B H L D"],
    k: Float[Tensor, "B G L D"],
    v: Float[Tensor, "B G L V"],
    *,
    ranks: int,
    causal: bool,
    scale: Real | None = None,
) -> Float[Tensor, "B H L V"]:
    """All ranks' hops in this process, on the whole sequence. ``ranks`` divides ``L``."""
    check_attention(q, k, v, None, 0, scale)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    outs = []
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    rows, keys, values = (stretches(x, ranks) for x in (q, k, v))
    for rank in range(ranks):
        strip: list = [None] * ranks
        for hop in range(ranks):
            source = (rank - hop) % ranks
            strip[source] = rows[rank] @ keys[source].mT * scale
        scores = torch.cat(strip, -1)
        if causal:
            scores = scores.masked_fill(_later(rank, rows[rank], ranks), -torch.inf)
        weights = scores.softmax(-1).split(rows[rank].shape[2], -1)
        outs.append(
            sum(weights[(rank - h) % ranks] @ values[(rank - h) % ranks] for h in range(ranks))
        )
    return torch.cat(outs, 2)


def _later(rank: int, q: Tensor, ranks: int) -> Tensor:
    """``(n, L)``: the keys that come after each of this rank's queries."""
    n = q.shape[2]
    places = torch.arange(n, device=q.device)[:, None] + rank * n
    return torch.arange(n * ranks, device=q.device)[None, :] > places


# --- on ranks -------------------------------------------------------------------------------------


def ring_self_attention(
    q: Float[Tensor, "B H n D"],
    k: Float[Tensor, "B G n D"],
    v: Float[Tensor, "B G n V"],
    *,
    causal: bool,
    scale: Real | None = None,
    group: Any = None,
    return_lse: bool = False,
) -> OutMaybeLse:
    """This rank's rows of attention over the sequence that all ranks of ``group`` hold together.

    Call it on every rank with that rank's stretch, of one length on all ranks, in rank order.
    Forward and backward are collectives: every rank runs both. With ``return_lse`` also the
    log-sum-exp ``(B, H, n)``, natural logarithms.

    Raises ValueError or TypeError for shapes, dtypes or options that do not fit, RuntimeError
    outside a rank.
    """
    check_attention(q, k, v, None, 0, scale)
    if q.shape[2] != k.shape[2]:
        raise ValueError(f"k: expected the positions of q, {q.shape[2]}, got {k.shape[2]}")
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    place_in(group)
    out, lse = _Ring.apply(q, k, v, causal, scale, group)
    return (out, lse) if return_lse else out


class _Ring(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, causal, scale, group):
        rank, ranks = place_in(group)
        B, H, n, _ = q.shape
        wide = torch.promote_types(q.dtype, torch.float32)
        rows = _grouped(q, k).to(wide)
        scores = rows.new_empty(*rows.shape[:3], n, n * ranks)
        for source, keys in ring_pass(k, group):
            scores[..., _columns(source, n)] = rows @ keys[:, :, None].to(wide).mT * scale
        if causal:
            scores.masked_fill_(_later(rank, q, ranks), -torch.inf)
        lse = torch.logsumexp(scores, -1)
        weights = torch.exp(scores - lse[..., None])
        out = sum(
            weights[..., _columns(source, n)] @ values[:, :, None].to(wide)
            for source, values in ring_pass(v, group)
        )
        ctx.save_for_backward(q, k, v, weights, out)
        ctx.settings = scale, group
        return out.flatten(1, 2).to(q.dtype), lse.flatten(1, 2)

    @staticmethod
    @once_differentiable
    def backward(ctx, d_out, d_lse):
        q, k, v, weights, out = ctx.saved_tensors
        scale, group = ctx.settings
        n, rows = q.shape[2], _grouped(q, k).to(out.dtype)
        d_out, d_lse = _grouped(d_out, k).to(out.dtype), _grouped(d_lse, k)
        delta = (d_out * out).sum(-1) - d_lse
        d_scores = torch.empty_like(weights)
        for source, values in ring_pass(v, group):
            d_scores[..., _columns(source, n)] = d_out @ values[:, :, None].to(out.dtype).mT
        d_scores.sub_(delta[..., None]).mul_(weights).mul_(scale)
        dq = sum(
            d_scores[..., _columns(source, n)] @ keys[:, :, None].to(out.dtype)
            for source, keys in ring_pass(k, group)
        )
        dk = ring_sum(lambda s: (d_scores[..., _columns(s, n)].mT @ rows).sum(2), group)
        dv = ring_sum(lambda s: (weights[..., _columns(s, n)].mT @ d_out).sum(2), group)
        return dq.flatten(1, 2).to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), None, None, None


def _grouped(x: Tensor, k: Tensor) -> Tensor:
    """``(B, H, …)`` as ``(B, G, H / G, …)``: the query heads of a group beside each other."""
    return x.unflatten(1, (k.shape[1], -1))


def _columns(source: int, n: int) -> slice:
    return slice(source * n, (source + 1) * n)


def linformer_sp(
    q: Float[Tensor, "B H n D"],
    k: Float[Tensor, "B G n D"],
    v: Float[Tensor, "B G n V"],
    project_k: Float[Tensor, "R n"],
    project_v: Float[Tensor, "R n"],
    *,
    scale: Real | None = None,
    group: Any = None,
) -> Float[Tensor, "B H n V"]:
    """Linformer's attention with the sequence cut among ranks (not causal).

    ``project_k`` and ``project_v`` are this rank's columns of the two projections of the length to
    ``R``. What ranks exchange, ``2 R`` projected keys and values, does not grow with the length.
    """
    check_attention(q, k, v, None, 0, scale)
    for name, x in (("project_k", project_k), ("project_v", project_v)):
        if x.dim() != 2 or x.shape[1] != k.shape[2]:
            raise ValueError(f"{name}: expected shape (R, {k.shape[2]}), got {tuple(x.shape)}")
    keys, values = all_reduce(project_k @ k, group), all_reduce(project_v @ v, group)
    return attention(q, keys, values, causal=False, scale=scale)


# --- what it costs --------------------------------------------------------------------------------


def bytes_sent(n: int, ranks: int, *, B: int, G: int, D: int, itemsize: int) -> tuple[int, int]:
    """Bytes a rank sends ``(forward, backward)``: ``n`` positions each, values ``D`` wide."""
    check_ranks(ranks)
    hop = B * G * n * D * itemsize
    return 2 * (ranks - 1) * hop, 4 * (ranks - 1) * hop


def paper_bytes_sent(n: int, ranks: int, *, B: int, G: int, D: int, itemsize: int) -> int:
    """The paper's count, forward and backward together: it sums ``dk`` and ``dv`` by all-reduce."""
    forward, _ = bytes_sent(n, ranks, B=B, G=G, D=D, itemsize=itemsize)
    return 4 * forward


def memory_model(
    *, B: int, L: int, ranks: int, C: int, heads: int, D: int, R: int = 256
) -> dict[str, dict[str, float]]:
    """Numbers that a rank holds for one attention block in training, by method and part.

    Weights count with their gradients and Adam's two moments. ``tensor parallel`` (Megatron) cuts
    heads and weights, the others the sequence; ``R``: Linformer's projected length. After the
    paper's table of attention blocks, with its scores for complete rows.
    """
    check_ranks(ranks)
    weights, n = 16 * heads * D * C, L / ranks
    local = 4 * B * n * heads * D  # q, k, v and the output of the heads
    return {
        "tensor parallel": {
            "weights": weights / ranks,
            "activations": local + B * L * C,
            "scores": B * heads * L * n,
        },
        "ring, complete rows": {
            "weights": weights,
            "activations": local + B * n * C,
            "scores": B * heads * L * n,
        },
        "ring, online softmax": {
            "weights": weights,
            "activations": local + B * n * C,
            "scores": B * heads * n,  # the log-sum-exp
        },
        "ring, Linformer": {
            "weights": weights + 8 * R * n,
            "activations": local + B * n * C + 2 * B * heads * R * D,
            "scores": B * heads * R * n,
        },
    }


def example() -> dict:
    """Twelve positions, for one, two, three or four ranks: ``q, k, v`` of the whole sequence.

    >>> ring_self_attention_reference(**example(), ranks=3, causal=False).shape
    torch.Size([2, 4, 12, 4])
    """
    generator = torch.Generator().manual_seed(0)
    shapes = (2, 4, 12, 4), (2, 2, 12, 4), (2, 2, 12, 4)
    q, k, v = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)
    return dict(q=q, k=k, v=v)
