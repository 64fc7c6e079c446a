"""Gradients of exact attention, rebuilt from the log-sum-exp (flash attention, backward).

With ``p = exp(scale * q k^T - lse)`` recomputed tile by tile, and the incoming gradients ``d_out``
and ``d_lse``:

    delta = sum(d_out * out) - d_lse           (one number a query)
    dv    = p^T d_out
    ds    = p * (d_out v^T - delta)
    dq    = scale * ds k                       dk = scale * ds^T q

The gradient of the log-sum-exp costs nothing extra: it is subtracted from ``delta``, because
``d lse / d s = p``. One kernel walks over the keys for each block of queries (``delta``, ``dq``), a
second one over the queries, of all heads in the group, for each block of keys (``dk``, ``dv``): no
atomics, so that the result is the same at every run.

Sources: Dao et al., arXiv 2205.14135 (appendix B.2) and 2307.08691 (algorithm 2).

`flash_attention_backward` is additive over blocks of keys: given the finished ``out`` and ``lse``
of the whole sequence, it returns what one block of keys contributes (ring attention).
"""

from __future__ import annotations

import torch
from torch import Tensor

from corelib.kernels import _flash_launch as _launch
from corelib.kernels._flash_dkdv import tiles_for_dkdv, with_own_tile
from corelib.kernels._flash_table import specialisations
from corelib.kernels._shared import (
    can_see,
    edge_block,
    is_interpreted,
    jit,
    key_blocks,
    launch,
    load_tile,
    query_blocks,
    sliced_product,
    store_tile,
    tl,
)

__all__ = ["flash_attention_backward"]


#: What is compiled for every target; the launcher takes its tiles from the same tables.
SPECIALISATIONS = [with_own_tile(row) for row in specialisations("dq", "dkdv")]


@jit
def _load_lse(lse, rows, L):
    """To base 2; infinite for rows that see no key or do not exist, so that they weigh nothing."""
    natural = tl.load(lse + rows, mask=rows < L, other=float("inf"))
    return tl.where(natural == float("-inf"), float("inf"), natural) * 1.4426950408889634


@jit
def _add_dq(
    dq, queries, d_outs, lse2, delta, q, k, v, d_out, q_l, k_l, v_l, d_out_l, first, begin, end,
    sink, lo, a, b, L, S, shift, window, sinks, scale_log2, D: tl.constexpr, V: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, PRECISION: tl.constexpr, SLICE: tl.constexpr,
    MASKED: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """``ds k`` summed over key blocks: the masked ones by `edge_block`, or a plain range."""
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
            dp = sliced_product(
                d_out, first, L, d_out_l, v, start, S, v_l, V, BLOCK_M, BLOCK_N, BLOCK_V, SLICE,
                PRECISION,
            )  # fmt: skip
            keys = load_tile(k, start, S, k_l, BLOCK_N, D, BLOCK_D, MASKED)
        else:
            keys = load_tile(k, start, S, k_l, BLOCK_N, D, BLOCK_D, MASKED)
            values = load_tile(v, start, S, v_l, BLOCK_N, V, BLOCK_V, MASKED)
            scores = tl.dot(queries, tl.trans(keys), input_precision=PRECISION)
            dp = tl.dot(d_outs, tl.trans(values), input_precision=PRECISION)
        scores = scores * scale_log2
        if MASKED:
            keys_at = start + tl.arange(0, BLOCK_N)
            seen = can_see(rows[:, None], keys_at[None, :], S, shift, window, sinks, CAUSAL, WINDOW)
            scores = tl.where(seen, scores, float("-inf"))
        p = tl.exp2(scores - lse2[:, None])
        ds = p * (dp - delta[:, None])
        dq = tl.dot(ds.to(keys.dtype), keys, dq, input_precision=PRECISION)
    return dq


@jit
def flash_backward_dq(
    q, k, v, out, d_out, dq, lse, d_lse, delta_out, starts_q, starts_k,
    q_b, q_h, q_l, k_b, k_h, k_l, v_b, v_h, v_l, out_b, out_h, out_l,
    d_out_b, d_out_h, d_out_l, dq_b, dq_h, dq_l, lse_h,
    heads_per_group, L, S, shift, window, sinks, scale_log2,
    D: tl.constexpr, V: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr,
    VARLEN: tl.constexpr, PRECISION: tl.constexpr, SLICE: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """A program: one block of queries of one head. Writes ``dq``, and delta for `dk` and `dv`."""
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
        d_out += token_q * d_out_l
        dq += token_q * dq_l
    else:
        q += sequence * q_b
        k += sequence * k_b
        v += sequence * v_b
        out += sequence * out_b
        d_out += sequence * d_out_b
        dq += sequence * dq_b
    q += head * q_h
    k += group * k_h
    v += group * v_h
    out += head * out_h
    d_out += head * d_out_h
    dq += head * dq_h

    rows = first + tl.arange(0, BLOCK_M)
    exists = rows < L
    outs = load_tile(out, first, L, out_l, BLOCK_M, V, BLOCK_V, True)
    d_outs = load_tile(d_out, first, L, d_out_l, BLOCK_M, V, BLOCK_V, True)
    lse2 = _load_lse(lse + row, rows, L)
    delta = tl.sum(outs.to(tl.float32) * d_outs.to(tl.float32), 1)
    delta -= tl.load(d_lse + row + rows, mask=exists, other=0.0)
    delta = tl.where(lse2 == float("inf"), 0.0, delta)  # what an empty row is told is no number
    tl.store(delta_out + row + rows, delta, mask=exists)
    queries = q
    if not SLICE:
        queries = load_tile(q, first, L, q_l, BLOCK_M, D, BLOCK_D, True)
    sink, lo, a, b, hi = key_blocks(
        first, L, S, shift, window, sinks, BLOCK_M, BLOCK_N, CAUSAL, WINDOW
    )
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    acc = _add_dq(
        acc, queries, d_outs, lse2, delta, q, k, v, d_out, q_l, k_l, v_l, d_out_l, first, a, b,
        sink, lo, a, b, L, S, shift, window, sinks, scale_log2, D, V, CAUSAL, WINDOW, PRECISION,
        SLICE, False, BLOCK_D, BLOCK_V, BLOCK_M, BLOCK_N,
    )  # fmt: skip
    edges = sink + (a - lo) + (hi - b)
    acc = _add_dq(
        acc, queries, d_outs, lse2, delta, q, k, v, d_out, q_l, k_l, v_l, d_out_l, first, 0, edges,
        sink, lo, a, b, L, S, shift, window, sinks, scale_log2, D, V, CAUSAL, WINDOW, PRECISION,
        SLICE, True, BLOCK_D, BLOCK_V, BLOCK_M, BLOCK_N,
    )  # fmt: skip
    acc = acc * (scale_log2 * 0.6931471805599453)
    store_tile(dq, acc, first, L, dq_l, BLOCK_M, D, BLOCK_D)


@jit
def _add_dkdv(
    dk, dv, keys, values, q_0, k, v, d_out_0, lse_0, delta_0, q_h, q_l, k_l, v_l, d_out_h, d_out_l,
    lse_h, start, begin, blocks, members, lo, a, b, L, S, shift, window, sinks, scale_log2,
    D: tl.constexpr, V: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr,
    PRECISION: tl.constexpr, SLICE: tl.constexpr, MASKED: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """``ds^T q`` and ``p^T d_out`` summed over query blocks; tiles are (keys, queries).

    One loop over the blocks of all heads of the group: a loop of loops needs more registers.
    """
    keys_at = start + tl.arange(0, BLOCK_N)
    for step in range(0, blocks * members):
        member = (step // blocks).to(tl.int64)
        q = q_0 + member * q_h
        d_out = d_out_0 + member * d_out_h
        lse = lse_0 + member * lse_h
        delta = delta_0 + member * lse_h
        block = begin + step % blocks
        if MASKED:
            block = edge_block(block, lo, lo, a, b)
        first = block * BLOCK_M
        rows = first + tl.arange(0, BLOCK_M)
        if SLICE:
            scores = sliced_product(
                k, start, S, k_l, q, first, L, q_l, D, BLOCK_N, BLOCK_M, BLOCK_D, SLICE, PRECISION
            )
        else:
            queries = load_tile(q, first, L, q_l, BLOCK_M, D, BLOCK_D, True)
            scores = tl.dot(keys, tl.trans(queries), input_precision=PRECISION)
        scores = scores * scale_log2
        if MASKED:
            seen = can_see(rows[None, :], keys_at[:, None], S, shift, window, sinks, CAUSAL, WINDOW)
            scores = tl.where(seen, scores, float("-inf"))
        p = tl.exp2(scores - _load_lse(lse, rows, L)[None, :])
        d_outs = load_tile(d_out, first, L, d_out_l, BLOCK_M, V, BLOCK_V, True)
        dv = tl.dot(p.to(d_outs.dtype), d_outs, dv, input_precision=PRECISION)
        if SLICE:
            dp = sliced_product(
                v, start, S, v_l, d_out, first, L, d_out_l, V, BLOCK_N, BLOCK_M, BLOCK_V, SLICE,
                PRECISION,
            )  # fmt: skip
            queries = load_tile(q, first, L, q_l, BLOCK_M, D, BLOCK_D, True)
        else:
            dp = tl.dot(values, tl.trans(d_outs), input_precision=PRECISION)
        ds = p * (dp - tl.load(delta + rows, mask=rows < L, other=0.0)[None, :])
        dk = tl.dot(ds.to(queries.dtype), queries, dk, input_precision=PRECISION)
    return dk, dv


@jit
def flash_backward_dkdv(
    q, k, v, d_out, dk, dv, lse, delta, starts_q, starts_k,
    q_b, q_h, q_l, k_b, k_h, k_l, v_b, v_h, v_l,
    d_out_b, d_out_h, d_out_l, dk_b, dk_h, dk_l, dv_b, dv_h, dv_l, lse_h,
    heads_per_group, L, S, shift, window, sinks, scale_log2,
    D: tl.constexpr, V: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr,
    VARLEN: tl.constexpr, PRECISION: tl.constexpr, SLICE: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """A program: one block of keys of one group, over the queries of all heads that read it."""
    sequence = tl.program_id(2).to(tl.int64)
    group = tl.program_id(1).to(tl.int64)
    start = tl.program_id(0) * BLOCK_N
    row = sequence * tl.num_programs(1) * heads_per_group * lse_h
    if VARLEN:
        token_q = tl.load(starts_q + sequence).to(tl.int64)
        token_k = tl.load(starts_k + sequence).to(tl.int64)
        L = (tl.load(starts_q + sequence + 1) - token_q).to(tl.int32)
        S = (tl.load(starts_k + sequence + 1) - token_k).to(tl.int32)
        shift = S - L
        row = token_q
        if start >= S:
            return
        q += token_q * q_l
        k += token_k * k_l
        v += token_k * v_l
        d_out += token_q * d_out_l
        dk += token_k * dk_l
        dv += token_k * dv_l
    else:
        q += sequence * q_b
        k += sequence * k_b
        v += sequence * v_b
        d_out += sequence * d_out_b
        dk += sequence * dk_b
        dv += sequence * dv_b
    k += group * k_h
    v += group * v_h

    keys, values = k, v
    if not SLICE:
        keys = load_tile(k, start, S, k_l, BLOCK_N, D, BLOCK_D, True)
        values = load_tile(v, start, S, v_l, BLOCK_N, V, BLOCK_V, True)
    lo, a, b, hi = query_blocks(start, S, L, shift, window, sinks, BLOCK_N, BLOCK_M, CAUSAL, WINDOW)
    acc_k = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    acc_v = tl.zeros([BLOCK_N, BLOCK_V], tl.float32)
    head = group * heads_per_group
    q += head * q_h
    d_out += head * d_out_h
    lse += row + head * lse_h
    delta += row + head * lse_h
    acc_k, acc_v = _add_dkdv(
        acc_k, acc_v, keys, values, q, k, v, d_out, lse, delta, q_h, q_l, k_l, v_l, d_out_h,
        d_out_l, lse_h, start, a, b - a, heads_per_group, lo, a, b, L, S, shift, window, sinks,
        scale_log2, D, V, CAUSAL, WINDOW, PRECISION, SLICE, False,
        BLOCK_D, BLOCK_V, BLOCK_M, BLOCK_N,
    )  # fmt: skip
    acc_k, acc_v = _add_dkdv(
        acc_k, acc_v, keys, values, q, k, v, d_out, lse, delta, q_h, q_l, k_l, v_l, d_out_h,
        d_out_l, lse_h, start, lo, a - lo + hi - b, heads_per_group, lo, a, b, L, S, shift, window,
        sinks, scale_log2, D, V, CAUSAL, WINDOW, PRECISION, SLICE, True,
        BLOCK_D, BLOCK_V, BLOCK_M, BLOCK_N,
    )  # fmt: skip
    acc_k = acc_k * (scale_log2 * 0.6931471805599453)
    store_tile(dk + group * dk_h, acc_k, start, S, dk_l, BLOCK_N, D, BLOCK_D)
    store_tile(dv + group * dv_h, acc_v, start, S, dv_l, BLOCK_N, V, BLOCK_V)


@torch.no_grad()
def flash_attention_backward(
    d_out: Tensor,
    d_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    *,
    causal: bool,
    q_start: int,
    key_start: int,
    window: int | None = None,
    sinks: int = 0,
    scale: float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """What one block of keys contributes to the gradients, given the finished output.

    Args:
        d_out, d_lse: gradients of ``out (B, H, L, V)`` and ``lse (B, H, L)``; ``d_lse`` may be
            None. Over all blocks of keys, ``d_lse`` belongs to each call.
        q, k, v: as in `flash_attention`, ``k`` and ``v`` a block of the sequence's keys.
        out, lse: the finished output and log-sum-exp over *all* keys.
        q_start, key_start: positions of the first query and of the first key.

    Returns:
        ``dq``, to be summed over the blocks of keys, and this block's ``dk`` and ``dv``.
    """
    _launch.check_inputs(q, k, v)
    options = _launch.options_for(q, causal, window, sinks, scale, q_start - key_start)
    options = options._replace(sinks=max(0, sinks - key_start))
    return run_backward(d_out, d_lse, q, k, v, out, lse, options, None)


def run_backward(d_out, d_lse, q, k, v, out, lse, options, packed) -> tuple[Tensor, Tensor, Tensor]:
    """Launch both kernels: ``dq`` first, because it leaves ``delta`` for ``dk`` and ``dv``."""
    q, k, v, out, d_out = _launch.with_contiguous_rows(q, k, v, out, d_out.to(q.dtype))
    lse = lse.contiguous()
    d_lse = torch.zeros_like(lse) if d_lse is None else d_lse.to(lse.dtype).contiguous()
    dq, dk, dv = (_launch.empty_like_rows(x, x.shape[-1], x.dtype) for x in (q, k, v))
    delta = torch.empty_like(lse)
    longest_q, longest_k, batch = q.shape[2], k.shape[2], q.shape[0]
    if packed is not None:
        longest_q, longest_k, batch = packed.longest_q, packed.longest_k, len(packed.starts_q) - 1
    given = _launch.arguments(q, k, v, options, packed, out=out, d_out=d_out, dq=dq)
    given |= {"lse": lse, "d_lse": d_lse, "delta_out": delta}
    _launch.run(
        "flash_attention", flash_backward_dq, "dq", given,
        lambda blocks: (-(-longest_q // blocks.block_m), q.shape[1], batch),
    )  # fmt: skip
    given = _launch.arguments(q, k, v, options, packed, d_out=d_out, dk=dk, dv=dv)
    given |= {"lse": lse, "delta": delta}
    _run_dkdv(given, lambda blocks: (-(-longest_k // blocks.block_n), k.shape[1], batch))
    return dq, dk, dv


def _run_dkdv(given, grid) -> None:
    if is_interpreted(flash_backward_dkdv):
        tiles = [_launch.INTERPRETED]
    else:
        tiles = tiles_for_dkdv(_launch.target(), given["q"].dtype, given["D"], given["V"])
    if 0 not in grid(tiles[0]):
        key = tuple(given[x] for x in ("D", "V", "CAUSAL", "WINDOW", "VARLEN"))
        launch(flash_backward_dkdv, grid, tiles, given, (given["q"].dtype, *key))
