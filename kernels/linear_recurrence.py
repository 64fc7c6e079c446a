"""Linear recurrence with a matrix state, chunk by chunk, without storing a state.

    S_t = D_t S_{t-1} + b_t c_t^T            out_t = scale * S_t^T a_t

A program owns some value channels of one head and walks over the chunks with its part of the state
in registers: inside a chunk a masked product as in attention, the state for everything before it
(Lightning Attention-2, arXiv 2401.04658, algorithm 1; with decays for each channel, Yang et al.,
arXiv 2312.06635). Each input is read once by each block of value channels; no state is written but
the last.

The backward pass is the same kernel three times. With d_S running from the last step to the first,

    d_v = backwards in time (k, q, d_out)
    d_q = in time (d_out, v, k)              d_k = backwards in time (v, d_out, q)

where the states of d_q and d_k are transposed, so that a decay of the key channels stands on the
kernel's value channels there. The gradient of the log-decays is the sum, from the end, of
``q d_q - k d_k``, and of the final state times its gradient.

Decays stand in exponents as sums over a stretch, never positive; log-decays below -100 count as
-100, which float32 cannot tell from a reset. Scores with a decay for each channel are added up pair
by pair in chunks of 16. Sums and states are float32; half-precision products take the state rounded
to the inputs' type. There is no delta rule in this kernel.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any, NamedTuple

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

__all__ = ["linear_recurrence", "scan_bytes"]

MAX_WIDTH = 128


@jit
def _scan_kernel(
    a, b, c, log_decay, initial, out, final, L, scale, K: tl.constexpr, V: tl.constexpr,
    DECAY: tl.constexpr, REVERSE: tl.constexpr, PRECISION: tl.constexpr, CHUNK: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """A program: value channels ``program_id(1) * BLOCK_V ..`` of head ``program_id(0)``.

    ``DECAY`` is "none", "scalar", "key" or "value": what has a decay of its own. ``REVERSE`` runs
    from the last step to the first: then ``initial`` is the state after the last step.
    """
    head = tl.program_id(0).to(tl.int64)
    first_v = tl.program_id(1) * BLOCK_V
    a += head * L * K
    b += head * L * K
    c += head * L * V + first_v
    out += head * L * V + first_v
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
        reads = load_tile(a, start, L, K, CHUNK, K, BLOCK_K, True)
        writes = load_tile(b, start, L, K, CHUNK, K, BLOCK_K, True)
        values = load_tile(c, start, L, V, CHUNK, V - first_v, BLOCK_V, True)
        if DECAY == "none":
            scores = tl.dot(reads, tl.trans(writes), input_precision=PRECISION)
            scores = tl.where(order >= 0, scores, 0.0).to(values.dtype)
            here = tl.dot(scores, values, input_precision=PRECISION)
            here = tl.dot(reads, state.to(reads.dtype), here, input_precision=PRECISION)
            state = tl.dot(tl.trans(writes), values, state, input_precision=PRECISION)
        elif DECAY == "scalar":
            logs = tl.load(log_decay + head * L + start + rows, mask=start + rows < L, other=0.0)
            sums, total, before, after = _stretches(logs, REVERSE)
            between = sums[:, None] - sums[None, :]
            if REVERSE:
                between = -between
            scores = tl.dot(reads, tl.trans(writes), input_precision=PRECISION)
            scores = tl.where(order >= 0, scores * tl.exp(tl.minimum(between, 0.0)), 0.0)
            here = tl.dot(scores.to(values.dtype), values, input_precision=PRECISION)
            reads = (reads * before[:, None]).to(reads.dtype)
            writes = (writes * after[:, None]).to(writes.dtype)
            here = tl.dot(reads, state.to(reads.dtype), here, input_precision=PRECISION)
            state = tl.dot(tl.trans(writes), values, state * total, input_precision=PRECISION)
        elif DECAY == "key":
            logs = load_tile(log_decay + head * L * K, start, L, K, CHUNK, K, BLOCK_K, True)
            sums, total, before, after = _stretches(logs, REVERSE)
            scores = tl.zeros([CHUNK, CHUNK], tl.float32)
            for j in range(0, CHUNK):
                one = rows[:, None] == j
                between = sums - tl.sum(tl.where(one, sums, 0.0), 0)[None, :]
                if REVERSE:
                    between = -between
                write = tl.sum(tl.where(one, writes, 0.0).to(tl.float32), 0)
                pair = reads * write[None, :] * tl.exp(tl.minimum(between, 0.0))
                scores = tl.where(rows[None, :] == j, tl.sum(pair, 1)[:, None], scores)
            scores = tl.where(order >= 0, scores, 0.0).to(values.dtype)
            here = tl.dot(scores, values, input_precision=PRECISION)
            reads = (reads * before).to(reads.dtype)
            writes = (writes * after).to(writes.dtype)
            here = tl.dot(reads, state.to(reads.dtype), here, input_precision=PRECISION)
            state = state * total[:, None]
            state = tl.dot(tl.trans(writes), values, state, input_precision=PRECISION)
        else:
            decays = log_decay + head * L * V + first_v
            logs = load_tile(decays, start, L, V, CHUNK, V - first_v, BLOCK_V, True)
            sums, total, before, after = _stretches(logs, REVERSE)
            scores = tl.dot(reads, tl.trans(writes), input_precision=PRECISION)
            scores = tl.where(order >= 0, scores, 0.0)
            here = tl.dot(reads, state.to(reads.dtype), input_precision=PRECISION) * before
            for j in range(0, CHUNK):
                one = rows[:, None] == j
                between = sums - tl.sum(tl.where(one, sums, 0.0), 0)[None, :]
                if REVERSE:
                    between = -between
                value = tl.sum(tl.where(one, values, 0.0).to(tl.float32), 0)
                score = tl.sum(tl.where(rows[None, :] == j, scores, 0.0), 1)
                here += score[:, None] * value[None, :] * tl.exp(tl.minimum(between, 0.0))
            values = (values * after).to(values.dtype)
            state = state * total[None, :]
            state = tl.dot(tl.trans(writes), values, state, input_precision=PRECISION)
        store_tile(out, here * scale, start, L, V, CHUNK, V - first_v, BLOCK_V)
    store_tile(final + place, state, zero, K, V, BLOCK_K, V - first_v, BLOCK_V)


@jit
def _stretches(logs, REVERSE: tl.constexpr):
    """``(sums, total, before, after)`` of the log-decays of a chunk, along its first axis.

    ``before`` decays the state on its way to a step, ``after`` a step on its way out of the chunk.
    """
    logs = tl.maximum(logs.to(tl.float32), -100.0)
    sums = tl.cumsum(logs, 0)
    total = tl.sum(logs, 0)
    before = tl.exp(sums)
    after = tl.exp(tl.minimum(total - sums, 0.0))
    if REVERSE:
        before, after = after, before
    return sums, tl.exp(total), before, after


class Blocks(NamedTuple):
    """How a scan is launched: steps in a chunk, value channels of a program, warps, stages."""

    chunk: int
    block_v: int
    num_warps: int
    num_stages: int


#: (decays for each channel?, bytes of a number, wider of K and V, padded) -> how it is launched.
BLOCKS = {
    (False, 2, 64): Blocks(32, 32, 4, 2),
    (False, 2, 128): Blocks(32, 32, 4, 2),
    (False, 4, 64): Blocks(16, 32, 4, 1),
    (True, 2, 64): Blocks(16, 32, 4, 1),
    (True, 2, 128): Blocks(16, 32, 4, 1),
    (True, 4, 64): Blocks(16, 32, 4, 1),
}


def blocks_for(decay: str, K: int, V: int, dtype: torch.dtype) -> Blocks:
    """The row of the table for these widths."""
    return BLOCKS[decay in ("key", "value"), dtype.itemsize, max(64, padded(max(K, V)))]


def widest(dtype: torch.dtype) -> int:
    """The widest keys and values that the kernel takes."""
    return MAX_WIDTH // 2 if dtype == torch.float32 else MAX_WIDTH


def linear_recurrence(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    log_decay: Tensor | None = None,
    state: Tensor | None = None,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """``(out (B, H, L, V), state (B, H, K, V))``; differentiable in every tensor.

    Args:
        q, k, v: ``(B, H, L, K)`` twice and ``(B, H, L, V)``; float16 or bfloat16 up to 128 wide,
            float32 up to 64 (wider states do not fit into the registers).
        log_decay: at most 0: ``(B, H, L)``, or ``(B, H, L, K)`` for each key channel, or None.
        state: what an earlier call returned, or None.
        scale: of the output, ``K ** -0.5`` if None.

    Raises:
        ValueError, TypeError: shapes, widths, dtypes or devices that do not fit.
        ImportError: Triton is missing.
    """
    _check(q, k, v, log_decay, state)
    check_device("linear_recurrence", _scan_kernel, q, k, v)
    (B, H, L, K), V = q.shape, v.shape[-1]
    if state is None:
        state = torch.zeros(B, H, K, V, dtype=torch.float32, device=q.device)
    if 0 in (B, H, L):
        return torch.zeros_like(v), state.float()
    scale = K**-0.5 if scale is None else float(scale)
    decay = None if log_decay is None else log_decay.float().flatten(0, 1)
    flat = (x.flatten(0, 1) for x in (q, k, v))
    out, state = _Recurrence.apply(*flat, decay, state.float().flatten(0, 1), scale)
    return out.unflatten(0, (B, H)), state.unflatten(0, (B, H))


class _Recurrence(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, log_decay, state, scale):
        kind = "none" if log_decay is None else ("scalar", "key")[log_decay.dim() - 2]
        out, final = _scan(q, k, v, log_decay, state, kind, out_dtype=v.dtype, scale=scale)
        ctx.save_for_backward(q, k, v, log_decay, state, final)
        ctx.kind, ctx.scale = kind, scale
        return out, final

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, d_out, d_final):
        q, k, v, log_decay, state, final = ctx.saved_tensors
        kind = ctx.kind
        d_out = (d_out * ctx.scale).to(v.dtype)
        back = dict(kind=kind, reverse=True)
        d_v, d_state = _scan(k, q, d_out, log_decay, d_final, **back, out_dtype=v.dtype)
        kind = "value" if kind == "key" else kind
        # The decay's gradient is a difference: there the products may not be rounded first.
        wide = dict(kind=kind, out_dtype=q.dtype if log_decay is None else torch.float32)
        d_q, _ = _scan(d_out, v, k, log_decay, state.mT, **wide)
        d_k, _ = _scan(v, d_out, q, log_decay, d_final.mT, **wide, reverse=True)
        d_decay = None
        if log_decay is not None and ctx.needs_input_grad[3]:
            changes, end = q * d_q - k * d_k, (final * d_final).sum(-1)
            if kind == "scalar":
                changes, end = changes.sum(-1), end.sum(-1)
            later = changes.double().flip(1).cumsum(1).flip(1)
            d_decay = (later + end[:, None]).to(log_decay.dtype)
        return d_q.to(q.dtype), d_k.to(k.dtype), d_v, d_decay, d_state, None


def _scan(
    a: Tensor, b: Tensor, c: Tensor, log_decay: Tensor | None, initial: Tensor, kind: str, *,
    out_dtype: torch.dtype, reverse: bool = False, scale: float = 1.0,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Launch the kernel on ``a, b (N, L, K)``, ``c (N, L, V)``, ``initial (N, K, V)``."""
    a, b, c, initial = (x.contiguous() for x in (a, b, c, initial))
    (N, L, K), V = a.shape, c.shape[2]
    out = torch.empty(c.shape, dtype=out_dtype, device=c.device)
    final = torch.empty_like(initial)
    blocks = blocks_for(kind, K, V, c.dtype)
    options: dict[str, Any] = {}
    if not is_interpreted(_scan_kernel):
        options = {"num_warps": blocks.num_warps, "num_stages": blocks.num_stages}
    with torch.cuda.device(c.device) if c.is_cuda else nullcontext():
        _scan_kernel[(N, -(-V // blocks.block_v))](
            a, b, c, None if log_decay is None else log_decay.contiguous(), initial, out, final,
            L, scale, K=K, V=V, DECAY=kind, REVERSE=reverse, PRECISION=precision(c.dtype),
            CHUNK=blocks.chunk, BLOCK_K=padded(K), BLOCK_V=blocks.block_v, **options,
        )  # fmt: skip
    return out, final


def scan_bytes(N: int, L: int, K: int, V: int, decay: str, itemsize: int = 4) -> int:
    """Bytes that one pass over ``N`` heads has to move.

    Every block of value channels reads both key-sided inputs and, of decays, what it needs; its
    values, its output and its part of the first and the last state pass once. Logs and states are
    float32.
    """
    dtype = torch.float32 if itemsize == 4 else torch.float16
    programs = -(-V // blocks_for(decay, K, V, dtype).block_v)
    logs = {"none": 0, "scalar": programs, "key": programs * K, "value": V}[decay]
    return N * (L * ((2 * K * programs + 2 * V) * itemsize + 4 * logs) + 2 * 4 * K * V)


def _check(q, k, v, log_decay, state) -> None:
    for name, x in (("q", q), ("k", k), ("v", v)):
        if not isinstance(x, Tensor) or x.dim() != 4:
            got = tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
            raise ValueError(f"{name}: expected (batch, heads, length, width), got {got}")
        if x.dtype not in (torch.float16, torch.bfloat16, torch.float32) or x.dtype != q.dtype:
            raise TypeError(f"{name}: expected float16, bfloat16 or float32 as q, got {x.dtype}")
        if not 1 <= x.shape[-1] <= widest(x.dtype):
            wanted = f"a width of 1 to {widest(x.dtype)} in {x.dtype}"
            raise ValueError(f"{name}: expected {wanted}, got {x.shape[-1]}")
    if k.shape != q.shape or v.shape[:3] != q.shape[:3]:
        shapes = [tuple(x.shape) for x in (q, k, v)]
        raise ValueError(f"q, k, v: expected one batch, heads and length, got {shapes}")
    if log_decay is not None and log_decay.shape not in (q.shape, q.shape[:3]):
        wanted = f"{tuple(q.shape[:3])} or {tuple(q.shape)}"
        raise ValueError(f"log_decay: expected {wanted}, got {tuple(log_decay.shape)}")
    if state is not None and state.shape != (*q.shape[:2], q.shape[3], v.shape[3]):
        wanted = (*q.shape[:2], q.shape[3], v.shape[3])
        raise ValueError(f"state: expected {wanted}, got {tuple(state.shape)}")


def _specialisation(kind: str, reverse: bool, name: str, width: int) -> Specialisation:
    dtype = torch.float32 if name == "fp32" else torch.bfloat16
    chunk, block_v, warps, stages = blocks_for(kind, width, width, dtype)
    signature = dict.fromkeys(("a", "b", "c", "out"), f"*{name}")
    signature |= {"initial": "*fp32", "final": "*fp32", "L": "i32", "scale": "fp32"}
    constexprs = {
        "K": width, "V": width, "DECAY": kind, "REVERSE": reverse, "CHUNK": chunk,
        "BLOCK_K": width, "BLOCK_V": block_v, "PRECISION": precision(dtype, "sm_80"),
    }  # fmt: skip
    if kind == "none":
        constexprs["log_decay"] = None
    else:
        signature["log_decay"] = "*fp32"
    backward = reverse or kind == "value"
    if backward and kind in ("value", "scalar"):
        signature["out"] = "*fp32"
    return Specialisation(
        kernel="_scan_kernel",
        label=f"{name} {width} wide, decay {kind}" + (", backwards in time" if reverse else ""),
        direction="backward" if backward else "forward",
        signature=signature,
        constexprs=constexprs,
        num_warps=warps,
        num_stages=stages,
        overrides={"gfx942": {"constexprs": {"PRECISION": precision(dtype, "gfx942")}}},
    )


#: What is compiled for every target; the launcher takes its blocks from the same table. Plain
#: linear attention needs less of everything than a scalar decay, which stands for both.
SPECIALISATIONS = [
    _specialisation(kind, reverse, name, width)
    for kind in ("scalar", "key", "value")
    for reverse in (False, True)
    for name, width in (("bf16", 64), ("bf16", 128), ("fp32", 64))
]
SPECIALISATIONS += [_specialisation("none", False, "bf16", 64)]
