"""Vandermonde sums: the convolution kernel of a diagonal state space model.

With poles in conjugate pairs, of which one each is kept, a diagonal system answers to a single 1 by

    kernel[c, t] = 2 Re sum_n weights[c, n] exp(rates[c, n] t)                 t = 0 .. L - 1

where ``rates`` are poles times step. As a matrix product this is ``weights`` times a Vandermonde
matrix of ``P L`` complex powers a channel. Nobody has to make them all: with ``t = J i + j``,

    exp(rate t) = exp(rate J i) exp(rate j)

so ``2 sqrt(L)`` powers a pole make all ``L``, and the sum is a small matrix product for each
channel, ``(L / J, 2 P) @ (2 P, J)`` in real numbers. The powers are made in float64 for every
dtype: an angle of thousands of radians has no digits to lose.

`vandermonde_moments` is the transpose: ``sum_t values[t] exp(rate t)``, by which a state sums up
its inputs; the backward pass is made of it. On a GPU the kernel `corelib.kernels.vandermonde`
makes every power in registers.

Cost: ``O(C P L)`` multiplications in matrix products, ``O(C P sqrt(L))`` powers, time and memory.
The sums are not differentiable twice. Oracle: the formula in complex128
(`vandermonde_sums_reference`).
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Complex, Float
from torch import Tensor

Pairs = Complex[Tensor, "C P"]


def vandermonde_sums_reference(weights: Pairs, rates: Pairs, L: int) -> Float[Tensor, "C L"]:
    """The formula as it stands; ``(C, P, L)`` complex numbers at once."""
    _check(weights, rates, L)
    t = torch.arange(L, dtype=weights.real.dtype, device=weights.device)
    return 2 * (weights[..., None] * torch.exp(rates[..., None] * t)).sum(1).real


def vandermonde_sums(weights: Pairs, rates: Pairs, L: int) -> Float[Tensor, "C L"]:
    """``kernel[c, t] = 2 Re sum_n weights[c, n] exp(rates[c, n] t)``, differentiable once.

    Args:
        weights: ``(C, P)`` complex; one of each conjugate pair. A real pole that stands alone takes
            half its weight.
        rates: ``(C, P)`` complex, of the same dtype: poles times step. Real parts are at most 0
            where the kernel is to stay bounded.
        L: how many taps.

    CUDA tensors take the Triton kernel. Raises ValueError or TypeError for arguments that do not
    fit.
    """
    _check(weights, rates, L)
    if weights.is_cuda:
        from corelib.kernels.vandermonde import vandermonde_sums as kernel

        return kernel(weights, rates, L)
    return _VandermondeSums.apply(weights, rates, L)


def vandermonde_moments(values: Float[Tensor, "B C L"], rates: Pairs) -> Complex[Tensor, "B C P"]:
    """``sum_t values[b, c, t] exp(rates[c, n] t)``: what a diagonal state makes of its inputs.

    The last value counts as the oldest one: flip the inputs for a causal state.
    """
    if values.shape[1] != rates.shape[0] or values.dtype != rates.real.dtype:
        raise ValueError(
            f"values: expected (B, {rates.shape[0]}, L) in {rates.real.dtype}, "
            f"got {tuple(values.shape)} in {values.dtype}"
        )
    L = values.shape[-1]
    fine, coarse = _tables(rates, L)
    pieces = _pieces(values, fine.shape[-1])
    sums = _to_complex(pieces.transpose(0, 1).flatten(1, 2) @ fine.mT)
    sums = sums.unflatten(1, pieces.shape[:1] + pieces.shape[2:3])
    return (sums.conj() * coarse[:, None]).sum(2).transpose(0, 1)


class _VandermondeSums(torch.autograd.Function):
    @staticmethod
    def forward(ctx, weights, rates, L):
        fine, coarse = _tables(rates, L)
        ctx.save_for_backward(weights, fine, coarse)
        weighed = 2 * weights[:, None] * coarse
        kernel = torch.cat([weighed.real, weighed.imag], -1) @ fine
        return kernel.flatten(1)[:, :L].contiguous()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, d_kernel):
        weights, fine, coarse = ctx.saved_tensors
        J = fine.shape[-1]
        pieces = _pieces(d_kernel, J)
        place = torch.arange(J, dtype=fine.dtype, device=fine.device)
        start = J * torch.arange(coarse.shape[1], dtype=fine.dtype, device=fine.device)
        sums = _to_complex(pieces @ fine.mT)
        times = _to_complex((pieces * place) @ fine.mT) + start[:, None] * sums
        d_weights = 2 * (sums * coarse.conj()).sum(1)
        d_rates = 2 * weights.conj() * (times * coarse.conj()).sum(1)
        return d_weights, d_rates, None


def _tables(rates: Tensor, L: int) -> tuple[Tensor, Tensor]:
    """``fine (C, 2 P, J)``: real parts of ``exp(rate j)``, then imaginary parts, negated; and
    ``coarse (C, L / J, P)``: ``exp(rate J i)``."""
    J = 1 << (math.isqrt(max(L, 1)).bit_length() - 1)
    growth, turn = rates.real.double()[..., None], rates.imag.double()[..., None]
    j = torch.arange(J, dtype=torch.float64, device=rates.device)
    size, angle = torch.exp(growth * j), turn * j
    fine = torch.cat([size * torch.cos(angle), -size * torch.sin(angle)], 1)
    i = J * torch.arange(-(-L // J), dtype=torch.float64, device=rates.device)
    size, angle = torch.exp(growth * i), turn * i
    coarse = torch.complex(size * torch.cos(angle), size * torch.sin(angle))
    return fine.to(rates.real.dtype), coarse.mT.to(rates.dtype)


def _pieces(values: Tensor, J: int) -> Tensor:
    """``(..., L) -> (..., L / J, J)``, with zeros behind the end."""
    values = torch.nn.functional.pad(values, (0, -values.shape[-1] % J))
    return values.unflatten(-1, (values.shape[-1] // J, J))


def _to_complex(x: Tensor) -> Tensor:
    return torch.complex(*x.chunk(2, -1))


def _check(weights: Tensor, rates: Tensor, L: int) -> None:
    for name, x in (("weights", weights), ("rates", rates)):
        if x.dim() != 2 or x.dtype not in (torch.complex64, torch.complex128):
            raise ValueError(
                f"{name}: expected (C, P) in complex64 or complex128, "
                f"got {tuple(x.shape)} in {x.dtype}"
            )
    if weights.shape != rates.shape or weights.dtype != rates.dtype:
        raise ValueError(
            f"rates: expected the shape and dtype of weights, {tuple(weights.shape)} in "
            f"{weights.dtype}, got {tuple(rates.shape)} in {rates.dtype}"
        )
    if weights.device != rates.device:
        raise ValueError(f"rates: expected the device of weights, got {rates.device}")
    if isinstance(L, bool) or not isinstance(L, int):
        raise TypeError(f"L: expected an int, got {type(L).__name__}")
    if L < 0:
        raise ValueError(f"L: expected at least 0, got {L}")
