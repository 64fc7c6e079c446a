"""Int8 products summed in int32, and a Hadamard rotation that ends in int8.

    int8_matmul(a, b)            = a @ b.T                        exactly, on int8 matrix units
    hadamard_quantise(x, scale)  = int8(x @ H.T / sqrt(n) / scale)

The first is an ordinary tiled product; what is special are the units: twice the rate of half
precision, and half the bytes.

The second rotates without a pass through memory of its own. A Hadamard matrix of Kronecker form is
two small ones: with the row written as a matrix ``X`` of ``a`` rows, ``n = a b``,

    H_n = S_a (x) H_b         H_n x  =  S_a X H_b^T

two products per row on matrix units, instead of ``log2(n)`` passes of butterflies (HadaCore, arXiv
2412.08832, has the idea). The entries of ``S_a`` are signs made in registers from the bits of their
places; ``H_b`` is a table of at most 16 kilobytes that stays in the cache. Both are exact in half
precision; a number is taken as the sum of two, so that the products keep 22 bits on fast units. (In
units of the result, where nothing that is not clipped passes 127 times the root of ``a``, so that
half precision's range is enough.) Rounding, to even like PyTorch's, and the int8 store follow in
registers: a row is read once and written once, at a quarter (for half precision, half) of its size.
"""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from corelib.kernels._shared import (
    check_device,
    is_interpreted,
    jit,
    load_tile,
    padded,
    tl,
)
from corelib.kernels.gates.specialisation import Specialisation
from corelib.primitives.hadamard import hadamard, hadamard_factors

__all__ = ["forward_bytes", "hadamard_bytes", "hadamard_quantise", "int8_matmul"]

BLOCK_M, BLOCK_N, BLOCK_K, WARPS = 64, 64, 64, 4
TALLEST, WIDEST = 64, 128  # S_a and H_b


@jit
def _int8_matmul(
    a, b, out, M, N, K, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr
):  # fmt: skip
    first, column = tl.program_id(0) * BLOCK_M, tl.program_id(1) * BLOCK_N
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.int32)
    for at in range(0, K, BLOCK_K):
        left = load_tile(a + at, first, M, K, BLOCK_M, K - at, BLOCK_K, True)
        right = load_tile(b + at, column, N, K, BLOCK_N, K - at, BLOCK_K, True)
        total = tl.dot(left, tl.trans(right), total, out_dtype=tl.int32)
    rows, columns = first + tl.arange(0, BLOCK_M), column + tl.arange(0, BLOCK_N)
    place = out + rows[:, None].to(tl.int64) * N + columns[None, :]
    tl.store(place, total, mask=(rows < M)[:, None] & (columns < N)[None, :])


@jit
def _in_two(x):
    """``x`` as a sum of two half-precision numbers, to 22 bits."""
    x = tl.minimum(tl.maximum(x, -30000.0), 30000.0)
    high = x.to(tl.float16)
    return high, (x - high.to(tl.float32)).to(tl.float16)


@jit
def _hadamard_quantise(
    x, table, out, factor, HEIGHT: tl.constexpr, WIDTH: tl.constexpr, A: tl.constexpr,
    B: tl.constexpr,
):  # fmt: skip
    """A row of ``HEIGHT * WIDTH`` numbers, as a matrix padded to ``A x B``."""
    up, across = tl.arange(0, A), tl.arange(0, B)
    bits = up[:, None] & up[None, :]
    bits = bits ^ (bits >> 4)
    bits = bits ^ (bits >> 2)
    signs = (1 - 2 * ((bits ^ (bits >> 1)) & 1)).to(tl.float16)  # (-1)^(bits in common)
    inside = (across < WIDTH)[:, None] & (across < WIDTH)[None, :]
    right = tl.load(table + across[None, :] * WIDTH + across[:, None], mask=inside, other=0)
    right = right.to(tl.float16)  # H_b^T
    here = up[:, None] * WIDTH + across[None, :]
    exists = (up < HEIGHT)[:, None] & (across < WIDTH)[None, :]
    row = tl.program_id(0).to(tl.int64)
    values = tl.load(x + row * HEIGHT * WIDTH + here, mask=exists, other=0.0)
    high, low = _in_two(values.to(tl.float32) * factor)
    high, low = _in_two(tl.dot(signs, low, tl.dot(signs, high)))
    turned = tl.dot(low, right, tl.dot(high, right))
    turned = tl.minimum(tl.maximum(turned, -128.0), 127.0)
    # adding 1.5 * 2^23 leaves no bits behind the point: rounded, halves to even
    whole = (turned + 12582912.0) - 12582912.0
    tl.store(out + row * HEIGHT * WIDTH + here, whole.to(tl.int8), mask=exists)


def int8_matmul(a: Tensor, b: Tensor) -> Tensor:
    """``a (M, K) @ b (N, K).T`` of int8, ``(M, N)`` in int32.

    Raises ValueError or TypeError for shapes, dtypes or devices that do not fit, ImportError where
    Triton is missing.
    """
    check_device("int8_matmul", _int8_matmul, a, b)
    if a.dim() != 2 or b.dim() != 2 or a.shape[1] != b.shape[1]:
        raise ValueError(f"a, b: expected (M, K), (N, K), got {tuple(a.shape)}, {tuple(b.shape)}")
    for name, y in (("a", a), ("b", b)):
        if y.dtype != torch.int8:
            raise TypeError(f"{name}: expected int8, got {y.dtype}")
    (M, K), N = a.shape, len(b)
    out = torch.empty(M, N, dtype=torch.int32, device=a.device)
    if out.numel():
        options = {} if is_interpreted(_int8_matmul) else {"num_warps": WARPS}
        grid = -(-M // BLOCK_M), -(-N // BLOCK_N)
        _int8_matmul[grid](
            a.contiguous(), b.contiguous(), out, M, N, K, BLOCK_M=BLOCK_M, BLOCK_N=BLOCK_N,
            BLOCK_K=BLOCK_K, **options,
        )  # fmt: skip
    return out


def split(n: int) -> tuple[int, int]:
    """``(a, b)``, ``a b = n``: ``a`` a power of two, at least 16 where it can be, ``b <= 128``.

    Raises ValueError for a size without such a Hadamard matrix.
    """
    power, m = hadamard_factors(n)
    a = min(power, 16)
    while n // a > WIDEST and a < min(power, TALLEST):
        a *= 2
    if n // a > WIDEST:
        raise ValueError(f"x: expected rows of at most {TALLEST * WIDEST} numbers, got {n}")
    return a, n // a


@functools.lru_cache(maxsize=16)
def _table(b: int, device: torch.device) -> Tensor:
    return hadamard(b, dtype=torch.int8).to(device)


def hadamard_quantise(x: Tensor, scale: float) -> Tensor:
    """Rows ``x (rows, n)``, rotated by ``hadamard(n) / sqrt(n)``, in steps of ``scale``, int8.

    Args:
        x: float16, bfloat16 or float32; rotated to 22 bits.
        scale: what an integer stands for, more than 0.

    Raises ValueError or TypeError for shapes, sizes, dtypes or devices that do not fit, ImportError
    where Triton is missing.
    """
    check_device("hadamard_quantise", _hadamard_quantise, x)
    if x.dim() != 2:
        raise ValueError(f"x: expected (rows, n), got {tuple(x.shape)}")
    if x.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        raise TypeError(f"x: expected float16, bfloat16 or float32, got {x.dtype}")
    if not scale > 0:
        raise ValueError(f"scale: expected more than 0, got {scale}")
    (rows, n), out = x.shape, torch.empty(x.shape, dtype=torch.int8, device=x.device)
    a, b = split(n)
    if rows:
        options = {} if is_interpreted(_hadamard_quantise) else {"num_warps": _warps(n)}
        _hadamard_quantise[(rows,)](
            x.contiguous(), _table(b, x.device), out, 1 / (math.sqrt(n) * scale), HEIGHT=a,
            WIDTH=b, A=padded(a), B=padded(b), **options,
        )  # fmt: skip
    return out


def _warps(n: int) -> int:
    return 8 if n > 2048 else 4


def forward_bytes(M: int, N: int, K: int) -> int:
    """Bytes that `int8_matmul` moves: each factor once for each block of the other, and the
    result."""
    return M * K * -(-N // BLOCK_N) + N * K * -(-M // BLOCK_M) + 4 * M * N


def hadamard_bytes(rows: int, n: int, *, itemsize: int = 4) -> int:
    """Bytes that `hadamard_quantise` moves: rows in, int8 rows out, and the table."""
    return rows * (n * (itemsize + 1) + split(n)[1] ** 2)


def _hadamard_row(dtype: str, n: int) -> Specialisation:
    a, b = split(n)
    constants = {"HEIGHT": a, "WIDTH": b, "A": padded(a), "B": padded(b)}
    return Specialisation(
        kernel="_hadamard_quantise",
        label=f"{dtype} n={n}",
        direction="forward",
        signature={"x": f"*{dtype}", "table": "*i8", "out": "*i8", "factor": "fp32"},
        constexprs=constants,
        num_warps=_warps(n),
    )


SPECIALISATIONS = [
    Specialisation(
        kernel="_int8_matmul",
        label="int8",
        direction="forward",
        signature={"a": "*i8", "b": "*i8", "out": "*i32"} | dict.fromkeys(("M", "N", "K"), "i32"),
        constexprs={"BLOCK_M": BLOCK_M, "BLOCK_N": BLOCK_N, "BLOCK_K": BLOCK_K},
        num_warps=WARPS,
        divisible=("N", "K"),
    ),
    _hadamard_row("fp32", 512),
    _hadamard_row("fp16", 5120),
]
