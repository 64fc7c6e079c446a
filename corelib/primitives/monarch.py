"""The Fourier transform as a few dense matrix products, and the long convolution built from them.

    y[t] = out_gate[t] * sum_{j <= t} kernel[t - j] (in_gate u)[j]                (`monarch_conv`)

FlashFFTConv (arXiv 2311.05908, section 3) cuts a transform into steps that matrix units can do; a
matrix made of such steps is called a *Monarch* matrix.

**One split.** With ``M = N1 N2``, write the points row by row as ``X (N1, N2)``, so that
``n = n1 N2 + n2``; let ``F_n[a, b] = exp(-2 pi i a b / n)``:

    Y = ((F_N1 @ X) * W) @ F_N2           W[k1, n2] = exp(-2 pi i k1 n2 / M), the twiddles
    Y[k1, k2] = spectrum[k1 + N1 k2]

**Order p.** The rows of ``(F_N1 @ X) * W`` are transformed by the same rule with the remaining
factors. Entry ``[k1, k2, k3 ...]``, laid out flat in this order, is frequency
``k1 + N1 (k2 + N2 (k3 + ...))`` (`monarch_frequencies`). A product of spectra does not mind the
order, so nothing is ever put in place; the inverse undoes the steps from the last to the first,
with conjugate matrices and twiddles and ``1 / M``.

**Real signals.** ``pack_real`` makes ``M`` complex points of ``N = 2 M`` real ones,
``z[m] = x[2 m] + i x[2 m + 1]``. With ``Z' [f] = conj(Z[-f])`` (`monarch_mirror` says where ``-f``
lies) the halves' spectra are ``even = (Z + Z') / 2`` and ``odd = (Z - Z') / 2i``, and a convolution
around ``N`` points is, on packed spectra (``w[f] = exp(-2 pi i f / M)``, one step of the odd half),

    Z_y = direct * Z_u + mirrored * Z_u'
    direct = even_k + i (1 - w) / 2 odd_k           mirrored = i (1 + w) / 2 odd_k

Its transpose, which the backward pass needs, has ``conj(direct)`` and ``-conj(mirrored)``. A kernel
that would rather not look up ``-f`` can put two rows of a batch into one complex signal
(``u_0 + i u_1``, all ``N`` points) and multiply by the plain spectrum of the taps: the real and the
imaginary part are the two results; in ``spectrum(dy) * conj(spectrum(u))`` the real part after the
inverse is the sum of both rows' gradients of the taps.

**Zeros.** Only the first ``L`` of ``N`` points of a causal convolution hold anything: the first
product skips the empty rows of ``X``, the last one the rows that nobody will read.

Exact for every factorisation. The backward pass recomputes the spectra: between the passes only
the inputs are kept. Half precision is computed in float32. Not differentiable twice.

Cost: ``8 M (N1 + N2 + ...)`` operations a transform, against ``5 M log2 M`` for the classic FFT:
more arithmetic, of the kind that matrix units do many times faster. A CPU has no such units, so
there the FFT wins, and without ``factors`` `monarch_conv` takes it. On a GPU it takes the kernel
`corelib.kernels.monarch_fft_conv` where the circle fits on the chip, 4,096 points in half
precision (products of half-precision factors, float32 sums) and 512 in float32; beyond, the FFT.
Oracle: ``torch.fft``.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Complex, Float
from torch import Tensor

from .fft_conv import _check, _check_gates, _convolve, gated_fft_conv
from .monarch_transform import (
    causal_points,
    check_factors,
    monarch_factors,
    monarch_fft,
    monarch_frequencies,
    monarch_ifft,
    monarch_mirror,
    pack_real,
    phase,
    unpack_real,
)

__all__ = [
    "causal_points",
    "monarch_conv",
    "monarch_factors",
    "monarch_fft",
    "monarch_frequencies",
    "monarch_ifft",
    "monarch_mirror",
    "pack_real",
    "packed_coefficients",
    "unpack_real",
]


def packed_coefficients(
    spectrum: Complex[Tensor, "*rows M"], factors: Sequence[int]
) -> tuple[Complex[Tensor, "*rows M"], Complex[Tensor, "*rows M"]]:
    """``(direct, mirrored)``, as in the module's docstring, of the spectrum of packed taps."""
    mirror, half_minus, half_plus = _packing(
        tuple(factors), spectrum.real.dtype, str(spectrum.device)
    )
    reflected = spectrum[..., mirror].conj()
    i_odd = (spectrum - reflected) / 2
    return (spectrum + reflected) / 2 + half_minus * i_odd, half_plus * i_odd


def monarch_conv(
    u: Float[Tensor, "*batch_and_channels L"],
    kernel: Float[Tensor, "*channels K"],
    in_gate: Float[Tensor, "*batch_and_channels L"] | None = None,
    out_gate: Float[Tensor, "*batch_and_channels L"] | None = None,
    causal: bool = True,
    factors: Sequence[int] | None = None,
) -> Float[Tensor, "*batch_and_channels L"]:
    """``out_gate * conv(in_gate * u, kernel)``; channels as in `fft_conv`.

    Args:
        causal: False convolves around a circle of ``L`` points, taps beyond it coming round.
        factors: do it with matrix products of these sizes; their product is the number of packed
            points, at least half of ``L + K - 1`` (`causal_points`, `monarch_factors`). None: the
            fastest way on this device, which on a CPU is the FFT.

    Raises:
        ValueError, TypeError: as `fft_conv`; gates not of ``u``'s shape; too few points.
    """
    _check(u, kernel=kernel)
    _check_gates(u, in_gate=in_gate, out_gate=out_gate)
    if u.numel() == 0:
        return u.clone()
    if not causal:
        return _around(u, kernel, in_gate, out_gate, factors)
    if factors is None:
        fused = _fused(u, kernel, in_gate, out_gate) if u.is_cuda else None
        return gated_fft_conv(u, kernel, in_gate, out_gate) if fused is None else fused
    L, taps = u.shape[-1], kernel[..., : u.shape[-1]]
    factors = _enough(factors, L + taps.shape[-1] - 1, "L + K - 1")
    return _by_products(u, taps, in_gate, out_gate, factors, L)


def _around(u, kernel, in_gate, out_gate, factors) -> Tensor:
    """A circle of ``L`` points: as it is, or a line of ``2 L - 1`` whose end comes round."""
    L = u.shape[-1]
    taps = F.pad(kernel, (0, -kernel.shape[-1] % L)).unflatten(-1, (-1, L)).sum(-2)
    if factors is None:
        fused = _fused(u, taps, in_gate, out_gate, L) if u.is_cuda else None
        return _gated(_convolve(_gated(u, in_gate), taps, L), out_gate) if fused is None else fused
    factors = check_factors(factors)
    if 2 * math.prod(factors) == L:
        return _by_products(u, taps, in_gate, out_gate, factors, L)
    factors = _enough(factors, 2 * L - 1, "2 L - 1 (or of L itself)")
    line = _by_products(u, taps, in_gate, None, factors, 2 * L - 1)
    return _gated(line[..., :L] + F.pad(line[..., L:], (0, 1)), out_gate)


def _fused(
    u, kernel, in_gate=None, out_gate=None, circle: int | None = None, keep: tuple[int, ...] = ()
) -> Tensor | None:
    """By the kernel, ``keep`` a block of the spectrum; None where a chip has no room for it."""
    from corelib.kernels._monarch_tables import circle_for

    L, K = u.shape[-1], kernel.shape[-1]
    fits = circle_for(circle or L + min(K, L) - 1, u.dtype)
    if fits is None or circle not in (None, fits):
        return None
    from corelib.kernels.monarch_fft_conv import monarch_fft_conv, sparse_conv

    H, shape = kernel.shape[:-1].numel(), u.shape
    u, in_gate, out_gate = (x if x is None else x.reshape(-1, H, L) for x in (u, in_gate, out_gate))
    run = sparse_conv if keep else monarch_fft_conv
    return run(u, kernel.reshape(H, K), *keep, in_gate, out_gate, circle=circle).view(shape)


def _by_products(u, taps, in_gate, out_gate, factors, length: int) -> Tensor:
    if u.dtype not in (torch.float16, torch.bfloat16):
        return _MonarchConv.apply(u, taps, in_gate, out_gate, factors, length)
    wide = (x if x is None else x.float() for x in (u, taps, in_gate, out_gate))
    return _MonarchConv.apply(*wide, factors, length).to(u.dtype)


def _enough(factors: Sequence[int], points: int, what: str) -> tuple[int, ...]:
    factors = check_factors(factors)
    if 2 * math.prod(factors) < points:
        raise ValueError(
            f"factors: expected a product of at least half of {what} = {points}, got {factors}"
        )
    return factors


class _MonarchConv(torch.autograd.Function):
    """Keeps its inputs and nothing else; spectra are computed again where they are needed."""

    @staticmethod
    def forward(ctx, u, taps, in_gate, out_gate, factors, length):
        ctx.save_for_backward(u, taps, in_gate, out_gate)
        ctx.factors = factors
        spectrum = _spectrum(_gated(u, in_gate), factors)
        return _gated(_filter(spectrum, _coefficients(taps, factors), factors, length), out_gate)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, d_out):
        u, taps, in_gate, out_gate = ctx.saved_tensors
        factors, needs = ctx.factors, ctx.needs_input_grad
        d_u = d_taps = d_in = d_out_gate = None
        u_spectrum = _spectrum(_gated(u, in_gate), factors) if needs[1] or needs[3] else None
        direct, mirrored = _coefficients(taps, factors)
        if needs[3]:
            y = _filter(u_spectrum, (direct, mirrored), factors, d_out.shape[-1])
            d_out_gate = d_out * y
        d_spectrum = _spectrum(_gated(d_out, out_gate), factors)
        if needs[0] or needs[2]:
            transposed = direct.conj(), -mirrored.conj()
            d_inside = _filter(d_spectrum, transposed, factors, u.shape[-1])
            d_u = _gated(d_inside, in_gate) if needs[0] else None
            d_in = d_inside * u if needs[2] else None
        if needs[1]:
            d_taps = _correlate(d_spectrum, u_spectrum, factors, taps)
        return d_u, d_taps, d_in, d_out_gate, None, None


def _gated(x: Tensor, gate: Tensor | None) -> Tensor:
    return x if gate is None else x * gate


def _spectrum(x: Tensor, factors) -> Tensor:
    return monarch_fft(pack_real(x), factors)


def _coefficients(taps: Tensor, factors) -> tuple[Tensor, Tensor]:
    return packed_coefficients(_spectrum(taps, factors), factors)


def _product(spectrum: Tensor, coefficients: tuple[Tensor, Tensor], factors) -> Tensor:
    direct, mirrored = coefficients
    mirror, *_ = _packing(tuple(factors), spectrum.real.dtype, str(spectrum.device))
    return direct * spectrum + mirrored * spectrum[..., mirror].conj()


def _filter(spectrum: Tensor, coefficients: tuple[Tensor, Tensor], factors, length) -> Tensor:
    product = _product(spectrum, coefficients, factors)
    return unpack_real(monarch_ifft(product, factors, -(-length // 2)), length)


def _correlate(d_spectrum: Tensor, u_spectrum: Tensor, factors, taps: Tensor) -> Tensor:
    """The gradient of the taps: ``sum_t dy[t] u[t - j]``, summed over the batch as spectra."""
    direct, mirrored = packed_coefficients(u_spectrum, factors)
    spectrum = _product(d_spectrum, (direct.conj(), -mirrored.conj()), factors)
    batch = tuple(range(spectrum.dim() - taps.dim()))
    spectrum = spectrum.sum(batch) if batch else spectrum
    K = taps.shape[-1]
    return unpack_real(monarch_ifft(spectrum, factors, -(-K // 2)), K)


@functools.lru_cache(maxsize=16)
def _packing(factors: tuple[int, ...], dtype: torch.dtype, device: str) -> tuple[Tensor, ...]:
    """The mirror, ``(1 - w) / 2`` and ``(1 + w) / 2``, in permuted order."""
    frequencies = monarch_frequencies(factors)
    w = phase(frequencies, len(frequencies), dtype.to_complex(), device)
    return monarch_mirror(factors).to(device), (1 - w) / 2, (1 + w) / 2
