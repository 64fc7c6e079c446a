"""Hadamard matrices and the fast transform: a rotation made of additions.

``hadamard(n)`` holds only 1 and -1, and its rows stand at right angles: ``H H^T = n I``. Divided by
``sqrt(n)`` it is a rotation, which spreads every coordinate over all others. A vector with one
huge entry becomes one with ``n`` moderate ones; that is why quantisers like it (QuIP, arXiv
2307.13304; QuaRot, arXiv 2404.00456; Quamba, arXiv 2410.13229).

    hadamard(2 n) = [[H, H], [H, -H]]                        Sylvester, from hadamard(1) = [[1]]
    hadamard(q + 1) for a prime q = 4k + 3                   Paley, from squares modulo q
    hadamard(2^k m) = sylvester(2^k) (x) paley(m)            all other sizes here

`fwht` multiplies by it without forming it: ``H_(a b) x = S_a X H_b^T``, with ``x`` written as a
matrix ``X`` of ``a`` rows: ``O(n (a + b))``, with ``a`` and ``b`` about ``sqrt(n)``. Butterflies,
``log2(n)`` passes of sums and differences, need fewer operations and more trips through memory: on
a CPU they were slower at every size up to 1,024. Oracle: ``scipy.linalg.hadamard``.
"""

from __future__ import annotations

import functools
import math

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

SMALL = 128  # up to here one product is faster than two


@functools.cache
def _paley(m: int) -> Tensor:
    """``I + S`` with the skew matrix of squares modulo the prime ``m - 1``; ``[[1]]`` for 1."""
    if m == 1:
        return torch.ones(1, 1, dtype=torch.float64, device="cpu")
    q = m - 1
    square = torch.full((q,), -1.0, dtype=torch.float64, device="cpu")
    square[torch.arange(1, q, device="cpu") ** 2 % q] = 1.0
    square[0] = 0.0
    places = torch.arange(q, device="cpu")
    skew = torch.ones(m, m, dtype=torch.float64, device="cpu")
    skew[0, 0], skew[1:, 0] = 0.0, -1.0
    skew[1:, 1:] = square[(places[None, :] - places[:, None]) % q]
    return skew + torch.eye(m, dtype=torch.float64, device="cpu")


def _is_prime(q: int) -> bool:
    return q > 1 and all(q % d for d in range(2, int(q**0.5) + 1))


def hadamard_factors(n: int) -> tuple[int, int]:
    """``(2^k, m)`` with ``n = 2^k m``, the first as large as can be.

    Raises ValueError where none is known here: ``m`` must be 1, or one more than a prime 4k + 3.
    """
    if isinstance(n, bool) or not isinstance(n, int) or n < 1:
        raise ValueError(f"n: expected an int, at least 1, got {n!r}")
    power = n & -n
    while power:
        m = n // power
        if m == 1 or (m % 4 == 0 and _is_prime(m - 1)):
            return power, m
        power //= 2
    raise ValueError(
        f"n: expected a power of two times 1, 12, 20, 24, 44, ... (a prime 4k + 3, plus 1), got {n}"
    )


@functools.lru_cache(maxsize=16)
def _hadamard(n: int) -> Tensor:
    """On the CPU, whatever PyTorch's default device is: it is kept, and serves every device."""
    power, m = hadamard_factors(n)
    H = torch.ones(1, 1, dtype=torch.float64, device="cpu")
    while len(H) < power:
        H = torch.cat([torch.cat([H, H], 1), torch.cat([H, -H], 1)])
    return torch.kron(H, _paley(m))


def hadamard(
    n: int, *, dtype: torch.dtype = torch.float64, device: torch.device | str | None = None
) -> Shaped[Tensor, "n n"]:
    """A matrix of 1 and -1 with ``H @ H.T == n * I``, on PyTorch's default device or another.

    Raises ValueError for sizes that `hadamard_factors` does not know.
    """
    return torch.empty(n, n, dtype=dtype, device=device).copy_(_hadamard(n))


def fwht(x: Float[Tensor, "*rows n"]) -> Float[Tensor, "*rows n"]:
    """``x @ hadamard(n).T``; divide by ``sqrt(n)`` for a rotation.

    Raises TypeError for integers, ValueError for sizes that `hadamard_factors` does not know.
    """
    if not x.is_floating_point():
        raise TypeError(f"x: expected a floating-point tensor, got {x.dtype}")
    n = x.shape[-1]
    power, m = hadamard_factors(n)
    a = 1
    while n > SMALL and n // a > 2 * a and a < power:
        a *= 2
    y = x.reshape(-1, a, n // a) @ _hadamard(n // a).to(x).T
    y = y if a == 1 else _hadamard(a).to(x) @ y
    return y.reshape(x.shape)


def rotate(x: Float[Tensor, "*rows n"]) -> Float[Tensor, "*rows n"]:
    """``x @ hadamard(n).T / sqrt(n)``: the same vectors in Hadamard's basis, as long as before."""
    return fwht(x) / math.sqrt(x.shape[-1])
