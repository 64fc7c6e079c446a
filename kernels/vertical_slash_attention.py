"""Vertical-slash attention: ranges of neighbouring keys, and single columns gathered into tiles.

A block of queries walks over two lists of its own (`corelib.primitives.vertical_slash`). Slashes
come as ranges that start anywhere, not only at multiples of a block, so that a slash costs one tile
and not two; only there causality can matter. Columns come as key numbers, and a tile of them is
read row by row. Both feed one online softmax:

    m'   = max(m, max_j s_ij)              s = scale * q k^T
    p    = exp(s - m')                     l' = exp(m - m') l + sum_j p_ij
    acc' = exp(m - m') acc + p v           out = acc / l,  lse = m + log l

Source: MInference, arXiv 2407.02490 (appendix C.4). A forward pass for prefill, without gradients.
Half-precision heads up to 128 wide and float32 up to 64.
"""

from __future__ import annotations

import torch
from torch import Tensor

from corelib.kernels import _flash_launch as _flash
from corelib.kernels._flash_table import candidates_for
from corelib.kernels._shared import (
    Blocks,
    check_device,
    is_interpreted,
    jit,
    load_tile,
    padded,
    precision,
    store_tile,
    tl,
)
from corelib.kernels.gates.specialisation import TARGETS, Specialisation

__all__ = ["vertical_slash_attention", "vertical_slash_bytes"]

INTERPRETED = Blocks(block_m=16, block_n=16)
WIDEST = {2: 128, 4: 64}
#: Where flash attention's tile spills here: (bytes of a number, width, target).
NARROWER = {(2, 128, "gfx942"): Blocks(64, 32, 8, 2)}


@jit
def _add_tile(acc, m, l, queries, keys, values, seen, scale_log2, PRECISION: tl.constexpr):
    """One tile of keys into the online softmax."""
    scores = tl.dot(queries, tl.trans(keys), input_precision=PRECISION) * scale_log2
    scores = tl.where(seen, scores, float("-inf"))
    m_new = tl.maximum(m, tl.max(scores, 1))
    base = tl.where(m_new == float("-inf"), 0.0, m_new)  # a row that has seen nothing yet
    p = tl.exp2(scores - base[:, None])
    rescale = tl.exp2(m - base)
    l = l * rescale + tl.sum(p, 1)
    acc = tl.dot(p.to(values.dtype), values, acc * rescale[:, None], input_precision=PRECISION)
    return acc, m_new, l


@jit
def _gathered_rows(pointer, rows, exists, stride, width, PADDED: tl.constexpr):
    """Rows ``rows`` of a matrix with contiguous columns; zeros where none exists."""
    columns = tl.arange(0, PADDED)
    address = pointer + rows.to(tl.int64)[:, None] * stride + columns[None, :]
    return tl.load(address, mask=exists[:, None] & (columns < width)[None, :], other=0.0)


@jit
def vertical_slash_forward(
    q, k, v, out, lse, range_offsets, starts, stops, key_offsets, keys,
    q_b, q_h, q_l, k_b, k_h, k_l, v_b, v_h, v_l, out_b, out_h, out_l,
    heads_per_group, L, S, shift, scale_log2, D: tl.constexpr, V: tl.constexpr,
    BLOCK: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """A program: one tile of queries of one head, over the ranges and the keys of its block."""
    sequence = tl.program_id(2).to(tl.int64)
    head = tl.program_id(1).to(tl.int64)
    group = head // heads_per_group
    heads = tl.num_programs(1)
    first = (tl.num_programs(0) - 1 - tl.program_id(0)) * BLOCK_M  # long lists start first
    list_at = (sequence * heads + head) * tl.cdiv(L, BLOCK) + first // BLOCK
    q += sequence * q_b + head * q_h
    k += sequence * k_b + group * k_h
    v += sequence * v_b + group * v_h
    out += sequence * out_b + head * out_h
    lse += (sequence * heads + head) * L

    rows = first + tl.arange(0, BLOCK_M)
    lanes = tl.arange(0, BLOCK_N)
    queries = load_tile(q, first, L, q_l, BLOCK_M, D, BLOCK_D, True)
    acc = tl.zeros([BLOCK_M, BLOCK_V], tl.float32)
    m = tl.full([BLOCK_M], float("-inf"), tl.float32)
    l = tl.zeros([BLOCK_M], tl.float32)
    begin, end = tl.load(range_offsets + list_at), tl.load(range_offsets + list_at + 1)
    TILES: tl.constexpr = BLOCK // BLOCK_N
    for step in range(begin * TILES, end * TILES):
        start = tl.load(starts + step // TILES) + step % TILES * BLOCK_N
        stop = tl.load(stops + step // TILES)
        key_tile = load_tile(k, start, stop, k_l, BLOCK_N, D, BLOCK_D, True)
        values = load_tile(v, start, stop, v_l, BLOCK_N, V, BLOCK_V, True)
        places = start + lanes
        seen = (places < stop)[None, :] & (places[None, :] <= (rows + shift)[:, None])
        acc, m, l = _add_tile(acc, m, l, queries, key_tile, values, seen, scale_log2, PRECISION)
    begin, end = tl.load(key_offsets + list_at), tl.load(key_offsets + list_at + 1)
    for at in range(begin, end, BLOCK_N):
        exists = at + lanes < end
        places = tl.load(keys + at + lanes, mask=exists, other=0)
        key_tile = _gathered_rows(k, places, exists, k_l, D, BLOCK_D)
        values = _gathered_rows(v, places, exists, v_l, V, BLOCK_V)
        seen = exists[None, :] & (places[None, :] <= (rows + shift)[:, None])
        acc, m, l = _add_tile(acc, m, l, queries, key_tile, values, seen, scale_log2, PRECISION)
    l = tl.where(l == 0.0, 1.0, l)  # a row that sees no key returns zeros and -inf
    tl.store(lse + rows, (m + tl.log2(l)) * 0.6931471805599453, mask=rows < L)
    store_tile(out, acc / l[:, None], first, L, out_l, BLOCK_M, V, BLOCK_V)


def vertical_slash_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    columns: Tensor,
    distances: Tensor,
    *,
    scale: float | None = None,
    block: int = 64,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Causal attention over kept columns and slashes.

    Args:
        q: ``(B, H, L, D)`` in float16, bfloat16 (width up to 128) or float32 (up to 64).
        k, v: ``(B, G, S, D)`` and ``(B, G, S, V)``; head h reads ``h // (H // G)``.
        columns: ``(B, H, S)`` booleans: keys kept for every query.
        distances: ``(B, H, S)`` booleans: distances kept for every query; 0 always is.
        block: queries that share their lists, 16 or another power of two from there on.

    Returns:
        ``out (B, H, L, V)`` in q's dtype, and with ``return_lse`` also ``lse (B, H, L)`` in
        float32. A row that sees no key is zeros with ``lse = -inf``. Not differentiable.
    """
    from corelib.primitives.vertical_slash import check_vertical_slash, slash_lists

    _flash.check_inputs(q, k, v)
    check_vertical_slash(q, k, v, columns, distances, scale, block)
    if block < 16 or block & (block - 1):
        raise ValueError(f"block: expected 16 or more, a power of two, got {block}")
    width = max(q.shape[3], v.shape[3])
    if width > WIDEST[q.itemsize]:
        raise ValueError(f"q, v: expected a width up to {WIDEST[q.itemsize]}, got {width}")
    if torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v)):
        raise ValueError("q, k, v: the kernel has no backward pass; call it under torch.no_grad()")
    check_device("vertical_slash_attention", vertical_slash_forward, q, k, v)
    (B, H, L, D), (_, G, S, V) = q.shape, v.shape
    out = _flash.empty_like_rows(q, V, q.dtype)
    lse = torch.empty((B, H, L), dtype=torch.float32, device=q.device)
    q, k, v = _flash.with_contiguous_rows(q, k, v)
    tile, options = INTERPRETED, {}
    if not is_interpreted(vertical_slash_forward):
        tile = tile_for(_flash.target(), q.dtype, width, block)
        options = {"num_warps": tile.num_warps, "num_stages": tile.num_stages}
    grid = -(-L // tile.block_m), H, B
    if 0 not in grid:
        vertical_slash_forward[grid](
            q, k, v, out, lse, *slash_lists(columns, distances, L, block),
            **_flash.strides(q=q, k=k, v=v, out=out), heads_per_group=H // G, L=L, S=S,
            shift=S - L, scale_log2=(D**-0.5 if scale is None else scale) * 1.4426950408889634,
            D=D, V=V, BLOCK=block, PRECISION=precision(q.dtype), BLOCK_D=padded(D),
            BLOCK_V=padded(V), BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, **options,
        )  # fmt: skip
    return (out, lse) if return_lse else out


def tile_for(target: str, dtype: torch.dtype, width: int, block: int) -> Blocks:
    """Flash attention's smaller forward tile, cut to the block where that is smaller."""
    usual = candidates_for("forward", target, dtype, width, width)[-1]
    m, n, *rest = NARROWER.get((dtype.itemsize, max(64, padded(width)), target), usual)
    return Blocks(min(m, block), min(n, block), *rest)


def vertical_slash_bytes(
    kept: int, B: int, H: int, L: int, D: int, V: int, *, block: int, tile: int = 16,
    itemsize: int = 4,
) -> int:  # fmt: skip
    """Bytes that have to move for ``kept`` keys, summed over all query blocks.

    Each tile of ``tile`` queries reads the kept keys and values of its block once; queries are read
    and outputs written once, with 4 bytes of log-sum-exp a row. The lists are not counted.
    """
    keys = kept * (block // min(tile, block))
    return (keys + B * H * L) * (D + V) * itemsize + 4 * B * H * L


#: (dtype, width, block) of what is compiled.
SHIPPED = (
    (torch.bfloat16, 64, 64),
    (torch.float16, 128, 64),
    (torch.float32, 64, 64),
)


def _specialisation(dtype: torch.dtype, width: int, block: int) -> Specialisation:
    name = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}[dtype]
    strides = [f"{x}_{axis}" for x in ("q", "k", "v", "out") for axis in "bhl"]
    lists = "range_offsets", "starts", "stops", "key_offsets", "keys"
    signature = dict.fromkeys(("q", "k", "v", "out"), f"*{name}") | dict.fromkeys(lists, "*i32")
    signature |= dict.fromkeys((*strides, "heads_per_group", "L", "S", "shift"), "i32")
    signature |= {"scale_log2": "fp32", "lse": "*fp32"}
    constants = {"D": width, "V": width, "BLOCK_D": width, "BLOCK_V": width, "BLOCK": block}
    on = {}
    for target in TARGETS:
        m, n, warps, stages = tile_for(target, dtype, width, block)
        own = {"BLOCK_M": m, "BLOCK_N": n, "PRECISION": precision(dtype, target)}
        on[target] = {"constexprs": own, "num_warps": warps, "num_stages": stages}
    first = on.pop(TARGETS[0])
    return Specialisation(
        kernel="vertical_slash_forward",
        label=f"{name} D={width} blocks of {block}",
        direction="forward",
        signature=signature,
        constexprs=constants | first["constexprs"],
        num_warps=first["num_warps"],
        num_stages=first["num_stages"],
        divisible=tuple(strides),
        overrides=on,
    )


SPECIALISATIONS = [_specialisation(*row) for row in SHIPPED]
