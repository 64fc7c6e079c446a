"""Linear recurrence with a matrix state: linear attention, gated linear attention, the delta rule.

    S_t = D_t S_{t-1} + k_t v_t^T          out_t = scale * S_t^T q_t          D_t = diag(exp(g_t))

* no ``log_decay``: plain causal linear attention, ``D_t = 1``;
* ``log_decay (B, H, L)``: one decay a head and step (RetNet, Lightning, Mamba-2 without its scan);
* ``log_decay (B, H, L, K)``: one for each key channel (GLA, RWKV-6, HGRN-2);
* ``beta (B, H, L)``: the delta rule, which writes only what the state does not hold yet,
  ``S_t = D_t S_{t-1} + beta_t k_t (v_t - (D_t S_{t-1})^T k_t)^T`` (DeltaNet; with a scalar decay
  Gated DeltaNet, with a vector Kimi Delta Attention). Keys are taken as they come: for a stable
  recurrence give them length 1.

Forms, all with the same results up to rounding and all differentiable:

| form        | what                                             | kept for gradients |
|:------------|:-------------------------------------------------|:-------------------|
| `reference` | the equations above, step by step                | every state        |
| `recurrent` | the same with few calls a step: for decoding     | every state        |
| `chunked`   | products within chunks of 64, states between     | a state a chunk    |
| `kernel`    | Triton: `linear_recurrence`, or `delta_rule`     | with `beta`, errors |

Time is O(L K V) for the first two and O(L (64 (K + V) + K V)) for the others, in matrix products.
``auto``: on a GPU the kernel (widths up to 128, in float32 up to 64), else `chunked`,
below 8 steps `recurrent`.
Decays may be as strong as you like, ``-inf`` included (a reset): nothing overflows.
Half-precision inputs are computed in float32; the state is float32 or float64.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from ._checks import check_same_kind
from .linear_recurrence_chunked import chunked
from .linear_recurrence_delta import delta_chunked

FORMS = ("auto", "reference", "recurrent", "chunked", "kernel")
FEW_STEPS = 8

Decay = Float[Tensor, "B H L"] | Float[Tensor, "B H L K"]
Out = Float[Tensor, "B H L V"]
State = Float[Tensor, "B H K V"]


def linear_recurrence(
    q: Float[Tensor, "B H L K"],
    k: Float[Tensor, "B H L K"],
    v: Float[Tensor, "B H L V"],
    *,
    log_decay: Decay | None = None,
    beta: Float[Tensor, "B H L"] | None = None,
    state: State | None = None,
    scale: float | None = None,
    form: str = "auto",
    return_state: bool = False,
) -> Out | tuple[Out, State]:
    """The recurrence of this module over ``L`` steps.

    Args:
        log_decay: natural logarithm of the decay, at most 0: a head's or each key channel's.
        beta: how far the delta rule corrects, usually 0 to 1; None adds ``k_t v_t^T`` instead.
        state: ``S_0``, what an earlier call returned; None starts from zeros.
        scale: of the output, ``K ** -0.5`` if None.
        form: one of `FORMS`.
        return_state: also return the state after the last step, in float32 at least.

    Returns:
        ``out`` in v's dtype, and with ``return_state`` the state ``(B, H, K, V)``.

    Raises:
        ValueError, TypeError: shapes, dtypes, devices or options that do not fit, a positive
            ``log_decay`` (looked for on a CPU only).
    """
    _check(q, k, v, log_decay, beta, state, scale, form)
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    form = _choose(q, v) if form == "auto" else form
    if form == "kernel":
        options = dict(log_decay=log_decay, state=state, scale=scale)
        if beta is None:
            from corelib.kernels.linear_recurrence import linear_recurrence as kernel

            out, state = kernel(q, k, v, **options)
        else:
            from corelib.kernels.delta_rule import delta_rule

            out, state = delta_rule(q, k, v, beta, **options)
        return (out, state) if return_state else out
    wide = torch.promote_types(q.dtype, torch.float32)
    (B, H, _, K), V = q.shape, v.shape[-1]
    if state is None:
        state = torch.zeros(B, H, K, V, dtype=wide, device=q.device)
    flat = [None if x is None else x.flatten(0, 1) for x in (q, k, v, log_decay)]
    parts = *flat, None if beta is None else beta.flatten(0, 1), state.to(wide).flatten(0, 1)
    out, state = _run(form, *parts, scale)
    out, state = out.to(v.dtype).unflatten(0, (B, H)), state.unflatten(0, (B, H))
    return (out, state) if return_state else out


def _run(form, q, k, v, log_decay, beta, state, scale) -> tuple[Tensor, Tensor]:
    if 0 in (*q.shape, v.shape[2]):
        return torch.zeros_like(v) + 0 * q.sum(), state.clone()
    if form == "chunked" and beta is None:
        return chunked(q, k, v, log_decay, state, scale)
    if form == "chunked":
        return delta_chunked(q, k, v, log_decay, beta, state, scale)
    return (_reference if form == "reference" else _recurrent)(
        q, k, v, log_decay, beta, state, scale
    )


def _reference(q, k, v, log_decay, beta, state, scale) -> tuple[Tensor, Tensor]:
    """Step by step, as the equations stand; ``q (N, L, K)``, ``state (N, K, V)``."""
    q, k, v = (x.to(state.dtype) for x in (q, k, v))
    outs = []
    for t in range(q.shape[1]):
        if log_decay is not None:
            decay = torch.exp(log_decay[:, t].to(state.dtype))  # (N,) or (N, K)
            state = decay.reshape(len(q), -1, 1) * state
        added = v[:, t]
        if beta is not None:
            held = torch.einsum("nk,nkv->nv", k[:, t], state)
            added = beta[:, t, None].to(state.dtype) * (added - held)
        state = state + torch.einsum("nk,nv->nkv", k[:, t], added)
        outs.append(scale * torch.einsum("nk,nkv->nv", q[:, t], state))
    return torch.stack(outs, 1), state


def _recurrent(q, k, v, log_decay, beta, state, scale) -> tuple[Tensor, Tensor]:
    """As `_reference`, with all that is not sequential done before the loop."""
    q, k, v = (x.to(state.dtype) for x in (q * scale, k, v))
    queries, rows, columns = (x.unbind(1) for x in (q[:, :, None], k[:, :, None], k[..., None]))
    values = v[:, :, None].unbind(1)
    decays = betas = [None] * q.shape[1]
    if log_decay is not None:
        log_decay = log_decay.to(state.dtype).reshape(*log_decay.shape[:2], -1, 1)
        decays = torch.exp(log_decay).unbind(1)
    if beta is not None:
        betas = beta.to(state.dtype)[:, :, None, None].unbind(1)
    outs = []
    for query, row, column, value, decay, strength in zip(
        queries, rows, columns, values, decays, betas, strict=True
    ):
        if decay is not None:
            state = state * decay
        if strength is not None:
            value = strength * torch.baddbmm(value, row, state, alpha=-1)
        state = torch.baddbmm(state, column, value)
        outs.append(torch.bmm(query, state))
    return torch.cat(outs, 1), state


def _choose(q: Tensor, v: Tensor) -> str:
    widest = {torch.float16: 128, torch.bfloat16: 128, torch.float32: 64}.get(q.dtype, 0)
    if q.is_cuda and max(q.shape[3], v.shape[3]) <= widest:
        return "kernel"
    return "chunked" if q.shape[2] >= FEW_STEPS else "recurrent"


def _check(q, k, v, log_decay, beta, state, scale, form) -> None:
    check_same_kind(q=q, k=k, v=v)
    if q.dim() != 4:
        raise ValueError(f"q: expected 4 axes (B, H, L, K), got shape {tuple(q.shape)}")
    B, H, L, K = q.shape
    if k.shape != q.shape:
        raise ValueError(f"k: expected the shape of q, {tuple(q.shape)}, got {tuple(k.shape)}")
    if v.dim() != 4 or v.shape[:3] != q.shape[:3]:
        raise ValueError(f"v: expected shape ({B}, {H}, {L}, V), got {tuple(v.shape)}")
    for name, x, shapes in (
        ("log_decay", log_decay, [(B, H, L), (B, H, L, K)]),
        ("beta", beta, [(B, H, L)]),
        ("state", state, [(B, H, K, v.shape[3])]),
    ):
        if x is None:
            continue
        if not isinstance(x, Tensor) or not x.is_floating_point():
            got = x.dtype if isinstance(x, Tensor) else type(x).__name__
            raise TypeError(f"{name}: expected a floating-point tensor or None, got {got}")
        if tuple(x.shape) not in shapes:
            wanted = " or ".join(map(str, shapes))
            raise ValueError(f"{name}: expected shape {wanted}, got {tuple(x.shape)}")
        if x.device != q.device:
            raise ValueError(f"{name}: expected the device of q, {q.device}, got {x.device}")
    if (
        log_decay is not None
        and not log_decay.is_cuda
        and log_decay.numel()
        and log_decay.amax() > 0
    ):
        raise ValueError(f"log_decay: expected at most 0, got {log_decay.max().item():.3g}")
    if scale is not None and not isinstance(scale, int | float):
        raise TypeError(f"scale: expected a number or None, got {type(scale).__name__}")
    if form not in FORMS:
        raise ValueError(f"form: expected one of {FORMS}, got {form!r}")
