"""The (gated) delta rule: a linear recurrence whose values are first corrected by what is held.

    S_t = D_t S_{t-1} + k_t u_t^T     u_t = beta_t e_t     e_t = v_t - (D_t S_{t-1})^T k_t
    out_t = scale * S_t^T q_t

Once the errors ``e`` are known this is the plain recurrence of `linear_recurrence`, whose kernel
makes the output. The kernel here finds them: a program owns some value channels of one head and
walks over the chunks with its part of the state in registers. Within a chunk the errors solve

    (1 + A diag(beta)) e = v - (k exp(G)) S       A_ij = sum_c k_ic k_jc exp(G_ic - G_jc), j < i

row after row (forward substitution: 16 steps of rank one, no power of A is taken, so keys may be
long). Yang et al., arXiv 2406.06484; with gates arXiv 2412.06464 and, per channel, 2510.26692.

Backward, with M_t the gradient of S_t, ``w_t = beta_t d_u_t`` and ``d_u_t = M_t^T k_t``,

    M_t = q_t d_out_t^T + D_{t+1} (M_{t+1} - k_{t+1} w_{t+1}^T)

The part of M that queries write is a plain recurrence backwards in time; given what k reads of it
as values, the rest of ``d_u`` are the errors of a delta rule backwards in time: this kernel again.
Then ``d_v = w``, ``d_beta = d_u . e``, ``d_q`` as ever, and, each a pass of the plain kernel,

    d_k = M u (written) - (D_t S_{t-1}) w (read)
    d_log_decay_t = S_L d_S_L + sum_{s >= t} q_s d_q_s - k_s (written_s - read_s)

Decays, chunks and rounding are those of `linear_recurrence`. Errors are stored in float32.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from corelib.kernels._shared import (
    check_device,
    is_interpreted,
    jit,
    load_tile,
    padded,
    precision,
    store_tile,
    tl,
)
from corelib.kernels.gates.specialisation import Specialisation
from corelib.kernels.linear_recurrence import _check, _scan, _stretches

__all__ = ["delta_bytes", "delta_rule"]

CHUNK, BLOCK_V, WARPS = 16, 32, 4


@jit
def _delta_kernel(
    k, v, beta, log_decay, initial, errors, final, L, K: tl.constexpr, V: tl.constexpr,
    DECAY: tl.constexpr, REVERSE: tl.constexpr, PRECISION: tl.constexpr, CHUNK: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """A program: value channels ``program_id(1) * BLOCK_V ..`` of head ``program_id(0)``.

    ``DECAY`` is "none", "scalar" or "key"; ``REVERSE`` runs from the last step to the first.
    """
    head = tl.program_id(0).to(tl.int64)
    first_v = tl.program_id(1) * BLOCK_V
    k += head * L * K
    v += head * L * V + first_v
    errors += head * L * V + first_v
    place = head * K * V + first_v
    zero = tl.program_id(1) * 0
    state = load_tile(initial + place, zero, K, V, BLOCK_K, V - first_v, BLOCK_V, True)
    rows = tl.arange(0, CHUNK)
    chunks = tl.cdiv(L, CHUNK)
    for step in range(0, chunks):
        start = step * CHUNK
        order = rows[:, None] - rows[None, :]
        if REVERSE:
            start = (chunks - 1 - step) * CHUNK
            order = -order
        keys = load_tile(k, start, L, K, CHUNK, K, BLOCK_K, True)
        values = load_tile(v, start, L, V, CHUNK, V - first_v, BLOCK_V, True)
        strength = tl.load(beta + head * L + start + rows, mask=start + rows < L, other=0.0)
        reads, writes = keys, keys
        if DECAY == "none":
            overlaps = tl.dot(keys, tl.trans(keys), input_precision=PRECISION)
        elif DECAY == "scalar":
            logs = tl.load(log_decay + head * L + start + rows, mask=start + rows < L, other=0.0)
            sums, total, before, after = _stretches(logs, REVERSE)
            between = sums[:, None] - sums[None, :]
            if REVERSE:
                between = -between
            overlaps = tl.dot(keys, tl.trans(keys), input_precision=PRECISION)
            overlaps = overlaps * tl.exp(tl.minimum(between, 0.0))
            reads = (keys * before[:, None]).to(keys.dtype)
            writes = (keys * after[:, None]).to(keys.dtype)
        else:
            logs = load_tile(log_decay + head * L * K, start, L, K, CHUNK, K, BLOCK_K, True)
            sums, total, before, after = _stretches(logs, REVERSE)
            overlaps = tl.zeros([CHUNK, CHUNK], tl.float32)
            for j in range(0, CHUNK):
                one = rows[:, None] == j
                between = sums - tl.sum(tl.where(one, sums, 0.0), 0)[None, :]
                if REVERSE:
                    between = -between
                write = tl.sum(tl.where(one, keys, 0.0).to(tl.float32), 0)
                pair = keys * write[None, :] * tl.exp(tl.minimum(between, 0.0))
                overlaps = tl.where(rows[None, :] == j, tl.sum(pair, 1)[:, None], overlaps)
            reads = (keys * before).to(keys.dtype)
            writes = (keys * after).to(keys.dtype)
        held = tl.dot(reads, state.to(reads.dtype), input_precision=PRECISION)
        here = values.to(tl.float32) - held
        weights = tl.where(order > 0, overlaps * strength[None, :], 0.0)
        for i in range(0, CHUNK - 1):  # row j is known once those before it have been taken off
            j = i
            if REVERSE:
                j = CHUNK - 1 - i
            row = tl.sum(tl.where(rows[:, None] == j, here, 0.0), 0)
            weight = tl.sum(tl.where(rows[None, :] == j, weights, 0.0), 1)
            here -= weight[:, None] * row[None, :]
        added = (here * strength[:, None]).to(keys.dtype)
        if DECAY == "scalar":
            state = state * total
        elif DECAY == "key":
            state = state * total[:, None]
        state = tl.dot(tl.trans(writes), added, state, input_precision=PRECISION)
        store_tile(errors, here, start, L, V, CHUNK, V - first_v, BLOCK_V)
    store_tile(final + place, state, zero, K, V, BLOCK_K, V - first_v, BLOCK_V)


def delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    *,
    log_decay: Tensor | None = None,
    state: Tensor | None = None,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """``(out (B, H, L, V), state (B, H, K, V))``; differentiable in every tensor.

    Args:
        q, k, v, log_decay, state, scale: as `linear_recurrence` takes them.
        beta: how far each step corrects, ``(B, H, L)``, usually 0 to 1.

    Raises:
        ValueError, TypeError: shapes, widths, dtypes or devices that do not fit.
        ImportError: Triton is missing.
    """
    _check(q, k, v, log_decay, state)
    if not isinstance(beta, Tensor) or beta.shape != q.shape[:3]:
        got = tuple(beta.shape) if isinstance(beta, Tensor) else type(beta).__name__
        raise ValueError(f"beta: expected shape {tuple(q.shape[:3])}, got {got}")
    check_device("delta_rule", _delta_kernel, q, k, v, beta)
    (B, H, L, K), V = q.shape, v.shape[-1]
    if state is None:
        state = torch.zeros(B, H, K, V, dtype=torch.float32, device=q.device)
    if 0 in (B, H, L):
        return torch.zeros_like(v), state.float()
    scale = K**-0.5 if scale is None else float(scale)
    decay = None if log_decay is None else log_decay.float().flatten(0, 1)
    flat = (x.flatten(0, 1) for x in (q, k, v, beta.float()))
    out, state = _Delta.apply(*flat, decay, state.float().flatten(0, 1), scale)
    return out.unflatten(0, (B, H)), state.unflatten(0, (B, H))


class _Delta(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, beta, log_decay, state, scale):
        kind = "none" if log_decay is None else ("scalar", "key")[log_decay.dim() - 2]
        errors, final = _errors(k, v, beta, log_decay, state, kind)
        u = (beta[..., None] * errors).to(v.dtype)
        out, _ = _scan(q, k, u, log_decay, state, kind, out_dtype=v.dtype, scale=scale)
        ctx.save_for_backward(q, k, beta, log_decay, state, errors, final)
        ctx.kind, ctx.scale = kind, scale
        return out, final

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, d_out, d_final):
        q, k, beta, log_decay, state, errors, final = ctx.saved_tensors
        kind, strength, dtype = ctx.kind, beta[..., None], q.dtype
        d_out, u = (d_out * ctx.scale).to(dtype), (strength * errors).to(dtype)
        back = dict(kind=kind, reverse=True)
        read, d_state = _scan(k, q, d_out, log_decay, d_final, **back, out_dtype=dtype)
        nothing = torch.zeros_like(d_final)
        d_u, taken = _errors(k, read, beta, log_decay, nothing, **back)
        w = (strength * d_u).to(dtype)
        wide = dict(kind="value" if kind == "key" else kind, out_dtype=torch.float32)
        d_q, _ = _scan(d_out, u, k, log_decay, state.mT, **wide)
        written, _ = _scan(u, d_out, q, log_decay, d_final.mT, **wide, reverse=True)
        later, _ = _scan(u, w, k, log_decay, nothing.mT, **wide, reverse=True)
        earlier, _ = _scan(w, u, k, log_decay, state.mT, **wide)
        own = (u.float() * w.float()).sum(-1, keepdim=True) * k  # a step does not read itself
        written, held = written - (later - own), earlier - own
        d_decay = None
        if log_decay is not None and ctx.needs_input_grad[4]:
            changes = q * d_q - k * (written + held)
            end = (final * d_final).sum(-1)
            if kind == "scalar":
                changes, end = changes.sum(-1), end.sum(-1)
            after = changes.double().flip(1).cumsum(1).flip(1)
            d_decay = (after + end[:, None]).to(log_decay.dtype)
        d_beta = (d_u * errors).sum(-1)
        d_k = (written - held).to(dtype)
        return d_q.to(dtype), d_k, w, d_beta, d_decay, d_state - taken, None


def _errors(
    k: Tensor, v: Tensor, beta: Tensor, log_decay: Tensor | None, initial: Tensor, kind: str, *,
    reverse: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Launch the kernel on ``k (N, L, K)``, ``v (N, L, V)``, ``initial (N, K, V)``."""
    k, v, beta, initial = (x.contiguous() for x in (k, v, beta, initial))
    (N, L, K), V = k.shape, v.shape[2]
    errors = torch.empty(v.shape, dtype=torch.float32, device=v.device)
    final = torch.empty_like(initial)
    options: dict[str, Any] = {}
    if not is_interpreted(_delta_kernel):
        options = {"num_warps": WARPS, "num_stages": 1}
    with torch.cuda.device(v.device) if v.is_cuda else nullcontext():
        _delta_kernel[(N, -(-V // BLOCK_V))](
            k, v, beta, None if log_decay is None else log_decay.contiguous(), initial, errors,
            final, L, K=K, V=V, DECAY=kind, REVERSE=reverse, PRECISION=precision(v.dtype),
            CHUNK=CHUNK, BLOCK_K=padded(K), BLOCK_V=BLOCK_V, **options,
        )  # fmt: skip
    return errors, final


def delta_bytes(N: int, L: int, K: int, V: int, decay: str, itemsize: int = 4) -> int:
    """Bytes that the errors of ``N`` heads cost; the plain recurrence comes on top.

    Every block of value channels reads the keys, their decays and ``beta``; values, errors and
    states pass once. Logs, ``beta``, errors and states are float32.
    """
    programs = -(-V // BLOCK_V)
    logs = {"none": 0, "scalar": 1, "key": K}[decay]
    a_step = (K * programs + V) * itemsize + 4 * (programs * (1 + logs) + V)
    return N * (L * a_step + 2 * 4 * K * V)


def _specialisation(kind: str, reverse: bool, name: str, width: int) -> Specialisation:
    dtype = torch.float32 if name == "fp32" else torch.bfloat16
    signature = {"k": f"*{name}", "v": f"*{name}", "L": "i32"}
    signature |= dict.fromkeys(("beta", "initial", "errors", "final"), "*fp32")
    constexprs = {
        "K": width, "V": width, "DECAY": kind, "REVERSE": reverse, "CHUNK": CHUNK,
        "BLOCK_K": width, "BLOCK_V": BLOCK_V, "PRECISION": precision(dtype, "sm_80"),
    }  # fmt: skip
    if kind == "none":
        constexprs["log_decay"] = None
    else:
        signature["log_decay"] = "*fp32"
    return Specialisation(
        kernel="_delta_kernel",
        label=f"{name} {width} wide, decay {kind}" + (", backwards in time" if reverse else ""),
        direction="backward" if reverse else "forward",
        signature=signature,
        constexprs=constexprs,
        num_warps=WARPS,
        num_stages=1,
        overrides={"gfx942": {"constexprs": {"PRECISION": precision(dtype, "gfx942")}}},
    )


#: A scalar decay stands for none as well, which needs less of everything.
SPECIALISATIONS = [
    _specialisation(kind, reverse, name, width)
    for kind in ("scalar", "key")
    for reverse in (False, True)
    for name, width in (("bf16", 128), ("fp32", 64))
]
SPECIALISATIONS += [_specialisation("none", False, "bf16", 64)]
