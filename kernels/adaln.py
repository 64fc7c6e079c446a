"""Adaptive layer normalisation in one pass over the tokens, forward and backward.

    residual = x + gate branch                                        (gated only)
    out = (residual - mean) rstd (1 + scale) + shift

Residual sum, norm, scale and shift are four passes when written out; here a program keeps a few
rows in registers. A modulation of one row for all tokens of a request is loaded once per program,
which handles ``SPAN`` rows; a token-wise one is loaded with its row. Backward, with ``g`` the
gradient of ``out`` and ``n`` the normed row,

    d_scale = g n     d_shift = g     d_n = g (1 + scale)
    d_residual += rstd (d_n - mean(d_n) - n mean(d_n n))
    d_x = d_residual     d_branch = gate d_residual     d_gate = branch d_residual

makes ``n`` again from the stored residual and two numbers a row. Gradients of a modulation that
all tokens share are summed over a program's rows in float32; PyTorch adds the programs' sums.
Everything is computed in float32; the norm is that of the residual as stored, in its own type.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from corelib.kernels._shared import check_device, is_interpreted, jit, tl
from corelib.kernels.gates.specialisation import Specialisation
from corelib.primitives.adaln import EPS, check_adaln

__all__ = ["adaln", "backward_bytes", "forward_bytes", "gated_adaln"]

MAX_WIDTH = 8192
TILE = 2048  # numbers of a tile that a program holds in registers
SPAN = 16  # rows of a program


class Shape(NamedTuple):
    """How a width is laid out: columns of a tile, rows of it, warps."""

    block: int
    rows: int
    warps: int


def shape_of(C: int) -> Shape:
    block = 1 << max(4, (C - 1).bit_length())
    return Shape(block, min(SPAN, max(1, TILE // block)), 4 if block <= TILE else 8)


@jit
def _row(modulation, stride, rows, columns, inside, TOKENWISE: tl.constexpr):
    """The modulation of some rows, or the one that they share, in float32."""
    if TOKENWISE:
        place = modulation + rows[:, None] * stride + columns[None, :]
        found = tl.load(place, mask=inside, other=0.0)
    else:
        found = tl.load(modulation + columns, mask=inside, other=0.0)[None, :]
    return found.to(tl.float32)


@jit
def _adaln_forward(
    x, branch, gate, shift, scale, residual, out, means, rstds, L, gate_b, gate_l, shift_b,
    shift_l, scale_b, scale_l, eps, C: tl.constexpr, BLOCK_C: tl.constexpr, ROWS: tl.constexpr,
    SPAN: tl.constexpr, GATED: tl.constexpr, TOKENWISE: tl.constexpr,
):  # fmt: skip
    """Program ``(span of rows, request)``."""
    b, first = tl.program_id(1).to(tl.int64), tl.program_id(0) * SPAN
    columns = tl.arange(0, BLOCK_C)
    exists = columns < C
    gate, shift, scale = gate + b * gate_b, shift + b * shift_b, scale + b * scale_b
    if not TOKENWISE:
        moved = _row(shift, 0, columns, columns, exists, False)
        factor = 1.0 + _row(scale, 0, columns, columns, exists, False)
        if GATED:
            opened = _row(gate, 0, columns, columns, exists, False)
    for step in range(0, SPAN, ROWS):
        rows = first + step + tl.arange(0, ROWS)
        inside = (rows < L)[:, None] & exists[None, :]
        place = (b * L + rows)[:, None] * C + columns[None, :]
        r = tl.load(x + place, mask=inside, other=0.0).to(tl.float32)
        if TOKENWISE:
            moved = _row(shift, shift_l, rows, columns, inside, True)
            factor = 1.0 + _row(scale, scale_l, rows, columns, inside, True)
            if GATED:
                opened = _row(gate, gate_l, rows, columns, inside, True)
        if GATED:
            r += opened * tl.load(branch + place, mask=inside, other=0.0).to(tl.float32)
            stored = r.to(residual.dtype.element_ty)
            tl.store(residual + place, stored, mask=inside)
            r = stored.to(tl.float32)
        mean = tl.sum(r, 1) / C
        centred = tl.where(inside, r - mean[:, None], 0.0)
        rstd = tl.rsqrt(tl.sum(centred * centred, 1) / C + eps)
        y = centred * rstd[:, None] * factor + moved
        tl.store(out + place, y.to(out.dtype.element_ty), mask=inside)
        tl.store(means + b * L + rows, mean, mask=rows < L)
        tl.store(rstds + b * L + rows, rstd, mask=rows < L)


@jit
def _adaln_backward(
    d_residual, d_out, residual, branch, gate, scale, means, rstds, d_x, d_branch, d_gate, d_shift,
    d_scale, L, gate_b, gate_l, scale_b, scale_l, C: tl.constexpr, BLOCK_C: tl.constexpr,
    ROWS: tl.constexpr, SPAN: tl.constexpr, GATED: tl.constexpr, TOKENWISE: tl.constexpr,
):  # fmt: skip
    """Program ``(span of rows, request)``; shared modulations get one sum a program."""
    b, first = tl.program_id(1).to(tl.int64), tl.program_id(0) * SPAN
    columns = tl.arange(0, BLOCK_C)
    exists = columns < C
    gate, scale = gate + b * gate_b, scale + b * scale_b
    if not TOKENWISE:
        factor = 1.0 + _row(scale, 0, columns, columns, exists, False)
        sum_shift = tl.zeros([BLOCK_C], tl.float32)
        sum_scale = tl.zeros([BLOCK_C], tl.float32)
        if GATED:
            opened = _row(gate, 0, columns, columns, exists, False)
            sum_gate = tl.zeros([BLOCK_C], tl.float32)
    for step in range(0, SPAN, ROWS):
        rows = first + step + tl.arange(0, ROWS)
        inside = (rows < L)[:, None] & exists[None, :]
        place = (b * L + rows)[:, None] * C + columns[None, :]
        mean = tl.load(means + b * L + rows, mask=rows < L, other=0.0)[:, None]
        rstd = tl.load(rstds + b * L + rows, mask=rows < L, other=0.0)[:, None]
        g = tl.load(d_out + place, mask=inside, other=0.0).to(tl.float32)
        r = tl.load(residual + place, mask=inside, other=0.0).to(tl.float32)
        n = tl.where(inside, (r - mean) * rstd, 0.0)
        if TOKENWISE:
            factor = 1.0 + _row(scale, scale_l, rows, columns, inside, True)
            tl.store(d_shift + place, g.to(d_shift.dtype.element_ty), mask=inside)
            tl.store(d_scale + place, (g * n).to(d_scale.dtype.element_ty), mask=inside)
        else:
            sum_shift += tl.sum(g, 0)
            sum_scale += tl.sum(g * n, 0)
        d_n = g * factor
        both = tl.sum(d_n * n, 1) / C
        d_r = rstd * (d_n - (tl.sum(d_n, 1) / C)[:, None] - n * both[:, None])
        if GATED:
            d_r += tl.load(d_residual + place, mask=inside, other=0.0).to(tl.float32)
            d_g = d_r * tl.load(branch + place, mask=inside, other=0.0).to(tl.float32)
            if TOKENWISE:
                opened = _row(gate, gate_l, rows, columns, inside, True)
                tl.store(d_gate + place, d_g.to(d_gate.dtype.element_ty), mask=inside)
            else:
                sum_gate += tl.sum(tl.where(inside, d_g, 0.0), 0)
            d_b = (d_r * opened).to(d_branch.dtype.element_ty)
            tl.store(d_branch + place, d_b, mask=inside)
        tl.store(d_x + place, d_r.to(d_x.dtype.element_ty), mask=inside)
    if not TOKENWISE:
        place = (tl.program_id(0) * tl.num_programs(1) + b) * C + columns
        tl.store(d_shift + place, sum_shift, mask=exists)
        tl.store(d_scale + place, sum_scale, mask=exists)
        if GATED:
            tl.store(d_gate + place, sum_gate, mask=exists)


def adaln(x: Tensor, shift: Tensor, scale: Tensor, *, eps: float = EPS) -> Tensor:
    """As `corelib.primitives.adaln.adaln`, for float16, bfloat16 and float32 on a GPU.

    Raises ValueError or TypeError for shapes, dtypes, widths over 8,192 or devices that do not fit,
    ImportError where Triton is missing.
    """
    check_device("adaln", _adaln_forward, x, shift, scale)
    check_adaln(eps, x, shift=shift, scale=scale)
    _check_limits(x)
    return _AdaLN.apply(x, None, None, shift, scale, eps)


def gated_adaln(
    x: Tensor, branch: Tensor, gate: Tensor, shift: Tensor, scale: Tensor, *, eps: float = EPS
) -> tuple[Tensor, Tensor]:
    """As `corelib.primitives.adaln.gated_adaln`; raises as `adaln` does."""
    check_device("gated_adaln", _adaln_forward, x, branch, gate, shift, scale)
    check_adaln(eps, x, branch, gate=gate, shift=shift, scale=scale)
    _check_limits(x)
    return _AdaLN.apply(x, branch, gate, shift, scale, eps)


def _check_limits(x: Tensor) -> None:
    if x.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        raise TypeError(f"x: expected float16, bfloat16 or float32, got {x.dtype}")
    if x.shape[2] > MAX_WIDTH:
        raise ValueError(f"x: expected a width of at most {MAX_WIDTH}, got {x.shape[2]}")


class _AdaLN(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, branch, gate, shift, scale, eps):
        gated, (B, L) = branch is not None, x.shape[:2]
        x, shift, scale = x.contiguous(), _rows(shift), _rows(scale)
        branch, gate = (branch.contiguous(), _rows(gate)) if gated else (x, shift)  # unused
        residual, out = torch.empty_like(x) if gated else x, torch.empty_like(x)
        stats = torch.empty(2, B, L, dtype=torch.float32, device=x.device)
        ctx.tokenwise, ctx.gated = shift.shape[1] == L and L > 1, gated
        if out.numel():
            _launch(
                _adaln_forward, ctx, x, branch, gate, shift, scale, residual, out, *stats, L,
                *gate.stride()[:2], *shift.stride()[:2], *scale.stride()[:2], eps,
            )  # fmt: skip
        ctx.save_for_backward(residual, branch, gate, scale, stats)
        return (residual, out) if gated else out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *grads):
        residual, branch, gate, scale, stats = ctx.saved_tensors
        B, L, C = residual.shape
        d_out, d_residual = grads[-1].contiguous(), grads[0].contiguous()
        d_x = torch.empty_like(residual)
        d_branch = torch.empty_like(residual) if ctx.gated else d_x
        if ctx.tokenwise:
            sums = torch.empty(3, B, L, C, dtype=scale.dtype, device=scale.device)
        else:
            sums = torch.empty(3, -(-L // SPAN), B, C, device=scale.device)
        d_gate, d_shift, d_scale = sums
        if d_x.numel():
            _launch(
                _adaln_backward, ctx, d_residual, d_out, residual, branch, gate, scale, *stats,
                d_x, d_branch, d_gate, d_shift, d_scale, L, *gate.stride()[:2],
                *scale.stride()[:2],
            )  # fmt: skip
        if not ctx.tokenwise:
            d_gate, d_shift, d_scale = sums.sum(1)[:, :, None][:, :, : scale.shape[1]].to(
                scale.dtype
            )
        if not ctx.gated:
            d_branch = d_gate = None
        return d_x, d_branch, d_gate, d_shift, d_scale, None


def _rows(modulation: Tensor) -> Tensor:
    """With its channels side by side; a slice of a wider one stays where it is."""
    return modulation if modulation.stride(2) == 1 else modulation.contiguous()


def _launch(kernel, ctx, *arguments) -> None:
    B, L, C = arguments[0].shape
    shape = shape_of(C)
    kernel[(-(-L // SPAN), B)](
        *arguments, C=C, BLOCK_C=shape.block, ROWS=shape.rows, SPAN=SPAN, GATED=ctx.gated,
        TOKENWISE=ctx.tokenwise, **({} if is_interpreted(kernel) else {"num_warps": shape.warps}),
    )  # fmt: skip


def forward_bytes(
    B: int, L: int, C: int, *, gated: bool, tokenwise: bool, itemsize: int = 2
) -> int:
    """Bytes that the forward pass moves: every token once in and out, two numbers a row, and a
    shared modulation once for every span of rows."""
    tokens, parts = (4, 3) if gated else (2, 2)
    rows = L if tokenwise else -(-L // SPAN)
    return itemsize * B * C * (tokens * L + parts * rows) + 8 * B * L


def backward_bytes(
    B: int, L: int, C: int, *, gated: bool, tokenwise: bool, itemsize: int = 2
) -> int:
    """Bytes that the backward kernel moves; what PyTorch adds up afterwards is not in it."""
    tokens, parts = (6, 3) if gated else (3, 2)
    rows = L if tokenwise else -(-L // SPAN)
    read = (parts - 1) * rows * itemsize
    written = parts * rows * (itemsize if tokenwise else 4)
    return B * C * (tokens * L * itemsize + read + written) + 8 * B * L


def _specialisation(direction: str, dtype: str, C: int, gated: bool, tokenwise: bool):
    names = ["scale", "gate", "branch", "residual"]
    numbers, statistics = ["L", "gate_b", "gate_l", "scale_b", "scale_l"], ["means", "rstds"]
    if direction == "forward":
        names += ["x", "shift", "out"]
        numbers += ["shift_b", "shift_l"]
    else:
        names += ["d_residual", "d_out", "d_x", "d_branch"]
    gradients = ["d_gate", "d_shift", "d_scale"] if direction == "backward" else []
    signature = dict.fromkeys(names, f"*{dtype}") | dict.fromkeys(statistics, "*fp32")
    signature |= dict.fromkeys(gradients, f"*{dtype}" if tokenwise else "*fp32")
    signature |= dict.fromkeys(numbers, "i32")
    signature |= {"eps": "fp32"} if direction == "forward" else {}
    shape = shape_of(C)
    form = f"{'gated, ' if gated else ''}{'token-wise' if tokenwise else 'shared'}"
    return Specialisation(
        kernel=f"_adaln_{direction}",
        label=f"{dtype} C={C} {form}",
        direction=direction,
        signature=signature,
        constexprs={
            "C": C, "BLOCK_C": shape.block, "ROWS": shape.rows, "SPAN": SPAN, "GATED": gated,
            "TOKENWISE": tokenwise,
        },
        num_warps=shape.warps,
    )  # fmt: skip


#: DiT-XL's width with one modulation a request, and a narrower one with one a token.
SPECIALISATIONS = [
    _specialisation(direction, *form)
    for direction in ("forward", "backward")
    for form in (
        ("bf16", 1152, True, False),
        ("fp32", 1152, True, False),
        ("bf16", 512, False, True),
        ("bf16", 1152, True, True),
    )
]
