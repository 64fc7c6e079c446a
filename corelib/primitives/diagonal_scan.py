"""First-order scans: every channel, or every pair of channels, its own linear recurrence.

    h_t = a_t h_{t-1} + x_t          diagonal_scan: a_t a number, real or complex
    h_t = A_t h_{t-1} + x_t          block_scan: A_t a 2 x 2 matrix, h_t and x_t pairs

Diagonal state space models (S4D, S5, LRU), gated linear RNNs, and a Newton step of a nonlinear RNN
are such scans. ``reset`` marks steps that forget all before them (Lu et al., arXiv 2303.03982,
section 3); ``reverse`` runs from the end: ``h_t = a_t h_{t+1} + x_t``.

Forms: step by step, one fused multiply-add over all channels at a time, where there are many
channels; else in chunks of about ``sqrt(L)`` steps, all chunks side by side: the states from zero,
the products of the chunk's decays, one pass over the chunks' ends, and ``h += products * before``.
That is three times the arithmetic in ``3 sqrt(L)`` calls instead of ``L``. Only products of the
given decays are formed: nothing is divided, nothing overflows that the recurrence would not.

On a GPU these are the kernels `corelib.kernels.diagonal_scan` and `corelib.kernels.block_scan`.

Backward is the same scan the other way round, over conjugated (transposed) decays. Linear in L in
time and memory. Oracle: `scan_reference`, a loop.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Bool, Float, Inexact
from torch import Tensor
from torch.autograd.function import once_differentiable

WIDE = 4096  # channels (times batch) from which a step is worth a call
FEW_STEPS = 16

Values = Inexact[Tensor, "B L C"]
Pairs = Float[Tensor, "B L C 2"]


def scan_reference(decay, x, *, reset=None, state=None, reverse=False) -> Tensor:
    """`diagonal_scan` or `block_scan`, by the shape of ``x``, one step after the other."""
    decay = decay.expand(x.shape) if decay.dim() == 1 else decay
    if reset is not None:
        decay = decay.masked_fill(reset.reshape(*reset.shape, *[1] * (decay.dim() - 2)), 0)
    h = torch.zeros_like(x[:, 0]) if state is None else state
    hs: list[Tensor] = [h] * x.shape[1]
    steps = range(x.shape[1])
    for t in reversed(steps) if reverse else steps:
        a = decay[:, t]
        h = (a @ h[..., None])[..., 0] + x[:, t] if x.dim() == 4 else a * h + x[:, t]
        hs[t] = h
    return torch.stack(hs, 1)


def diagonal_scan(
    decay: Values | Inexact[Tensor, " C"],
    x: Values,
    *,
    reset: Bool[Tensor, "B L"] | None = None,
    state: Inexact[Tensor, "B C"] | None = None,
    reverse: bool = False,
) -> Values:
    """``h_t = decay_t * h_{t-1} + x_t`` for every channel; all states, ``(B, L, C)``.

    Args:
        decay: of every step, or of every channel for all steps alike; of x's dtype.
        reset: where the past is forgotten before ``x_t`` is added.
        state: ``h`` before the first step (with ``reverse``: behind the last); None is zero.
        reverse: from the last step to the first.

    Raises:
        ValueError, TypeError: shapes, dtypes or devices that do not fit together.
    """
    _check(x, 3, reset, decay=(decay, x.shape[2:], x.shape), state=(state, _state_shape(x)))
    if x.is_cuda and x.dtype.itemsize >= 4:  # not half precision
        from corelib.kernels.diagonal_scan import diagonal_scan as kernel

        return kernel(decay, x, reset=reset, state=state, reverse=reverse)
    decay = decay.expand(x.shape) if decay.dim() == 1 else decay
    if reset is not None:
        decay = decay.masked_fill(reset[..., None], 0)
    state = x.new_zeros(_state_shape(x)) if state is None else state
    return _Scan.apply(decay, x, state, reverse, _Diagonal)


def block_scan(
    blocks: Float[Tensor, "B L C 2 2"],
    x: Pairs,
    *,
    reset: Bool[Tensor, "B L"] | None = None,
    state: Float[Tensor, "B C 2"] | None = None,
    reverse: bool = False,
) -> Pairs:
    """``h_t = blocks_t @ h_{t-1} + x_t`` for every pair of channels; all states ``(B, L, C, 2)``.

    Arguments and errors as for `diagonal_scan`.
    """
    _check(x, 4, reset, blocks=(blocks, (*x.shape, 2)), state=(state, _state_shape(x)))
    if x.is_cuda and x.dtype.itemsize >= 4:  # not half precision
        from corelib.kernels.block_scan import block_scan as kernel

        return kernel(blocks, x, reset=reset, state=state, reverse=reverse)
    if reset is not None:
        blocks = blocks.masked_fill(reset[..., None, None, None], 0)
    state = x.new_zeros(_state_shape(x)) if state is None else state
    return _Scan.apply(blocks, x, state, reverse, _Blocks)


class _Diagonal:
    """Arithmetic of one number a channel."""

    @staticmethod
    def add_product(to: Tensor, a: Tensor, h: Tensor) -> None:
        """``to += a h`` in place."""
        to.addcmul_(a, h)

    @staticmethod
    def compose(a: Tensor, b: Tensor) -> Tensor:
        return a * b

    @staticmethod
    def adjoint(a: Tensor) -> Tensor:
        return a.conj().resolve_conj()

    @staticmethod
    def outer(g: Tensor, h: Tensor) -> Tensor:
        """The gradient of ``a`` from those of ``a h``."""
        return g * h.conj()


class _Blocks:
    """Arithmetic of 2 x 2 matrices, written out: as matrix products they cost mostly calls."""

    @staticmethod
    def add_product(to: Tensor, a: Tensor, h: Tensor) -> None:
        to.addcmul_(a[..., 0], h[..., 0:1]).addcmul_(a[..., 1], h[..., 1:2])

    @staticmethod
    def compose(a: Tensor, b: Tensor) -> Tensor:
        return a[..., 0:1] * b[..., 0:1, :] + a[..., 1:2] * b[..., 1:2, :]

    @staticmethod
    def adjoint(a: Tensor) -> Tensor:
        return a.mT

    @staticmethod
    def outer(g: Tensor, h: Tensor) -> Tensor:
        return g[..., None] * h[..., None, :]


class _Scan(torch.autograd.Function):
    @staticmethod
    def forward(ctx, a, x, state, reverse, kind):
        h = _flip(_scan(_flip(a, reverse), _flip(x, reverse), state, kind), reverse)
        ctx.save_for_backward(a, h, state)
        ctx.options = reverse, kind
        return h

    @staticmethod
    @once_differentiable
    def backward(ctx, dh):
        a, h, state = ctx.saved_tensors
        reverse, kind = ctx.options
        if not h.shape[1]:
            return torch.zeros_like(a), dh, torch.zeros_like(state), None, None
        a, h, dh = (_flip(y, reverse) for y in (a, h, dh))
        nothing = torch.zeros_like(a[:, :1])
        onwards = torch.cat([kind.adjoint(a[:, 1:]), nothing], 1)  # how h_t acts on h_{t+1}
        g = _flip(_scan(_flip(onwards, True), _flip(dh, True), torch.zeros_like(state), kind), True)
        before = torch.cat([state[:, None], h[:, :-1]], 1)
        of_state = torch.zeros_like(state)
        kind.add_product(of_state, kind.adjoint(a[:, 0]), g[:, 0])
        return _flip(kind.outer(g, before), reverse), _flip(g, reverse), of_state, None, None


def _flip(x: Tensor, reverse: bool) -> Tensor:
    return x.flip(1) if reverse else x


def _scan(a: Tensor, x: Tensor, state: Tensor, kind) -> Tensor:
    """All states; ``a`` and ``x`` have time as their second axis."""
    L = x.shape[1]
    h = x.clone(memory_format=torch.contiguous_format)
    if not L:
        return h
    kind.add_product(h[:, 0], a[:, 0], state)
    if L < FEW_STEPS or x.numel() // L >= WIDE:
        _steps(a.unbind(1), h.unbind(1), kind.add_product)
        return h
    size = max(2, int(L**0.5))
    whole = L - L % size
    _in_chunks(a[:, :whole], h[:, :whole], size, kind)
    if whole < L:
        _steps(a[:, whole - 1 :].unbind(1), h[:, whole - 1 :].unbind(1), kind.add_product)
    return h


def _steps(a: tuple[Tensor, ...], h: tuple[Tensor, ...], add_product: Callable) -> None:
    for t in range(1, len(h)):
        add_product(h[t], a[t], h[t - 1])


def _in_chunks(a: Tensor, h: Tensor, size: int, kind) -> None:
    """``h`` in place, its length a multiple of ``size``; the first state is in ``h[:, 0]``."""
    a, h = a.unflatten(1, (-1, size)), h.unflatten(1, (-1, size))
    _steps(a.unbind(2), h.unbind(2), kind.add_product)
    products = [a[:, :, 0]]
    for step in a.unbind(2)[1:]:
        products.append(kind.compose(step, products[-1]))
    through = torch.stack(products, 2)
    _steps(through[:, :, -1].unbind(1), h[:, :, -1].unbind(1), kind.add_product)
    kind.add_product(h[:, 1:, :-1], through[:, 1:, :-1], h[:, :-1, -1:])


def _state_shape(x: Tensor) -> tuple[int, ...]:
    return (*x.shape[:1], *x.shape[2:])


def _check(x, axes, reset, **tensors) -> None:
    """``tensors``: name -> (the tensor or None, shapes that it may have)."""
    if not isinstance(x, Tensor) or not (x.is_floating_point() or x.is_complex()):
        got = x.dtype if isinstance(x, Tensor) else type(x).__name__
        raise TypeError(f"x: expected a floating-point or complex tensor, got {got}")
    if x.dim() != axes:
        raise ValueError(f"x: expected {axes} axes, got shape {tuple(x.shape)}")
    for name, (y, *wanted) in tensors.items():
        if y is None:
            continue
        if not isinstance(y, Tensor) or y.dtype != x.dtype:
            got = y.dtype if isinstance(y, Tensor) else type(y).__name__
            raise TypeError(f"{name}: expected a tensor of x's dtype, {x.dtype}, got {got}")
        if tuple(y.shape) not in [tuple(shape) for shape in wanted]:
            described = " or ".join(str(tuple(shape)) for shape in wanted)
            raise ValueError(f"{name}: expected shape {described}, got {tuple(y.shape)}")
        if y.device != x.device:
            raise ValueError(f"{name}: expected the device of x, {x.device}, got {y.device}")
    if reset is not None and (reset.dtype != torch.bool or reset.shape != x.shape[:2]):
        raise ValueError(
            f"reset: expected booleans of shape {tuple(x.shape[:2])}, got "
            f"{reset.dtype} of {tuple(reset.shape)}"
        )
