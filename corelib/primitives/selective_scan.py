"""The selective scan of Mamba: a diagonal recurrence whose steps depend on the input.

    h_t = exp(dt_t A) * h_{t-1} + (dt_t u_t) B_t          y_t = C_t . h_t + D u_t

for each of ``D`` channels with ``N`` states of its own; ``*`` is elementwise (Gu & Dao, arXiv
2312.00752, section 3.2 and algorithm 2; the discretisation of ``B`` is Euler's, as released).
With ``z`` the output is ``y_t * silu(z_t)``; ``dt`` may get a bias and a softplus first.

| here    | paper       | shape            |
|:--------|:------------|:-----------------|
| u       | x           | (B, D, L)        |
| dt      | Delta       | (B, D, L)        |
| A       | A           | (D, N), negative |
| B, C    | B, C        | (B, N, L)        |
| state   | h           | (B, D, N)        |

The decay has no factor that all channels share, so nothing here is a product of matrices between
steps: the scan is bound by memory and by ``B L D N`` exponentials. What costs time in the obvious
code is that it writes ``exp(dt A)`` and ``dt u B`` of the whole sequence, ``(B, D, L, N)`` each,
and then walks through them in strides. Here both are made for a few steps at a time, in buffers
that stay in the cache; within them a step is one fused multiply-add over all channels, and the
outputs of a block are one batched product. Steps follow each other in a loop: on a CPU the forms
that have none (prefix doubling, Blelloch) do several times the work on the same bytes and were
slower at every length (`make bench`).

On a GPU the kernel `corelib.kernels.selective_scan` runs, for N a power of two.

Backward keeps the state before each block, ``B L D N / block`` numbers, and computes the rest
again: ``(B, L, D, N)`` is never held. Time O(B L D N).
Oracle: `selective_scan_reference`, and transformers' ``MambaMixer.slow_forward``.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from ._checks import check_same_kind
from .decay_exp import decay_exp_

CACHED = 1 << 17  # numbers in one buffer of a block: half a megabyte of float32

Sequence = Float[Tensor, "B D L"]
Mixing = Float[Tensor, "B N L"]
State = Float[Tensor, "B D N"]


def selective_scan_reference(
    u: Sequence,
    dt: Sequence,
    A: Float[Tensor, "D N"],
    B: Mixing,
    C: Mixing,
    D: Float[Tensor, " D"] | None = None,
    z: Sequence | None = None,
    *,
    dt_bias: Float[Tensor, " D"] | None = None,
    dt_softplus: bool = False,
    state: State | None = None,
    return_state: bool = False,
) -> Sequence | tuple[Sequence, State]:
    """As `selective_scan`, one step after the other as the equations stand."""
    _check(u, dt, A, B, C, D, z, dt_bias, state)
    dt = step_size(dt, dt_bias, dt_softplus)
    h = u.new_zeros(u.shape[0], *A.shape) if state is None else state
    ys = []
    for t in range(u.shape[2]):
        decay = torch.exp(dt[:, :, t, None] * A)
        h = decay * h + (dt[:, :, t] * u[:, :, t])[:, :, None] * B[:, None, :, t]
        ys.append((h * C[:, None, :, t]).sum(-1))
    y = torch.stack(ys, 2) if ys else torch.zeros_like(u)
    y = _skip_and_gate(y, u, D, z)
    return (y, h) if return_state else y


def selective_scan(
    u: Sequence,
    dt: Sequence,
    A: Float[Tensor, "D N"],
    B: Mixing,
    C: Mixing,
    D: Float[Tensor, " D"] | None = None,
    z: Sequence | None = None,
    *,
    dt_bias: Float[Tensor, " D"] | None = None,
    dt_softplus: bool = False,
    state: State | None = None,
    return_state: bool = False,
) -> Sequence | tuple[Sequence, State]:
    """The recurrence of this module over ``L`` steps, differentiable in every tensor.

    Args:
        D: what passes by the states, per channel; None nothing.
        z: a gate: the output is multiplied by ``silu(z)``; None leaves it.
        dt_bias: added to ``dt``; dt_softplus: then ``dt = softplus(dt)``.
        state: what an earlier call returned; None starts from zeros.
        return_state: also return the state after the last step, in float32 at least.

    Returns:
        ``y (B, D, L)`` in u's dtype, and with ``return_state`` the state ``(B, D, N)``.

    Raises:
        ValueError, TypeError: shapes, dtypes or devices that do not fit together.
    """
    _check(u, dt, A, B, C, D, z, dt_bias, state)
    wide = torch.promote_types(u.dtype, torch.float32)
    dt = step_size(dt.to(wide), dt_bias, dt_softplus)
    if state is None:
        state = torch.zeros(u.shape[0], *A.shape, dtype=wide, device=u.device)
    parts = (x.to(wide) for x in (u, dt, A, B, C, state))
    y, state = _recurrence(*parts)
    y = _skip_and_gate(y, u.to(wide), D, z).to(u.dtype)
    return (y, state) if return_state else y


def _recurrence(u, dt, A, B, C, state) -> tuple[Tensor, Tensor]:
    """``y`` without skip and gate, and the last state; all in one dtype of at least float32."""
    N = A.shape[1]
    if u.is_cuda and N & (N - 1) == 0:
        from corelib.kernels.selective_scan import selective_scan as kernel

        return kernel(u, dt, A, B, C, state)
    return _Scan.apply(u, dt, A, B, C, state)


class _Scan(torch.autograd.Function):
    """``(u, dt, A, B, C, state) -> (y, state)``; inside, the states lie as ``(B, N, D)``."""

    @staticmethod
    def forward(ctx, u, dt, A, B, C, state):
        plan = _Blocks(u, dt, A, B, C)
        y, kept = torch.empty_like(u.permute(2, 0, 1), memory_format=torch.contiguous_format), []
        h = state.mT.contiguous()
        for block in plan:
            kept.append(h)
            states = plan.states(block, h)
            plan.read(block, states, y)
            h = states[-1].clone()
        ctx.save_for_backward(u, dt, A, B, C, *kept)
        return y.permute(1, 2, 0), h.mT.contiguous()

    @staticmethod
    @once_differentiable
    def backward(ctx, dy, dstate):
        u, dt, A, B, C, *kept = ctx.saved_tensors
        plan = _Blocks(u, dt, A, B, C)
        grads = _Gradients(plan, dy, u)
        carried = dstate.mT.contiguous()
        for block, h in zip(reversed(list(plan)), reversed(kept), strict=True):
            carried = grads.add(block, plan.states(block, h), carried)
        return *grads.results(), carried.mT


class _Blocks:
    """The sequence in blocks of a few steps, time first, channels last, buffers used again."""

    def __init__(self, u, dt, A, B, C):
        self.u, self.dt, self.B, self.C = u, dt, B, C
        self.A = A.mT.contiguous()  # (N, D)
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

    def part(self, x: Tensor, block: slice) -> Tensor:
        """``x (B, *, L)`` of this block as ``(T, B, *)``, contiguous."""
        return x[:, :, block].permute(2, 0, 1).contiguous()

    def states(self, block: slice, h: Tensor) -> Tensor:
        """``(T + 1, B, N, D)``: ``h`` and the states after each step of the block."""
        n = block.stop - block.start
        u, dt, B = (self.part(x, block) for x in (self.u, self.dt, self.B))
        decay_exp_(torch.mul(dt[:, :, None], self.A, out=self.decays[:n]))
        torch.mul((u * dt)[:, :, None], B[..., None], out=self.buffer[1 : n + 1])
        self.buffer[0].copy_(h)
        for t in range(n):
            self.state_of[t + 1].addcmul_(self.decay_of[t], self.state_of[t])
        return self.buffer[: n + 1]

    def read(self, block: slice, states: Tensor, y: Tensor) -> None:
        """Write ``C_t . h_t`` of the block into ``y (L, B, D)``."""
        n, batch, N, D = states[1:].shape
        C = self.part(self.C, block).view(n * batch, 1, N)
        torch.bmm(C, states[1:].reshape(-1, N, D), out=y[block].view(n * batch, 1, D))


class _Gradients:
    """Collects the gradients, block by block from the end."""

    def __init__(self, plan: _Blocks, dy: Tensor, u: Tensor):
        self.plan, self.dy = plan, dy
        self.du, self.ddt = torch.empty_like(u), torch.empty_like(u)
        self.dA = torch.zeros_like(plan.A)
        self.dB, self.dC = torch.empty_like(plan.B), torch.empty_like(plan.C)
        self.buffer = torch.empty_like(plan.decays)
        self.grad_of = self.buffer.unbind(0)

    def add(self, block: slice, states: Tensor, carried: Tensor) -> Tensor:
        """``carried (B, N, D)``: the gradient of the block's last state; returns that of ``h``."""
        plan, n = self.plan, len(states) - 1
        u, dt, B, C, dy = (plan.part(x, block) for x in (plan.u, plan.dt, plan.B, plan.C, self.dy))
        grads, decays = self.buffer[:n], plan.decays[:n]
        torch.mul(C[..., None], dy[:, :, None], out=grads)
        grads[-1] += carried
        for t in range(n - 2, -1, -1):
            self.grad_of[t].addcmul_(plan.decay_of[t + 1], self.grad_of[t + 1])
        carried = decays[0] * grads[0]
        of_input = (B[:, :, None] @ grads)[:, :, 0]  # of dt * u
        self._put(self.dB, block, (grads @ (u * dt)[..., None])[..., 0])
        self._put(self.dC, block, (states[1:] @ dy[..., None])[..., 0])
        exponent = decays.mul_(states[:-1]).mul_(grads)  # of dt * A
        of_dt = torch.mul(exponent, plan.A, out=grads).sum(2)
        self.dA += exponent.mul_(dt[:, :, None]).sum((0, 1))
        self._put(self.du, block, of_input * dt)
        self._put(self.ddt, block, of_dt.addcmul_(of_input, u))
        return carried

    def _put(self, whole: Tensor, block: slice, part: Tensor) -> None:
        whole[:, :, block] = part.permute(1, 2, 0)

    def results(self) -> tuple[Tensor, ...]:
        return self.du, self.ddt, self.dA.mT, self.dB, self.dC


def step_size(dt: Tensor, dt_bias: Tensor | None, dt_softplus: bool) -> Tensor:
    """``dt (B, channels, L)``, with the bias of each channel and made positive, if asked to."""
    if dt_bias is not None:
        dt = dt + dt_bias[:, None].to(dt.dtype)
    return F.softplus(dt) if dt_softplus else dt


def _skip_and_gate(y: Tensor, u: Tensor, D: Tensor | None, z: Tensor | None) -> Tensor:
    if D is not None:
        y = torch.addcmul(y, u, D[:, None].to(y.dtype))
    return y if z is None else y * F.silu(z.to(y.dtype))


def _check(u, dt, A, B, C, D, z, dt_bias, state) -> None:
    given = dict(u=u, dt=dt, B=B, C=C) | ({} if z is None else {"z": z})
    check_same_kind(**given)
    if u.dim() != 3:
        raise ValueError(f"u: expected 3 axes (B, D, L), got shape {tuple(u.shape)}")
    if not isinstance(A, Tensor) or not A.is_floating_point():
        got = A.dtype if isinstance(A, Tensor) else type(A).__name__
        raise TypeError(f"A: expected a real floating-point tensor, got {got}")
    batch, D_, L = u.shape
    if A.dim() != 2 or len(A) != D_:
        raise ValueError(f"A: expected shape ({D_}, N), got {tuple(A.shape)}")
    wanted = dict(dt=(batch, D_, L), z=(batch, D_, L), D=(D_,), dt_bias=(D_,))
    wanted |= dict(B=(batch, A.shape[1], L), C=(batch, A.shape[1], L), state=(batch, *A.shape))
    tensors = dict(dt=dt, B=B, C=C, D=D, z=z, dt_bias=dt_bias, state=state)
    for name, x in tensors.items():
        if x is not None and tuple(x.shape) != wanted[name]:
            raise ValueError(f"{name}: expected shape {wanted[name]}, got {tuple(x.shape)}")
        if x is not None and x.device != u.device:
            raise ValueError(f"{name}: expected the device of u, {u.device}, got {x.device}")
