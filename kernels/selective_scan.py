"""The selective scan of Mamba, forward and backward.

    h_t = exp(dt_t A) h_{t-1} + dt_t u_t B_t          y_t = C_t . h_t

for ``D`` channels with ``N`` states each (arXiv 2312.00752, section 3.3.2). The decays and the
states, ``(B, D, L, N)``, are never written: a program owns a batch row and a block of channels and
walks over the sequence; a block of steps is loaded once, coalesced along time, and for one state
index after the other an associative scan runs over it in registers. What is written besides the
output is the state before each block of steps, for the backward pass.

Backward walks from the end, scans the block again from its stored state, and scans the gradient
``g_t = C_t dy_t + exp(dt_{t+1} A) g_{t+1}`` in reverse. All it needs of the past is
``exp(dt_t A) h_{t-1} = h_t - dt_t u_t B_t``, so nothing is divided by a decay that may be zero.
``dB`` and ``dC`` are sums over channels: programs add to them atomically, so that their last bits
vary from run to run on a GPU.

Computed in float32, float64 for float64. No ``tl.dot``: a diagonal recurrence has no product of
matrices. Softplus, skip and gate stay outside (`corelib.primitives.selective_scan`).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from corelib.kernels._shared import check_device, is_interpreted, jit, tl
from corelib.kernels.gates.specialisation import Specialisation

__all__ = ["backward_bytes", "forward_bytes", "selective_scan"]


class Tile(NamedTuple):
    """Channels and steps at a time, and warps."""

    block_d: int
    block_t: int
    num_warps: int


FORWARD, BACKWARD = Tile(4, 64, 4), Tile(1, 64, 2)


@jit
def _compose(a, x, b, y):
    """First ``h -> a h + x``, then ``h -> b h + y``."""
    return b * a, b * x + y


@jit
def _scan_forward(
    u, dt, A, B, C, state, y, kept, last, D, L,
    N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    channels = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    steps, states = tl.arange(0, BLOCK_T), tl.arange(0, N)
    real = channels < D
    own = (row * D + channels)[:, None] * N + states[None, :]
    h = tl.load(state + own, mask=real[:, None], other=0.0)
    for first in range(0, L, BLOCK_T):
        now = first + steps
        inside = real[:, None] & (now < L)[None, :]
        place = (row * D + channels)[:, None] * L + now[None, :]
        delta = tl.load(dt + place, mask=inside, other=0.0)  # no step: decay 1, nothing added
        fed = delta * tl.load(u + place, mask=inside, other=0.0)
        blocks = tl.cdiv(L, BLOCK_T)
        slot = ((row * blocks + first // BLOCK_T) * D + channels)[:, None] * N + states[None, :]
        tl.store(kept + slot, h, mask=real[:, None])
        out = tl.zeros([BLOCK_D, BLOCK_T], h.dtype)
        for n in range(0, N):
            rate = tl.load(A + channels * N + n, mask=real, other=0.0)
            mixing = (row * N + n) * L + now
            write = tl.load(B + mixing, mask=now < L, other=0.0)
            read = tl.load(C + mixing, mask=now < L, other=0.0)
            decay = tl.exp(delta * rate[:, None])
            before = tl.sum(tl.where(states[None, :] == n, h, 0.0), 1)
            through, added = tl.associative_scan((decay, fed * write[None, :]), 1, _compose)
            here = through * before[:, None] + added
            out += here * read[None, :]
            end = tl.sum(tl.where(steps[None, :] == BLOCK_T - 1, here, 0.0), 1)
            h = tl.where(states[None, :] == n, end[:, None], h)
        tl.store(y + place, out, mask=inside)
    tl.store(last + own, h, mask=real[:, None])


@jit
def _scan_backward(
    dy, u, dt, A, B, C, kept, d_last, du, ddt, dA, dB, dC, d_state, D, L,
    N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    channels = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    steps, states = tl.arange(0, BLOCK_T), tl.arange(0, N)
    real = channels < D
    own = (row * D + channels)[:, None] * N + states[None, :]
    carried = tl.load(d_last + own, mask=real[:, None], other=0.0)  # of the state after the block
    of_rate = tl.zeros([BLOCK_D, N], carried.dtype)
    blocks = tl.cdiv(L, BLOCK_T)
    for back in range(0, blocks):
        block = blocks - 1 - back
        now = block * BLOCK_T + steps
        inside = real[:, None] & (now < L)[None, :]
        place = (row * D + channels)[:, None] * L + now[None, :]
        delta = tl.load(dt + place, mask=inside, other=0.0)
        value = tl.load(u + place, mask=inside, other=0.0)
        d_out = tl.load(dy + place, mask=inside, other=0.0)
        within = inside & (steps < BLOCK_T - 1)[None, :] & (now + 1 < L)[None, :]
        following = tl.load(dt + place + 1, mask=within, other=0.0)
        slot = ((row * blocks + block) * D + channels)[:, None] * N + states[None, :]
        h = tl.load(kept + slot, mask=real[:, None], other=0.0)
        d_fed = tl.zeros([BLOCK_D, BLOCK_T], h.dtype)
        d_delta = tl.zeros([BLOCK_D, BLOCK_T], h.dtype)
        for n in range(0, N):
            rate = tl.load(A + channels * N + n, mask=real, other=0.0)
            mixing = (row * N + n) * L + now
            write = tl.load(B + mixing, mask=now < L, other=0.0)
            read = tl.load(C + mixing, mask=now < L, other=0.0)
            chosen = states[None, :] == n
            before = tl.sum(tl.where(chosen, h, 0.0), 1)
            fed = delta * value * write[None, :]
            decay = tl.exp(delta * rate[:, None])
            through, added = tl.associative_scan((decay, fed), 1, _compose)
            here = through * before[:, None] + added
            behind = tl.sum(tl.where(chosen, carried, 0.0), 1)
            # Steps behind the end have decay 1 and read nothing: they hand ``behind`` on.
            source = d_out * read[None, :]
            source += tl.where(steps[None, :] == BLOCK_T - 1, behind[:, None], 0.0)
            ahead = tl.exp(following * rate[:, None])
            unused, grad = tl.associative_scan((ahead, source), 1, _compose, reverse=True)
            d_write = tl.sum(tl.where(inside, grad * delta * value, 0.0), 0)
            d_read = tl.sum(tl.where(inside, here * d_out, 0.0), 0)
            tl.atomic_add(dB + mixing, d_write, mask=now < L)
            tl.atomic_add(dC + mixing, d_read, mask=now < L)
            d_fed += grad * write[None, :]
            held = grad * (here - fed)  # of the exponent dt A
            d_delta += held * rate[:, None]
            of_rate += tl.where(chosen, tl.sum(held * delta, 1)[:, None], 0.0)
            start = tl.sum(tl.where(steps[None, :] == 0, decay * grad, 0.0), 1)
            carried = tl.where(chosen, start[:, None], carried)
        tl.store(du + place, d_fed * delta, mask=inside)
        tl.store(ddt + place, d_delta + d_fed * value, mask=inside)
    tl.store(dA + own, of_rate, mask=real[:, None])
    tl.store(d_state + own, carried, mask=real[:, None])


def selective_scan(
    u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    """The recurrence of this module over ``L`` steps.

    Args:
        u, dt: ``(B, D, L)``, float32 or float64, as all others. A: ``(D, N)``, ``N`` a power of
            two. B, C: ``(B, N, L)``. state: ``(B, D, N)``, before the first step.

    Returns:
        ``y (B, D, L)`` and the state after the last step; differentiable once in everything.

    Raises ValueError or TypeError for shapes, dtypes or devices that do not fit, ImportError where
    Triton is missing.
    """
    check_device("selective_scan", _scan_forward, u, dt, A, B, C, state)
    if u.dim() != 3 or A.dim() != 2:
        shapes = f"{tuple(u.shape)} and {tuple(A.shape)}"
        raise ValueError(f"u, A: expected shapes (B, D, L) and (D, N), got {shapes}")
    (batch, D, L), N = u.shape, A.shape[1]
    if N < 1 or N & (N - 1):
        raise ValueError(f"A: expected a number of states that is a power of two, got {N}")
    wanted = dict(dt=(batch, D, L), A=(D, N), B=(batch, N, L), C=(batch, N, L))
    wanted["state"] = (batch, D, N)
    for name, x in dict(dt=dt, A=A, B=B, C=C, state=state).items():
        if tuple(x.shape) != wanted[name]:
            raise ValueError(f"{name}: expected shape {wanted[name]}, got {tuple(x.shape)}")
        if x.dtype != u.dtype:
            raise TypeError(f"{name}: expected the dtype of u, {u.dtype}, got {x.dtype}")
    if u.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"u: expected float32 or float64, got {u.dtype}")
    return _SelectiveScan.apply(*(x.contiguous() for x in (u, dt, A, B, C, state)))


class _SelectiveScan(torch.autograd.Function):
    @staticmethod
    def forward(ctx, u, dt, A, B, C, state):
        (batch, D, L), N, tile = u.shape, A.shape[1], FORWARD
        y, last = torch.empty_like(u), torch.empty_like(state)
        blocks = -(-L // tile.block_t)
        kept = u.new_empty(batch, blocks, D, N)
        if state.numel():
            _launch(
                _scan_forward, tile, batch, D,
                u, dt, A, B, C, state, y, kept, last, D, L, N=N,
            )  # fmt: skip
        ctx.save_for_backward(u, dt, A, B, C, kept)
        return y, last

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy, d_last):
        u, dt, A, B, C, kept = ctx.saved_tensors
        (batch, D, L), N = u.shape, A.shape[1]
        du, ddt = torch.empty_like(u), torch.empty_like(u)
        dA, d_state = d_last.new_empty(d_last.shape), d_last.new_empty(d_last.shape)
        dB, dC = torch.zeros_like(B), torch.zeros_like(C)
        if d_state.numel():
            _launch(
                _scan_backward, BACKWARD, batch, D,
                dy.contiguous(), u, dt, A, B, C, kept, d_last.contiguous(),
                du, ddt, dA, dB, dC, d_state, D, L, N=N,
            )  # fmt: skip
        return du, ddt, dA.sum(0), dB, dC, d_state


def _launch(kernel, tile: Tile, batch: int, D: int, *arguments, **constants) -> None:
    options = {} if is_interpreted(kernel) else {"num_warps": tile.num_warps}
    constants |= dict(BLOCK_D=tile.block_d, BLOCK_T=tile.block_t)
    kernel[(batch, -(-D // tile.block_d))](*arguments, **constants, **options)


def forward_bytes(batch: int, D: int, L: int, N: int, *, itemsize: int = 4) -> int:
    """Bytes that the forward pass moves: ``u``, ``dt``, ``y`` and the states once; ``B`` and ``C``
    for each block of channels; ``A`` for each block of steps; a state a block of steps."""
    programs, blocks = -(-D // FORWARD.block_d), -(-L // FORWARD.block_t)
    numbers = 3 * D * L + 2 * D * N + programs * 2 * N * L + 2 * blocks * D * N
    return itemsize * batch * numbers


def backward_bytes(batch: int, D: int, L: int, N: int, *, itemsize: int = 4) -> int:
    """Bytes that the backward pass moves: three sequences read and two written, ``dt`` again one
    step on; ``B``, ``C`` read and ``dB``, ``dC`` added to for each block of channels."""
    programs, blocks = -(-D // BACKWARD.block_d), -(-L // BACKWARD.block_t)
    ahead = D * (L - blocks)
    numbers = 5 * D * L + ahead + 3 * D * N + programs * 6 * N * L + 2 * blocks * D * N
    return itemsize * batch * numbers


def _specialisation(kernel: str, dtype: str, N: int) -> Specialisation:
    forward = kernel == "_scan_forward"
    shared = ["u", "dt", "A", "B", "C"]
    names = [*shared, "state", "y", "kept", "last"]
    if not forward:
        names = ["dy", *shared, "kept", "d_last", "du", "ddt", "dA", "dB", "dC", "d_state"]
    tile = FORWARD if forward else BACKWARD
    return Specialisation(
        kernel=kernel,
        label=f"{dtype} N={N}",
        direction="forward" if forward else "backward",
        signature=dict.fromkeys(names, f"*{dtype}") | dict.fromkeys(("D", "L"), "i32"),
        constexprs={"N": N, "BLOCK_D": tile.block_d, "BLOCK_T": tile.block_t},
        num_warps=tile.num_warps,
    )


SPECIALISATIONS = [
    _specialisation(kernel, "fp32", N)
    for kernel in ("_scan_forward", "_scan_backward")
    for N in (16, 64)
]
