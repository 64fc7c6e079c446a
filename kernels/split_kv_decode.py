"""Attention of one to a few queries over a long cache: flash-decoding and LeanAttention's stream-K.

An *output* is one (request, key/value head) pair. Its ``H / G`` query heads times ``L`` queries
are the rows of one tile, so that every key and value is read once, not once per query head. Its
keys are cut into tiles, and programs turn stretches of tiles into partial softmaxes
``(peak, total, weighted)``: the largest score, the sum of ``exp(score - peak)``, and the same sum
over the values. A second kernel merges an output's partials. Who takes which tiles is the schedule:

* `split_kv_decode`: each output is cut into ``splits`` stretches ("Flash-Decoding for long-context
  inference", Dao, Haziza, Massa and Sizov, 2023).
* `stream_k_decode`: the tiles of all outputs in one line, cut into ``programs`` equal stretches
  that cross from output to output (LeanAttention, arXiv 2405.10480). Program ``p`` meets output
  ``u`` at most once, and of two meetings the later one has the larger ``p + u``: so ``p + u`` is
  the partial's place in a workspace of ``outputs + programs - 1``.

Scores are kept in base 2 (``exp2`` is one instruction); ``lse`` is the natural logarithm.
"""

from __future__ import annotations

from torch import Tensor

from corelib.kernels import _decode_launch as _launch
from corelib.kernels._decode_launch import decode_bytes
from corelib.kernels._shared import jit, load_tile, sliced_product, tl

__all__ = ["decode_bytes", "split_kv_decode", "stream_k_decode"]


@jit
def _held(pointers, exists, S):
    """How many keys requests hold: at least none, at most the cache's ``S``."""
    n = tl.load(pointers, mask=exists, other=0).to(tl.int32)
    return tl.maximum(tl.minimum(n, S), 0)


@jit
def _attend_keys(
    q, row, rows, k, v, first, last, visible, stride_ks, stride_vs, scale_log2,
    D: tl.constexpr, V: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SLICE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The partial softmax of rows ``row .. row + BLOCK_M`` of ``q`` over keys ``first .. last``."""
    if not SLICE:
        queries = load_tile(q, row, rows, D, BLOCK_M, D, BLOCK_D, True)
    peak = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    weighted = tl.zeros([BLOCK_M, BLOCK_V], tl.float32)
    for step in range(0, tl.cdiv(last - first, BLOCK_N)):
        at = first + step * BLOCK_N
        if SLICE:
            scores = sliced_product(
                q, row, rows, D, k, at, last, stride_ks, D,
                BLOCK_M, BLOCK_N, BLOCK_D, SLICE, PRECISION,
            )  # fmt: skip
        else:
            keys = load_tile(k, at, last, stride_ks, BLOCK_N, D, BLOCK_D, True)
            scores = tl.dot(queries, tl.trans(keys), input_precision=PRECISION)
        scores = scores * scale_log2
        seen = (at + tl.arange(0, BLOCK_N))[None, :] < visible[:, None]
        scores = tl.where(seen, scores, float("-inf"))
        new_peak = tl.maximum(peak, tl.max(scores, 1))
        base = tl.where(new_peak == float("-inf"), 0.0, new_peak)  # a row that saw nothing yet
        weights = tl.exp2(scores - base[:, None])
        rescale = tl.exp2(peak - base)
        total = total * rescale + tl.sum(weights, 1)
        values = load_tile(v, at, last, stride_vs, BLOCK_N, V, BLOCK_V, True)
        weighted = weighted * rescale[:, None]
        weighted = tl.dot(weights.to(values.dtype), values, weighted, input_precision=PRECISION)
        peak = new_peak
    return peak, total, weighted


@jit
def _attend_output(
    q, k, v, peaks, totals, sums, output, n, first, last, slot,
    stride_kb, stride_kg, stride_ks, stride_vb, stride_vg, stride_vs, scale_log2, G, L,
    GROUP: tl.constexpr, ROW_BLOCKS: tl.constexpr, D: tl.constexpr, V: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    SLICE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One output's partial softmax over keys ``first .. last`` of its ``n``, put into ``slot``."""
    pair = (output // ROW_BLOCKS).to(tl.int64)
    request, group = pair // G, pair % G
    rows = GROUP * L
    row = output % ROW_BLOCKS * BLOCK_M
    lanes = tl.arange(0, BLOCK_M)
    real = row + lanes < rows
    visible = tl.minimum(n - L + (row + lanes) % L + 1, last)  # the last query sees all n keys
    peak, total, weighted = _attend_keys(
        q + pair * rows * D, row, rows,  # q is (B, G, rows, D)
        k + request * stride_kb + group * stride_kg, v + request * stride_vb + group * stride_vg,
        first, last, visible, stride_ks, stride_vs, scale_log2,
        D, V, BLOCK_D, BLOCK_V, BLOCK_M, BLOCK_N, SLICE, PRECISION,
    )  # fmt: skip
    place = slot.to(tl.int64) * BLOCK_M + lanes
    wide = tl.arange(0, BLOCK_V)
    tl.store(peaks + place, peak, mask=real)
    tl.store(totals + place, total, mask=real)
    inside = real[:, None] & (wide < V)[None, :]
    tl.store(sums + place[:, None] * V + wide[None, :], weighted, mask=inside)


@jit
def _fixed_split_kernel(
    q, k, v, lengths, peaks, totals, sums, slots, scale_log2,
    stride_kb, stride_kg, stride_ks, stride_vb, stride_vg, stride_vs, B, G, S, L, tile, splits,
    GROUP: tl.constexpr, ROW_BLOCKS: tl.constexpr, D: tl.constexpr, V: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    SLICE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Program ``(output, split)``: one stretch of one output's tiles."""
    output, split = tl.program_id(0), tl.program_id(1)
    n = _held(lengths + output // (G * ROW_BLOCKS), True, S)
    tiles = tl.cdiv(n, tile)
    sharing = tl.minimum(splits, tiles)
    if split < sharing:
        slot = output * splits + split
        if split == 0:
            tl.store(slots + 2 * output, slot)
            tl.store(slots + 2 * output + 1, slot + sharing)
        first = split * tiles // sharing * tile
        last = tl.minimum((split + 1) * tiles // sharing * tile, n)
        _attend_output(
            q, k, v, peaks, totals, sums, output, n, first, last, slot,
            stride_kb, stride_kg, stride_ks, stride_vb, stride_vg, stride_vs, scale_log2, G, L,
            GROUP, ROW_BLOCKS, D, V, BLOCK_D, BLOCK_V, BLOCK_M, BLOCK_N, SLICE, PRECISION,
        )  # fmt: skip


@jit
def _stream_k_kernel(
    q, k, v, lengths, peaks, totals, sums, slots, scale_log2,
    stride_kb, stride_kg, stride_ks, stride_vb, stride_vg, stride_vs, B, G, S, L, tile, programs,
    GROUP: tl.constexpr, ROW_BLOCKS: tl.constexpr, D: tl.constexpr, V: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_B: tl.constexpr, SLICE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Program ``p``: tiles ``p N // P .. (p + 1) N // P`` of all outputs' tiles in one line."""
    program = tl.program_id(0)
    requests = tl.arange(0, BLOCK_B)
    parts = G * ROW_BLOCKS  # outputs of a request
    tiles = parts * tl.cdiv(_held(lengths + requests, requests < B, S), tile)
    ends = tl.cumsum(tiles, 0)
    N = tl.sum(tiles, 0)
    sharing = tl.minimum(programs, N)  # with fewer tiles than programs, the rest have nothing
    stop = 0
    at = 0
    if program < sharing:
        at = (program.to(tl.int64) * N // sharing).to(tl.int32)
        stop = ((program + 1).to(tl.int64) * N // sharing).to(tl.int32)
    while at < stop:
        request = tl.sum((ends <= at).to(tl.int32), 0)
        n = _held(lengths + request, True, S)
        per_output = tl.cdiv(n, tile)
        into = at - tl.sum(tl.where(requests == request, ends - tiles, 0), 0)
        part, tile_of = into // per_output, into % per_output
        taken = tl.minimum(per_output - tile_of, stop - at)
        output = request * parts + part
        slot = program + output
        if tile_of == 0:
            tl.store(slots + 2 * output, slot)
        if tile_of + taken == per_output:
            tl.store(slots + 2 * output + 1, slot + 1)
        last = tl.minimum((tile_of + taken) * tile, n)
        _attend_output(
            q, k, v, peaks, totals, sums, output, n, tile_of * tile, last, slot,
            stride_kb, stride_kg, stride_ks, stride_vb, stride_vg, stride_vs, scale_log2, G, L,
            GROUP, ROW_BLOCKS, D, V, BLOCK_D, BLOCK_V, BLOCK_M, BLOCK_N, SLICE, PRECISION,
        )  # fmt: skip
        at += taken


@jit
def _merge_kernel(
    peaks, totals, sums, slots, out, lse, L,
    GROUP: tl.constexpr, ROW_BLOCKS: tl.constexpr, V: tl.constexpr, BLOCK_V: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_SLOTS: tl.constexpr,
):  # fmt: skip
    """Program ``(request and head, row)``: merge the row's partials and normalise."""
    pair, row = tl.program_id(0), tl.program_id(1)
    output = pair * ROW_BLOCKS + row // BLOCK_M
    lane = row % BLOCK_M
    begin, end = tl.load(slots + 2 * output), tl.load(slots + 2 * output + 1)
    columns = tl.arange(0, BLOCK_V)
    peak = float("-inf")
    total = 0.0
    merged = tl.zeros([BLOCK_V], tl.float32)
    for at in range(begin, end, BLOCK_SLOTS):
        partials = at + tl.arange(0, BLOCK_SLOTS)
        exists = partials < end
        place = partials.to(tl.int64) * BLOCK_M + lane
        peak_of = tl.load(peaks + place, mask=exists, other=float("-inf"))
        total_of = tl.load(totals + place, mask=exists, other=0.0)
        inside = exists[:, None] & (columns < V)[None, :]
        sum_of = tl.load(sums + place[:, None] * V + columns[None, :], mask=inside, other=0.0)
        new_peak = tl.maximum(peak, tl.max(peak_of, 0))
        base = tl.where(new_peak == float("-inf"), 0.0, new_peak)
        weight, rescale = tl.exp2(peak_of - base), tl.exp2(peak - base)
        total = total * rescale + tl.sum(weight * total_of, 0)
        merged = merged * rescale + tl.sum(weight[:, None] * sum_of, 0)
        peak = new_peak
    some = tl.where(total == 0.0, 1.0, total)  # a row without keys: zeros, and -inf + log(1)
    place = (pair.to(tl.int64) * GROUP * L) + row  # (B, H, L) flattened: rows of a group adjoin
    merged = (merged / some).to(out.dtype.element_ty)
    tl.store(out + place * V + columns, merged, mask=columns < V)
    tl.store(lse + place, peak * 0.6931471805599453 + tl.log(some))


def split_kv_decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: Tensor | None = None,
    *,
    splits: int,
    tile: int | None = None,
    scale: float | None = None,
    return_lse: bool = False,
):
    """Flash-decoding: each (request, key/value head) pair's keys in ``splits`` equal stretches.

    Args:
        q: ``(B, H, L, D)``, the newest ``L`` queries (one to a few): query ``i`` of request ``b``
            sees the keys ``j <= i + lengths[b] - L``.
        k, v: ``(B, G, S, D)`` and ``(B, G, S, V)``. What lies behind ``lengths`` is never read.
        lengths: ``(B,)`` integers on the same device, the keys that each request holds;
            ``None`` means ``S``. Values below 0 count as 0, values above ``S`` as ``S``.
        splits: stretches per output; an output with fewer tiles of keys has fewer.
        tile: keys in a tile; ``None`` means 256 for heads 64 wide, 128 for 128.
        scale: ``None`` means ``D ** -0.5``.

    Returns:
        ``out (B, H, L, V)`` in the type of ``q``, and with ``return_lse`` also ``lse (B, H, L)``
        in float32. A row that sees no key is zeros, its ``lse`` ``-inf``. Not differentiable.
    """
    _launch.check_count("splits", splits)

    def schedule(outputs: int, tiles: int, filling: int):
        share = min(splits, tiles)
        return (outputs, share), outputs * share, {"splits": share}

    kernels = _fixed_split_kernel, _merge_kernel
    return _launch.decode(kernels, schedule, q, k, v, lengths, tile, scale, return_lse)


def stream_k_decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: Tensor | None = None,
    *,
    programs: int | None = None,
    tile: int | None = None,
    scale: float | None = None,
    return_lse: bool = False,
):
    """LeanAttention: all outputs' tiles of keys in one line, cut into ``programs`` equal stretches.

    ``programs=None`` starts as many as the device runs at once. Everything else is as in
    `split_kv_decode`.
    """
    if programs is not None:
        _launch.check_count("programs", programs)

    def schedule(outputs: int, tiles: int, filling: int):
        share = min(programs or filling, outputs * tiles)
        requests = 1 << (q.shape[0] - 1).bit_length()
        return (share,), outputs + share - 1, {"programs": share, "BLOCK_B": requests}

    kernels = _stream_k_kernel, _merge_kernel
    return _launch.decode(kernels, schedule, q, k, v, lengths, tile, scale, return_lse)


SPECIALISATIONS = _launch.specialisations()
