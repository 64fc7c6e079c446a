"""Sending tokens to experts and back, and a matrix product for each expert.

    permute          rows[i] = x[order[i] // k]
    unpermute        out[n]  = sum_j weights[n, j] rows[place[n, j]]
    grouped_matmul   out[i]  = rows[i] @ weights[e]            for the rows i of expert e

``order`` and ``place`` are the two directions of one permutation (`corelib.primitives.
expert_permute.sort_by_expert`), so that every gradient is a gather too: that of `permute` is
`unpermute` without weights, that of `unpermute` one pass over the rows that also makes the
gradients of the weights. No atomics: the same sums in the same order at every run.

The product works on tiles of rows that never cross from one expert to the next. Which expert a tile
is of is a small table made on the device, so that nothing waits for the lengths: there are at most
``rows / 64 + E`` tiles, and those past the last do nothing. The gradient of the weights is one
program for each expert and tile of its matrix, which walks over the expert's rows; an expert
without rows writes zeros.
"""

from __future__ import annotations

import torch
from torch import Tensor

from corelib.kernels._shared import check_device, is_interpreted, jit, precision, tl
from corelib.kernels.gates.specialisation import TARGETS, Specialisation

__all__ = ["grouped_bytes", "grouped_matmul", "permute", "permute_bytes", "unpermute"]

_DTYPES = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}
#: Rows and columns of a program that moves rows; rows, columns and depth of a product; warps.
ROWS, COLUMNS, BLOCK, DEPTH, WARPS = 16, 128, 64, 32, 4


@jit
def _permute(x, order, rows, k, count, C, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    token = tl.load(order + row, mask=row < count, other=0) // k
    inside = (row < count)[:, None] & (column < C)[None, :]
    values = tl.load(x + token[:, None] * C + column[None, :], mask=inside, other=0.0)
    tl.store(rows + row[:, None] * C + column[None, :], values, mask=inside)


@jit
def _unpermute(
    rows, place, weights, out, k, count, C, WEIGHTED: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for j in range(0, k):
        choice = token * k + j
        row = tl.load(place + choice, mask=token < count, other=-1)
        inside = (row >= 0)[:, None] & (column < C)[None, :]
        values = tl.load(rows + row[:, None] * C + column[None, :], mask=inside, other=0.0)
        values = values.to(tl.float32)
        if WEIGHTED:
            weight = tl.load(weights + choice, mask=row >= 0, other=0.0).to(tl.float32)
            values *= weight[:, None]
        total += values
    inside = (token < count)[:, None] & (column < C)[None, :]
    place_out = out + token[:, None] * C + column[None, :]
    tl.store(place_out, total.to(out.dtype.element_ty), mask=inside)


@jit
def _unpermute_backward(
    rows, order, weights, d_out, d_rows, d_weights, k, count, C, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):  # fmt: skip
    """``d_rows[i] = weight d_out[token]`` and ``d_weight = rows[i] . d_out[token]``."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    choice = tl.load(order + row, mask=row < count, other=0)
    weight = tl.load(weights + choice).to(tl.float32)  # behind the last row: any, it is not used
    product = tl.zeros([ROWS], tl.float32)
    for first in range(0, C, COLUMNS):
        column = first + tl.arange(0, COLUMNS)
        inside = (row < count)[:, None] & (column < C)[None, :]
        here = (choice // k)[:, None] * C + column[None, :]
        grad = tl.load(d_out + here, mask=inside, other=0.0).to(tl.float32)
        here = row[:, None] * C + column[None, :]
        values = tl.load(rows + here, mask=inside, other=0.0).to(tl.float32)
        product += tl.sum(grad * values, 1)
        tl.store(d_rows + here, (weight[:, None] * grad).to(d_rows.dtype.element_ty), mask=inside)
    tl.store(d_weights + choice, product.to(d_weights.dtype.element_ty), mask=row < count)


@jit
def _grouped(
    rows, weights, out, ends, experts, tiles, E, I, O, stride_e, stride_i, stride_o,
    BLOCK: tl.constexpr, DEPTH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A tile of an expert's rows ``(BLOCK, I)`` times a tile of its matrix ``(I, BLOCK)``."""
    tile = tl.program_id(0)
    expert = tl.load(experts + tile)
    if expert < E:
        last = tl.load(ends + expert + 1)
        first = tl.load(ends + expert) + (tile - tl.load(tiles + expert)) * BLOCK
        row = first.to(tl.int64) + tl.arange(0, BLOCK)
        column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        matrix = weights + expert.to(tl.int64) * stride_e
        total = tl.zeros([BLOCK, BLOCK], tl.float32)
        for at in range(0, I, DEPTH):
            deep = at + tl.arange(0, DEPTH)
            inside = (row < last)[:, None] & (deep < I)[None, :]
            left = tl.load(rows + row[:, None] * I + deep[None, :], mask=inside, other=0.0)
            inside = (deep < I)[:, None] & (column < O)[None, :]
            right = matrix + deep[:, None] * stride_i + column[None, :] * stride_o
            right = tl.load(right, mask=inside, other=0.0)
            total = tl.dot(left, right, total, input_precision=PRECISION)
        inside = (row < last)[:, None] & (column < O)[None, :]
        place = out + row[:, None] * O + column[None, :]
        tl.store(place, total.to(out.dtype.element_ty), mask=inside)


@jit
def _grouped_weights(
    rows, d_out, d_weights, ends, I, O, BLOCK: tl.constexpr, DEPTH: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """A tile of ``rows^T d_out`` of one expert."""
    expert = tl.program_id(0)
    first, last = tl.load(ends + expert), tl.load(ends + expert + 1)
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    o = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK, BLOCK], tl.float32)
    for at in range(first, last, DEPTH):
        row = (at + tl.arange(0, DEPTH)).to(tl.int64)
        inside = (row < last)[:, None] & (i < I)[None, :]
        left = tl.load(rows + row[:, None] * I + i[None, :], mask=inside, other=0.0)
        inside = (row < last)[:, None] & (o < O)[None, :]
        right = tl.load(d_out + row[:, None] * O + o[None, :], mask=inside, other=0.0)
        total = tl.dot(tl.trans(left), right, total, input_precision=PRECISION)
    inside = (i < I)[:, None] & (o < O)[None, :]
    place = d_weights + expert.to(tl.int64) * I * O + i[:, None] * O + o[None, :]
    tl.store(place, total.to(d_weights.dtype.element_ty), mask=inside)


def permute(x: Tensor, order: Tensor, place: Tensor) -> Tensor:
    """Rows ``(rows, C)`` of ``x (N, C)``, sorted by expert.

    Args:
        x: float16, bfloat16 or float32.
        order: ``(rows,)`` int64, the choice ``token * k + j`` that each row is of.
        place: ``(N, k)`` int64, the row of each choice, -1 where it has none.

    Differentiable. Raises ValueError or TypeError for shapes, dtypes or devices that do not fit,
    ImportError where Triton is missing.
    """
    check_device("permute", _permute, x)
    _check("x", x, len(place), order, place)
    return _Permute.apply(x, order, place)


def unpermute(rows: Tensor, order: Tensor, place: Tensor, weights: Tensor | None = None) -> Tensor:
    """``(N, C)``: the sum of each token's rows, times ``weights (N, k)``; see `permute`."""
    check_device("unpermute", _unpermute, rows)
    _check("rows", rows, len(order), order, place)
    if weights is None:
        return _Sum.apply(rows, order, place)
    if weights.shape != place.shape:
        wanted, got = tuple(place.shape), tuple(weights.shape)
        raise ValueError(f"weights: expected shape {wanted}, got {got}")
    return _Unpermute.apply(rows, order, place, weights)


def grouped_matmul(rows: Tensor, weights: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Each expert's rows of ``rows (R, I)`` times its matrix of ``weights (E, I, O)``.

    Args:
        cu_seqlens: ``(E + 1,)`` from 0 to R: expert e owns rows ``cu_seqlens[e]`` and on.

    Differentiable. Raises as `permute` does; ``cu_seqlens`` itself is not looked at.
    """
    check_device("grouped_matmul", _grouped, rows, weights)
    if rows.dtype not in _DTYPES or weights.dtype != rows.dtype:
        raise TypeError(
            "rows, weights: expected both float16, bfloat16 or float32, "
            f"got {rows.dtype}, {weights.dtype}"
        )
    if rows.dim() != 2 or weights.dim() != 3 or weights.shape[1] != rows.shape[1]:
        shapes = tuple(rows.shape), tuple(weights.shape)
        raise ValueError(f"rows, weights: expected (R, I), (E, I, O), got {shapes}")
    if cu_seqlens.shape != (len(weights) + 1,):
        got = tuple(cu_seqlens.shape)
        raise ValueError(f"cu_seqlens: expected shape ({len(weights) + 1},), got {got}")
    return _GroupedMatmul.apply(rows, weights, cu_seqlens.to(torch.int32).contiguous())


def _check(name: str, x: Tensor, count: int, order: Tensor, place: Tensor) -> None:
    if x.dtype not in _DTYPES:
        raise TypeError(f"{name}: expected float16, bfloat16 or float32, got {x.dtype}")
    for label, index, axes in (("order", order, 1), ("place", place, 2)):
        if index.dtype != torch.int64 or index.dim() != axes:
            got = f"{index.dtype} of shape {tuple(index.shape)}"
            raise ValueError(f"{label}: expected int64 with {axes} axes, got {got}")
    if x.dim() != 2 or len(x) != count:
        raise ValueError(f"{name}: expected shape ({count}, C), got {tuple(x.shape)}")


def _run(kernel, grid: tuple, *args, **constants) -> None:
    if min(grid) > 0:
        options = {} if is_interpreted(kernel) else {"num_warps": WARPS}
        kernel[grid](*args, **constants, **options)


def _blocks(count: int, C: int) -> tuple[int, int]:
    return -(-count // ROWS), -(-C // COLUMNS)


def _permuted(x: Tensor, order: Tensor, place: Tensor) -> Tensor:
    count, C, k = len(order), x.shape[1], place.shape[1]
    rows = x.new_empty(count, C)
    tile = dict(ROWS=ROWS, COLUMNS=COLUMNS)
    _run(_permute, _blocks(count, C), x.contiguous(), order, rows, k, count, C, **tile)
    return rows


def _summed(rows: Tensor, place: Tensor, weights: Tensor | None = None) -> Tensor:
    (count, k), C = place.shape, rows.shape[1]
    out = rows.new_empty(count, C)
    given = rows if weights is None else weights.contiguous()
    _run(
        _unpermute, _blocks(count, C), rows.contiguous(), place.contiguous(), given, out, k,
        count, C, WEIGHTED=weights is not None, ROWS=ROWS, COLUMNS=COLUMNS,
    )  # fmt: skip
    return out


class _Permute(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, order, place):
        ctx.save_for_backward(place)
        return _permuted(x, order, place)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, d_rows):
        return _summed(d_rows, *ctx.saved_tensors), None, None


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows, order, place):
        ctx.save_for_backward(order, place)
        return _summed(rows, place)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, d_out):
        return _permuted(d_out, *ctx.saved_tensors), None, None


class _Unpermute(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows, order, place, weights):
        ctx.save_for_backward(rows, order, weights)
        return _summed(rows, place, weights)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, d_out):
        rows, order, weights = ctx.saved_tensors
        (count, C), k = rows.shape, weights.shape[1]
        d_rows = torch.empty_like(rows, memory_format=torch.contiguous_format)
        d_weights = torch.zeros_like(weights, memory_format=torch.contiguous_format)
        _run(
            _unpermute_backward, _blocks(count, 1)[:1], rows.contiguous(), order,
            weights.contiguous(), d_out.contiguous(), d_rows, d_weights, k, count, C, ROWS=ROWS,
            COLUMNS=COLUMNS,
        )  # fmt: skip
        return d_rows, None, None, d_weights


class _GroupedMatmul(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows, weights, ends):
        ctx.save_for_backward(rows, weights, ends)
        return _multiplied(rows, weights.contiguous(), ends)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, d_out):
        rows, weights, ends = ctx.saved_tensors
        d_rows = _multiplied(d_out, weights.contiguous().mT, ends)
        d_weights = torch.empty_like(weights, memory_format=torch.contiguous_format)
        E, I, O = weights.shape
        _run(
            _grouped_weights, (E, -(-I // BLOCK), -(-O // BLOCK)), rows.contiguous(),
            d_out.contiguous(), d_weights, ends, I, O, BLOCK=BLOCK, DEPTH=DEPTH,
            PRECISION=precision(rows.dtype),
        )  # fmt: skip
        return d_rows, d_weights, None


def _multiplied(rows: Tensor, weights: Tensor, ends: Tensor) -> Tensor:
    """``weights (E, I, O)`` of any strides."""
    (count, I), (E, _, O) = rows.shape, weights.shape
    out = rows.new_empty(count, O)
    tiles = -(-ends.diff() // BLOCK)  # of each expert
    after = tiles.cumsum(0, dtype=torch.int32)
    bound = count // BLOCK + E
    every = torch.arange(bound, dtype=torch.int32, device=rows.device)
    experts = torch.searchsorted(after, every, right=True, out_int32=True)
    _run(
        _grouped, (bound if count else 0, -(-O // BLOCK)), rows.contiguous(), weights, out, ends,
        experts, after - tiles, E, I, O, *weights.stride(), BLOCK=BLOCK, DEPTH=DEPTH,
        PRECISION=precision(rows.dtype),
    )  # fmt: skip
    return out


def permute_bytes(rows: int, C: int, *, itemsize: int = 4) -> int:
    """Bytes that `permute` moves: every row in and out, its index once for every 128 columns."""
    return rows * (2 * C * itemsize + 8 * -(-C // COLUMNS))


def grouped_bytes(lengths: list[int], I: int, O: int, *, itemsize: int = 4) -> int:
    """Bytes that `grouped_matmul` moves for experts with ``lengths`` rows, and no others.

    The rows once for every 64 columns of the result, a matrix once for every 64 rows; tables: four
    numbers of a tile, and one of each program that finds nothing to do.
    """
    across, tiles = -(-O // BLOCK), sum(-(-n // BLOCK) for n in lengths)
    programs = (sum(lengths) // BLOCK + len(lengths)) * across
    moved = sum(lengths) * (I * across + O) + tiles * I * O
    return moved * itemsize + 4 * (programs + 3 * tiles * across)


def _row(kernel: str, dtype: torch.dtype, label: str, direction: str, **more) -> Specialisation:
    """Of a kernel with dtype's pointers ``floats``, ``i64`` and ``i32`` ones, and numbers."""
    name = _DTYPES[dtype]
    signature = dict.fromkeys(more["floats"], f"*{name}") | dict.fromkeys(more["numbers"], "i32")
    for kind in ("i64", "i32"):
        signature |= dict.fromkeys(more.get(kind, ()), f"*{kind}")
    constants = dict(more["constants"])
    products = "DEPTH" in constants
    if products:
        constants["PRECISION"] = precision(dtype, "sm_90")
    change = {"constexprs": {"PRECISION": precision(dtype, "gfx942")}} if products else {}
    return Specialisation(
        kernel=kernel,
        label=f"{name} {label}".strip(),
        direction=direction,
        signature=signature,
        constexprs=constants,
        num_warps=WARPS,
        divisible=tuple(
            n for n in more["numbers"] if n in ("C", "I", "O", "stride_e", "stride_i", "stride_o")
        ),
        overrides={t: change for t in TARGETS if t.startswith("gfx") and change},
    )


_MOVE, _MULTIPLY = dict(ROWS=ROWS, COLUMNS=COLUMNS), dict(BLOCK=BLOCK, DEPTH=DEPTH)
_COUNTS = ("k", "count", "C")


def _specialisations(dtype: torch.dtype) -> list[Specialisation]:
    grouped = dict(floats=("rows", "weights", "out"), i32=("ends", "experts", "tiles"))
    sizes = ("E", "I", "O", "stride_e")
    return [
        _row("_permute", dtype, "", "forward", floats=("x", "rows"), i64=("order",),
             numbers=_COUNTS, constants=_MOVE),
        _row("_unpermute", dtype, "weighted", "forward", floats=("rows", "weights", "out"),
             i64=("place",), numbers=_COUNTS, constants=_MOVE | {"WEIGHTED": True}),
        _row("_unpermute", dtype, "of permute", "backward", floats=("rows", "weights", "out"),
             i64=("place",), numbers=_COUNTS, constants=_MOVE | {"WEIGHTED": False}),
        _row("_unpermute_backward", dtype, "", "backward", i64=("order",), numbers=_COUNTS,
             floats=("rows", "weights", "d_out", "d_rows", "d_weights"), constants=_MOVE),
        _row("_grouped", dtype, "", "forward", **grouped, numbers=(*sizes, "stride_i"),
             constants=_MULTIPLY | {"stride_o": 1}),
        _row("_grouped", dtype, "of the rows", "backward", **grouped,
             numbers=(*sizes, "stride_o"), constants=_MULTIPLY | {"stride_i": 1}),
        _row("_grouped_weights", dtype, "", "backward", i32=("ends",), numbers=("I", "O"),
             floats=("rows", "d_out", "d_weights"), constants=_MULTIPLY),
    ]  # fmt: skip


SPECIALISATIONS = [*_specialisations(torch.float32), *_specialisations(torch.bfloat16)]
