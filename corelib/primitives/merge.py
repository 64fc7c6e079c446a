"""Merging two partial attention results by their log-sum-exp.

Attention over a set of keys can be computed over any partition of them: each part gives its own
normalised output and the log-sum-exp of its scores, and two parts combine as

    lse = log(exp(lse_a) + exp(lse_b))
    out = exp(lse_a - lse) * out_a + exp(lse_b - lse) * out_b

This is the rescaling step of online softmax (Milakov and Gimelshein, arXiv 1805.02867) in the form
that flash-decoding, ring attention and LeanAttention reduce with. The operation is associative and
commutative, and ``(zeros, -inf)`` is its identity, so parts merge in any order and in any tree.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor


def merge_partials(
    out_a: Float[Tensor, "*rows V"],
    lse_a: Float[Tensor, "*rows"],
    out_b: Float[Tensor, "*rows V"],
    lse_b: Float[Tensor, "*rows"],
) -> tuple[Float[Tensor, "*rows V"], Float[Tensor, "*rows"]]:
    """Attention over the union of two disjoint sets of keys.

    ``out_* (..., V)`` are normalised outputs, ``lse_* (...)`` the natural logarithms of their
    normalisers. A part that saw no key is ``(zeros, -inf)``; where both are, so is the result, and
    the gradients are zero, not NaN. Weights are computed in the precision of ``lse`` and the
    output keeps the dtype of ``out_a``.
    """
    _check(out_a, lse_a, out_b, lse_b)
    top = torch.maximum(lse_a, lse_b).detach()
    empty = top == -torch.inf
    top = top.masked_fill(empty, 0.0)
    weight_a, weight_b = torch.exp(lse_a - top), torch.exp(lse_b - top)
    total = (weight_a + weight_b).masked_fill(empty, 1.0)
    lse = (top + torch.log(total)).masked_fill(empty, -torch.inf)
    share = (weight_a / total)[..., None]
    wide = torch.promote_types(out_a.dtype, lse.dtype)
    out = torch.lerp(out_b.to(wide), out_a.to(wide), share.to(wide))
    return out.to(out_a.dtype), lse


def _check(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> None:
    if out_a.shape != out_b.shape:
        raise ValueError(
            "out_a and out_b: expected equal shapes, "
            f"got {tuple(out_a.shape)} and {tuple(out_b.shape)}"
        )
    if out_a.dtype != out_b.dtype:
        raise TypeError(f"out_a and out_b: expected one dtype, got {out_a.dtype} and {out_b.dtype}")
    for name, lse in (("lse_a", lse_a), ("lse_b", lse_b)):
        if lse.shape != out_a.shape[:-1]:
            raise ValueError(
                f"{name}: expected the shape of out without its last axis, "
                f"{tuple(out_a.shape[:-1])}, got {tuple(lse.shape)}"
            )
