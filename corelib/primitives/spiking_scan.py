"""Leaky integrate-and-fire neurons over time, with a surrogate gradient.

    h_t = v_{t-1} + (x_t - v_{t-1}) / tau          the membrane leaks, and takes in its input
    s_t = 1 where h_t >= threshold, else 0         it fires
    v_t = h_t (1 - s_t)                            and starts again from 0 (hard reset)

The step has no derivative, so backward takes that of a sigmoid of slope ``slope`` in its place,
and the reset counts as a constant (SpikFormer, arXiv 2209.15425; LMUFormer, arXiv 2402.04882):

    ds_t / dh_t := slope p (1 - p)    with p = sigmoid(slope (h_t - threshold))
    dv_t / dh_t := 1 - s_t

Forward has to walk: whether a neuron fires depends on whether it fired before. Backward does not:
with the spikes known, ``dh_t / dv_{t-1} = 1 - 1 / tau`` makes it a linear recurrence,

    w_t = (1 - 1 / tau) (ds_t slope p (1 - p) + (1 - s_t) w_{t+1})     w_t the gradient of v_{t-1}

which `diagonal_scan` runs in parallel. One buffer is kept for it, the membrane ``h``. On a GPU both
are the kernel `corelib.kernels.spiking_scan`. Half precision is computed in float32.

Oracle: `spiking_scan_reference`, a loop with automatic differentiation.
"""

from __future__ import annotations

from numbers import Real

import torch
from jaxtyping import Float
from torch import Tensor

from ._checks import check_same_kind
from .diagonal_scan import diagonal_scan

Values = Float[Tensor, "B L C"]
Membrane = Float[Tensor, "B C"]


def spiking_scan_reference(
    x: Values,
    *,
    tau: float = 2.0,
    threshold: float = 1.0,
    slope: float = 4.0,
    state: Membrane | None = None,
) -> tuple[Values, Membrane]:
    """`spiking_scan`, one step after the other."""
    v, spikes = _check(x, tau, threshold, slope, state), [x[:, :0]]
    for x_t in x.unbind(1):
        h = v + (x_t - v) / tau
        soft = torch.sigmoid(slope * (h - threshold))
        fires = (h >= threshold).to(x.dtype)
        spikes.append((fires + (soft - soft.detach()))[:, None])  # the value of one, slope of other
        v = h * (1 - fires)
    return torch.cat(spikes, 1), v


def spiking_scan(
    x: Values,
    *,
    tau: float = 2.0,
    threshold: float = 1.0,
    slope: float = 4.0,
    state: Membrane | None = None,
) -> tuple[Values, Membrane]:
    """Spikes ``(B, L, C)``, zeros and ones in x's dtype, and the membrane after the last step.

    Args:
        x: what flows into each neuron at each step.
        tau: time constant in steps, above 1.
        threshold: at which a neuron fires, above 0.
        slope: of the sigmoid whose derivative stands in for the step's.
        state: the membrane before the first step; None is at rest, 0.

    Differentiable once, in ``x`` and ``state``. Raises ValueError or TypeError for arguments that
    do not fit.
    """
    state = _check(x, tau, threshold, slope, state)
    if x.is_cuda:
        from corelib.kernels.spiking_scan import spiking_scan as kernel

        return kernel(x, tau=tau, threshold=threshold, slope=slope, state=state)
    if x.dtype.itemsize < 4:
        spikes, v = _Spikes.apply(x.float(), state.float(), tau, threshold, slope)
        return spikes.to(x.dtype), v.to(x.dtype)
    return _Spikes.apply(x, state, tau, threshold, slope)


class _Spikes(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, state, tau, threshold, slope):
        h = _walk(x, state, 1 / tau, threshold)
        ctx.save_for_backward(h)
        ctx.options = tau, threshold, slope
        fires = h >= threshold
        after = h[:, -1].masked_fill(fires[:, -1], 0) if x.shape[1] else state.clone()
        return fires.to(x.dtype), after

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, d_spikes, d_after):
        (h,), (tau, threshold, slope) = ctx.saved_tensors, ctx.options
        keep = 1 - 1 / tau
        p = torch.sigmoid(slope * (h - threshold))
        fed = p.sub(p * p).mul_(d_spikes).mul_(keep * slope)
        decay = (h < threshold).to(h.dtype).mul_(keep)
        w = diagonal_scan(decay, fed, state=d_after.contiguous(), reverse=True)
        return w / (tau - 1), (w[:, 0] if h.shape[1] else d_after), None, None, None


def _walk(x: Tensor, v: Tensor, share: float, threshold: float) -> Tensor:
    """The membrane before each reset.

    In negative numbers: ``torch.threshold`` keeps what is above and clears the rest, so that a
    step is two calls.
    """
    x, v = -x, -v
    h = torch.empty_like(x, memory_format=torch.contiguous_format)
    for x_t, h_t in zip(x.unbind(1), h.unbind(1)):
        torch.lerp(v, x_t, share, out=h_t)
        torch.threshold(h_t, -threshold, 0.0, out=v)
    return h.neg_()


def _check(x, tau, threshold, slope, state) -> Tensor:
    """The membrane to start from."""
    check_same_kind(x=x, **({} if state is None else {"state": state}))
    if x.dim() != 3:
        raise ValueError(f"x: expected 3 axes (B, L, C), got shape {tuple(x.shape)}")
    for name, value, least in (("tau", tau, 1), ("threshold", threshold, 0), ("slope", slope, 0)):
        if not isinstance(value, Real) or not value > least:
            raise ValueError(f"{name}: expected a number above {least}, got {value!r}")
    state = x.new_zeros(x.shape[0], x.shape[2]) if state is None else state
    if state.shape != (x.shape[0], x.shape[2]):
        wanted = (x.shape[0], x.shape[2])
        raise ValueError(f"state: expected shape {wanted}, got {tuple(state.shape)}")
    return state
