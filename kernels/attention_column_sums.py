"""Column sums of attention: how much each key receives, from row sums that are known.

    sums[b, h, j] = sum_i weights[b, h, i] * exp(scale * q[b, h, i] . k[b, g, j] - lse[b, h, i])

Two passes instead of a map: ``lse`` comes from the forward pass of attention, and this kernel walks
down the map with it. A program owns a stretch of keys, multiplies every tile of queries that may
see them, and adds the shares up in registers, so that nothing but the sums is written and no two
programs write to one place. Causal, tiles above the diagonal are neither read nor multiplied.

A module of its own beside `block_scores`: its scores are those of tokens, not of blocks' means, it
needs ``lse``, and its result has one axis less. Scores are kept in base 2.
"""

from __future__ import annotations

import math
from contextlib import nullcontext

import torch
from torch import Tensor

from corelib.kernels._flash_launch import with_contiguous_rows
from corelib.kernels._shared import (
    can_see,
    check_device,
    is_interpreted,
    jit,
    padded,
    precision,
    query_blocks,
    sliced_product,
    tl,
)
from corelib.kernels.gates.specialisation import Specialisation

__all__ = ["attention_column_sums", "column_sum_bytes"]

MAX_WIDTH = 256
ROWS, KEYS = 64, 64  # queries in a tile, keys of a program
SLICE = {2: 64, 4: 32}  # itemsize -> channels multiplied at a time
OPTIONS = {"num_warps": 4, "num_stages": 2}
WIDE_OPTIONS = {"num_warps": 8, "num_stages": 1}  # products in float32: registers run out with 2
LOG2_E = math.log2(math.e)


@jit
def _column_sums_kernel(
    q, k, lse, weights, out, q_b, q_h, q_l, k_b, k_h, k_l, H, group, L, S, scale_log2,
    CAUSAL: tl.constexpr, WEIGHTED: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    SLICE: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Program ``(stretch of keys, request and head)``."""
    first, pair = tl.program_id(0) * KEYS, tl.program_id(1).to(tl.int64)
    request, head = pair // H, pair % H
    q += request * q_b + head * q_h
    k += request * k_b + head // group * k_h
    columns = first + tl.arange(0, KEYS)
    total = tl.zeros([KEYS], tl.float32)
    start, _, _, end = query_blocks(first, S, L, S - L, 0, 0, KEYS, ROWS, CAUSAL, False)
    for tile in range(start, end):
        row = tile * ROWS
        rows = row + tl.arange(0, ROWS)
        real = rows < L
        scores = sliced_product(
            k, first, S, k_l, q, row, L, q_l, D, KEYS, ROWS, BLOCK_D, SLICE, PRECISION
        )
        # The log-sum-exp of a row that sees nothing is -inf: such rows are hidden below.
        above = tl.load(lse + pair * L + rows, mask=real, other=0.0).to(tl.float32) * 1.4426950409
        shares = tl.exp2(scores * scale_log2 - above[None, :])
        seen = can_see(rows[None, :], columns[:, None], S, S - L, 0, 0, CAUSAL, False)
        shares = tl.where(seen & real[None, :], shares, 0.0)
        if WEIGHTED:
            weight = tl.load(weights + pair * L + rows, mask=real, other=0.0).to(tl.float32)
            shares = shares * weight[None, :]
        total += tl.sum(shares, 1)
    tl.store(out + pair * S + columns, total, mask=columns < S)


def attention_column_sums(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    *,
    causal: bool,
    scale: float | None = None,
    weights: Tensor | None = None,
) -> Tensor:
    """The weighted sum of every column of the attention map, ``(B, H, S)`` in float32.

    Args:
        q, k: ``(B, H, L, D)`` and ``(B, G, S, D)``; head h meets key head ``h // (H // G)``.
        lse: ``(B, H, L)``, natural log-sum-exps of the rows' scaled scores; ``-inf`` for a row
            that sees no key.
        causal: queries align with the last keys.
        scale: ``None`` means ``D ** -0.5``.
        weights: of the rows, broadcasting to ``(B, H, L)``; ``None`` means 1 each.

    Not differentiable.
    """
    _check(q, k, lse, weights)
    check_device("attention_column_sums", _column_sums_kernel, q, k, lse)
    (B, H, L, D), (G, S) = q.shape, k.shape[1:3]
    out = torch.zeros if 0 in q.shape else torch.empty
    out = out(B, H, S, dtype=torch.float32, device=q.device)
    if 0 in out.shape or L == 0:
        return out
    q, k = with_contiguous_rows(q, k)
    lse = lse.float().contiguous()
    if weights is not None:
        weights = weights.float().expand(B, H, L).contiguous()
    options = WIDE_OPTIONS if q.itemsize == 4 else OPTIONS
    options = {} if is_interpreted(_column_sums_kernel) else options
    scale = D**-0.5 if scale is None else float(scale)
    with torch.cuda.device(q.device) if q.is_cuda else nullcontext():
        _column_sums_kernel[(-(-S // KEYS), B * H)](
            q, k, lse, lse if weights is None else weights, out, *q.stride()[:3], *k.stride()[:3],
            H, H // G, L, S, scale * LOG2_E, CAUSAL=bool(causal), WEIGHTED=weights is not None,
            D=D, BLOCK_D=padded(D), SLICE=min(SLICE[q.itemsize], padded(D)), ROWS=ROWS, KEYS=KEYS,
            PRECISION=precision(q.dtype), **options,
        )  # fmt: skip
    return out


def _check(q: Tensor, k: Tensor, lse: Tensor, weights: Tensor | None) -> None:
    for name, x in (("q", q), ("k", k)):
        if not isinstance(x, Tensor):
            raise TypeError(f"{name}: expected a tensor, got {type(x).__name__}")
        if x.dtype not in (torch.float16, torch.bfloat16, torch.float32) or x.dtype != q.dtype:
            raise TypeError(f"{name}: expected float16, bfloat16 or float32, got {x.dtype}")
        if x.dim() != 4 or not 1 <= x.shape[3] <= MAX_WIDTH:
            raise ValueError(
                f"{name}: expected (batch, heads, length, a width up to {MAX_WIDTH}), "
                f"got {tuple(x.shape)}"
            )
        if torch.is_grad_enabled() and x.requires_grad:
            raise ValueError(f"{name}: the kernel has no backward pass; call it under no_grad()")
    (B, H, L, D), (B_k, G, _, D_k) = q.shape, k.shape
    if B != B_k or D != D_k or G == 0 or H % G:
        raise ValueError(
            f"k: expected batch {B}, heads that divide {H} and width {D}, got {B_k}, {G} and {D_k}"
        )
    if tuple(lse.shape) != (B, H, L):
        raise ValueError(f"lse: expected shape {(B, H, L)}, got {tuple(lse.shape)}")
    fits = weights is None or (
        weights.dim() == 3
        and all(n in (1, m) for n, m in zip(weights.shape, (B, H, L), strict=True))
    )
    if not fits:
        raise ValueError(
            f"weights: expected a shape that broadcasts to {(B, H, L)}, got {tuple(weights.shape)}"
        )


def column_sum_bytes(
    B: int, H: int, G: int, L: int, S: int, D: int, *, itemsize: int = 2, weighted: bool = False
) -> int:
    """Bytes that have to move without a mask: queries, keys, row sums once, column sums once.

    The kernel reads queries again for every ``KEYS`` keys, from the cache where they fit.
    """
    return B * ((H * L + G * S) * D * itemsize + 4 * H * (L * (1 + weighted) + S))


#: (dtype, width, weighted) of what is compiled.
SHIPPED = (("fp16", 64, False), ("fp16", 128, False), ("fp16", 128, True), ("fp32", 64, True))


def _specialisation(dtype: str, width: int, weighted: bool) -> Specialisation:
    strides = ("q_b", "q_h", "q_l", "k_b", "k_h", "k_l")
    signature = {"q": f"*{dtype}", "k": f"*{dtype}", "lse": "*fp32", "weights": "*fp32"}
    signature |= {"out": "*fp32", "scale_log2": "fp32"}
    signature |= dict.fromkeys((*strides, "H", "group", "L", "S"), "i32")
    return Specialisation(
        kernel="_column_sums_kernel",
        label=f"{dtype} D={width} causal" + (" weighted" if weighted else ""),
        direction="forward",
        signature=signature,
        constexprs={
            "CAUSAL": True, "WEIGHTED": weighted, "D": width, "BLOCK_D": width,
            "SLICE": SLICE[4 if dtype == "fp32" else 2], "ROWS": ROWS, "KEYS": KEYS,
            "PRECISION": "tf32x3" if dtype == "fp32" else "ieee",
        },
        divisible=strides,
        overrides={"gfx942": {"constexprs": {"PRECISION": "ieee"}}},
        **(WIDE_OPTIONS if dtype == "fp32" else OPTIONS),
    )  # fmt: skip


SPECIALISATIONS = [_specialisation(*kind) for kind in SHIPPED]
