"""Symmetric int8: one scale for a whole tensor, found from samples, and exact integer products.

    q = clip(round(x / scale), -128, 127)             x ~ q * scale
    y = (q_x @ q_w.T) * (scale_x * scale_w)           the sum in int32, exactly

A scale that covers the largest value seen (``absmax``) never clips; where one value in 100,000 is
huge, it leaves few steps for all others. A `percentile` scale clips these on purpose.

`int8_matmul` is exact on every device. On a CPU it is PyTorch's own integer product, where there is
one and where it is exact: instructions of older processors saturate in between, so that it is tried
once on the largest numbers there are. Elsewhere it runs in float32, which holds whole numbers up to
``2^24``: over 1,024 terms of at most ``2^14`` no sum can round, so 1,024 columns go at a time. On a
GPU it is the kernel `corelib.kernels.int8_matmul`. Oracle: the same product in int64.
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int8, Int32
from torch import Tensor, nn

from .hadamard import hadamard_factors, rotate

EXACT_TERMS = 1024  # 128 * 128 * 1024 = 2^24


class QuantObserver:
    """Finds a tensor's scale from samples of it.

    Args:
        percentile: None for the largest absolute value of all samples (it never clips); else the
            percentile of absolute values, averaged over the samples.
    """

    def __init__(self, percentile: float | None = None):
        if percentile is not None and not 0 < percentile <= 100:
            raise ValueError(f"percentile: expected None or 0 < p <= 100, got {percentile}")
        self.percentile, self.samples, self.limit = percentile, 0, 0.0

    def observe(self, x: Float[Tensor, "*any"]) -> None:
        """Take a sample into account; an empty one changes nothing."""
        size = x.detach().abs().flatten()
        if not size.numel():
            return
        if not size.isfinite().all():
            raise ValueError("x: expected finite numbers only")
        self.samples += 1
        if self.percentile is None:
            self.limit = max(self.limit, size.max().item())
        else:
            place = 1 + round(self.percentile / 100 * (size.numel() - 1))
            largest = size.kthvalue(place).values.item()
            self.limit += (largest - self.limit) / self.samples

    @property
    def scale(self) -> float:
        """The step from one integer to the next; 1 for a tensor of zeros.

        Raises RuntimeError before anything was observed.
        """
        if not self.samples:
            raise RuntimeError("scale: nothing was observed yet")
        return self.limit / 127 or 1.0


def quantise(x: Float[Tensor, "*any"], scale: float) -> Int8[Tensor, "*any"]:
    """``clip(round(x / scale), -128, 127)``, halves to the even neighbour.

    Raises ValueError for a scale that is not positive.
    """
    if not scale > 0:
        raise ValueError(f"scale: expected more than 0, got {scale}")
    return (x / scale).round_().clamp_(-128, 127).to(torch.int8)


def dequantise(
    q: Int8[Tensor, "*any"], scale: float, dtype: torch.dtype = torch.float32
) -> Float[Tensor, "*any"]:
    """``q * scale`` in ``dtype``."""
    return q.to(dtype) * scale


def hadamard_quantise(x: Float[Tensor, "*rows n"], scale: float) -> Int8[Tensor, "*rows n"]:
    """``quantise(rotate(x), scale)``; on a GPU up to 8,192 numbers in one pass, to 22 bits."""
    n = x.shape[-1]
    if x.is_cuda and x.dtype.itemsize <= 4 and n <= 8192 and hadamard_factors(n)[1] <= 128:
        from corelib.kernels.int8_matmul import hadamard_quantise as kernel

        return kernel(x.reshape(-1, n), scale).view(x.shape)
    return quantise(rotate(x), scale)


def int8_matmul_reference(a: Int8[Tensor, "M K"], b: Int8[Tensor, "N K"]) -> Int32[Tensor, "M N"]:
    """`int8_matmul`, in integers all the way."""
    return (a.long() @ b.long().T).to(torch.int32)


def int8_matmul(a: Int8[Tensor, "M K"], b: Int8[Tensor, "N K"]) -> Int32[Tensor, "M N"]:
    """``a (M, K) @ b (N, K).T`` of int8, exactly, ``(M, N)`` in int32.

    Raises ValueError or TypeError for shapes, dtypes or devices that do not fit.
    """
    for name, y in (("a", a), ("b", b)):
        if y.dtype != torch.int8:
            raise TypeError(f"{name}: expected int8, got {y.dtype}")
        if y.dim() != 2:
            raise ValueError(f"{name}: expected two axes, got shape {tuple(y.shape)}")
    if a.shape[1] != b.shape[1] or a.device != b.device:
        got = f"{tuple(a.shape)} on {a.device} and {tuple(b.shape)} on {b.device}"
        raise ValueError(f"a, b: expected (M, K) and (N, K) on one device, got {got}")
    if a.is_cuda:
        from corelib.kernels.int8_matmul import int8_matmul as kernel

        return kernel(a, b)
    if a.numel() and b.numel() and _has_integer_products():
        return torch._int_mm(a, b.T)
    return _by_float32(a, b)


@functools.cache
def _has_integer_products() -> bool:
    """Whether PyTorch multiplies int8 matrices here, without saturating."""
    extremes = torch.tensor([-128, 127, 127, -128], dtype=torch.int8).repeat(32, 16)
    try:
        found = torch._int_mm(extremes, extremes.T)
    except (AttributeError, RuntimeError):
        return False
    return torch.equal(found, int8_matmul_reference(extremes, extremes))


def _by_float32(a: Tensor, b: Tensor) -> Tensor:
    out = torch.zeros(len(a), len(b), dtype=torch.int32)
    for first in range(0, a.shape[1], EXACT_TERMS):
        part = slice(first, first + EXACT_TERMS)
        out += (a[:, part].float() @ b[:, part].float().T).to(torch.int32)
    return out


def int8_linear(
    x: Int8[Tensor, "*rows inner"],
    weight: Int8[Tensor, "outer inner"],
    x_scale: float,
    weight_scale: float,
    bias: Float[Tensor, " outer"] | None = None,
) -> Float[Tensor, "*rows outer"]:
    """``x @ weight.T + bias`` in float32: one exact integer product, then one multiplication."""
    product = int8_matmul(x.flatten(0, -2), weight).unflatten(0, x.shape[:-1])
    y = product.float() * (x_scale * weight_scale)
    return y if bias is None else y + bias


class Int8Linear(nn.Module):
    """A linear layer of int8 weights that takes int8 inputs of a known scale.

    Made by `of` from float weights. Inference only.
    """

    def __init__(self, weight: Int8[Tensor, "outer inner"], weight_scale: float, x_scale: float):
        super().__init__()
        self.register_buffer("weight", weight)
        self.weight_scale, self.x_scale = weight_scale, x_scale

    @classmethod
    def of(cls, weight: Float[Tensor, "outer inner"], x_scale: float) -> Int8Linear:
        """Quantise ``weight`` by its largest entry."""
        observer = QuantObserver()
        observer.observe(weight)
        return cls(quantise(weight.detach(), observer.scale), observer.scale, x_scale)

    def forward(self, x: Int8[Tensor, "*rows inner"]) -> Float[Tensor, "*rows outer"]:
        return int8_linear(x, self.weight, self.x_scale, self.weight_scale)

    def simulated(self, x: Float[Tensor, "*rows inner"]) -> Float[Tensor, "*rows outer"]:
        """The same in floating point, of inputs that are multiples of their scale: the oracle."""
        return F.linear(x, dequantise(self.weight, self.weight_scale, x.dtype))
