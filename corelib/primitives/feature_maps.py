"""Taylor features: softmax attention's kernel ``exp(s)`` as a finite dot product.

    taylor(q) . taylor(k) = 1 + s + s^2 / 2          s = scale * (q . k),  scale = D^-1/2

The second-order Taylor polynomial of ``exp(s)`` is never below 1/2, so attention with it needs no
guard in the denominator. It is the feature map of Based (Arora et al., arXiv 2402.18668, section 4,
with 16-wide queries and keys) and of JRT-RNN (arXiv 2407.05483).

| form                       | columns                           | for D = 16 |
|:---------------------------|:----------------------------------|-----------:|
| `taylor_features`          | ``1 + D + D^2``, the paper's      |        273 |
| `symmetric_taylor_features`| ``1 + D + D (D + 1) / 2``         |        153 |

Both have the same dot products: ``x_i x_j`` and ``x_j x_i`` are one number, so that the second form
keeps it once, times ``sqrt(2)``. A recurrent state over it is 44 % smaller at D = 16. Do not mix
the two, nor scales: queries and keys go through one map. Products are formed in float32 at least
and returned in the dtype of ``x``. Cost: the columns written, one product each.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor


def taylor_kernel(s: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """``1 + s + s^2 / 2``: what the features' dot products come to, from scaled scores ``s``."""
    return 1 + s * (1 + 0.5 * s)


def taylor_width(D: int) -> int:
    """Columns of `taylor_features` for inputs ``D`` wide."""
    return 1 + D + D * D


def symmetric_taylor_width(D: int) -> int:
    """Columns of `symmetric_taylor_features` for inputs ``D`` wide."""
    return 1 + D + D * (D + 1) // 2


def taylor_features(
    x: Float[Tensor, "*batch D"], *, scale: float | None = None
) -> Float[Tensor, "*batch F"]:
    """``[1, sqrt(scale) x_i, scale / sqrt(2) x_i x_j]`` with ``F = 1 + D + D^2`` columns.

    Column ``1 + D + D i + j`` holds the product of ``x_i`` and ``x_j``.

    Args:
        scale: of the scores ``q . k``, greater than 0; ``D ** -0.5`` if None.

    Raises ValueError or TypeError for an ``x`` or a ``scale`` that does not fit.
    """
    if _fits_kernel(x):
        from corelib.kernels import feature_maps

        return feature_maps.taylor_features(x, scale=scale)
    scaled = _scaled(x, scale)
    products = (scaled[..., :, None] * (scaled * 0.5**0.5)[..., None, :]).flatten(-2)
    return torch.cat([torch.ones_like(scaled[..., :1]), scaled, products], -1).to(x.dtype)


def symmetric_taylor_features(
    x: Float[Tensor, "*batch D"], *, scale: float | None = None
) -> Float[Tensor, "*batch F"]:
    """The same dot products as `taylor_features` from ``F = 1 + D + D (D + 1) / 2`` columns.

    ``[1, sqrt(scale) x_i, scale w x_i x_j]`` for ``i <= j``, row by row of the upper triangle,
    with ``w = 1`` off the diagonal and ``1 / sqrt(2)`` on it. Arguments and errors likewise.
    """
    if _fits_kernel(x):
        from corelib.kernels import feature_maps

        return feature_maps.symmetric_taylor_features(x, scale=scale)
    scaled = _scaled(x, scale)
    columns = [torch.ones_like(scaled[..., :1]), scaled]
    diagonal = scaled * 0.5**0.5
    for i in range(x.shape[-1]):
        here = scaled[..., i : i + 1]
        columns += [here * diagonal[..., i : i + 1], here * scaled[..., i + 1 :]]
    return torch.cat(columns, -1).to(x.dtype)


def _fits_kernel(x: Tensor) -> bool:
    """On a GPU up to 32 columns are one pass over memory: `corelib.kernels.feature_maps`."""
    on_gpu = isinstance(x, Tensor) and x.is_cuda and x.dim() > 0
    return on_gpu and x.dtype != torch.float64 and 1 <= x.shape[-1] <= 32


def _scaled(x: Tensor, scale: float | None) -> Tensor:
    """``sqrt(scale) x`` in float32 at least; checks both."""
    if not isinstance(x, Tensor) or not x.is_floating_point():
        got = x.dtype if isinstance(x, Tensor) else type(x).__name__
        raise TypeError(f"x: expected a floating-point tensor, got {got}")
    if x.dim() == 0 or x.shape[-1] == 0:
        raise ValueError(f"x: expected a last axis of at least 1, got shape {tuple(x.shape)}")
    if scale is None:
        scale = x.shape[-1] ** -0.5
    if isinstance(scale, bool) or not isinstance(scale, int | float):
        raise TypeError(f"scale: expected a number or None, got {type(scale).__name__}")
    if not 0 < scale < math.inf:
        raise ValueError(f"scale: expected a finite number greater than 0, got {scale}")
    return x.to(torch.promote_types(x.dtype, torch.float32)) * math.sqrt(scale)
