"""Cauchy sums: how a diagonal state space answers at many frequencies at once.

With poles in conjugate pairs, of which one each is kept, and frequencies on the imaginary axis:

    sums[m, c, k] = sum_n    weights[m, c, n]  / (i sine[k] -      poles[c, n]  cosine[k])
                           + weights[m, c, n]* / (i sine[k] -      poles[c, n]* cosine[k])

The frequency is ``i sine / cosine``; keeping the two apart keeps it finite where cosine is 0, at
the highest frequency of a discretised system. Several weights share the denominators: S4 needs four
sums at once (`corelib.state_space.s4`).

Written in real numbers, the terms ``1 / (...)`` of one channel are a matrix with a few rows a pole
and a column a frequency, and the sums are a product with it. On a CPU the matrix is made a few
channels at a time, so that it stays in the cache, and made again for the backward pass rather than
kept; on a GPU the kernel `corelib.kernels.cauchy` never writes it down.

Cost: ``O(C P K)`` time; memory beyond inputs and outputs is bounded. Not differentiable twice, nor
in the frequencies. Near a pole close to the axis the difference ``sine - poles.imag * cosine``
cancels: float32 is then only as good as the pole's own rounding.
Oracle: the complex formula above (`cauchy_sums_reference`), in complex128.
"""

from __future__ import annotations

import torch
from jaxtyping import Complex, Float
from torch import Tensor

Weights = Complex[Tensor, "M C P"]
Poles = Complex[Tensor, "C P"]
Frequencies = Float[Tensor, " K"]
Sums = Complex[Tensor, "M C K"]

CACHED = 1 << 17  # numbers in one temporary: half a megabyte in float32


def cauchy_sums_reference(
    weights: Weights, poles: Poles, sine: Frequencies, cosine: Frequencies
) -> Sums:
    """The formula as it stands; ``(M, C, P, K)`` complex numbers at once."""
    _check(weights, poles, sine, cosine)
    near = 1j * sine - poles[..., None] * cosine
    far = 1j * sine - poles[..., None].conj() * cosine
    return (weights[..., None] / near + weights[..., None].conj() / far).sum(-2)


def cauchy_sums(weights: Weights, poles: Poles, sine: Frequencies, cosine: Frequencies) -> Sums:
    """``M`` Cauchy sums over the same poles, at ``K`` frequencies, for ``C`` channels.

    Args:
        weights: ``(M, C, P)`` complex, numerators; their conjugates belong to the conjugate poles.
        poles: ``(C, P)`` complex, off the imaginary axis.
        sine, cosine: ``(K,)`` real, not both 0 anywhere; the frequencies are ``i sine / cosine``.

    Returns:
        ``(M, C, K)`` complex. CUDA tensors take the Triton kernel.

    Raises ValueError or TypeError for shapes, dtypes or devices that do not fit.
    """
    _check(weights, poles, sine, cosine)
    if weights.is_cuda:
        from corelib.kernels.cauchy import cauchy_sums as kernel

        return kernel(weights, poles, sine, cosine)
    return _CauchySums.apply(weights, poles, sine, cosine)


class _CauchySums(torch.autograd.Function):
    @staticmethod
    def forward(ctx, weights, poles, sine, cosine):
        ctx.save_for_backward(weights, poles, sine, cosine)
        (M, C, _), K = weights.shape, sine.shape[0]
        rows, out = _rows(weights), sine.new_empty(C, 2 * M, K)
        for part, terms in _stretches(poles, sine, cosine):
            torch.bmm(rows[part], terms, out=out[part])
        out = out.unflatten(1, (2, M))
        return torch.complex(out[:, 0].transpose(0, 1), out[:, 1].transpose(0, 1))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, d_sums):
        weights, poles, sine, cosine = ctx.saved_tensors
        rows, d_poles = _rows(weights), torch.empty_like(poles)
        d_rows = torch.empty_like(rows)
        d_out = torch.cat([d_sums.real, d_sums.imag]).transpose(0, 1).contiguous()
        for part, terms in _stretches(poles, sine, cosine):
            torch.bmm(d_out[part], terms.mT, out=d_rows[part])
            d_poles[part] = _through_terms(terms, rows[part].mT @ d_out[part], cosine)
        return _from_rows(d_rows, weights.shape[0]), d_poles, None, None


def _stretches(poles: Tensor, sine: Tensor, cosine: Tensor):
    """``(channels, terms (channels, 4 P, K))``, a few channels at a time, in one buffer."""
    C, P = poles.shape
    many = max(1, min(C, CACHED // max(1, P * sine.shape[0])))
    buffer = sine.new_empty(many, 4 * P, sine.shape[0])
    for first in range(0, C, many):
        part = slice(first, min(first + many, C))
        terms = buffer[: part.stop - first]
        _fill_terms(terms.unflatten(1, (4, P)), poles[part], sine, cosine)
        yield part, terms


def _fill_terms(terms: Tensor, poles: Tensor, sine: Tensor, cosine: Tensor) -> None:
    """Real and imaginary parts of both fractions, up to signs that `_rows` knows.

    ``1 / (i s - (a + i b) c) = (-a c + i (b c - s)) / ((a c)^2 + (b c - s)^2)``.
    """
    decay, turn = poles.real[..., None] * cosine, poles.imag[..., None] * cosine
    near_real, far_real, near_imag, far_imag = terms.unbind(1)
    square = decay * decay
    difference = turn - sine
    denominator = torch.addcmul(square, difference, difference)
    torch.div(decay, denominator, out=near_real)
    torch.div(difference, denominator, out=near_imag)
    total = turn.add_(sine)
    denominator = torch.addcmul(square, total, total, out=square)
    torch.div(decay, denominator, out=far_real)
    torch.div(total, denominator, out=far_imag)


def _rows(weights: Tensor) -> Tensor:
    """``(M, C, P)`` -> ``(C, 2 M, 4 P)``: real parts of the sums, then imaginary parts."""
    a, b = weights.real, weights.imag
    real, imaginary = torch.cat([-a, -a, -b, -b], -1), torch.cat([-b, b, a, -a], -1)
    return torch.cat([real, imaginary]).transpose(0, 1).contiguous()


def _from_rows(d_rows: Tensor, M: int) -> Tensor:
    """The transpose of `_rows`."""
    (ra, rb, rc, rd), (ia, ib, ic, id_) = (
        half.unflatten(-1, (4, -1)).unbind(2) for half in (d_rows[:, :M], d_rows[:, M:])
    )
    return torch.complex(-ra - rb + ic - id_, -rc - rd - ia + ib).transpose(0, 1)


def _through_terms(terms: Tensor, d_terms: Tensor, cosine: Tensor) -> Tensor:
    """Gradient of the poles: the derivative of ``1 / (i s - pole c)`` is ``c`` times its square."""
    (x, y), (d_x, d_y) = terms.chunk(2, 1), d_terms.chunk(2, 1)
    real_square = torch.addcmul(x * x, y, y, value=-1)
    half_imag_square = x * y
    real = torch.addcmul(d_x * real_square, d_y, half_imag_square, value=2) @ cosine
    imag = torch.addcmul(d_y * real_square, d_x, half_imag_square, value=-2) @ cosine
    return torch.complex(-real, imag).unflatten(1, (2, -1)).sum(1)


def _check(weights: Tensor, poles: Tensor, sine: Tensor, cosine: Tensor) -> None:
    wide = {torch.complex64: torch.float32, torch.complex128: torch.float64}
    for name, x, axes in (("weights", weights, 3), ("poles", poles, 2)):
        if x.dim() != axes or x.dtype not in wide or x.dtype != weights.dtype:
            raise ValueError(
                f"{name}: expected {axes} axes in complex64 or complex128, the same for both, "
                f"got {tuple(x.shape)} in {x.dtype}"
            )
    if weights.shape[1:] != poles.shape:
        raise ValueError(
            f"weights: expected channels and poles {tuple(poles.shape)}, got {weights.shape[1:]}"
        )
    for name, x in (("sine", sine), ("cosine", cosine)):
        if x.dim() != 1 or x.shape != sine.shape or x.dtype != wide[weights.dtype]:
            raise ValueError(
                f"{name}: expected one axis in {wide[weights.dtype]}, as long as the other, "
                f"got {tuple(x.shape)} in {x.dtype}"
            )
    devices = {str(x.device) for x in (weights, poles, sine, cosine)}
    if len(devices) > 1:
        raise ValueError(f"weights, poles, sine, cosine: expected one device, got {devices}")
