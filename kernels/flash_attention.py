"""Exact attention in one pass over the keys, without the L x S matrix (flash attention).

A program holds a block of queries and walks over the blocks of keys that it can see, keeping for
each query the running maximum ``m``, the sum ``l`` and the unnormalised output ``acc``:

    m'   = max(m, max_j s_ij)              s = scale * q k^T
    p    = exp(s - m')                     l' = exp(m - m') l + sum_j p_ij
    acc' = exp(m - m') acc + p v           out = acc / l,  lse = m + log l

Sources: Dao et al., arXiv 2205.14135 (algorithm 1) and 2307.08691 (section 3.1: normalise once, at
the end; keep only the log-sum-exp); Milakov and Gimelshein, arXiv 1805.02867 (online softmax).

Grouped-query attention, sliding windows with attention sinks (only the blocks that can be seen are
read), packed sequences, and a state ``(acc, m, l)`` that is carried from one block of keys to the
next. Exact in exact arithmetic; accumulates in float32. Float32 inputs are multiplied as three
TF32 products on NVIDIA (``tf32x3``, error near float32's) and in float32 on AMD. Inside, logarithms
are to base 2, because the hardware's exponential is; ``m`` and ``lse`` outside are natural.
"""

from __future__ import annotations

import torch
from torch import Tensor

from corelib.kernels import _flash_launch as _launch
from corelib.kernels._flash_table import specialisations
from corelib.kernels._shared import (
    can_see,
    edge_block,
    jit,
    key_blocks,
    load_tile,
    sliced_product,
    store_tile,
    tl,
)

__all__ = [
    "flash_attention",
    "flash_attention_carry",
    "flash_attention_finish",
    "flash_attention_varlen",
    "forward_bytes",
]


#: What is compiled for every target; the launcher takes its blocks from the same table.
SPECIALISATIONS = specialisations("forward")


@jit
def _attend(
    acc, m, l, queries, q, k, v, q_l, k_l, v_l, first, begin, end, sink, lo, a, b, L, S, shift,
    window, sinks, scale_log2, D: tl.constexpr, V: tl.constexpr, CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr, PRECISION: tl.constexpr, SLICE: tl.constexpr, MASKED: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """The online softmax over key blocks: the masked ones by `edge_block`, or a plain range."""
    rows = first + tl.arange(0, BLOCK_M)
    for step in range(begin, end):
        block = step
        if MASKED:
            block = edge_block(step, sink, lo, a, b)
        start = block * BLOCK_N
        if SLICE:
            scores = sliced_product(
                q, first, L, q_l, k, start, S, k_l, D, BLOCK_M, BLOCK_N, BLOCK_D, SLICE, PRECISION
            )
        else:
            keys = load_tile(k, start, S, k_l, BLOCK_N, D, BLOCK_D, MASKED)
            scores = tl.dot(queries, tl.trans(keys), input_precision=PRECISION)
        values = load_tile(v, start, S, v_l, BLOCK_N, V, BLOCK_V, MASKED)
        scores = scores * scale_log2
        if MASKED:
            keys_at = start + tl.arange(0, BLOCK_N)
            seen = can_see(rows[:, None], keys_at[None, :], S, shift, window, sinks, CAUSAL, WINDOW)
            scores = tl.where(seen, scores, float("-inf"))
        m_new = tl.maximum(m, tl.max(scores, 1))
        base = m_new
        if MASKED:  # a row that has seen nothing yet would compute -inf - (-inf)
            base = tl.where(m_new == float("-inf"), 0.0, m_new)
        p = tl.exp2(scores - base[:, None])
        rescale = tl.exp2(m - base)
        l = l * rescale + tl.sum(p, 1)
        acc = tl.dot(p.to(values.dtype), values, acc * rescale[:, None], input_precision=PRECISION)
        m = m_new
    return acc, m, l


@jit
def flash_forward(
    q, k, v, out, lse, row_max, acc_in, max_in, sum_in, starts_q, starts_k,
    q_b, q_h, q_l, k_b, k_h, k_l, v_b, v_h, v_l, out_b, out_h, out_l, lse_h,
    heads_per_group, L, S, shift, window, sinks, scale_log2,
    D: tl.constexpr, V: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr,
    VARLEN: tl.constexpr, CARRY: tl.constexpr, PRECISION: tl.constexpr, SLICE: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """A program: one block of queries of one head, over all key blocks that it can see.

    With ``CARRY`` it starts from the state ``(acc_in, max_in, sum_in)`` and writes the state to
    ``(out, row_max, lse)`` instead of the normalised output and the log-sum-exp.
    """
    sequence = tl.program_id(2).to(tl.int64)
    head = tl.program_id(1).to(tl.int64)
    group = head // heads_per_group
    first = tl.program_id(0) * BLOCK_M
    row = (sequence * tl.num_programs(1) + head) * lse_h
    if CAUSAL:  # the last queries see the most keys: start them first
        first = (tl.num_programs(0) - 1 - tl.program_id(0)) * BLOCK_M
    if VARLEN:
        token_q = tl.load(starts_q + sequence).to(tl.int64)
        token_k = tl.load(starts_k + sequence).to(tl.int64)
        L = (tl.load(starts_q + sequence + 1) - token_q).to(tl.int32)
        S = (tl.load(starts_k + sequence + 1) - token_k).to(tl.int32)
        shift = S - L
        row = head * lse_h + token_q
        if first >= L:
            return
        q += token_q * q_l
        k += token_k * k_l
        v += token_k * v_l
        out += token_q * out_l
    else:
        q += sequence * q_b
        k += sequence * k_b
        v += sequence * v_b
        out += sequence * out_b
    q += head * q_h
    k += group * k_h
    v += group * v_h
    out += head * out_h

    rows = first + tl.arange(0, BLOCK_M)
    exists = rows < L
    if CARRY:
        acc = load_tile(acc_in + row * V, first, L, V, BLOCK_M, V, BLOCK_V, True)
        m = tl.load(max_in + row + rows, mask=exists, other=float("-inf")) * 1.4426950408889634
        l = tl.load(sum_in + row + rows, mask=exists, other=0.0)
    else:
        acc = tl.zeros([BLOCK_M, BLOCK_V], tl.float32)
        m = tl.full([BLOCK_M], float("-inf"), tl.float32)
        l = tl.zeros([BLOCK_M], tl.float32)
    queries = q
    if not SLICE:
        queries = load_tile(q, first, L, q_l, BLOCK_M, D, BLOCK_D, True)
    sink, lo, a, b, hi = key_blocks(
        first, L, S, shift, window, sinks, BLOCK_M, BLOCK_N, CAUSAL, WINDOW
    )
    acc, m, l = _attend(
        acc, m, l, queries, q, k, v, q_l, k_l, v_l, first, a, b, sink, lo, a, b, L, S, shift,
        window, sinks, scale_log2, D, V, CAUSAL, WINDOW, PRECISION, SLICE, False,
        BLOCK_D, BLOCK_V, BLOCK_M, BLOCK_N,
    )  # fmt: skip
    edges = sink + (a - lo) + (hi - b)
    acc, m, l = _attend(
        acc, m, l, queries, q, k, v, q_l, k_l, v_l, first, 0, edges, sink, lo, a, b, L, S, shift,
        window, sinks, scale_log2, D, V, CAUSAL, WINDOW, PRECISION, SLICE, True,
        BLOCK_D, BLOCK_V, BLOCK_M, BLOCK_N,
    )  # fmt: skip
    if CARRY:
        tl.store(row_max + row + rows, m * 0.6931471805599453, mask=exists)
        tl.store(lse + row + rows, l, mask=exists)
    else:
        l = tl.where(l == 0.0, 1.0, l)  # a row that sees no key returns zeros and -inf
        acc = acc / l[:, None]
        tl.store(lse + row + rows, (m + tl.log2(l)) * 0.6931471805599453, mask=exists)
    store_tile(out, acc, first, L, out_l, BLOCK_M, V, BLOCK_V)


def flash_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool,
    window: int | None = None,
    sinks: int = 0,
    scale: float | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Exact attention; differentiable through the output and the log-sum-exp.

    Args:
        q: ``(B, H, L, D)`` in float16, bfloat16 or float32; D and V up to 256.
        k, v: ``(B, G, S, D)`` and ``(B, G, S, V)``; G divides H, head h reads ``h // (H // G)``.
        causal: keys after the query are hidden. With ``L != S`` queries align with the last keys.
        window: causal, a query sees itself and the ``window - 1`` keys before it; otherwise the
            keys nearer than ``window``.
        sinks: with a window, the first keys that every query sees (subject to causality).
        scale: of the scores, ``D ** -0.5`` if None.
        return_lse: also return the natural log-sum-exp of the scores, ``(B, H, L)`` float32.

    Returns:
        ``out (B, H, L, V)`` in q's dtype. A row that sees no key is zeros with ``lse = -inf``.

    Raises:
        ValueError, TypeError: shapes, dtypes or devices do not fit.
        ImportError: Triton is missing.
    """
    _launch.check_inputs(q, k, v)
    shift = k.shape[2] - q.shape[2]
    options = _launch.options_for(q, causal, window, sinks, scale, shift)
    out, lse = _FlashAttention.apply(q, k, v, options, None)
    return (out, lse) if return_lse else out


def flash_attention_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    *,
    causal: bool,
    window: int | None = None,
    sinks: int = 0,
    scale: float | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """`flash_attention` within each sequence of a packed batch, without padding.

    Args:
        q, k, v: ``(total, H, D)``, ``(total_k, G, D)`` and ``(total_k, G, V)``.
        cu_seqlens_q, cu_seqlens_k: ``(N + 1,)`` integers: sequence n holds the
            tokens ``cu_seqlens[n] .. cu_seqlens[n + 1]``. They are read once on the host.

    Returns:
        ``out (total, H, V)``, and ``lse (total, H)`` with ``return_lse``.
    """
    for name, x in (("q", q), ("k", k), ("v", v)):
        if not isinstance(x, Tensor) or x.dim() != 3:
            raise ValueError(f"{name}: expected (total, heads, width), got {_launch.shape_of(x)}")
    packed = _pack(cu_seqlens_q, cu_seqlens_k, q.shape[0], k.shape[0], q.device)
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
    _launch.check_inputs(q, k, v)
    options = _launch.options_for(q, causal, window, sinks, scale, 0)
    out, lse = _FlashAttention.apply(q, k, v, options, packed)
    out, lse = out[0].transpose(0, 1), lse[0].transpose(0, 1)
    return (out, lse) if return_lse else out


State = tuple[Tensor, Tensor, Tensor]


def flash_attention_carry(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    state: State | None = None,
    *,
    causal: bool,
    q_start: int,
    key_start: int,
    window: int | None = None,
    sinks: int = 0,
    scale: float | None = None,
) -> State:
    """Fold one more block of keys into the state of ``q``, as ring attention does.

    Args:
        q, k, v: as in `flash_attention`; the blocks of keys may come in any order.
        state: what the last call returned; None before the first block.
        q_start, key_start: positions of the first query and of the first key in the sequence;
            ``causal``, ``window`` and ``sinks`` speak of positions.

    Returns:
        ``(acc, m, l)``, float32: the *unnormalised* output ``(B, H, L, V)``, the largest scaled
        score ``(B, H, L)`` (natural units) and the sum of exponentials relative to it. A new
        state each time; `flash_attention_finish` divides.

    Raises:
        ValueError: a gradient is asked for. Call this inside an autograd function, and
            `flash_attention_backward` block by block, with the finished output and lse.
    """
    _launch.check_inputs(q, k, v)
    if torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v, *(state or ()))):
        raise ValueError("q, k, v, state: expected no gradient; the carried state has none")
    options = _launch.options_for(q, causal, window, sinks, scale, q_start - key_start)
    options = options._replace(sinks=max(0, sinks - key_start))
    B, H, L, _ = q.shape
    rows = dict(dtype=torch.float32, device=q.device)
    if state is None:
        m = torch.full((B, H, L), float("-inf"), **rows)
        state = torch.zeros((B, H, L, v.shape[-1]), **rows), m, torch.zeros((B, H, L), **rows)
    elif state[0].shape != (B, H, L, v.shape[-1]):
        got = _launch.shape_of(state[0])
        raise ValueError(f"state: expected {(B, H, L, v.shape[-1])} for the output, got {got}")
    acc, m, l = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in state)
    acc_in, max_in, sum_in = (x.contiguous() for x in state)
    carried = {"acc_in": acc_in, "max_in": max_in, "sum_in": sum_in, "row_max": m}
    _forward(q, k, v, acc, l, options, None, carried)
    return acc, m, l


def flash_attention_finish(state: State, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
    """The state of `flash_attention_carry` -> ``(out, lse)``; ``out`` in ``dtype`` or float32."""
    acc, m, l = state
    seen = l > 0
    out = acc / torch.where(seen, l, 1.0)[..., None]
    lse = torch.where(seen, m + torch.where(seen, l, 1.0).log(), float("-inf"))
    return out.to(dtype or acc.dtype), lse


def forward_bytes(
    B: int, H: int, L: int, S: int, D: int, V: int, *, causal: bool, window: int | None = None,
    sinks: int = 0, block_m: int = _launch.INTERPRETED.block_m, itemsize: int = 4,
) -> int:  # fmt: skip
    """Bytes that the forward pass has to move, with ``block_m`` queries per program.

    Queries are read once, the output and the log-sum-exp (4 bytes) written once; each block of
    queries reads each key and value that any of its queries may see, once (FlashAttention-2,
    arXiv 2307.08691: K and V travel once per row block; heads of a group share them in cache,
    which is not counted here).
    """
    keys = 0
    for first in range(0, L, block_m):
        lowest, highest = first + S - L, min(first + block_m, L) - 1 + S - L
        lo = max(0, lowest - window + 1) if window else 0
        hi = min(S, highest + 1) if causal else S
        if window and not causal:
            hi = min(S, highest + window)
        lo, hi = min(lo, S), max(hi, 0)
        seen = range(lo, hi)
        reach = min(S, max(highest + 1, 0)) if causal else S
        sunk = min(sinks, reach) if window else 0
        keys += len(seen) + min(sunk, lo) + max(0, sunk - max(hi, lo))
    rows = L * (D + V) * itemsize + 4 * L
    return B * H * (rows + keys * (D + V) * itemsize)


class _FlashAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, options, packed):
        out = _launch.empty_like_rows(q, v.shape[-1], q.dtype)
        lse = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
        _forward(q, k, v, out, lse, options, packed)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.options, ctx.packed = options, packed
        return out, lse

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, d_out, d_lse):
        from corelib.kernels.flash_attention_backward import run_backward

        return *run_backward(d_out, d_lse, *ctx.saved_tensors, ctx.options, ctx.packed), None, None


def _forward(q, k, v, out, lse, options, packed, carried=None) -> None:
    """Launch the kernel that fills ``out`` and ``lse``."""
    q, k, v = _launch.with_contiguous_rows(q, k, v)
    given = _launch.arguments(q, k, v, options, packed, out=out)
    given |= carried or dict.fromkeys(("acc_in", "max_in", "sum_in", "row_max"))
    longest = q.shape[2] if packed is None else packed.longest_q
    batch = q.shape[0] if packed is None else len(packed.starts_q) - 1
    _launch.run(
        "flash_attention",
        flash_forward,
        "forward",
        {**given, "lse": lse, "CARRY": carried is not None},
        lambda blocks: (-(-longest // blocks.block_m), q.shape[1], batch),
    )


def _pack(
    cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, total_q: int, total_k: int, device: torch.device
) -> _launch.Packed:
    """Check the starts of packed sequences and find the longest."""
    longest = []
    for name, starts, total in (
        ("cu_seqlens_q", cu_seqlens_q, total_q),
        ("cu_seqlens_k", cu_seqlens_k, total_k),
    ):
        if not isinstance(starts, Tensor) or starts.dim() != 1 or starts.is_floating_point():
            raise ValueError(f"{name}: expected integers (N + 1,), got {_launch.shape_of(starts)}")
        values = starts.tolist()
        lengths = [b - a for a, b in zip(values, values[1:], strict=False)]
        if not values or values[0] != 0 or values[-1] != total or min(lengths, default=0) < 0:
            raise ValueError(f"{name}: expected to rise from 0 to {total}, got {values}")
        longest.append(max(lengths, default=0))
    if len(cu_seqlens_q) != len(cu_seqlens_k):
        raise ValueError(
            f"cu_seqlens_k: expected {len(cu_seqlens_q)} entries, got {len(cu_seqlens_k)}"
        )
    starts = (x.to(device, torch.int32) for x in (cu_seqlens_q, cu_seqlens_k))
    return _launch.Packed(*starts, *longest)
