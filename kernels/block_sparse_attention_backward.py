"""Gradients of block-sparse attention, rebuilt from the log-sum-exp over the same lists.

The equations are those of ``flash_attention_backward``; only the walks differ:

    delta = sum(d_out * out) - d_lse           p = exp(scale * q k^T - lse)
    dq    = scale * sum over the row's key blocks of  p * (d_out v^T - delta) k
    dk,dv = sums over the (head, query block) pairs whose lists hold the key block

The second walk needs the lists transposed (`transposed_lists`): a program has one tile of keys and
meets every reader of it, of all heads in the group. No atomics, so that every run is the same.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from corelib.kernels import _flash_launch as _flash
from corelib.kernels._shared import jit, load_tile, store_tile, tl
from corelib.kernels.block_sparse_attention import (
    arguments,
    listed_keys,
    run,
    sees,
    specialisations,
)

SPECIALISATIONS = specialisations("dq", "dkdv")


@jit
def _load_lse(lse, rows, L):
    """To base 2; infinite for rows that see no key or do not exist, so that they weigh nothing."""
    natural = tl.load(lse + rows, mask=rows < L, other=float("inf"))
    return tl.where(natural == float("-inf"), float("inf"), natural) * 1.4426950408889634


@jit
def _add_dq(
    dq, queries, d_outs, lse2, delta, k, v, k_l, v_l, blocks, positions, first, begin, steps, S,
    shift, scale_log2, D: tl.constexpr, V: tl.constexpr, CAUSAL: tl.constexpr,
    MOVED: tl.constexpr, MASKED: tl.constexpr, TILES: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """``ds k`` summed over ``steps`` tiles of listed key blocks."""
    rows = first + tl.arange(0, BLOCK_M)
    for step in range(0, steps):
        start = listed_keys(blocks, begin, step, TILES, BLOCK_N)
        keys = load_tile(k, start, S, k_l, BLOCK_N, D, BLOCK_D, MASKED)
        values = load_tile(v, start, S, v_l, BLOCK_N, V, BLOCK_V, MASKED)
        scores = tl.dot(queries, tl.trans(keys), input_precision=PRECISION) * scale_log2
        dp = tl.dot(d_outs, tl.trans(values), input_precision=PRECISION)
        if MASKED:
            keys_at = start + tl.arange(0, BLOCK_N)
            seen = sees(rows[:, None], keys_at[None, :], positions, S, shift, CAUSAL, MOVED)
            scores = tl.where(seen, scores, float("-inf"))
        p = tl.exp2(scores - lse2[:, None])
        ds = p * (dp - delta[:, None])
        dq = tl.dot(ds.to(keys.dtype), keys, dq, input_precision=PRECISION)
    return dq


@jit
def block_sparse_dq(
    q, k, v, out, d_out, dq, lse, d_lse, delta_out, offsets, middles, blocks, positions,
    q_b, q_h, q_l, k_b, k_h, k_l, v_b, v_h, v_l, out_b, out_h, out_l,
    d_out_b, d_out_h, d_out_l, dq_b, dq_h, dq_l,
    heads_per_group, L, S, shift, scale_log2, D: tl.constexpr, V: tl.constexpr,
    CAUSAL: tl.constexpr, MOVED: tl.constexpr, BLOCK: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """A program: one tile of queries of one head. Writes ``dq``, and delta for `dk` and `dv`."""
    sequence = tl.program_id(2).to(tl.int64)
    head = tl.program_id(1).to(tl.int64)
    group = head // heads_per_group
    heads = tl.num_programs(1)
    first = (tl.num_programs(0) - 1 - tl.program_id(0)) * BLOCK_M
    list_at = (sequence * heads + head) * tl.cdiv(L, BLOCK) + first // BLOCK
    row = (sequence * heads + head) * L
    q += sequence * q_b + head * q_h
    k += sequence * k_b + group * k_h
    v += sequence * v_b + group * v_h
    out += sequence * out_b + head * out_h
    d_out += sequence * d_out_b + head * d_out_h
    dq += sequence * dq_b + head * dq_h
    if MOVED:
        positions += (sequence * (heads // heads_per_group) + group) * S
    begin = tl.load(offsets + list_at)
    middle = tl.load(middles + list_at)
    end = tl.load(offsets + list_at + 1)

    rows = first + tl.arange(0, BLOCK_M)
    exists = rows < L
    queries = load_tile(q, first, L, q_l, BLOCK_M, D, BLOCK_D, True)
    outs = load_tile(out, first, L, out_l, BLOCK_M, V, BLOCK_V, True)
    d_outs = load_tile(d_out, first, L, d_out_l, BLOCK_M, V, BLOCK_V, True)
    lse2 = _load_lse(lse + row, rows, L)
    delta = tl.sum(outs.to(tl.float32) * d_outs.to(tl.float32), 1)
    delta -= tl.load(d_lse + row + rows, mask=exists, other=0.0)
    delta = tl.where(lse2 == float("inf"), 0.0, delta)  # what an empty row is told is no number
    tl.store(delta_out + row + rows, delta, mask=exists)
    TILES: tl.constexpr = BLOCK // BLOCK_N
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    acc = _add_dq(
        acc, queries, d_outs, lse2, delta, k, v, k_l, v_l, blocks, positions, first, begin,
        (middle - begin) * TILES, S, shift, scale_log2, D, V, CAUSAL, MOVED, False, TILES,
        PRECISION, BLOCK_D, BLOCK_V, BLOCK_M, BLOCK_N,
    )  # fmt: skip
    acc = _add_dq(
        acc, queries, d_outs, lse2, delta, k, v, k_l, v_l, blocks, positions, first, middle,
        (end - middle) * TILES, S, shift, scale_log2, D, V, CAUSAL, MOVED, True, TILES,
        PRECISION, BLOCK_D, BLOCK_V, BLOCK_M, BLOCK_N,
    )  # fmt: skip
    acc = acc * (scale_log2 * 0.6931471805599453)
    store_tile(dq, acc, first, L, dq_l, BLOCK_M, D, BLOCK_D)


@jit
def _add_dkdv(
    dk, dv, keys, values, q, d_out, lse, delta, q_h, q_l, d_out_h, d_out_l, readers, positions,
    start, begin, steps, blocks_q, L, S, shift, scale_log2, D: tl.constexpr, V: tl.constexpr,
    CAUSAL: tl.constexpr, MOVED: tl.constexpr, MASKED: tl.constexpr, TILES: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """``ds^T q`` and ``p^T d_out`` summed over tiles of reading queries; tiles are (keys, queries).

    A reader is ``member * blocks_q + query block``, with the head's place in its group.
    """
    keys_at = start + tl.arange(0, BLOCK_N)
    for step in range(0, steps):
        reader = tl.load(readers + begin + step // TILES)
        member = (reader // blocks_q).to(tl.int64)
        first = (reader % blocks_q * TILES + step % TILES) * BLOCK_M
        rows = first + tl.arange(0, BLOCK_M)
        queries = load_tile(q + member * q_h, first, L, q_l, BLOCK_M, D, BLOCK_D, True)
        scores = tl.dot(keys, tl.trans(queries), input_precision=PRECISION) * scale_log2
        if MASKED:
            seen = sees(rows[None, :], keys_at[:, None], positions, S, shift, CAUSAL, MOVED)
            scores = tl.where(seen, scores, float("-inf"))
        p = tl.exp2(scores - _load_lse(lse + member * L, rows, L)[None, :])
        d_outs = load_tile(d_out + member * d_out_h, first, L, d_out_l, BLOCK_M, V, BLOCK_V, True)
        dv = tl.dot(p.to(d_outs.dtype), d_outs, dv, input_precision=PRECISION)
        dp = tl.dot(values, tl.trans(d_outs), input_precision=PRECISION)
        told = tl.load(delta + member * L + rows, mask=rows < L, other=0.0)
        ds = p * (dp - told[None, :])
        dk = tl.dot(ds.to(queries.dtype), queries, dk, input_precision=PRECISION)
    return dk, dv


@jit
def block_sparse_dkdv(
    q, k, v, d_out, dk, dv, lse, delta, offsets, middles, blocks, positions,
    q_b, q_h, q_l, k_b, k_h, k_l, v_b, v_h, v_l,
    d_out_b, d_out_h, d_out_l, dk_b, dk_h, dk_l, dv_b, dv_h, dv_l,
    heads_per_group, L, S, shift, scale_log2, D: tl.constexpr, V: tl.constexpr,
    CAUSAL: tl.constexpr, MOVED: tl.constexpr, BLOCK: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """A program: one tile of keys of one group; ``blocks`` lists the readers of its block."""
    sequence = tl.program_id(2).to(tl.int64)
    group = tl.program_id(1).to(tl.int64)
    pair = sequence * tl.num_programs(1) + group
    start = tl.program_id(0) * BLOCK_N
    list_at = pair * tl.cdiv(S, BLOCK) + start // BLOCK
    row = pair * heads_per_group * L
    q += sequence * q_b + group * heads_per_group * q_h
    d_out += sequence * d_out_b + group * heads_per_group * d_out_h
    k += sequence * k_b + group * k_h
    v += sequence * v_b + group * v_h
    dk += sequence * dk_b + group * dk_h
    dv += sequence * dv_b + group * dv_h
    if MOVED:
        positions += pair * S
    begin = tl.load(offsets + list_at)
    middle = tl.load(middles + list_at)
    end = tl.load(offsets + list_at + 1)

    keys = load_tile(k, start, S, k_l, BLOCK_N, D, BLOCK_D, True)
    values = load_tile(v, start, S, v_l, BLOCK_N, V, BLOCK_V, True)
    TILES: tl.constexpr = BLOCK // BLOCK_M
    blocks_q = tl.cdiv(L, BLOCK)
    acc_k = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    acc_v = tl.zeros([BLOCK_N, BLOCK_V], tl.float32)
    acc_k, acc_v = _add_dkdv(
        acc_k, acc_v, keys, values, q, d_out, lse + row, delta + row, q_h, q_l, d_out_h, d_out_l,
        blocks, positions, start, begin, (middle - begin) * TILES, blocks_q, L, S, shift,
        scale_log2, D, V, CAUSAL, MOVED, False, TILES, PRECISION,
        BLOCK_D, BLOCK_V, BLOCK_M, BLOCK_N,
    )  # fmt: skip
    acc_k, acc_v = _add_dkdv(
        acc_k, acc_v, keys, values, q, d_out, lse + row, delta + row, q_h, q_l, d_out_h, d_out_l,
        blocks, positions, start, middle, (end - middle) * TILES, blocks_q, L, S, shift,
        scale_log2, D, V, CAUSAL, MOVED, True, TILES, PRECISION,
        BLOCK_D, BLOCK_V, BLOCK_M, BLOCK_N,
    )  # fmt: skip
    acc_k = acc_k * (scale_log2 * 0.6931471805599453)
    store_tile(dk, acc_k, start, S, dk_l, BLOCK_N, D, BLOCK_D)
    store_tile(dv, acc_v, start, S, dv_l, BLOCK_N, V, BLOCK_V)


def transposed_lists(ordered, shape: tuple[int, int, int, int], G: int):
    """Sorted lists turned round: for each (batch row, group, key block) its readers.

    Returns ``(offsets, middles, readers)``: readers are ``member * nq + query block``, first those
    that see the block whole.
    """
    offsets, middles, blocks = (x.long() for x in ordered)
    B, H, nq, nk = shape
    entries, total = torch.arange(len(blocks), device=blocks.device), B * G * nk
    rows = torch.searchsorted(offsets[1:], entries, right=True)  # behind the last list: none
    listed, rows = rows < len(middles), rows.clamp(max=len(middles) - 1)
    partly = entries >= middles[rows]
    sequence, head, place = rows // (H * nq), rows // nq % H, rows % nq
    target = (sequence * G + head // (H // G)) * nk + blocks
    order = torch.argsort(torch.where(listed, 2 * target + partly, 2 * total), stable=True)
    readers = head % (H // G) * nq + place
    counts, whole = (
        torch.zeros(total, dtype=torch.long, device=blocks.device).index_add_(0, target, x.long())
        for x in (listed, listed & ~partly)
    )
    starts = F.pad(counts.cumsum(0), (1, 0))
    return starts.int(), (starts[:-1] + whole).int(), readers[order].int()


def run_backward(d_out, d_lse, q, k, v, out, lse, *ordered_and_options):
    """Launch both kernels: ``dq`` first, because it leaves ``delta`` for ``dk`` and ``dv``."""
    *ordered, lists, causal, scale, positions = ordered_and_options
    (B, H, L, _), (_, G, S, _) = q.shape, k.shape
    (d_out,) = _flash.with_contiguous_rows(d_out.to(q.dtype))
    d_lse = torch.zeros_like(lse) if d_lse is None else d_lse.to(lse.dtype).contiguous()
    dq, dk, dv = (_flash.empty_like_rows(x, x.shape[-1], x.dtype) for x in (q, k, v))
    delta = torch.empty_like(lse)
    names = "offsets", "middles", "blocks"
    common = q, k, v, lists.block, causal, scale, positions
    given = arguments(*common, out=out, d_out=d_out, dq=dq)
    given |= dict(zip(names, ordered, strict=True), lse=lse, d_lse=d_lse, delta_out=delta)
    run(block_sparse_dq, "dq", given, lambda tile: (-(-L // tile.block_m), H, B))
    given = arguments(*common, d_out=d_out, dk=dk, dv=dv)
    turned = transposed_lists(ordered, lists.shape, G)
    given |= dict(zip(names, turned, strict=True), lse=lse, delta=delta)
    run(block_sparse_dkdv, "dkdv", given, lambda tile: (-(-S // tile.block_n), G, B))
    return dq, dk, dv
