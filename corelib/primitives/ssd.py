"""State space duality: the scan of Mamba-2, as products of matrices within chunks.

    S_t = exp(dt_t A) S_{t-1} + dt_t B_t x_t^T          y_t = S_t^T C_t + D x_t

It is linear attention with queries ``C``, keys ``B``, values ``dt x`` and one decay a head and step
(Dao & Gu, arXiv 2405.21060, sections 6 and 7). Heads share ``B`` and ``C`` in groups, as query
heads share keys in grouped-query attention; that is why this is not just a call of
`linear_recurrence`: the scores ``C_i . B_j`` are made once a group, and only their decay,
``exp(s_i - s_j)`` with ``s`` the running sum of ``dt A``, once a head.

| here    | paper | shape            |
|:--------|:------|:-----------------|
| x       | X     | (B, H, L, V)     |
| dt      | Delta | (B, H, L)        |
| A       | A     | (H,), negative   |
| B, C    | B, C  | (B, G, L, K)     |
| state   | H     | (B, H, K, V)     |

Exponents are differences of a running sum in float64, and at most 0: nothing overflows and little
is lost behind a strong decay. Time O(L T (K/r + V) + L K V) a head for chunks of T steps and r
heads a group, linear in L; for gradients autograd keeps the ``T`` scores of every step.

On a GPU the kernel `corelib.kernels.ssd` runs, in its own chunks, for heads up to 64 wide and K up
to 128 (64 in float32); half-precision inputs enter its products as they are, sums are float32.
Oracle: `ssd_reference`, `linear_recurrence`, and transformers' ``Mamba2Mixer.torch_forward``.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from ._checks import check_same_kind
from .decay_exp import decay_exp
from .selective_scan import step_size

Heads = Float[Tensor, "B H L V"]
Mixing = Float[Tensor, "B G L K"]
State = Float[Tensor, "B H K V"]


def ssd_reference(
    x: Heads,
    dt: Float[Tensor, "B H L"],
    A: Float[Tensor, " H"],
    B: Mixing,
    C: Mixing,
    D: Float[Tensor, " H"] | None = None,
    *,
    dt_bias: Float[Tensor, " H"] | None = None,
    dt_softplus: bool = False,
    state: State | None = None,
    return_state: bool = False,
) -> Heads | tuple[Heads, State]:
    """As `ssd_chunked`, one step after the other as the equations stand."""
    _check(x, dt, A, B, C, D, dt_bias, state, chunk=1)
    dt = step_size(dt, dt_bias, dt_softplus)
    B, C = (y.repeat_interleave(x.shape[1] // y.shape[1], 1) for y in (B, C))
    S = x.new_zeros(*x.shape[:2], B.shape[3], x.shape[3]) if state is None else state
    ys = []
    for t in range(x.shape[2]):
        decay = torch.exp(dt[:, :, t] * A)[:, :, None, None]
        S = decay * S + B[:, :, t, :, None] * (dt[:, :, t, None] * x[:, :, t])[:, :, None]
        ys.append((C[:, :, t, :, None] * S).sum(2))
    y = torch.stack(ys, 2) if ys else torch.zeros_like(x)
    y = y if D is None else y + D[:, None, None] * x
    return (y, S) if return_state else y


def ssd_chunked(
    x: Heads,
    dt: Float[Tensor, "B H L"],
    A: Float[Tensor, " H"],
    B: Mixing,
    C: Mixing,
    D: Float[Tensor, " H"] | None = None,
    *,
    dt_bias: Float[Tensor, " H"] | None = None,
    dt_softplus: bool = False,
    chunk: int = 64,
    state: State | None = None,
    return_state: bool = False,
) -> Heads | tuple[Heads, State]:
    """The recurrence of this module over ``L`` steps, differentiable in every tensor.

    Args:
        B, C: the groups G divide the heads H; head h reads group ``h // (H // G)``.
        D: what passes by the states, per head; None nothing.
        dt_bias: added to ``dt``; dt_softplus: then ``dt = softplus(dt)``.
        chunk: steps multiplied at once, on a CPU; any number gives the same result.
        state: what an earlier call returned; None starts from zeros.
        return_state: also return the state after the last step, in float32 at least.

    Returns:
        ``y (B, H, L, V)`` in x's dtype, and with ``return_state`` the state ``(B, H, K, V)``.

    Raises:
        ValueError, TypeError: shapes, dtypes, devices or a chunk that do not fit.
    """
    _check(x, dt, A, B, C, D, dt_bias, state, chunk)
    wide = torch.promote_types(x.dtype, torch.float32)
    K = B.shape[3]
    if state is None:
        state = torch.zeros(*x.shape[:2], K, x.shape[3], dtype=wide, device=x.device)
    dt = step_size(dt.to(wide), dt_bias, dt_softplus)
    parts = x.to(wide) * dt[..., None], dt * A[:, None].to(wide), B, C, state.to(wide)
    chunk = min(chunk, max(1, x.shape[2]))  # a decoding step is not a whole chunk
    y, state = _by_kernel(*parts) if _fits_kernel(x, K) else _by_products(*parts, chunk)
    y = y if D is None else torch.addcmul(y.to(wide), x.to(wide), D[:, None, None].to(wide))
    return (y.to(x.dtype), state) if return_state else y.to(x.dtype)


def _fits_kernel(x: Tensor, K: int) -> bool:
    if not x.is_cuda or x.dtype == torch.float64:
        return False
    from corelib.kernels.ssd import widest

    keys, values = widest(x.dtype)
    return keys >= K and x.shape[3] <= values


def _by_kernel(values, log_decay, B, C, state) -> tuple[Tensor, Tensor]:
    from corelib.kernels.ssd import ssd

    return ssd(values.to(B.dtype), log_decay, B, C, state)


def _by_products(values, log_decay, B, C, state, chunk) -> tuple[Tensor, Tensor]:
    """``values (B, H, L, V)``, ``log_decay (B, H, L)``: ``y`` and the last state."""
    G, L = B.shape[1], values.shape[2]
    parts = values, log_decay, B.to(values.dtype), C.to(values.dtype)
    parts = (_in_chunks(y, chunk, G) for y in parts)  # (B, G, heads of the group, n, T, ...)
    y, state = _run(*parts, state.unflatten(1, (G, -1)))
    return y.flatten(3, 4).flatten(1, 2)[:, :, :L], state.flatten(1, 2)


def _run(values, log_decay, B, C, state) -> tuple[Tensor, Tensor]:
    """``values (B, G, R, n, T, V)``, ``log_decay (B, G, R, n, T)``, ``B, C (B, G, 1, n, T, K)``."""
    sums = log_decay.double().cumsum(-1)
    apart = (sums[..., :, None] - sums[..., None, :]).to(values.dtype)
    ahead = torch.ones(apart.shape[-2:], dtype=torch.bool, device=apart.device).triu(1)
    weights = (C @ B.mT) * decay_exp(apart.masked_fill(ahead, -torch.inf))
    into = decay_exp((sums[..., -1:] - sums).to(values.dtype))  # from a step to the chunk's end
    since = decay_exp(sums.to(values.dtype))[..., None]  # from the chunk's start to a step
    added = B.mT @ (into[..., None] * values)
    states = []
    totals = since[..., -1:, :].unbind(3)
    for total, more in zip(totals, added.unbind(3), strict=True):
        states.append(state)
        state = torch.addcmul(more, total, state)
    if not states:
        return torch.zeros_like(values), state
    y = weights @ values + since * (C @ torch.stack(states, 3))
    return y, state


def _in_chunks(x: Tensor, chunk: int, groups: int) -> Tensor:
    """``(B, heads, L, ...)`` as ``(B, groups, heads of a group, n, chunk, ...)``, zeros at the end.

    A step with ``dt = 0`` neither decays nor writes, so the zeros leave the state alone.
    """
    L = x.shape[2]
    short = -L % chunk
    if short:
        x = F.pad(x, [0, 0] * (x.dim() - 3) + [0, short])
    return x.unflatten(2, (-1, chunk) if L else (0, chunk)).unflatten(1, (groups, -1))


def _check(x, dt, A, B, C, D, dt_bias, state, chunk) -> None:
    check_same_kind(x=x, dt=dt, B=B, C=C)
    for name, y in dict(x=x, B=B).items():
        if y.dim() != 4:
            raise ValueError(f"{name}: expected 4 axes, got shape {tuple(y.shape)}")
    (batch, H, L, V), (G, K) = x.shape, (B.shape[1], B.shape[3])
    if G == 0 or H % G:
        raise ValueError(f"B: expected a number of groups that divides {H} heads, got {G}")
    wanted = dict(dt=(batch, H, L), A=(H,), B=(batch, G, L, K), C=(batch, G, L, K))
    wanted |= dict(D=(H,), dt_bias=(H,), state=(batch, H, K, V))
    tensors = dict(dt=dt, A=A, B=B, C=C, D=D, dt_bias=dt_bias, state=state)
    for name, y in tensors.items():
        if y is None:
            continue
        if not isinstance(y, Tensor) or not y.is_floating_point():
            got = y.dtype if isinstance(y, Tensor) else type(y).__name__
            raise TypeError(f"{name}: expected a floating-point tensor, got {got}")
        if tuple(y.shape) != wanted[name]:
            raise ValueError(f"{name}: expected shape {wanted[name]}, got {tuple(y.shape)}")
        if y.device != x.device:
            raise ValueError(f"{name}: expected the device of x, {x.device}, got {y.device}")
    if isinstance(chunk, bool) or not isinstance(chunk, int) or chunk < 1:
        raise ValueError(f"chunk: expected an int of at least 1, got {chunk!r}")
