"""The exponential of log-decays on a CPU, where very small results cost a hundred times as much.

PyTorch's ``exp`` of float32 is a vector routine as long as results are normal numbers. For
arguments below -87 it falls back to a careful path: measured on one core, 0.3 ns an element for
ordinary arguments and 30 to 80 ns where the result is subnormal or zero; and every product with a
subnormal number is slow once more. Strong decays are exactly that. So a result below the third
power of the dtype's rounding error, 2e-21 in float32 and 1e-47 in float64, is zero here: as a decay
it is, and times states and gradients of any usual size the smallest that is left stays normal.
"""

from __future__ import annotations

import functools
import math

import torch
import torch.nn.functional as F
from torch import Tensor


@functools.cache
def smallest_exponent(dtype: torch.dtype) -> float:
    """Where `decay_exp_` cuts: the logarithm of the rounding error's third power.

    >>> round(smallest_exponent(torch.float32), 1), round(smallest_exponent(torch.float64), 1)
    (-47.8, -108.1)
    """
    return 3 * math.log(torch.finfo(dtype).eps)


def decay_exp(log_decay: Tensor) -> Tensor:
    """``exp``, zero at and below `smallest_exponent`; minus infinity gives 0, NaN NaN.

    Differentiable; where the result is zero, so is the gradient.
    """
    return _DecayExp.apply(log_decay)


def decay_exp_(log_decay: Tensor) -> Tensor:
    """`decay_exp` in place, without gradients."""
    least = smallest_exponent(log_decay.dtype)
    return F.threshold_(log_decay.clamp_(min=least).exp_(), 1.001 * math.exp(least), 0.0)


class _DecayExp(torch.autograd.Function):
    """The derivative is the result itself: one pass, where clamping by itself would take three."""

    @staticmethod
    def forward(log_decay):
        return decay_exp_(log_decay.clone())

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(output)
        ctx.save_for_forward(output)

    @staticmethod
    def backward(ctx, gradient):
        (decay,) = ctx.saved_tensors
        return gradient * decay

    @staticmethod
    def jvp(ctx, tangent):
        (decay,) = ctx.saved_tensors
        return tangent * decay
