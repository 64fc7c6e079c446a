"""Block-sparse attention: each block of queries walks over its own list of key blocks.

The online softmax of flash attention, with the range of key blocks replaced by a list in memory
(compressed sparse rows, `corelib.primitives.block_sparse.BlockLists`): what is not listed is not
read. Each list has the blocks first that every query of the row sees whole, then those that need a
mask, so that the long loop has none.

    m'   = max(m, max_j s_ij)              s = scale * q k^T, j over a listed block
    p    = exp(s - m')                     l' = exp(m - m') l + sum_j p_ij
    acc' = exp(m - m') acc + p v           out = acc / l,  lse = m + log l

Sources: Dao et al., arXiv 2205.14135 (section 3.3: block-sparse FlashAttention) and MInference,
arXiv 2407.02490 (appendix C.4: lists per head and query block). ``key_positions`` says where moved
keys belong (PBS-Attn, arXiv 2510.21270).

Tiles of queries and keys come from flash attention's table and may be smaller than a block.
Half-precision heads up to 128 wide and float32 up to 64: wider tiles would spill.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from corelib.kernels import _flash_launch as _flash
from corelib.kernels._flash_table import candidates_for
from corelib.kernels._shared import (
    Blocks,
    can_see,
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

__all__ = ["block_sparse_attention", "block_sparse_bytes"]

INTERPRETED = Blocks(block_m=16, block_n=16)
#: Widest head by bytes of a number.
WIDEST = {2: 128, 4: 64}
#: Where flash attention's tile spills here: (pass, bytes of a number, width, target).
NARROWER = {
    ("forward", 2, 64, "sm_80"): Blocks(64, 32, 4, 3),
}


@jit
def listed_keys(blocks, begin, step, TILES: tl.constexpr, BLOCK_N: tl.constexpr):
    """The first key of the ``step``-th tile of a list: blocks are ``TILES`` tiles long."""
    block = tl.load(blocks + begin + step // TILES)
    return (block * TILES + step % TILES) * BLOCK_N


@jit
def sees(
    rows, keys_at, positions, S, shift, CAUSAL: tl.constexpr, MOVED: tl.constexpr,
):  # fmt: skip
    """May queries ``rows`` see keys ``keys_at``? Moved keys stand where ``positions`` says."""
    if MOVED:
        exists = keys_at < S
        places = tl.load(positions + keys_at, mask=exists, other=0)
        seen = exists
        if CAUSAL:
            seen = exists & (places <= rows + shift)
        return seen
    else:
        return can_see(rows, keys_at, S, shift, 0, 0, CAUSAL, False)


@jit
def _attend_listed(
    acc, m, l, queries, k, v, k_l, v_l, blocks, positions, first, begin, steps, S, shift,
    scale_log2, D: tl.constexpr, V: tl.constexpr, CAUSAL: tl.constexpr, MOVED: tl.constexpr,
    MASKED: tl.constexpr, TILES: tl.constexpr, PRECISION: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """The online softmax over ``steps`` tiles of listed blocks."""
    rows = first + tl.arange(0, BLOCK_M)
    for step in range(0, steps):
        start = listed_keys(blocks, begin, step, TILES, BLOCK_N)
        keys = load_tile(k, start, S, k_l, BLOCK_N, D, BLOCK_D, MASKED)
        values = load_tile(v, start, S, v_l, BLOCK_N, V, BLOCK_V, MASKED)
        scores = tl.dot(queries, tl.trans(keys), input_precision=PRECISION) * scale_log2
        if MASKED:
            keys_at = start + tl.arange(0, BLOCK_N)
            seen = sees(rows[:, None], keys_at[None, :], positions, S, shift, CAUSAL, MOVED)
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
def block_sparse_forward(
    q, k, v, out, lse, offsets, middles, blocks, positions,
    q_b, q_h, q_l, k_b, k_h, k_l, v_b, v_h, v_l, out_b, out_h, out_l,
    heads_per_group, L, S, shift, scale_log2, D: tl.constexpr, V: tl.constexpr,
    CAUSAL: tl.constexpr, MOVED: tl.constexpr, BLOCK: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """A program: one tile of queries of one head, over the list of its block."""
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
    if MOVED:
        positions += (sequence * (heads // heads_per_group) + group) * S
    begin = tl.load(offsets + list_at)
    middle = tl.load(middles + list_at)
    end = tl.load(offsets + list_at + 1)

    queries = load_tile(q, first, L, q_l, BLOCK_M, D, BLOCK_D, True)
    acc = tl.zeros([BLOCK_M, BLOCK_V], tl.float32)
    m = tl.full([BLOCK_M], float("-inf"), tl.float32)
    l = tl.zeros([BLOCK_M], tl.float32)
    TILES: tl.constexpr = BLOCK // BLOCK_N
    acc, m, l = _attend_listed(
        acc, m, l, queries, k, v, k_l, v_l, blocks, positions, first, begin,
        (middle - begin) * TILES, S, shift, scale_log2, D, V, CAUSAL, MOVED, False, TILES,
        PRECISION, BLOCK_D, BLOCK_V, BLOCK_M, BLOCK_N,
    )  # fmt: skip
    acc, m, l = _attend_listed(
        acc, m, l, queries, k, v, k_l, v_l, blocks, positions, first, middle,
        (end - middle) * TILES, S, shift, scale_log2, D, V, CAUSAL, MOVED, True, TILES,
        PRECISION, BLOCK_D, BLOCK_V, BLOCK_M, BLOCK_N,
    )  # fmt: skip
    l = tl.where(l == 0.0, 1.0, l)  # a row that sees no key returns zeros and -inf
    rows = first + tl.arange(0, BLOCK_M)
    tl.store(lse + rows, (m + tl.log2(l)) * 0.6931471805599453, mask=rows < L)
    store_tile(out, acc / l[:, None], first, L, out_l, BLOCK_M, V, BLOCK_V)


def block_sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lists: Any,
    *,
    causal: bool,
    scale: float | None = None,
    key_positions: Tensor | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention over the listed blocks; differentiable through the output and the log-sum-exp.

    Args:
        q: ``(B, H, L, D)`` in float16, bfloat16 (width up to 128) or float32 (up to 64).
        k, v: ``(B, G, S, D)`` and ``(B, G, S, V)``; head h reads ``h // (H // G)``.
        lists: `corelib.primitives.block_sparse.BlockLists` on the same device, with a block of 16
            or another power of two from there on.
        causal: keys after the query are hidden. With ``L != S`` queries align with the last keys.
        key_positions: ``(B, G, S)`` integers, where moved keys belong; ``causal`` goes by them.

    Returns:
        ``out (B, H, L, V)`` in q's dtype, and with ``return_lse`` also ``lse (B, H, L)`` in
        float32. A row that sees no key is zeros with ``lse = -inf``.
    """
    from corelib.primitives.block_sparse import check_block_sparse

    _flash.check_inputs(q, k, v)
    check_block_sparse(q, k, v, lists, scale, key_positions)
    block, widest = lists.block, WIDEST[q.itemsize]
    if block < 16 or block & (block - 1):
        raise ValueError(f"lists: expected a block of 16 or more, a power of two, got {block}")
    if max(q.shape[3], v.shape[3]) > widest:
        raise ValueError(f"q, v: expected a width up to {widest} in {q.dtype}, got {q.shape[3]}")
    check_device("block_sparse_attention", block_sparse_forward, q, k, v)
    scale = q.shape[3] ** -0.5 if scale is None else float(scale)
    out, lse = _BlockSparse.apply(q, k, v, lists, bool(causal), scale, key_positions)
    return (out, lse) if return_lse else out


class _BlockSparse(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, lists, causal, scale, positions):
        from corelib.primitives.block_sparse import sort_lists

        (B, H, L, _), S = q.shape, k.shape[2]
        ordered = sort_lists(lists, L, S, causal=causal, key_positions=positions)
        out = _flash.empty_like_rows(q, v.shape[3], q.dtype)
        lse = torch.empty((B, H, L), dtype=torch.float32, device=q.device)
        given = arguments(q, k, v, lists.block, causal, scale, positions, out=out)
        given |= dict(zip(("offsets", "middles", "blocks"), ordered, strict=True), lse=lse)
        run(block_sparse_forward, "forward", given, lambda tile: (-(-L // tile.block_m), H, B))
        ctx.save_for_backward(q, k, v, out, lse, *ordered)
        ctx.options = lists, causal, scale, positions
        return out, lse

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, d_out, d_lse):
        from corelib.kernels.block_sparse_attention_backward import run_backward

        return *run_backward(d_out, d_lse, *ctx.saved_tensors, *ctx.options), *[None] * 4


def arguments(q, k, v, block, causal, scale, positions, **tensors: Tensor) -> dict[str, Any]:
    """What all kernels here take; ``tensors`` are passed with their strides."""
    q, k, v = _flash.with_contiguous_rows(q, k, v)
    (_, H, L, D), (_, G, S, V) = q.shape, v.shape
    tensors = {"q": q, "k": k, "v": v, **tensors}
    if positions is not None:
        positions = positions.to(torch.int32).contiguous()
    return {
        **tensors, **_flash.strides(**tensors), "positions": positions, "L": L, "S": S,
        "heads_per_group": H // G, "shift": S - L, "scale_log2": scale * math.log2(math.e),
        "D": D, "V": V, "CAUSAL": causal, "MOVED": positions is not None, "BLOCK": block,
        "PRECISION": precision(q.dtype), "BLOCK_D": padded(D), "BLOCK_V": padded(V),
    }  # fmt: skip


def tile_for(which: str, target: str, dtype: torch.dtype, width: int, block: int) -> Blocks:
    """Flash attention's smaller tile for this pass, cut to the block where that is smaller."""
    usual = candidates_for(which, target, dtype, width, width)[-1]
    m, n, *rest = NARROWER.get((which, dtype.itemsize, max(64, padded(width)), target), usual)
    return Blocks(min(m, block), min(n, block), *rest)


def run(kernel: Any, which: str, given: dict[str, Any], grid: Any) -> None:
    """Launch one of the kernels on a grid that is not empty."""
    if is_interpreted(kernel):
        tile, options = INTERPRETED, {}
    else:
        width = max(given["D"], given["V"])
        tile = tile_for(which, _flash.target(), given["q"].dtype, width, given["BLOCK"])
        options = {"num_warps": tile.num_warps, "num_stages": tile.num_stages}
    if 0 not in grid(tile):
        kernel[grid(tile)](**given, BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, **options)


def block_sparse_bytes(
    listed: int, B: int, H: int, L: int, D: int, V: int, *, block: int, tile: int = 16,
    itemsize: int = 4,
) -> int:  # fmt: skip
    """Bytes that the forward pass has to move for ``listed`` pairs of full blocks.

    Each tile of ``tile`` queries reads the keys and values of its block's list once; queries are
    read and outputs written once, with 4 bytes of log-sum-exp a row. The lists are not counted.
    """
    keys = listed * (block // min(tile, block)) * block
    return (keys + B * H * L) * (D + V) * itemsize + 4 * B * H * L


_STRIDED = {
    "forward": ("q", "k", "v", "out"),
    "dq": ("q", "k", "v", "out", "d_out", "dq"),
    "dkdv": ("q", "k", "v", "d_out", "dk", "dv"),
}
_FLOATS = {"forward": ("lse",), "dq": ("lse", "d_lse", "delta_out"), "dkdv": ("lse", "delta")}
_KERNELS = {
    "forward": "block_sparse_forward",
    "dq": "block_sparse_dq",
    "dkdv": "block_sparse_dkdv",
}
#: (dtype, width, block, are keys moved) of what is compiled, for each pass
SHIPPED = (
    (torch.bfloat16, 64, 64, False),
    (torch.bfloat16, 128, 128, True),
    (torch.float16, 128, 64, False),
    (torch.float32, 64, 64, False),
)


def specialisations(*passes: str) -> list[Specialisation]:
    """Every row of `SHIPPED`, causal, for these passes."""
    return [_specialisation(which, *row) for which in passes for row in SHIPPED]


def _specialisation(which: str, dtype, width: int, block: int, moved: bool) -> Specialisation:
    name = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}[dtype]
    strides = [f"{x}_{axis}" for x in _STRIDED[which] for axis in "bhl"]
    signature = dict.fromkeys(_STRIDED[which], f"*{name}") | dict.fromkeys(_FLOATS[which], "*fp32")
    signature |= dict.fromkeys(("offsets", "middles", "blocks"), "*i32")
    signature |= dict.fromkeys((*strides, "heads_per_group", "L", "S", "shift"), "i32")
    signature |= {"scale_log2": "fp32"} | ({"positions": "*i32"} if moved else {})
    constants = {"D": width, "V": width, "BLOCK_D": width, "BLOCK_V": width, "BLOCK": block}
    constants |= {"CAUSAL": True, "MOVED": moved} | ({} if moved else {"positions": None})
    on = {}
    for target in TARGETS:
        m, n, warps, stages = tile_for(which, target, dtype, width, block)
        own = {"BLOCK_M": m, "BLOCK_N": n, "PRECISION": precision(dtype, target)}
        on[target] = {"constexprs": own, "num_warps": warps, "num_stages": stages}
    first = on.pop(TARGETS[0])
    return Specialisation(
        kernel=_KERNELS[which],
        label=f"{name} D={width} blocks of {block}" + (", moved keys" if moved else ""),
        direction="forward" if which == "forward" else "backward",
        signature=signature,
        constexprs=constants | first["constexprs"],
        num_warps=first["num_warps"],
        num_stages=first["num_stages"],
        divisible=tuple(strides),
        overrides=on,
    )


SPECIALISATIONS = specialisations("forward")
