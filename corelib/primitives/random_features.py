"""Positive random features: vectors whose inner product is ``exp(x . y)`` on average.

    phi(x)_f = exp(w_f . x - |x|^2 / 2) / sqrt(m)         E_w[phi(x) . phi(y)] = exp(x . y)

with ``m`` directions ``w_f`` drawn from the standard normal law (Choromanski et al., Performer,
arXiv 2009.14794, lemma 1). All features are positive, so that sums of them can be divided by. The
price is in the norms: relative to ``exp(x . y)`` the variance of one pair's estimate is

    (exp(|x + y|^2) - 1) / m                               (`relative_variance`; lemma 2)

for independent directions, and a little less for orthogonal ones. No number of features pays for
long vectors: give the features short ones.

Oracle: the mean over many draws, in the tests.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

from ._checks import check_same_kind

Directions = Float[Tensor, "m D"]


def positive_features(
    x: Float[Tensor, "*axes D"], directions: Directions
) -> Float[Tensor, "*axes m"]:
    """``phi(x)`` of this module, in x's dtype; an entry is at most ``exp(|w|^2 / 2)``.

    Raises ValueError or TypeError for widths or dtypes that do not fit.
    """
    return log_positive_features(x, directions).exp()


def log_positive_features(
    x: Float[Tensor, "*axes D"], directions: Directions
) -> Float[Tensor, "*axes m"]:
    """The logarithm of `positive_features`: subtract a maximum from it before `exp` where ``|x|``
    is so large that all features of a position would vanish."""
    check_same_kind(x=x, directions=directions)
    if directions.dim() != 2 or x.dim() == 0 or x.shape[-1] != directions.shape[1]:
        raise ValueError(
            f"directions: expected shape (m, D) with the width of x, {tuple(x.shape)[-1:]}, got "
            f"{tuple(directions.shape)}"
        )
    if len(directions) == 0:
        raise ValueError("directions: expected at least one, got 0")
    half_square = 0.5 * x.square().sum(-1, keepdim=True)
    return x @ directions.T - half_square - 0.5 * math.log(len(directions))


def gaussian_directions(
    features: int, width: int, *, generator: torch.Generator | None = None
) -> Directions:
    """``(features, width)`` independent standard normal numbers, float32."""
    _check_sizes(features, width)
    return torch.randn(features, width, generator=generator)


def orthogonal_directions(
    features: int, width: int, *, generator: torch.Generator | None = None
) -> Directions:
    """Each direction as if it were normal, but ``width`` at a time at right angles; float32.

    Blocks of rotations times lengths drawn like those of normal vectors. Estimates stay unbiased
    and vary less.
    """
    _check_sizes(features, width)
    lengths = torch.randn(features, width, generator=generator, dtype=torch.float64).norm(dim=1)
    blocks = -(-features // width)
    normal = torch.randn(blocks, width, width, generator=generator, dtype=torch.float64)
    rotations, upper = torch.linalg.qr(normal)
    rotations = rotations * upper.diagonal(dim1=1, dim2=2).sign()[:, None]  # uniform on rotations
    return (lengths[:, None] * rotations.mT.flatten(0, 1)[:features]).float()


def relative_variance(
    x: Float[Tensor, "*axes D"], y: Float[Tensor, "*axes D"], features: int
) -> Float[Tensor, "*axes"]:
    """Variance of ``phi(x) . phi(y) / exp(x . y)`` with independent directions."""
    return torch.expm1((x + y).square().sum(-1)) / features


def _check_sizes(features: int, width: int) -> None:
    for name, value in (("features", features), ("width", width)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{name}: expected a whole number of at least 1, got {value!r}")
