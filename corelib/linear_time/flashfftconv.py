"""FlashFFTConv: long convolutions as matrix products, and what can be skipped (arXiv 2311.05908).

Idea: a Fourier transform written as a few small dense products (a Monarch decomposition) runs on
matrix units, keeps a whole sequence on the chip between transform, product with the kernel's
spectrum, inverse and gates, and makes leaving something out as easy as skipping a block.

    y = out_gate * conv(in_gate * u, kernel)                 all of it: `primitives.monarch_conv`
    partial:           only the first M taps of the kernel, so that M - 1 past inputs are enough
    frequency-sparse:  only the block k1 < keep1, k2 < keep2 of the kernel's spectrum, laid out as
                       (N1, N2) with frequency k1 + N1 k2, and the negatives of its frequencies

A real output needs the negative frequencies, and they come for free: a kept frequency whose
negative lies outside the block counts twice, and the imaginary part is never computed. So
``keep1 = N1`` with ``keep2 = N2 / 2`` drops no more than the middle frequency, at half the work,
and a smaller ``keep2`` is a low-pass filter (what the released example does).

| here            | paper             | what                                                     |
|:----------------|:------------------|:---------------------------------------------------------|
| u, kernel       | u, k              | (..., *channels, L), (*channels, K)                      |
| in_gate, out_gate | w, v            | the shape of u                                           |
| factors         | N_1 ... N_p       | sides of the products, `monarch_factors`                 |
| taps (M)        | partial length    | taps that are kept                                       |
| keep1, keep2    | sparsity pattern  | rows and columns of the spectrum that are kept           |

Exact: every convolution equals its definition, with the zeros written out. The paper's patterns
have more dimensions than two (a block of each factor); ours has the two that a product of order 2
has. Left out: kernels of order 3 and the outer pass through main memory; our kernel holds circles
up to 4,096 points.
Cost: `fft_cost_model` (section 3.2), operations and bytes counted, seconds *modelled*. On a CPU the
FFT of `gated_fft_conv` is the faster way, and `monarch_conv` takes it. Kernel:
`corelib.kernels.monarch_fft_conv`. Oracle: ``torch.fft``; compare ``flashfftconv/sparse_conv.py``
of HazyResearch/flash-fft-conv.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from corelib.primitives import causal_short_conv, fft_conv
from corelib.primitives._checks import check_same_kind
from corelib.primitives.fft_conv import _check, fast_length
from corelib.primitives.monarch import _fused, monarch_conv
from corelib.primitives.monarch_transform import (
    check_factors,
    dft_matrix,
    first_product,
    last_product,
    monarch_frequencies,
)

from .fft_costs import FFTCost, fft_cost_model, library_cost_model

__all__ = [
    "FFTCost",
    "example",
    "fft_cost_model",
    "frequency_sparse_conv",
    "kept_frequencies",
    "library_cost_model",
    "monarch_conv",
    "partial_conv",
]

Inputs = Float[Tensor, "*batch_and_channels L"]
Taps = Float[Tensor, "*channels K"]


def partial_conv(
    u: Inputs,
    kernel: Taps,
    taps: int,
    state: Float[Tensor, "*batch_and_channels inputs"] | None = None,
    return_state: bool = False,
) -> Inputs | tuple[Inputs, Float[Tensor, "*batch_and_channels inputs"]]:
    """Causal convolution with the first ``taps`` of ``kernel``; ``taps = K`` is all of it.

    Args:
        state: the ``taps - 1`` inputs before ``u``, what an earlier call returned; None: zeros.
        return_state: return ``(y, state)``, to go on with the next piece of a long sequence.

    Raises ValueError or TypeError as `fft_conv` does, and for a state of another size.
    """
    _check(u, kernel=kernel)
    check_same_kind(u=u, **({} if state is None else {"state": state}))
    if isinstance(taps, bool) or not isinstance(taps, int) or not 1 <= taps <= kernel.shape[-1]:
        raise ValueError(f"taps: expected 1 to {kernel.shape[-1]}, got {taps!r}")
    wanted = (*u.shape[:-1], taps - 1)
    if state is not None and tuple(state.shape) != wanted:
        raise ValueError(f"state: expected shape {wanted}, got {tuple(state.shape)}")
    first, L = kernel[..., :taps], u.shape[-1]
    seen = u if state is None else torch.cat([state, u], -1)
    if L == 1:
        window = F.pad(seen, (taps - seen.shape[-1], 0))
        y = (window * first.flip(-1)).sum(-1, keepdim=True)
    else:
        y = _short(seen, first)[..., seen.shape[-1] - L :]
    if not return_state:
        return y
    return y, F.pad(seen, (max(0, taps - 1 - seen.shape[-1]), 0))[..., -(taps - 1) or L :]


def _short(u: Tensor, taps: Tensor) -> Tensor:
    """The quickest way for so many taps: directly, around one circle, or block by block."""
    training = torch.is_grad_enabled() and (u.requires_grad or taps.requires_grad)
    wide = u.dtype.itemsize >= 4 and u.numel() > 0
    if wide and taps.shape[-1] <= (16 if training else 128):
        weight = taps.flip(-1).reshape(-1, taps.shape[-1])
        rows = u.reshape(-1, len(weight), u.shape[-1])
        return causal_short_conv(rows, weight).view(u.shape)
    circle = fast_length(8 * taps.shape[-1])
    blocks = wide and not training and u.shape[-1] > 2 * circle
    return _in_blocks(u, taps, circle) if blocks else fft_conv(u, taps)


def _in_blocks(u: Tensor, taps: Tensor, circle: int) -> Tensor:
    """Cut ``u`` into blocks, convolve each, add what hangs over to the next: ``O(L log circle)``,
    and a block fits a cache."""
    L, M = u.shape[-1], taps.shape[-1]
    block = circle - M + 1
    pieces = F.pad(u, (0, -L % block)).unflatten(-1, (-1, block))
    spectrum = torch.fft.rfft(pieces, n=circle) * torch.fft.rfft(taps, n=circle)[..., None, :]
    full = torch.fft.irfft(spectrum, n=circle)
    over = F.pad(full[..., :-1, block:], (0, block - M + 1, 1, 0))
    return (full[..., :block] + over).flatten(-2)[..., :L]


def frequency_sparse_conv(
    u: Inputs, kernel: Taps, keep1: int, keep2: int, factors: tuple[int, int] | None = None
) -> Inputs:
    """Causal convolution with a block of the kernel's spectrum; the rest is not computed.

    Args:
        keep1, keep2: frequencies ``k1 + N1 k2`` with ``k1 < keep1`` and ``k2 < keep2`` are kept,
            and their negatives.
        factors: ``(N1, N2)`` with ``N1 N2 >= L + K - 1``; None: about square, powers of two.

    Dropping frequencies rings: unlike the kernel itself, the filtered one reaches back in time
    and round the circle of ``N1 N2`` points.

    Raises ValueError or TypeError as `fft_conv` does, and for sizes that do not fit.
    """
    _check(u, kernel=kernel)
    if u.numel() == 0:
        return u.clone()
    L, taps = u.shape[-1], kernel[..., : u.shape[-1]]
    N1, N2 = _two_factors(factors, L + taps.shape[-1] - 1)
    _check_keep(keep1=(keep1, N1), keep2=(keep2, N2))
    fused = _on_chip(u, taps, (N1, N2), (keep1, keep2)) if u.is_cuda else None
    if fused is not None:
        return fused
    wide = torch.promote_types(u.dtype, torch.float32)
    sides = N1, N2, keep1, keep2
    spectrum = _block(u.to(wide), *sides) * _block(taps.to(wide), *sides)
    spectrum = spectrum * _weights(N1, N2, keep1, keep2).to(spectrum.real) / (N1 * N2)
    y = spectrum @ dft_matrix(N2, spectrum.dtype, u.device)[:keep2].conj()
    return last_product(y, N1, L).to(u.dtype)


def _on_chip(u: Tensor, taps: Tensor, factors: tuple, keep: tuple) -> Tensor | None:
    """By the kernel, where it splits this circle in the same way."""
    from corelib.kernels._monarch_tables import SIDES

    circle = math.prod(factors)
    return _fused(u, taps, circle=circle, keep=keep) if SIDES.get(circle) == factors else None


def kept_frequencies(factors: tuple[int, int], keep1: int, keep2: int) -> Bool[Tensor, " N"]:
    """Which of the ``N1 N2`` frequencies, in natural order, `frequency_sparse_conv` keeps."""
    N1, N2 = _two_factors(factors, 1)
    _check_keep(keep1=(keep1, N1), keep2=(keep2, N2))
    kept = torch.zeros(N1 * N2, dtype=torch.bool)
    block = monarch_frequencies((N1, N2)).view(N1, N2)[:keep1, :keep2].flatten()
    kept[block] = True
    kept[-block % (N1 * N2)] = True
    return kept


def _block(x: Tensor, N1: int, N2: int, keep1: int, keep2: int) -> Tensor:
    """The kept block of the spectrum of real ``x``: both products are narrower for it."""
    y = first_product(x, N1, N2, keep1)
    return y @ dft_matrix(N2, y.dtype, x.device)[:, :keep2]


def _weights(N1: int, N2: int, keep1: int, keep2: int) -> Tensor:
    """2 where the negative frequency lies outside the block, 1 where it is there itself."""
    block = monarch_frequencies((N1, N2)).view(N1, N2)[:keep1, :keep2]
    inside = torch.zeros(N1 * N2, dtype=torch.bool)
    inside[block.flatten()] = True
    return 2.0 - inside[-block % (N1 * N2)].double()


def _two_factors(factors: tuple[int, int] | None, points: int) -> tuple[int, int]:
    if factors is None:
        power = max(0, (points - 1).bit_length())
        return 1 << (power + 1) // 2, 1 << power // 2
    factors = check_factors(factors)
    if len(factors) != 2 or math.prod(factors) < points:
        raise ValueError(
            f"factors: expected two with a product of at least {points}, got {factors}"
        )
    return factors


def _check_keep(**keeps: tuple[int, int]) -> None:
    for name, (keep, largest) in keeps.items():
        if isinstance(keep, bool) or not isinstance(keep, int) or not 1 <= keep <= largest:
            raise ValueError(f"{name}: expected 1 to {largest}, got {keep!r}")


def example() -> dict:
    """Two channels, eleven steps.

    >>> monarch_conv(**example(), factors=(2, 6)).shape
    torch.Size([1, 2, 11])
    """
    generator = torch.Generator().manual_seed(0)
    u, in_gate, out_gate = torch.randn(3, 1, 2, 11, generator=generator)
    kernel = torch.randn(2, 11, generator=generator) * 0.7 ** torch.arange(11)
    return dict(u=u, kernel=kernel, in_gate=in_gate, out_gate=out_gate)
