"""Scores between blocks of queries and blocks of keys: means first, then their products.

    means[b, h, n] = mean(x[b, h, n * block : (n + 1) * block])
    scores[b, h, m, n] = scale * (means of q)[b, h, m] . (means of k)[b, h // (H // G), n]

The first kernel reads every token once: a program adds up the rows of one block in float32 and
divides by those that exist. The second multiplies a tile of query means with a tile of key means;
causal, blocks that no query of the row may see are ``-inf``, and a tile of nothing else is not
computed. `grouped_block_scores` adds the scores of the query heads that share a key head, in
registers: what a selection wants that all heads of a group share. Means are kept in the type of
the input, as `corelib.primitives.block_scores` does on a CPU.
"""

from __future__ import annotations

from contextlib import nullcontext

import torch
from torch import Tensor

from corelib.kernels._flash_launch import with_contiguous_rows
from corelib.kernels._shared import (
    check_device,
    is_interpreted,
    jit,
    load_tile,
    padded,
    precision,
    sliced_product,
    store_tile,
    tl,
)
from corelib.kernels.gates.specialisation import Specialisation

__all__ = ["block_score_bytes", "grouped_block_scores", "pool_blocks", "pooled_block_scores"]

MAX_WIDTH = 256
ROWS = 32  # tokens that a program of the first kernel reads at a time
TILE = 64  # blocks of queries and of keys in a program of the second
SLICE = {2: 64, 4: 32}  # itemsize -> channels multiplied at a time
OPTIONS = {"num_warps": 4, "num_stages": 2}
WIDE_OPTIONS = {"num_warps": 8, "num_stages": 2}  # products in float32: registers run out with 4


@jit
def _pool_kernel(
    x, out, x_b, x_h, x_l, H, L, block, D: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr
):  # fmt: skip
    """Program ``(block, request and head)``: the mean of one block, in the type of ``out``."""
    number, pair = tl.program_id(0), tl.program_id(1).to(tl.int64)
    x += pair // H * x_b + pair % H * x_h
    first = number * block
    end = tl.minimum(first + block, L)
    total = tl.zeros([BLOCK_D], tl.float32)
    for at in range(0, block, ROWS):
        tile = load_tile(x, first + at, end, x_l, ROWS, D, BLOCK_D, True)
        total += tl.sum(tile.to(tl.float32), 0)
    columns = tl.arange(0, BLOCK_D)
    place = out + (pair * tl.num_programs(0) + number) * D + columns
    mean = total / (end - first).to(tl.float32)
    tl.store(place, mean.to(out.dtype.element_ty), mask=columns < D)


@jit
def _scores_kernel(
    q, k, out, group, summed, L, shift, nq, nk, block, scale, CAUSAL: tl.constexpr,
    D: tl.constexpr, BLOCK_D: tl.constexpr, SLICE: tl.constexpr, TILE: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Program ``(request and output head, tile of queries' blocks, tile of keys' blocks)``.

    ``summed`` query heads go into an output head, ``group`` output heads share a key head.
    """
    pair = tl.program_id(0).to(tl.int64)
    row, column = tl.program_id(1) * TILE, tl.program_id(2) * TILE
    q += pair * summed * nq * D
    k += pair // group * nk * D
    out += pair * nq * nk + column
    scores = tl.zeros([TILE, TILE], tl.float32)
    heads = summed
    if CAUSAL:  # nothing to multiply where the tile's last query stands before its first key
        last = tl.minimum((row + TILE) * block, L) - 1 + shift
        heads = tl.where(column * block <= last, summed, 0)
    for _ in range(heads):
        scores += sliced_product(
            q, row, nq, D, k, column, nk, D, D, TILE, TILE, BLOCK_D, SLICE, PRECISION
        )
        q += nq * D
    scores = scores * scale
    if CAUSAL:
        lasts = tl.minimum((row + tl.arange(0, TILE) + 1) * block, L) - 1 + shift
        firsts = (column + tl.arange(0, TILE)) * block
        scores = tl.where(firsts[None, :] <= lasts[:, None], scores, float("-inf"))
    store_tile(out, scores, row, nq, nk, TILE, nk - column, TILE)


def pool_blocks(x: Tensor, block: int) -> Tensor:
    """The means ``(B, H, n, D)`` of blocks of ``x (B, H, L, D)``; a last, short one over what
    exists. Not differentiable."""
    _check(x=x)
    _check_block(block)
    check_device("pool_blocks", _pool_kernel, x)
    (B, H, L, D), n = x.shape, -(-x.shape[2] // block)
    (x,), out = with_contiguous_rows(x), x.new_empty(B, H, n, D)
    if 0 in out.shape:
        return out
    options = {} if is_interpreted(_pool_kernel) else OPTIONS
    with torch.cuda.device(x.device) if x.is_cuda else nullcontext():
        _pool_kernel[(n, B * H)](
            x, out, *x.stride()[:3], H, L, block, D=D, BLOCK_D=padded(D), ROWS=ROWS, **options
        )
    return out


def pooled_block_scores(
    q: Tensor, k: Tensor, block: int, *, causal: bool, scale: float | None = None
) -> Tensor:
    """``scale * mean(q block) . mean(k block)`` as ``(B, H, nq, nk)``, in the type of ``q``.

    Args:
        q, k: ``(B, H, L, D)`` and ``(B, G, S, D)``; head h meets key head ``h // (H // G)``.
        block: tokens in a block, any number from 1 on.
        causal: ``-inf`` for blocks that hold no key which some query of the row may see.
        scale: ``None`` means ``D ** -0.5``.

    Not differentiable.
    """
    return _scores(q, k, block, causal, scale, summed=1)


def grouped_block_scores(
    q: Tensor, k: Tensor, block: int, *, causal: bool, scale: float | None = None
) -> Tensor:
    """`pooled_block_scores` added up over the query heads of a key head: ``(B, G, nq, nk)``."""
    _check(q=q, k=k)
    return _scores(q, k, block, causal, scale, summed=q.shape[1] // k.shape[1])


def _scores(
    q: Tensor, k: Tensor, block: int, causal: bool, scale: float | None, summed: int
) -> Tensor:
    _check(q=q, k=k)
    (B, H, L, D), (G, S) = q.shape, k.shape[1:3]
    mean_q, mean_k = pool_blocks(q, block), pool_blocks(k, block)
    heads, nq, nk = H // summed, mean_q.shape[2], mean_k.shape[2]
    out = q.new_empty(B, heads, nq, nk)
    if 0 in out.shape:
        return out
    options = WIDE_OPTIONS if q.itemsize == 4 else OPTIONS
    options = {} if is_interpreted(_scores_kernel) else options
    with torch.cuda.device(q.device) if q.is_cuda else nullcontext():
        _scores_kernel[(B * heads, -(-nq // TILE), -(-nk // TILE))](
            mean_q, mean_k, out, heads // G, summed, L, S - L, nq, nk, block,
            D**-0.5 if scale is None else float(scale), CAUSAL=bool(causal), D=D,
            BLOCK_D=padded(D), SLICE=min(SLICE[q.itemsize], padded(D)), TILE=TILE,
            PRECISION=precision(q.dtype), **options,
        )  # fmt: skip
    return out


def _check_block(block: int) -> None:
    from corelib.primitives.block_sparse import check_block

    check_block(block)


def _check(**tensors: Tensor) -> None:
    """``q`` or ``x`` comes first; the others have to fit to it."""
    first = next(iter(tensors.values()))
    for name, x in tensors.items():
        if not isinstance(x, Tensor):
            raise TypeError(f"{name}: expected a tensor, got {type(x).__name__}")
        if x.dtype not in (torch.float16, torch.bfloat16, torch.float32) or x.dtype != first.dtype:
            raise TypeError(f"{name}: expected float16, bfloat16 or float32, got {x.dtype}")
        if x.dim() != 4 or not 1 <= x.shape[3] <= MAX_WIDTH:
            raise ValueError(
                f"{name}: expected (batch, heads, length, a width up to {MAX_WIDTH}), "
                f"got {tuple(x.shape)}"
            )
        if x.device != first.device:
            raise ValueError(f"{name}: expected device {first.device}, got {x.device}")
        if torch.is_grad_enabled() and x.requires_grad:
            raise ValueError(f"{name}: the kernel has no backward pass; call it under no_grad()")
        (B, H, _, D), (B_x, G, _, D_x) = first.shape, x.shape
        if B != B_x or D != D_x or G == 0 or H % G:
            raise ValueError(
                f"{name}: expected batch {B}, heads that divide {H} and width {D}, "
                f"got {B_x}, {G} and {D_x}"
            )


def block_score_bytes(
    B: int, H: int, G: int, L: int, S: int, D: int, *, block: int, itemsize: int = 2
) -> int:
    """Bytes that have to move for `pooled_block_scores` without a mask.

    Every token is read once, every mean written and read once (from ``TILE`` blocks on or with
    grouped heads more often, then from the cache), every score written once.
    """
    nq, nk = -(-L // block), -(-S // block)
    tokens, means = H * L + G * S, H * nq + G * nk
    return B * ((tokens + 2 * means) * D + H * nq * nk) * itemsize


#: (dtype, width) of what is compiled.
SHIPPED = (("fp16", 64), ("fp16", 128), ("fp32", 64), ("fp32", 128))


def _pool(dtype: str, width: int) -> Specialisation:
    signature = {"x": f"*{dtype}", "out": f"*{dtype}"}
    signature |= dict.fromkeys(("x_b", "x_h", "x_l", "H", "L", "block"), "i32")
    return Specialisation(
        kernel="_pool_kernel",
        label=f"means {dtype} D={width}",
        direction="forward",
        signature=signature,
        constexprs={"D": width, "BLOCK_D": width, "ROWS": ROWS},
        divisible=("x_b", "x_h", "x_l", "block"),
        **OPTIONS,
    )


def _product(dtype: str, width: int, *, grouped: bool = False) -> Specialisation:
    signature = dict.fromkeys(("q", "k", "out"), f"*{dtype}") | {"scale": "fp32"}
    signature |= dict.fromkeys(("L", "shift", "nq", "nk", "block"), "i32")
    signature["summed" if grouped else "group"] = "i32"
    return Specialisation(
        kernel="_scores_kernel",
        label=f"scores {dtype} D={width} causal" + (" grouped" if grouped else ""),
        direction="forward",
        signature=signature,
        constexprs={
            "group" if grouped else "summed": 1, "CAUSAL": True, "D": width, "BLOCK_D": width,
            "SLICE": SLICE[4 if dtype == "fp32" else 2], "TILE": TILE,
            "PRECISION": "tf32x3" if dtype == "fp32" else "ieee",
        },
        divisible=("block",),
        overrides={"gfx942": {"constexprs": {"PRECISION": "ieee"}}},
        **(WIDE_OPTIONS if dtype == "fp32" else OPTIONS),
    )  # fmt: skip


SPECIALISATIONS = [
    *(_pool(*kind) for kind in SHIPPED),
    *(_product(*kind) for kind in SHIPPED),
    _product("fp16", 128, grouped=True),
]
