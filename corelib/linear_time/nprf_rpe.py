"""Stable, Fast and Accurate: Kernelized Attention with Relative Positional Encoding
(arXiv 2106.12566).

Idea: a bias that depends on the distance multiplies every weight by a Toeplitz factor. So
attention with features (Performer) and a relative bias is a bank of convolutions, one for each
pair of a feature and a value channel: O(L log L) by FFT. And with features of *normalised* queries
and keys the estimate no longer explodes; the learnt bias gives back the sharpness that this costs.

    out_i = sum_f phi_q_if (M (phi_k_f * v))_i / sum_f phi_q_if (M phi_k_f)_i
    M_ij  = exp(bias_(j - i))                              0 for j > i if causal
    phi(x)_f = exp(w_f . x - |x|^2 / 2) / sqrt(m)          x = q / |q|, k / |k|

| here          | paper            | what                                                    |
|:--------------|:-----------------|:--------------------------------------------------------|
| phi_q, phi_k  | phi(q), phi(k)   | (B, H, L, m), (B, G, L, m), not negative                |
| bias          | b_(j - i)        | (H, 2 n - 1), distance 0 in the middle, n at least L    |
| directions    | w                | (m, D), fixed, normal or orthogonal                     |

Forms: `kernel_attention_rpe` (FFT), `kernel_attention_rpe_dense` (L x L), a loop. The FFT form
never holds all ``m (V + 1) L`` products: `toeplitz_bank` takes a slab of features at a time,
forward and backward, and makes them again for the gradients. Cost: ``2 m (V + 1)`` transforms a
head, where the dense form does ``2 L^2 (m + V)`` operations: it pays from thousands of tokens on.

Decoding. What the past leaves for the future is a product with a Hankel matrix of ``exp(bias)``. A
general bias gives it full rank: no state is smaller than the past itself, and the causal layer in
`nprf_layers` keeps the features and values of all tokens, O(L) a step. ``bias = -slope * distance``
has rank 1: `decayed_attention`, the linear recurrence with a column of ones, with a state that does
not grow.

Exact: the FFT form, up to rounding *relative to the largest sum of a head*: biases that span more
than about 10 are better taken in float64. Approximate: features, as for any Performer. Our choices:
scale 1 after normalising; one set of directions for all heads. Left out: two-dimensional distances.
Oracle: the loop, ``scipy.linalg.matmul_toeplitz``.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from corelib.primitives import linear_recurrence
from corelib.primitives._checks import check_heads_and_widths, check_same_kind
from corelib.primitives.random_features import orthogonal_directions, positive_features
from corelib.primitives.toeplitz import middle_lags, rows_with_any, toeplitz
from corelib.primitives.toeplitz_bank import toeplitz_bank

Out = Float[Tensor, "B H L V"]
QueryFeatures = Float[Tensor, "B H L m"]
KeyFeatures = Float[Tensor, "B G S m"]
Values = Float[Tensor, "B G S V"]
Bias = Float[Tensor, "H T"]


def kernel_attention_rpe_reference(
    phi_q: QueryFeatures, phi_k: KeyFeatures, v: Values, bias: Bias, *, causal: bool
) -> Out:
    """Pair by pair, as the sums stand. Queries align with the last keys."""
    H, G, L, S = phi_q.shape[1], phi_k.shape[1], phi_q.shape[2], phi_k.shape[2]
    out = v.new_zeros(*phi_q.shape[:3], v.shape[3])
    for h in range(H):
        for i in range(L):
            total, position = 0.0, i + S - L
            for j in range(position + 1 if causal else S):
                factor = torch.exp(bias[h, bias.shape[1] // 2 + j - position])
                weight = factor * (phi_q[:, h, i] * phi_k[:, h // (H // G), j]).sum(-1)
                out[:, h, i] = out[:, h, i] + weight[:, None] * v[:, h // (H // G), j]
                total = total + weight
            out[:, h, i] = out[:, h, i] / total[:, None]
    return out


def kernel_attention_rpe_dense(
    phi_q: QueryFeatures, phi_k: KeyFeatures, v: Values, bias: Bias, *, causal: bool
) -> Out:
    """Three matrix products and an ``L x S`` square; queries align with the last keys."""
    _check(phi_q, phi_k, v, bias)
    L, S = phi_q.shape[2], phi_k.shape[2]
    if phi_q.numel() == 0:
        return v.new_zeros(*phi_q.shape[:3], v.shape[3])
    wide = torch.promote_types(v.dtype, torch.float32)
    factors = toeplitz(_factors(bias.to(wide), S, causal), L, S)
    factors = factors.tril(S - L) if causal else factors
    phi_k, values = (_repeat(x.to(wide), phi_q.shape[1]) for x in (phi_k, _with_ones(v)))
    sums = ((phi_q.to(wide) @ phi_k.mT) * factors) @ values
    return _divide(sums, bias, L, S, causal).to(v.dtype)


def kernel_attention_rpe(
    phi_q: QueryFeatures, phi_k: KeyFeatures, v: Values, bias: Bias, *, causal: bool
) -> Out:
    """As `kernel_attention_rpe_dense` in ``O(L log L)``; as many queries as keys.

    Args:
        phi_q, phi_k: features, not negative; query head h reads key head ``h // (H // G)``.
        bias: of each head and distance ``-(n - 1) .. n - 1``; ``-inf`` hides a distance.
        causal: a query sees itself and what is before it.

    A row that may see nothing gives zeros. Half precision is computed in float32.
    Raises ValueError or TypeError for shapes or dtypes that do not fit.
    """
    _check(phi_q, phi_k, v, bias)
    L, S = phi_q.shape[2], phi_k.shape[2]
    if L != S:
        raise ValueError(f"phi_q: expected as many queries as keys, {S}, got {L}")
    if phi_q.numel() == 0:
        return v.new_zeros(*phi_q.shape[:3], v.shape[3])
    wide = torch.promote_types(v.dtype, torch.float32)
    rows = (x.to(wide).mT for x in (phi_q, phi_k, _with_ones(v)))
    sums = toeplitz_bank(*rows, _factors(bias.to(wide), L, causal), causal=causal).mT
    return _divide(sums, bias, L, L, causal).to(v.dtype)


def decayed_attention(
    phi_q: QueryFeatures,
    phi_k: KeyFeatures,
    v: Values,
    slopes: Float[Tensor, " H"],
    state: Float[Tensor, "B H m V1"] | None = None,
) -> tuple[Out, Float[Tensor, "B H m V1"]]:
    """Causal attention with ``bias = -slopes * distance``, and the state after it, ``V + 1`` wide.

    A linear recurrence over values with a column of ones, which sums up the denominators. Slopes of
    zero are the Performer. A state of an earlier call goes on from there.
    """
    heads = phi_q.shape[1]
    phi_k, values = (_repeat(x, heads) for x in (phi_k, _with_ones(v)))
    log_decay = -slopes.to(phi_q.dtype)[:, None].expand(phi_q.shape[:3])
    options = dict(log_decay=log_decay, state=state, scale=1.0, return_state=True)
    sums, state = linear_recurrence(phi_q, phi_k, values, **options)
    return sums[..., :-1] / sums[..., -1:], state


def nprf(x: Float[Tensor, "*axes D"], directions: Float[Tensor, "m D"]) -> Float[Tensor, "*axes m"]:
    """Positive random features of ``x / |x|``: however long ``x`` is, the estimate is as good."""
    return positive_features(F.normalize(x, dim=-1), directions)


def prf(x: Float[Tensor, "*axes D"], directions: Float[Tensor, "m D"]) -> Float[Tensor, "*axes m"]:
    """The Performer's: of ``x / D^(1/4)``, so that ``phi(q) . phi(k)`` estimates the softmax's
    ``exp(q . k / sqrt(D))``."""
    return positive_features(x * x.shape[-1] ** -0.25, directions)


def _factors(bias: Tensor, length: int, causal: bool) -> Tensor:
    """``exp(bias)`` over the largest that is used: a common factor leaves the quotient."""
    bias = middle_lags(bias, length)
    top = bias.detach()[..., : length if causal else None].amax(-1, keepdim=True)
    return torch.exp(bias - torch.where(top == -torch.inf, 0.0, top))


def _divide(sums: Tensor, bias: Tensor, L: int, S: int, causal: bool) -> Tensor:
    """Numerators over denominators, the last column; zeros in rows that see no distance."""
    seen = bias > -torch.inf
    if seen.all():
        return sums[..., :-1] / sums[..., -1:]
    some = rows_with_any(seen, L, S, causal=causal)[..., None]
    return torch.where(some, sums[..., :-1], 0.0) / torch.where(some, sums[..., -1:], 1.0)


def _with_ones(v: Tensor) -> Tensor:
    return torch.cat([v, torch.ones_like(v[..., :1])], -1)


def _repeat(x: Tensor, heads: int) -> Tensor:
    return x if x.shape[1] == heads else x.repeat_interleave(heads // x.shape[1], 1)


def _check(phi_q: Tensor, phi_k: Tensor, v: Tensor, bias: Tensor) -> None:
    check_same_kind(phi_q=phi_q, phi_k=phi_k, v=v, bias=bias)
    shapes = [tuple(x.shape) for x in (phi_q, phi_k, v)]
    if not phi_q.dim() == phi_k.dim() == v.dim() == 4 or phi_k.shape[0:3:2] != v.shape[0:3:2]:
        wanted = "(B, H, L, m), (B, G, S, m) and (B, G, S, V)"
        raise ValueError(f"phi_q, phi_k, v: expected {wanted}, got {shapes}")
    check_heads_and_widths(phi_q, phi_k, v, heads_axis=1)
    if len(phi_q) != len(phi_k) or phi_q.shape[2] > phi_k.shape[2]:
        wanted = "one batch size and no more queries than keys"
        raise ValueError(f"phi_q: expected {wanted}, got {shapes}")
    if bias.dim() != 2 or len(bias) != phi_q.shape[1]:
        wanted = f"({phi_q.shape[1]}, 2 n - 1)"
        raise ValueError(f"bias: expected shape {wanted}, got {tuple(bias.shape)}")


def example() -> dict:
    """Two heads, nine tokens, features of normalised vectors, a bias that fades unevenly.

    >>> kernel_attention_rpe(**example(), causal=False).shape
    torch.Size([1, 2, 9, 3])
    """
    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 1, 2, 9, 4, generator=generator)
    v = torch.randn(1, 2, 9, 3, generator=generator)
    directions = orthogonal_directions(6, 4, generator=generator)
    bias = -0.3 * (torch.arange(17) - 8).abs() + torch.randn(2, 17, generator=generator)
    return dict(phi_q=nprf(q, directions), phi_k=nprf(k, directions), v=v, bias=bias)
