"""What a sequence layer does, found from outside: whom it hears, for how long, and at what price.

Every probe takes a function ``x (B, L, C) -> y (B, L, C)`` (of a mixer: ``lambda x: mixer(x)[0]``)
and a *background* ``x``, and asks what one input more or less would change. For a layer that is
linear and treats all positions alike, the answer does not depend on the background: it is the
convolution kernel. For all others it does, and by how much is a measure of its own.

    influence[t, s]      = |d y_t / d x_s|                                         `influence`
    response[lag, o, i]  = (fn(x + e) - fn(x))[at + lag], e = 1 at ``at`` in channel i
    half-life            = the lag from which no response is above half of the largest
    H(omega)             = sum over lags of response exp(-i omega lag)
    variation            = |response at ``at + shift`` - response at ``at``| / |the latter|

`variation` is the test for linear and time-invariant layers. The obvious one, to delay the whole
input and see whether the output is delayed (`shift_gap`), does not do: a selective layer that keeps
silent until something comes passes it, for its rule is the same at all times; it is only not
linear.

`state_bytes` and `state_jacobian` look into the state that a mixer returns: any nesting of tensors
that `torch.utils._pytree` knows. Oracles: the kernels of the layers, decays in closed form.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Complex, Float
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

Layer = Callable[[Tensor], Tensor]
Background = Float[Tensor, "B L C"]
Response = Float[Tensor, "lags *channels"]
Spectrum = Complex[Tensor, "K *channels"]


# --- whom an output hears -------------------------------------------------------------------------


def influence(fn: Layer, x: Background) -> Float[Tensor, "L L"]:
    """Entry ``(t, s)``: the Frobenius norm of ``d y_t / d x_s``, root mean square over the batch.

    Exact, by a backward pass for every position and channel: for tens of positions.
    """
    x = _sequence(x).detach().clone().requires_grad_()
    y = fn(x)
    if y.shape[:2] != x.shape[:2] or y.dim() != 3:
        raise ValueError(f"fn: expected a result (B, L, C), got shape {tuple(y.shape)}")
    rows = []
    for outputs in y.unbind(1):
        squares = x.new_zeros(x.shape[:2])
        for channel in outputs.unbind(-1):
            (grad,) = torch.autograd.grad(channel.sum(), x, retain_graph=True, allow_unused=True)
            squares += 0 if grad is None else grad.square().sum(-1)
        rows.append(squares.mean(0).sqrt())
    return torch.stack(rows)


def future_share(influences: Float[Tensor, "L L"]) -> float:
    """The largest influence of a later input, over the largest of all: 0 if causal."""
    top = influences.max().item()
    return influences.triu(1).max().item() / top if top else 0.0


def effective_receptive_field(influences: Float[Tensor, "rows L"], share: float = 0.9) -> int:
    """How many of the latest inputs hold ``share`` of the last output's squared influences."""
    if not 0 < share <= 1:
        raise ValueError(f"share: expected more than 0, at most 1, got {share}")
    held = influences[-1].square().flip(0).cumsum(0)
    return 1 + int((held < share * held[-1] * (1 - 1e-12)).sum())


# --- what becomes of an impulse -------------------------------------------------------------------


def impulse_response(
    fn: Layer, x: Float[Tensor, "1 L C"], at: int = 0, *, size: float = 1.0
) -> Float[Tensor, "lags O C"]:
    """How the outputs from ``at`` on change when one input there is raised: ``(lags, out, in)``.

    A bump of ``size`` in each channel at a time, and the change divided by ``size``: of a linear
    layer the exact kernel, whatever the background.
    """
    if len(_sequence(x)) != 1:
        raise ValueError(f"x: expected one background (1, L, C), got shape {tuple(x.shape)}")
    L, C = x.shape[1:]
    if not 0 <= at < L:
        raise ValueError(f"at: expected a position, 0 to {L - 1}, got {at}")
    bumped = x.detach().repeat(C + 1, 1, 1)
    bumped[range(1, C + 1), at, range(C)] += size
    with torch.no_grad():
        y = fn(bumped)
    return ((y[1:] - y[:1]) / size)[:, at:].permute(1, 2, 0)


def memory_halflife(response: Response) -> float:
    """The lag from which no response is larger than half of the largest one.

    For ``decay ** lag`` that is ``ln 2 / -ln decay``, in between lags by interpolating logarithms;
    a kernel that rings counts by its envelope. ``inf`` where the half is not reached within the
    response. Half-lives near its length are therefore lower bounds at best: measure longer.
    """
    size = response.detach().double().reshape(len(response), -1).norm(dim=1)
    envelope = size.flip(0).cummax(0).values.flip(0)  # the largest still to come
    below = (envelope <= envelope[0] / 2).nonzero()
    if not envelope[0] > 0 or not len(below):
        return math.inf
    lag = int(below[0])
    before, after = envelope[lag - 1].item(), envelope[lag].item()
    if after == 0:
        return float(lag)
    part = math.log(2 * before / envelope[0].item()) / math.log(before / after)
    return lag - 1 + part


def frequency_response(response: Response, omega: Float[Tensor, " K"]) -> Spectrum:
    """``sum over lags of response exp(-i omega lag)``; ``omega`` in radians a step.

    The transfer function on the unit circle, as far as the response has died out at its end.
    """
    lags = torch.arange(len(response), dtype=torch.float64, device=response.device)
    waves = torch.exp(-1j * omega.double()[:, None] * lags)
    return torch.tensordot(waves, response.to(waves.dtype), dims=1)


def variation(fn: Layer, x: Float[Tensor, "1 L C"], shift: int, *, size: float = 1.0) -> float:
    """How much the response to an impulse changes when it comes ``shift`` later: 0 if LTI.

    A layer that is linear and time-invariant (LTI) has one response. If the layer gates or selects,
    the response depends on what stands around; if it sees positions, on the place. Relative to
    the first response; the background ``x`` decides how large it gets.
    """
    if not 0 < shift < x.shape[1]:
        raise ValueError(f"shift: expected 1 to {x.shape[1] - 1}, got {shift}")
    first = impulse_response(fn, x, 0, size=size)[: x.shape[1] - shift]
    later = impulse_response(fn, x, shift, size=size)
    return ((later - first).norm() / first.norm()).item()


def shift_gap(fn: Layer, x: Background, shift: int) -> float:
    """How far ``fn`` of the delayed input is from the delayed output, over the output's norm.

    The input is delayed by zeros. Only says that the rule is the same at all times, and silence
    stays silence: see the note at the top.
    """
    if not 0 < shift < x.shape[1]:
        raise ValueError(f"shift: expected 1 to {x.shape[1] - 1}, got {shift}")
    kept = x[:, : x.shape[1] - shift]
    with torch.no_grad():
        y = fn(kept)
        delayed = fn(torch.cat([torch.zeros_like(x[:, :shift]), kept], 1))[:, shift:]
    return ((delayed - y).norm() / y.norm()).item()


# --- the state ------------------------------------------------------------------------------------


def state_bytes(state: Any) -> int:
    """Bytes of all tensors in a state."""
    tensors = (leaf for leaf in tree_leaves(state) if isinstance(leaf, Tensor))
    return sum(leaf.numel() * leaf.element_size() for leaf in tensors)


def state_jacobian(
    mixer: Any, x_t: Float[Tensor, "1 C"], state: Any
) -> Float[Tensor, "n n"] | None:
    """How the state after ``x_t`` depends on the state before: ``(after, before)``, real numbers.

    Complex states count as two real numbers. None for a state that grows. Its eigenvalues are the
    layer's, at this input and state: those of a linear layer are the same everywhere.
    """
    leaves, spec = tree_flatten(state)
    leaves = [leaf.detach().clone().requires_grad_() for leaf in leaves]
    _, after = mixer.step(x_t, tree_unflatten(leaves, spec))
    after = [leaf for leaf in tree_leaves(after) if isinstance(leaf, Tensor)]
    if [leaf.shape for leaf in after] != [leaf.shape for leaf in leaves]:
        return None
    rows = []
    for number in _real(after):
        if number.requires_grad:
            grads = torch.autograd.grad(number, leaves, retain_graph=True, allow_unused=True)
        else:
            grads = [None] * len(leaves)
        parts = (torch.zeros_like(h) if g is None else g for h, g in zip(leaves, grads))
        rows.append(_real(parts).detach())
    return torch.stack(rows)


def _real(tensors) -> Tensor:
    """All numbers in one row; a complex gradient is that of real part plus i times imaginary."""
    parts = (torch.view_as_real(t.resolve_conj()) if t.is_complex() else t for t in tensors)
    return torch.cat([part.flatten() for part in parts])


def _sequence(x: Tensor) -> Tensor:
    if x.dim() != 3:
        raise ValueError(f"x: expected (B, L, C), got shape {tuple(x.shape)}")
    return x
