"""The selective scan of `selective_scan` on a CPU, with its own backward pass: `Scan`.

Time comes first and channels last, so that a step is one contiguous stretch; decays and inputs are
made for a block of steps at a time, in buffers that stay in the cache and are used again.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .decay_exp import decay_exp_, smallest_exponent

CACHED = 1 << 17  # numbers in one buffer of a block: half a megabyte of float32


class Scan(torch.autograd.Function):
    """``(u, dt, A, B, C, state) -> (y, state)``; inside, the states lie as ``(B, N, D)``."""

    @staticmethod
    def forward(ctx, u, dt, A, B, C, state):
        plan = _Blocks(u, dt, A, B, C)
        y, kept = torch.empty_like(plan.u), []
        h = state.mT.contiguous()
        for block in plan:
            kept.append(h)
            states = plan.states(block, h)
            plan.read(block, states, y)
            h = states[-1].clone()
        ctx.save_for_backward(u, dt, A, B, C, *kept)
        return _time_last(y), h.mT.contiguous()

    @staticmethod
    @once_differentiable
    def backward(ctx, dy, dstate):
        u, dt, A, B, C, *kept = ctx.saved_tensors
        plan = _Blocks(u, dt, A, B, C)
        grads = _Gradients(plan, _time_first(dy))
        carried = dstate.mT.contiguous()
        for block, h in zip(reversed(list(plan)), reversed(kept), strict=True):
            carried = grads.add(block, plan.states(block, h), carried)
        return *grads.results(), carried.mT


class _Blocks:
    """The sequence in blocks of a few steps, time first, channels last, buffers used again."""

    def __init__(self, u, dt, A, B, C):
        self.u, self.dt, self.B, self.C = (_time_first(x) for x in (u, dt, B, C))
        self.A = A.mT.contiguous()  # (N, D)
        strongest = (self.A.amin(0) * self.dt.amax((0, 1))).amin() if self.dt.numel() else 0.0
        mild = bool(strongest > smallest_exponent(u.dtype))
        self.exp_ = Tensor.exp_ if mild else decay_exp_
        batch, (N, D) = len(u), self.A.shape
        self.length = u.shape[2]
        self.steps = max(8, min(64, CACHED // max(1, batch * N * D)))
        self.decays = u.new_empty(self.steps, batch, N, D)
        self.buffer = u.new_empty(self.steps + 1, batch, N, D)
        # Views of single steps, made once: slicing costs as much as the arithmetic of a step.
        self.decay_of, self.state_of = self.decays.unbind(0), self.buffer.unbind(0)

    def __iter__(self):
        for start in range(0, self.length, self.steps):
            yield slice(start, min(start + self.steps, self.length))

    def states(self, block: slice, h: Tensor) -> Tensor:
        """``(T + 1, B, N, D)``: ``h`` and the states after each step of the block."""
        n = block.stop - block.start
        u, dt, B = self.u[block], self.dt[block], self.B[block]
        self.exp_(torch.mul(dt[:, :, None], self.A, out=self.decays[:n]))
        torch.mul((u * dt)[:, :, None], B[..., None], out=self.buffer[1 : n + 1])
        self.buffer[0].copy_(h)
        for t in range(n):
            self.state_of[t + 1].addcmul_(self.decay_of[t], self.state_of[t])
        return self.buffer[: n + 1]

    def read(self, block: slice, states: Tensor, y: Tensor) -> None:
        """Write ``C_t . h_t`` of the block into ``y (L, B, D)``."""
        n, batch, N, D = states[1:].shape
        C = self.C[block].view(n * batch, 1, N)
        torch.bmm(C, states[1:].reshape(-1, N, D), out=y[block].view(n * batch, 1, D))


class _Gradients:
    """Collects the gradients, block by block from the end."""

    def __init__(self, plan: _Blocks, dy: Tensor):
        self.plan, self.dy = plan, dy
        self.du, self.ddt = torch.empty_like(plan.u), torch.empty_like(plan.u)
        self.dA = torch.zeros_like(plan.A)
        self.dB, self.dC = torch.empty_like(plan.B), torch.empty_like(plan.C)
        self.buffer = torch.empty_like(plan.decays)
        self.grad_of = self.buffer.unbind(0)

    def add(self, block: slice, states: Tensor, carried: Tensor) -> Tensor:
        """``carried (B, N, D)``: the gradient of the block's last state; returns that of ``h``."""
        plan, n = self.plan, len(states) - 1
        u, dt, B, C, dy = (x[block] for x in (plan.u, plan.dt, plan.B, plan.C, self.dy))
        grads, decays = self.buffer[:n], plan.decays[:n]
        torch.mul(C[..., None], dy[:, :, None], out=grads)
        grads[-1] += carried
        for t in range(n - 2, -1, -1):
            self.grad_of[t].addcmul_(plan.decay_of[t + 1], self.grad_of[t + 1])
        carried = decays[0] * grads[0]
        of_input = (B[:, :, None] @ grads)[:, :, 0]  # of dt * u
        torch.matmul(grads, (u * dt)[..., None], out=self.dB[block, ..., None])
        torch.matmul(states[1:], dy[..., None], out=self.dC[block, ..., None])
        exponent = decays.mul_(states[:-1]).mul_(grads)  # of dt * A
        of_dt = torch.mul(exponent, plan.A, out=grads).sum(2)
        self.dA += exponent.mul_(dt[:, :, None]).sum((0, 1))
        torch.mul(of_input, dt, out=self.du[block])
        torch.addcmul(of_dt, of_input, u, out=self.ddt[block])
        return carried

    def results(self) -> tuple[Tensor, ...]:
        du, ddt, dB, dC = (_time_last(x) for x in (self.du, self.ddt, self.dB, self.dC))
        return du, ddt, self.dA.mT, dB, dC


def _time_first(x: Tensor) -> Tensor:
    """``(B, channels, L)`` as ``(L, B, channels)``, by one flat transposition: several times faster
    than a permuted copy."""
    return x.flatten(0, 1).t().contiguous().view(x.shape[2], *x.shape[:2])


def _time_last(x: Tensor) -> Tensor:
    """``(L, B, channels)`` as ``(B, channels, L)``."""
    return x.flatten(1).t().contiguous().view(*x.shape[1:], x.shape[0])
