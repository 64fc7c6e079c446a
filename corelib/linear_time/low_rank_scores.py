"""Attention scores from truncated queries and keys, which are never put together again (`dr_rl`).

    Q_r K_r^T = U_q (S_q V_q^T V_k S_k) U_k^T          (L, r) (r, r) (r, S)

The core in the middle is as small as the rank. Rebuilding ``Q_r`` and ``K_r`` first, as the paper's
released code does, costs a full product afterwards: ``L S D`` again, and the SVD on top.

Error: ``|Q K^T - Q_r K_r^T|_2 <= sigma_{r+1}(Q) |K|_2 + |Q_r|_2 sigma_{r+1}(K)``
(`score_error_bound`). Truncating queries and keys one by one is not the best that rank ``r`` can do
for their product: that is `truncate_scores`, one more SVD of the small core.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from corelib.primitives import visible_keys
from corelib.primitives._checks import check_heads_and_widths, check_same_kind
from corelib.primitives.svd import svd_factors, truncated_svd

Queries, Keys = Float[Tensor, "B H L D"], Float[Tensor, "B G S D"]
OfQueries = tuple[Float[Tensor, "B H D"], Float[Tensor, "B H D D"]]
OfKeys = tuple[Float[Tensor, "B G D"], Float[Tensor, "B G D D"]]


class QKFactors(NamedTuple):
    """``left (B, H, L, r) @ core (B, H, r, r) @ right (B, G, S, r)^T`` are the scores, unscaled."""

    left: Tensor
    core: Tensor
    right: Tensor


def truncate_qk(q: Queries, k: Keys, rank: int) -> QKFactors:
    """The best ``Q_r`` and ``K_r`` of each head, as factors of their product.

    Raises ValueError or TypeError for shapes or a rank that do not fit.
    """
    _check(q, k)
    (u_q, s_q, v_q), (u_k, s_k, v_k) = (truncated_svd(x, rank) for x in (q, k))
    repeat = q.shape[1] // k.shape[1]
    right = (s_k[..., None] * v_k).repeat_interleave(repeat, 1)
    return QKFactors(u_q, (s_q[..., None] * v_q) @ right.mT, u_k)


def truncate_scores(q: Queries, k: Keys, rank: int) -> QKFactors:
    """The best rank-``r`` approximation of ``Q K^T`` itself, which truncated Q and K are not.

    Ours: the SVD of the core at full rank turns both outer factors. ``right`` has all heads.
    """
    left, core, right = truncate_qk(q, k, q.shape[3])
    u, sigma, vh = truncated_svd(core, rank)
    right = right.repeat_interleave(q.shape[1] // k.shape[1], 1)
    return QKFactors(left @ u, torch.diag_embed(sigma), right @ vh.mT)


def factors_from_bases(q: Queries, k: Keys, of_q: OfQueries, of_k: OfKeys, rank: int) -> QKFactors:
    """`truncate_qk` from ``sigma, vh`` of both (`corelib.primitives.svd.gram_svd`): no ``U``."""
    v_q, v_k = (vh[..., :rank, :].mT for _, vh in (of_q, of_k))
    core = v_q.mT @ v_k.repeat_interleave(q.shape[1] // k.shape[1], 1)
    return QKFactors(q @ v_q, core, k @ v_k)


def factored_scores(factors: QKFactors) -> Float[Tensor, "B H L S"]:
    """``left core right^T``, unscaled; nothing as large as queries or keys is made."""
    left, core, right = factors
    G = right.shape[1]
    rows = (left @ core).unflatten(1, (G, -1))  # the heads of a key head, one after the other
    scores = rows.flatten(2, 3) @ right.mT
    return scores.unflatten(2, rows.shape[2:4]).flatten(1, 2)


def rebuild_qk(q: Queries, k: Keys, rank: int) -> tuple[Queries, Keys]:
    """``Q_r`` and ``K_r`` at their full width: what `truncate_qk` is about, and avoids."""
    _check(q, k)
    return torch.matmul(*svd_factors(q, rank)), torch.matmul(*svd_factors(k, rank))


def truncated_scores_reference(q: Queries, k: Keys, rank: int) -> Float[Tensor, "B H L S"]:
    """The definition: rebuild ``Q_r`` and ``K_r``, then multiply as if nothing had happened."""
    low_q, low_k = rebuild_qk(q, k, rank)
    return low_q @ low_k.repeat_interleave(q.shape[1] // k.shape[1], 1).mT


def low_rank_attention(
    factors: QKFactors, v: Float[Tensor, "B G S V"], *, causal: bool, scale: float
) -> Float[Tensor, "B H L V"]:
    """Softmax attention on `factored_scores`. ``scale``: ``D ** -0.5``, which factors do not know.

    Queries align with the last keys; a row that sees nothing gives zeros.
    """
    (L, S), H = (factors.left.shape[2], v.shape[2]), factors.left.shape[1]
    visible = visible_keys(L, S, causal=causal, device=v.device)
    scores = (factored_scores(factors) * scale).masked_fill(~visible, -torch.inf)
    weights = scores.softmax(-1).masked_fill(~visible, 0.0)
    return weights @ v.repeat_interleave(H // v.shape[1], 1)


# --- what a rank costs in accuracy ----------------------------------------------------------------


def score_spectrum(of_q: OfQueries, of_k: OfKeys) -> Float[Tensor, "B H D"]:
    """Singular values of ``Q K^T`` from ``sigma, vh`` of both: those of the core."""
    (s_q, v_q), (s_k, v_k) = of_q, of_k
    right = (s_k[..., None] * v_k).repeat_interleave(s_q.shape[1] // s_k.shape[1], 1)
    return torch.linalg.svdvals((s_q[..., None] * v_q) @ right.mT)


def rank_change_norm(sigma: Float[Tensor, "*batch k"], r: int, r2: int) -> Float[Tensor, "*batch"]:
    """``|A_r - A_r2|_F = sqrt(sum_{r < i <= r2} sigma_i^2)``, whichever is larger.

    Exact where both are best approximations of *one* matrix with this spectrum.
    """
    if min(r, r2) < 0:
        raise ValueError(f"r, r2: expected ranks of at least 0, got {r} and {r2}")
    return sigma[..., min(r, r2) : max(r, r2)].square().sum(-1).sqrt()


def score_error_bound(
    of_q: Float[Tensor, "*batch k"], of_k: Float[Tensor, "*batch s"], rank: int
) -> Float[Tensor, "*batch"]:
    """No singular value of ``Q K^T - Q_r K_r^T`` is above this, from the spectra of Q and K."""
    if rank < 1:
        raise ValueError(f"rank: expected at least 1, got {rank}")
    return _after(of_q, rank) * of_k[..., 0] + of_q[..., 0] * _after(of_k, rank)


def _after(sigma: Tensor, rank: int) -> Tensor:
    return sigma[..., rank] if rank < sigma.shape[-1] else torch.zeros_like(sigma[..., 0])


def _check(q: Tensor, k: Tensor) -> None:
    check_same_kind(q=q, k=k)
    if q.dim() != 4 or k.dim() != 4 or q.shape[0] != k.shape[0]:
        shapes = tuple(q.shape), tuple(k.shape)
        raise ValueError(f"q, k: expected (B, H, L, D) and (B, G, S, D), got {shapes}")
    check_heads_and_widths(q, k, k, heads_axis=1)
