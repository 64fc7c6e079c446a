"""The chunked (gated) delta rule.

    S_t = D_t S_{t-1} + k_t u_t^T        u_t = beta_t (v_t - (D_t S_{t-1})^T k_t)

With the corrected values ``u`` it is a plain linear recurrence, so all that is new is to find the
``u`` of a chunk at once. They solve a triangular system (Yang et al., arXiv 2406.06484, the UT
transform; with gates arXiv 2412.06464, per channel arXiv 2510.26692):

    (1 + T) u = beta (v - (k exp(G)) S)      T_ij = beta_i sum_c k_ic k_jc exp(G_ic - G_jc), j < i

Gradients are PyTorch's own: everything here is written without changing a tensor in place.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK = 32


def delta_chunked(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    beta: Tensor,
    state: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """``(out, final state)``; heads flattened, ``q (N, L, K)``, ``state (N, K, V)``."""
    L = q.shape[1]
    chunk = min(CHUNK, 1 << (L - 1).bit_length())
    q, k, v, beta = (_chunks(x.to(state.dtype), chunk) for x in (q, k, v, beta[..., None]))
    decay = _decay(log_decay, q, chunk, state)
    # Queries for the output and keys that read the state are decayed in the same way.
    both = torch.stack([q * scale, k])
    scores, read, write, total = (_by_head if decay.shape[-1] == 1 else _by_channel)(both, k, decay)
    solve = beta * scores[1].tril(-1) + torch.eye(chunk, dtype=q.dtype, device=q.device)
    right = torch.cat([beta * v, beta * read[1]], -1)
    solved = torch.linalg.solve_triangular(solve, right, upper=False, unitriangular=True)
    fresh, forgotten = solved.split([v.shape[-1], k.shape[-1]], -1)
    # `unbind`, as the gradient of one chunk by index would be as large as all of them.
    parts = fresh, forgotten, scores[0], read[0], write.mT, total.mT
    outs = []
    for new, lost, score, reads, writes, left in zip(*(x.unbind(1) for x in parts), strict=True):
        values = torch.baddbmm(new, lost, state, alpha=-1)
        outs.append(torch.bmm(score, values).baddbmm(reads, state))
        state = torch.baddbmm(left * state, writes, values)
    return torch.cat(outs, 1)[:, :L], state


def _by_channel(both: Tensor, k: Tensor, decay: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A decay for each channel: it stands inside the products of queries and keys."""
    scores, read, write, total = decayed_scores(both, k.expand_as(both), decay.expand_as(both))
    return scores, read, write[0], total[0]


def _by_head(both: Tensor, k: Tensor, decay: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """One decay ``(..., C, 1)`` for all channels: that of plain products, by its own halving."""
    one = torch.ones_like(decay)
    left, since_start, until_end, total = decayed_scores(one, one, decay)
    return both @ k.mT * left, both * since_start, k * until_end, total


def decayed_scores(q: Tensor, k: Tensor, decay: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``(scores, read, write, total)`` of chunks ``(..., C, K)``, as in `linear_recurrence_decay`.

    The same halving, from the top and without changing anything in place. ``total (..., 1, K)``.
    """
    C = q.shape[-2]
    if C == 1:
        return (q * k).sum(-1, keepdim=True), q * decay, k, decay
    halves = (x.unflatten(-2, (2, C // 2)) for x in (q, k, decay))
    parts = [x.unbind(-3) for x in decayed_scores(*halves)]
    (scores_l, scores_r), (read_l, read_r), (write_l, write_r), (total_l, total_r) = parts
    below = torch.cat([read_r @ write_l.mT, scores_r], -1)
    return (
        torch.cat([F.pad(scores_l, (0, C // 2)), below], -2),
        torch.cat([read_l, read_r * total_l], -2),
        torch.cat([write_l * total_r, write_r], -2),
        total_l * total_r,
    )


def _chunks(x: Tensor, chunk: int) -> Tensor:
    """``(N, L, ...)`` to ``(N, chunks, chunk, ...)``, zeros behind the end."""
    x = F.pad(x, (0, 0) * (x.dim() - 2) + (0, -x.shape[1] % chunk))
    return x.unflatten(1, (-1, chunk))


def _decay(log_decay: Tensor | None, q: Tensor, chunk: int, state: Tensor) -> Tensor:
    """``(N, chunks, chunk, K)``, or 1 in the place of K for one decay a head."""
    if log_decay is None:
        return torch.ones_like(q[..., :1])
    log_decay = log_decay if log_decay.dim() == 3 else log_decay[..., None]
    return torch.exp(_chunks(log_decay.to(state.dtype), chunk))
