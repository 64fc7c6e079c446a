"""Attention of one to a few queries over a list of positions, read where they lie.

An *output* is one (request, list) pair: a list belongs to a query head, or to a key/value head and
then to all query heads of its group, whose queries are the rows of one tile, so that each listed
key is read once for all of them. The list is cut into stretches; a program takes one, loads its
positions, and with them the keys and values, a block at a time: nothing is copied together first.
It leaves a partial softmax ``(peak, total, weighted)``, and the merge kernel of
`corelib.kernels.split_kv_decode` combines an output's partials.

Positions below 0 are padding, as are those from ``S`` on. All queries see all listed keys. Scores
are kept in base 2 (``exp2`` is one instruction); ``lse`` is the natural logarithm.
"""

from __future__ import annotations

import math
from contextlib import nullcontext

import torch
from torch import Tensor

from corelib.kernels._decode_launch import resident_programs
from corelib.kernels._flash_launch import check_inputs, with_contiguous_rows
from corelib.kernels._shared import (
    Blocks,
    check_device,
    is_interpreted,
    jit,
    load_tile,
    padded,
    precision,
    tl,
)
from corelib.kernels.gates.specialisation import Specialisation
from corelib.kernels.split_kv_decode import _merge_kernel

__all__ = ["gather_decode_bytes", "gather_sparse_decode"]

#: (bytes of a number, the wider of D and V, padded) -> rows and keys of a block, warps, stages.
#: Loads through a list cannot be planned far ahead: two stages, small blocks, many programs.
TILES = {
    (2, 64): Blocks(16, 64, 4, 2),
    (2, 128): Blocks(16, 32, 4, 2),
    (2, 256): Blocks(16, 16, 4, 2),
    (4, 64): Blocks(16, 32, 4, 2),
    (4, 128): Blocks(16, 16, 4, 2),
}
MERGED_AT_ONCE = 16


@jit
def _load_listed(
    pointer, rows, exists, stride, WIDTH: tl.constexpr, PADDED: tl.constexpr
):  # fmt: skip
    """Rows of a matrix by their numbers, as ``(len(rows), PADDED)``; zeros where none exists."""
    columns = tl.arange(0, PADDED)
    address = pointer + rows.to(tl.int64)[:, None] * stride + columns[None, :]
    return tl.load(address, mask=exists[:, None] & (columns < WIDTH)[None, :], other=0.0)


@jit
def _gather_decode_kernel(
    q, k, v, indices, peaks, totals, sums, scale_log2, stride_kb, stride_kg, stride_ks,
    stride_vb, stride_vg, stride_vs, stride_ib, stride_iu, lists, lists_a_group, S, n, share, rows,
    ROW_BLOCKS: tl.constexpr, D: tl.constexpr, V: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Program ``(output, split)``: entries ``split * share .. (split + 1) * share`` of one list.

    ``lists_a_group``: lists of one key/value head; ``rows``: query rows of a list.
    """
    output, split = tl.program_id(0), tl.program_id(1)
    pair = (output // ROW_BLOCKS).to(tl.int64)
    row = output % ROW_BLOCKS * BLOCK_M
    request, unit = pair // lists, pair % lists
    group = unit // lists_a_group
    k += request * stride_kb + group * stride_kg
    v += request * stride_vb + group * stride_vg
    indices += request * stride_ib + unit * stride_iu
    queries = load_tile(q + pair * rows * D, row, rows, D, BLOCK_M, D, BLOCK_D, True)
    peak = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    weighted = tl.zeros([BLOCK_M, BLOCK_V], tl.float32)
    first = split * share
    last = tl.minimum(first + share, n)
    for at in range(first, last, BLOCK_N):
        entries = at + tl.arange(0, BLOCK_N)
        listed = tl.load(indices + entries, mask=entries < last, other=-1)
        exists = (listed >= 0) & (listed < S)
        keys = _load_listed(k, listed, exists, stride_ks, D, BLOCK_D)
        scores = tl.dot(queries, tl.trans(keys), input_precision=PRECISION) * scale_log2
        scores = tl.where(exists[None, :], scores, float("-inf"))
        new_peak = tl.maximum(peak, tl.max(scores, 1))
        base = tl.where(new_peak == float("-inf"), 0.0, new_peak)  # only padding so far
        weights = tl.exp2(scores - base[:, None])
        rescale = tl.exp2(peak - base)
        total = total * rescale + tl.sum(weights, 1)
        values = _load_listed(v, listed, exists, stride_vs, V, BLOCK_V)
        weighted = weighted * rescale[:, None]
        weighted = tl.dot(weights.to(values.dtype), values, weighted, input_precision=PRECISION)
        peak = new_peak
    lanes = tl.arange(0, BLOCK_M)
    real = row + lanes < rows
    slot = output.to(tl.int64) * tl.num_programs(1) + split
    place = slot * BLOCK_M + lanes
    tl.store(peaks + place, peak, mask=real)
    tl.store(totals + place, total, mask=real)
    wide = tl.arange(0, BLOCK_V)
    inside = real[:, None] & (wide < V)[None, :]
    tl.store(sums + place[:, None] * V + wide[None, :], weighted, mask=inside)


def gather_sparse_decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    indices: Tensor,
    *,
    splits: int | None = None,
    scale: float | None = None,
    return_lse: bool = False,
):
    """`corelib.primitives.gather_decode` as a kernel.

    Args:
        q: ``(B, H, L, D)``, one to a few queries; each sees every listed key.
        k, v: ``(B, G, S, D)`` and ``(B, G, S, V)``; only listed rows are read.
        indices: ``(B, U, n)`` integers, ``U`` one of 1, ``G`` and ``H``; padding is below 0.
        splits: stretches of a list; ``None`` fills the device.
        scale: ``None`` means ``D ** -0.5``.

    Returns:
        ``out (B, H, L, V)`` in the type of ``q``, and with ``return_lse`` also ``lse (B, H, L)``
        in float32. A head with nothing listed gives zeros and ``-inf``. Not differentiable.
    """
    _check(q, k, v, indices, splits)
    check_device("gather_sparse_decode", _gather_decode_kernel, q, k, v)
    (B, H, L, D), (_, G, S, V) = q.shape, v.shape
    n, lists = indices.shape[2], max(G, indices.shape[1])
    out, lse = q.new_empty(B, H, L, V), q.new_empty(B, H, L, dtype=torch.float32)
    if 0 in (B, L, S, n):
        out, lse = out.zero_(), lse.fill_(-math.inf)
        return (out, lse) if return_lse else out
    q, (k, v) = q.contiguous(), with_contiguous_rows(k, v)
    indices = with_contiguous_rows(indices)[0].expand(B, lists, n)
    blocks = TILES[q.itemsize, max(64, padded(max(D, V)))]
    rows = H // lists * L
    row_blocks = -(-rows // blocks.block_m)
    outputs, steps = B * lists * row_blocks, -(-n // blocks.block_n)
    if splits is None:
        splits = -(-resident_programs(q.device, blocks.num_warps) // outputs)
    share = -(-steps // min(splits, steps)) * blocks.block_n
    splits = -(-n // share)  # each has some of the list
    peaks, totals = (_floats(q, outputs * splits, blocks.block_m) for _ in range(2))
    sums = _floats(q, outputs * splits, blocks.block_m, V)
    ends = torch.arange(outputs + 1, dtype=torch.int32, device=q.device) * splits
    slots = torch.stack([ends[:-1], ends[1:]], 1)  # where an output's partials begin and end
    shape = {"ROW_BLOCKS": row_blocks, "V": V, "BLOCK_V": padded(V), "BLOCK_M": blocks.block_m}
    scale = D**-0.5 if scale is None else float(scale)
    options = {"num_warps": blocks.num_warps, "num_stages": blocks.num_stages}
    options = {} if is_interpreted(_gather_decode_kernel) else options
    with torch.cuda.device(q.device) if q.is_cuda else nullcontext():
        _gather_decode_kernel[(outputs, splits)](
            q, k, v, indices, peaks, totals, sums, scale * math.log2(math.e), *k.stride()[:3],
            *v.stride()[:3], *indices.stride()[:2], lists, lists // G, S, n, share, rows, **shape,
            D=D, BLOCK_D=padded(D), BLOCK_N=blocks.block_n, PRECISION=precision(q.dtype), **options,
        )  # fmt: skip
        _merge_kernel[(B * lists, rows)](
            peaks, totals, sums, slots, out, lse, L, GROUP=H // lists, **shape,
            BLOCK_SLOTS=MERGED_AT_ONCE,
        )  # fmt: skip
    return (out, lse) if return_lse else out


def _floats(like: Tensor, *shape: int) -> Tensor:
    return like.new_empty(shape, dtype=torch.float32)


def _check(q: Tensor, k: Tensor, v: Tensor, indices: Tensor, splits: int | None) -> None:
    check_inputs(q, k, v)
    if splits is not None and (isinstance(splits, bool) or not isinstance(splits, int)):
        raise TypeError(f"splits: expected an int or None, got {type(splits).__name__}")
    if splits is not None and splits < 1:
        raise ValueError(f"splits: expected at least 1, got {splits}")
    if not isinstance(indices, Tensor) or indices.dtype not in (torch.int32, torch.int64):
        found = indices.dtype if isinstance(indices, Tensor) else type(indices).__name__
        raise TypeError(f"indices: expected a tensor of int32 or int64, got {found}")
    B, H, G = q.shape[0], q.shape[1], k.shape[1]
    if indices.dim() != 3 or indices.shape[0] != B or indices.shape[1] not in (1, G, H):
        raise ValueError(
            f"indices: expected (batch {B}, lists 1, {G} or {H}, n), got {tuple(indices.shape)}"
        )
    if indices.device != q.device:
        raise ValueError(f"indices: expected the device of q, {q.device}, got {indices.device}")
    width = max(q.shape[3], v.shape[3])
    if (q.itemsize, max(64, padded(width))) not in TILES:
        raise ValueError(f"q, v: expected widths of at most 128 in float32, got {width}")
    if torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v)):
        raise ValueError(
            "q, k, v: the decode kernels have no backward pass; call them under torch.no_grad()"
        )


def gather_decode_bytes(
    listed: int, B: int, H: int, L: int, D: int, V: int, *, entries: int, partials: int, rows: int,
    itemsize: int = 2, index_size: int = 8,
) -> int:  # fmt: skip
    """Bytes that have to move: ``listed`` rows of keys and values in all lists together.

    ``entries`` of the lists are read, padding too, and each of ``partials`` stretches reads its
    ``rows`` queries and leaves a partial softmax of ``V + 2`` float32 a row, read again to merge.
    """
    pieces = partials * rows * (D * itemsize + 2 * 4 * (V + 2))
    kept = listed * (D + V) * itemsize + entries * index_size
    return kept + pieces + B * H * L * (V * itemsize + 4)


def _specialisation(dtype: str, width: int) -> Specialisation:
    blocks = TILES[4 if dtype == "fp32" else 2, width]
    strides = [f"stride_{name}" for name in ("kb", "kg", "ks", "vb", "vg", "vs", "ib", "iu")]
    sizes = ["lists", "S", "n", "share", "rows"]
    signature = dict.fromkeys(("q", "k", "v"), f"*{dtype}")
    signature |= dict.fromkeys(("peaks", "totals", "sums"), "*fp32")
    signature |= {"indices": "*i64", "scale_log2": "fp32"}
    signature |= dict.fromkeys(strides + sizes, "i32")
    constexprs = {
        "lists_a_group": 1, "ROW_BLOCKS": 1, "D": width, "V": width, "BLOCK_D": width,
        "BLOCK_V": width, "BLOCK_M": blocks.block_m, "BLOCK_N": blocks.block_n,
        "PRECISION": "tf32x3" if dtype == "fp32" else "ieee",
    }  # fmt: skip
    return Specialisation(
        kernel="_gather_decode_kernel",
        label=f"{dtype} D={width}",
        direction="forward",
        signature=signature,
        constexprs=constexprs,
        num_warps=blocks.num_warps,
        num_stages=blocks.num_stages,
        divisible=tuple(strides[:6]),
        overrides={"gfx942": {"constexprs": {"PRECISION": "ieee"}}},
    )


SPECIALISATIONS = [
    _specialisation(*kind)
    for kind in (("fp16", 64), ("bf16", 128), ("fp16", 256), ("fp32", 64), ("fp32", 128))
]
