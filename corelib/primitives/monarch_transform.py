"""The discrete Fourier transform as a few dense matrix products (a Monarch decomposition).

The layout, the twiddles and the packing of real signals are written down in `monarch`, whose
convolution is built from these pieces. Oracle: ``torch.fft``.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Complex, Float
from torch import Tensor

LARGEST = 32


@functools.cache
def monarch_factors(points: int, largest: int = LARGEST) -> tuple[int, ...]:
    """``points`` as a product of few factors of about one size, each at most ``largest``.

    A prime factor above ``largest`` stays whole (a dense transform of that size).

    >>> monarch_factors(4096), monarch_factors(16384), monarch_factors(97)
    ((16, 16, 16), (32, 16, 32), (97,))
    """
    if isinstance(points, bool) or not isinstance(points, int) or points < 1:
        raise ValueError(f"points: expected a whole number of at least 1, got {points!r}")
    if isinstance(largest, bool) or not isinstance(largest, int) or largest < 2:
        raise ValueError(f"largest: expected a whole number of at least 2, got {largest!r}")
    for order in range(1, points.bit_length() + 1):
        factors = balanced_factors(points, order)
        if max(factors) <= largest:
            return factors
    return factors


def causal_points(L: int, K: int) -> int:
    """Packed points ``M``, a power of two, for ``L`` inputs and ``K`` taps: ``2 M >= L + K - 1``
    (taps beyond ``L`` reach nothing)."""
    return 1 << max(0, (L + min(K, L) - 2).bit_length() - 1)


def monarch_frequencies(factors: Sequence[int]) -> Tensor:
    """The frequency at each place of the permuted spectrum, ``k1 + N1 (k2 + N2 (...))``.

    >>> monarch_frequencies((2, 3)).tolist()
    [0, 2, 4, 1, 3, 5]
    """
    frequencies = torch.zeros(1, dtype=torch.long)
    for factor in reversed(check_factors(factors)):
        frequencies = (torch.arange(factor)[:, None] + factor * frequencies).flatten()
    return frequencies


def monarch_mirror(factors: Sequence[int]) -> Tensor:
    """Where the negative of each place's frequency lies."""
    frequencies = monarch_frequencies(factors)
    places = torch.empty_like(frequencies)
    places[frequencies] = torch.arange(len(frequencies))
    return places[-frequencies % len(frequencies)]


def monarch_fft(
    x: Complex[Tensor, "*rows points"], factors: Sequence[int]
) -> Complex[Tensor, "*rows M"]:
    """Spectrum of ``x``, followed by zeros up to ``M = prod(factors)``, in permuted order."""
    first, *rest = factors = check_factors(factors)
    M = math.prod(factors)
    if x.shape[-1] > M:
        raise ValueError(f"x: expected at most {M} points for factors {factors}, got {x.shape[-1]}")
    matrix = dft_matrix(first, x.dtype, x.device)
    if not rest:
        return x @ matrix[: x.shape[-1]]
    columns = M // first
    rows = -(-x.shape[-1] // columns)
    x = F.pad(x, (0, rows * columns - x.shape[-1])).unflatten(-1, (rows, columns))
    y = (matrix[:, :rows] @ x) * twiddles(first, columns, x.dtype, x.device)
    return monarch_fft(y, rest).flatten(-2)


def monarch_ifft(
    spectrum: Complex[Tensor, "*rows M"], factors: Sequence[int], points: int | None = None
) -> Complex[Tensor, "*rows points"]:
    """The first ``points`` points (default: all) that `monarch_fft` turns into ``spectrum``."""
    first, *rest = factors = check_factors(factors)
    M = spectrum.shape[-1]
    if math.prod(factors) != M:
        raise ValueError(f"factors: expected a product of {M}, got {factors}")
    points = M if points is None else points
    if not 0 <= points <= M:
        raise ValueError(f"points: expected 0 to {M}, got {points}")
    matrix = dft_matrix(first, spectrum.dtype, spectrum.device).conj() / first
    if not rest:
        return spectrum @ matrix[:, :points]
    columns = M // first
    y = monarch_ifft(spectrum.unflatten(-1, (first, columns)), rest)
    y = y * twiddles(first, columns, y.dtype, y.device).conj()
    return (matrix[: -(-points // columns)] @ y).flatten(-2)[..., :points]


def pack_real(x: Float[Tensor, "*rows N"]) -> Complex[Tensor, "*rows M"]:
    """Two neighbours in one complex number; an odd length gets one zero more."""
    x = F.pad(x, (0, x.shape[-1] % 2))
    return torch.complex(x[..., 0::2], x[..., 1::2])


def unpack_real(z: Complex[Tensor, "*rows M"], length: int) -> Float[Tensor, "*rows {length}"]:
    """The first ``length`` real numbers that `pack_real` made ``z`` of."""
    return torch.view_as_real(z).flatten(-2)[..., :length]


def first_product(
    x: Float[Tensor, "*batch points"], N1: int, N2: int, kept: int
) -> Complex[Tensor, "*batch {kept} {N2}"]:
    """The first ``kept`` rows of ``(F_N1 @ X) * W`` for real ``x`` with zeros behind it."""
    rows = -(-x.shape[-1] // N2)
    X = F.pad(x, (0, rows * N2 - x.shape[-1])).unflatten(-1, (rows, N2))
    dtype = x.dtype.to_complex()
    matrix = dft_matrix(N1, dtype, x.device)[:kept, :rows]
    y = torch.cat([matrix.real, matrix.imag]) @ X  # half of what a complex product costs
    y = torch.complex(y[..., :kept, :], y[..., kept:, :])
    return y * twiddles(N1, N2, dtype, x.device)[:kept]


def last_product(
    y: Complex[Tensor, "*batch rows N2"], N1: int, points: int
) -> Float[Tensor, "*batch {points}"]:
    """The transpose of `first_product`: real part of ``conj(F_N1) @ (conj(W) * y)``, laid flat."""
    kept, N2 = y.shape[-2:]
    y = y * twiddles(N1, N2, y.dtype, y.device)[:kept].conj()
    matrix = dft_matrix(N1, y.dtype, y.device)[: -(-points // N2), :kept]
    x = torch.cat([matrix.real, matrix.imag], 1) @ torch.cat([y.real, y.imag], -2)
    return x.flatten(-2)[..., :points]


def balanced_factors(points: int, order: int) -> tuple[int, ...]:
    """``order`` factors (fewer where ``points`` has fewer primes), each near the rest's root."""
    if order == 1 or points == 1:
        return (points,)
    divisors = [d for d in range(2, math.isqrt(points) + 1) if points % d == 0]
    divisors += [points // d for d in divisors]
    if not divisors:
        return (points,)
    root = math.log(points) / order
    first = min(divisors, key=lambda d: (abs(math.log(d) - root), d))
    return (first, *balanced_factors(points // first, order - 1))


def check_factors(factors: Sequence[int]) -> tuple[int, ...]:
    """``factors`` as a tuple; ValueError unless they are whole numbers of at least 1."""
    factors = tuple(factors)
    whole = all(isinstance(n, int) and not isinstance(n, bool) and n >= 1 for n in factors)
    if not factors or not whole:
        raise ValueError(f"factors: expected whole numbers of at least 1, got {factors}")
    return factors


def phase(turns: Tensor, period: int, dtype: torch.dtype, device) -> Tensor:
    """``exp(-2 pi i turns / period)``, the angle reduced as a whole number first."""
    with torch.inference_mode(False):  # what is kept must serve training as well
        angle = (turns % period).double() * (-2 * math.pi / period)
        return torch.polar(torch.ones_like(angle), angle).to(device=device, dtype=dtype)


@functools.lru_cache(maxsize=64)
def dft_matrix(n: int, dtype: torch.dtype, device) -> Tensor:
    """``F_n``, ``(n, n)``."""
    turns = torch.arange(n)
    return phase(turns[:, None] * turns, n, dtype, device)


@functools.lru_cache(maxsize=64)
def twiddles(first: int, columns: int, dtype: torch.dtype, device) -> Tensor:
    """``W[k1, n2]``, ``(first, columns)``; kept between calls, as `dft_matrix` is."""
    turns = torch.arange(first)[:, None] * torch.arange(columns)
    return phase(turns, first * columns, dtype, device)
