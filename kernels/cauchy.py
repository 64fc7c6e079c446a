"""Cauchy sums over conjugate pairs of poles, forward and backward.

    sums[m, c, k] = sum_n weights[m, c, n] x[c, n, k] + weights[m, c, n]* y[c, n, k]
    x = 1 / (i sine[k] - poles[c, n] cosine[k])      y = 1 / (i sine[k] - poles[c, n]* cosine[k])

The kernel of S4 (arXiv 2111.00396, section 3.3) is made of four such sums over the same poles. As
a matrix, ``x`` and ``y`` have ``C P K`` entries, several times what goes in and out together; here
each entry lives in registers, and the ``M`` sums share it:

* forward, program ``(channel, block of frequencies)``: walks over the poles;
* backward, program ``(channel, block of poles)``: walks over the frequencies, makes the entries
  again, and keeps partial sums in every lane until the end.

Gradients follow PyTorch's convention for complex tensors; with ``g`` that of the sums,

    d_weights = sum_k g x* + g* y
    d_poles = sum_(m, k) cosine weights* (g (x*)^2 + g* y^2)

Everything is computed in the inputs' own precision, float32 or float64. No ``tl.dot``: four sums
are too few rows for a matrix instruction, and its TF32 would lose the sharp poles.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from corelib.kernels._shared import check_device, is_interpreted, jit, tl
from corelib.kernels.gates.specialisation import Specialisation

__all__ = ["backward_bytes", "cauchy_sums", "forward_bytes"]


class Tile(NamedTuple):
    """Poles and frequencies at a time, and warps."""

    block_p: int
    block_k: int
    num_warps: int


FORWARD = {torch.float32: Tile(1, 256, 4), torch.float64: Tile(1, 128, 4)}
BACKWARD = {torch.float32: Tile(8, 64, 4), torch.float64: Tile(4, 64, 4)}


@jit
def _fractions(real, imag, sine, cosine):
    """``x`` and ``y`` of poles ``real + i imag``: two real and two imaginary parts."""
    decay = real * cosine
    turn = imag * cosine
    low, high = turn - sine, turn + sine
    near = 1.0 / (decay * decay + low * low)
    far = 1.0 / (decay * decay + high * high)
    return -decay * near, low * near, -decay * far, -high * far


@jit
def _cauchy_forward(
    weights, poles, sine, cosine, out, C, P, K,
    M: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    channel = tl.program_id(0).to(tl.int64)
    frequencies = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    sums = tl.arange(0, BLOCK_M)
    exists, real_sums = frequencies < K, sums < M
    s = tl.load(sine + frequencies, mask=exists, other=1.0)
    c = tl.load(cosine + frequencies, mask=exists, other=1.0)
    row = sums.to(tl.int64) * C + channel
    total_real = tl.zeros([BLOCK_M, BLOCK_K], s.dtype)
    total_imag = tl.zeros([BLOCK_M, BLOCK_K], s.dtype)
    for n in range(0, P):
        pole = poles + 2 * (channel * P + n)
        x, x_imag, y, y_imag = _fractions(tl.load(pole), tl.load(pole + 1), s, c)
        weight = weights + 2 * (row * P + n)
        w = tl.load(weight, mask=real_sums, other=0.0)[:, None]
        w_imag = tl.load(weight + 1, mask=real_sums, other=0.0)[:, None]
        total_real += w * (x + y)[None, :] + w_imag * (y_imag - x_imag)[None, :]
        total_imag += w * (x_imag + y_imag)[None, :] + w_imag * (x - y)[None, :]
    place = out + 2 * (row[:, None] * K + frequencies[None, :])
    inside = real_sums[:, None] & exists[None, :]
    tl.store(place, total_real, mask=inside)
    tl.store(place + 1, total_imag, mask=inside)


@jit
def _cauchy_backward(
    d_out, weights, poles, sine, cosine, d_weights, d_poles, C, P, K,
    M: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    channel = tl.program_id(0).to(tl.int64)
    which = tl.program_id(1) * BLOCK_P + tl.arange(0, BLOCK_P)
    sums, lanes = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_K)
    real_poles, real_sums = which < P, sums < M
    row = sums.to(tl.int64) * C + channel
    at_pole = 2 * (channel * P + which)
    pole = tl.load(poles + at_pole, mask=real_poles, other=1.0)[:, None]
    pole_imag = tl.load(poles + at_pole + 1, mask=real_poles, other=0.0)[:, None]
    at_weight = 2 * (row[:, None] * P + which[None, :])
    both = real_sums[:, None] & real_poles[None, :]
    w = tl.load(weights + at_weight, mask=both, other=0.0)[:, :, None]
    w_imag = tl.load(weights + at_weight + 1, mask=both, other=0.0)[:, :, None]
    d_w = tl.zeros([BLOCK_M, BLOCK_P, BLOCK_K], w.dtype)
    d_w_imag = tl.zeros([BLOCK_M, BLOCK_P, BLOCK_K], w.dtype)
    d_pole = tl.zeros([BLOCK_P, BLOCK_K], w.dtype)
    d_pole_imag = tl.zeros([BLOCK_P, BLOCK_K], w.dtype)
    for first in range(0, K, BLOCK_K):
        frequencies = first + lanes
        exists = frequencies < K
        s = tl.load(sine + frequencies, mask=exists, other=1.0)[None, :]
        c = tl.load(cosine + frequencies, mask=exists, other=1.0)[None, :]
        place = d_out + 2 * (row[:, None] * K + frequencies[None, :])
        inside = real_sums[:, None] & exists[None, :]
        g = tl.load(place, mask=inside, other=0.0)[:, None, :]
        g_imag = tl.load(place + 1, mask=inside, other=0.0)[:, None, :]
        x, x_imag, y, y_imag = _fractions(pole, pole_imag, s, c)
        d_w += g * (x + y)[None] + g_imag * (x_imag + y_imag)[None]
        d_w_imag += g * (y_imag - x_imag)[None] + g_imag * (x - y)[None]
        one, two = tl.sum(w * g, 0), tl.sum(w_imag * g_imag, 0)
        three, four = tl.sum(w * g_imag, 0), tl.sum(w_imag * g, 0)
        x_square, x_twice = x * x - x_imag * x_imag, 2.0 * x * x_imag
        y_square, y_twice = y * y - y_imag * y_imag, 2.0 * y * y_imag
        # weights* g is (one + two, three - four), weights* g* is (one - two, -three - four)
        d_pole += c * ((one + two) * x_square + (three - four) * x_twice)
        d_pole += c * ((one - two) * y_square + (three + four) * y_twice)
        d_pole_imag += c * ((three - four) * x_square - (one + two) * x_twice)
        d_pole_imag += c * ((one - two) * y_twice - (three + four) * y_square)
    tl.store(d_weights + at_weight, tl.sum(d_w, 2), mask=both)
    tl.store(d_weights + at_weight + 1, tl.sum(d_w_imag, 2), mask=both)
    tl.store(d_poles + at_pole, tl.sum(d_pole, 1), mask=real_poles)
    tl.store(d_poles + at_pole + 1, tl.sum(d_pole_imag, 1), mask=real_poles)


def cauchy_sums(weights: Tensor, poles: Tensor, sine: Tensor, cosine: Tensor) -> Tensor:
    """``M`` Cauchy sums over the same pairs of poles, at ``K`` frequencies, for ``C`` channels.

    Args:
        weights: ``(M, C, P)``, complex64 or complex128.
        poles: ``(C, P)``, of the same dtype; one of each conjugate pair, off the imaginary axis.
        sine, cosine: ``(K,)``, float32 or float64; the frequencies are ``i sine / cosine``.

    Returns:
        ``(M, C, K)`` complex; differentiable once in ``weights`` and ``poles``.

    Raises ValueError or TypeError for shapes, dtypes or devices that do not fit, ImportError where
    Triton is missing.
    """
    check_device("cauchy_sums", _cauchy_forward, weights, poles, sine, cosine)
    if weights.dim() != 3 or weights.shape[1:] != poles.shape:
        raise ValueError(
            f"weights: expected (M, C, P) with the (C, P) of poles, {tuple(poles.shape)}, "
            f"got {tuple(weights.shape)}"
        )
    if sine.dim() != 1 or sine.shape != cosine.shape:
        raise ValueError(
            f"cosine: expected the one axis of sine, {tuple(sine.shape)}, got {tuple(cosine.shape)}"
        )
    dtype = sine.dtype.to_complex() if sine.dtype in FORWARD else torch.complex64
    for name, x, wanted in (
        ("sine", sine, dtype.to_real()),
        ("cosine", cosine, dtype.to_real()),
        ("weights", weights, dtype),
        ("poles", poles, dtype),
    ):
        if x.dtype != wanted:
            raise TypeError(f"{name}: expected {wanted}, got {x.dtype}")
    return _CauchySums.apply(weights, poles, sine.contiguous(), cosine.contiguous())


class _CauchySums(torch.autograd.Function):
    @staticmethod
    def forward(ctx, weights, poles, sine, cosine):
        (M, C, P), K = weights.shape, sine.shape[0]
        given = (_real(weights), _real(poles), sine, cosine)
        ctx.save_for_backward(*given)
        out = torch.empty((M, C, K, 2), dtype=sine.dtype, device=sine.device)
        tile = FORWARD[sine.dtype]
        if out.numel():
            _launch(
                _cauchy_forward, (C, -(-K // tile.block_k)), tile.num_warps,
                *given, out, C, P, K, M=M, BLOCK_M=_power(M), BLOCK_K=tile.block_k,
            )  # fmt: skip
        return torch.view_as_complex(out)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, d_out):
        weights, poles, sine, cosine = ctx.saved_tensors
        (M, C, P), K = weights.shape[:3], sine.shape[0]
        d_weights, d_poles = torch.empty_like(weights), torch.empty_like(poles)
        tile = BACKWARD[sine.dtype]
        if d_weights.numel():
            _launch(
                _cauchy_backward, (C, -(-P // tile.block_p)), tile.num_warps,
                _real(d_out), weights, poles, sine, cosine, d_weights, d_poles, C, P, K,
                M=M, BLOCK_M=_power(M), BLOCK_P=tile.block_p, BLOCK_K=tile.block_k,
            )  # fmt: skip
        return torch.view_as_complex(d_weights), torch.view_as_complex(d_poles), None, None


def _real(x: Tensor) -> Tensor:
    """Real and imaginary parts side by side, contiguous."""
    return torch.view_as_real(x.resolve_conj().contiguous())


def _power(n: int) -> int:
    return 1 << (n - 1).bit_length()


def _launch(kernel, grid: tuple[int, int], num_warps: int, *arguments, **constants) -> None:
    options = {} if is_interpreted(kernel) else {"num_warps": num_warps}
    kernel[grid](*arguments, **constants, **options)


def forward_bytes(M: int, C: int, P: int, K: int, *, itemsize: int = 4) -> int:
    """Bytes that the forward pass moves: the sums once, and for each block of frequencies its
    sines and cosines, and all the channel's weights and poles."""
    tile = FORWARD[torch.float32 if itemsize == 4 else torch.float64]
    blocks = -(-K // tile.block_k)
    return itemsize * C * (2 * M * K + 2 * K + blocks * 2 * (M + 1) * P)


def backward_bytes(M: int, C: int, P: int, K: int, *, itemsize: int = 4) -> int:
    """Bytes that the backward pass moves: each block of poles reads the channel's gradients, sines
    and cosines once; weights and poles are read once and their gradients written once."""
    tile = BACKWARD[torch.float32 if itemsize == 4 else torch.float64]
    blocks = -(-P // tile.block_p)
    return itemsize * C * (blocks * 2 * (M + 1) * K + 4 * (M + 1) * P)


def _specialisation(kernel: str, dtype: torch.dtype) -> Specialisation:
    kind = {torch.float32: "fp32", torch.float64: "fp64"}[dtype]
    forward = kernel == "_cauchy_forward"
    names = ["weights", "poles", "sine", "cosine"]
    names += ["out"] if forward else ["d_out", "d_weights", "d_poles"]
    tile = (FORWARD if forward else BACKWARD)[dtype]
    constants = {"M": 4, "BLOCK_M": 4, "BLOCK_K": tile.block_k}
    return Specialisation(
        kernel=kernel,
        label=f"{kind} M=4",
        direction="forward" if forward else "backward",
        signature=dict.fromkeys(names, f"*{kind}") | dict.fromkeys(("C", "P", "K"), "i32"),
        constexprs=constants if forward else constants | {"BLOCK_P": tile.block_p},
        num_warps=tile.num_warps,
    )


SPECIALISATIONS = [
    _specialisation(kernel, dtype)
    for kernel in ("_cauchy_forward", "_cauchy_backward")
    for dtype in FORWARD
]
