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

from ._checks import check_same_kind
from ._selective_scan_cpu import Scan

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
    return Scan.apply(u, dt, A, B, C, state)


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
