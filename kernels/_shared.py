"""What the kernels share: Triton behind a guard, tiles, masks, block ranges and the launch.

Everything imports where Triton is missing; only calling a kernel then raises `ImportError`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch

try:
    import triton
    import triton.language as tl
except ImportError:  # not on Linux, or blocked on purpose: the package works without
    triton = tl = None

jit = triton.jit if triton is not None else (lambda function: function)


@jit
def load_tile(
    pointer, first, length, stride, ROWS: tl.constexpr, width, PADDED: tl.constexpr,
    MASKED: tl.constexpr,
):  # fmt: skip
    """Rows ``first .. first + ROWS`` of a matrix with contiguous columns, as ``(ROWS, PADDED)``.

    Columns from ``width`` on are zeros, and rows from ``length`` on. Without ``MASKED`` all rows
    exist and ``width`` is a constant.
    """
    rows = tl.arange(0, ROWS)
    columns = tl.arange(0, PADDED)
    # The block's start in 64 bits: row * stride passes 2**31 in long sequences.
    address = pointer + first.to(tl.int64) * stride + rows[:, None] * stride + columns[None, :]
    if MASKED:
        inside = (first + rows < length)[:, None] & (columns < width)[None, :]
        return tl.load(address, mask=inside, other=0.0)
    elif width != PADDED:
        return tl.load(address, mask=(columns < width)[None, :], other=0.0)
    else:
        return tl.load(address)


@jit
def store_tile(
    pointer, tile, first, length, stride, ROWS: tl.constexpr, width, PADDED: tl.constexpr
):  # fmt: skip
    """Write the rows of ``tile (ROWS, PADDED)`` that exist, in the pointer's own type."""
    rows = tl.arange(0, ROWS)
    columns = tl.arange(0, PADDED)
    address = pointer + first.to(tl.int64) * stride + rows[:, None] * stride + columns[None, :]
    inside = (first + rows < length)[:, None] & (columns < width)[None, :]
    tl.store(address, tile.to(pointer.dtype.element_ty), mask=inside)


@jit
def sliced_product(
    a, first_a, length_a, stride_a, b, first_b, length_b, stride_b, width, ROWS_A: tl.constexpr,
    ROWS_B: tl.constexpr, PADDED: tl.constexpr, SLICE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """``A @ B.T`` of two tiles that stay in memory, ``SLICE`` columns at a time.

    For tiles too wide for the registers; what is read again each time comes from the cache.
    """
    product = tl.zeros([ROWS_A, ROWS_B], tl.float32)
    for at in range(0, PADDED, SLICE):
        left = load_tile(a + at, first_a, length_a, stride_a, ROWS_A, width - at, SLICE, True)
        right = load_tile(b + at, first_b, length_b, stride_b, ROWS_B, width - at, SLICE, True)
        product = tl.dot(left, tl.trans(right), product, input_precision=PRECISION)
    return product


@jit
def can_see(
    rows, columns, S, shift, window, sinks, CAUSAL: tl.constexpr, WINDOW: tl.constexpr
):  # fmt: skip
    """May queries ``rows`` see keys ``columns``? Both indices; ``shift`` aligns positions."""
    here = rows + shift  # a bound per row costs a few registers, a distance per score many
    seen = columns < S
    if CAUSAL:
        seen = seen & (columns <= here)
    if WINDOW:
        near = columns > here - window
        if not CAUSAL:
            near = near & (columns < here + window)
        seen = seen & (near | (columns < sinks))
    return seen


@jit
def key_blocks(
    first, length, S, shift, window, sinks, ROWS: tl.constexpr, BLOCK: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr,
):  # fmt: skip
    """The key blocks that queries ``first .. first + ROWS`` can see, as ``(sink, lo, a, b, hi)``.

    Blocks ``0 .. sink`` hold attention sinks before the window; of ``lo .. hi``, the blocks
    ``a .. b`` are seen whole by every query and need no mask. Blocks elsewhere are never read.
    """
    lowest = first + shift  # positions of the first and of the last query, counted in keys
    highest = tl.minimum(first + ROWS, length) - 1 + shift
    lo, hi, full_lo, full_hi = 0, S, 0, S
    if CAUSAL:
        hi = tl.minimum(hi, highest + 1)
        full_hi = tl.minimum(full_hi, lowest + 1)
    if WINDOW:
        lo = tl.maximum(lowest - window + 1, 0)
        full_lo = tl.maximum(highest - window + 1, 0)
        if not CAUSAL:
            hi = tl.minimum(S, tl.maximum(highest + window, sinks))
            full_hi = tl.minimum(S, lowest + window)
    hi = tl.cdiv(tl.maximum(hi, 0), BLOCK)
    lo = tl.minimum(lo // BLOCK, hi)
    a = tl.minimum(tl.maximum(tl.cdiv(full_lo, BLOCK), lo), hi)
    b = tl.minimum(tl.maximum(tl.maximum(full_hi, 0) // BLOCK, a), hi)
    sink = tl.minimum(tl.cdiv(sinks, BLOCK), lo)
    return sink, lo, a, b, hi


@jit
def edge_block(step, sink, lo, a, b):
    """The ``step``-th of the blocks that need a mask: ``0 .. sink``, ``lo .. a``, ``b .. hi``."""
    step += tl.where(step >= sink, lo - sink, 0)
    return step + tl.where(step >= a, b - a, 0)


@jit
def query_blocks(
    first, S, L, shift, window, sinks, ROWS: tl.constexpr, BLOCK: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr,
):  # fmt: skip
    """The query blocks that can see keys ``first .. first + ROWS``, as ``(lo, a, b, hi)``.

    The transpose of `key_blocks`: of ``lo .. hi``, the blocks ``a .. b`` need no mask.
    """
    last = tl.minimum(first + ROWS, S) - 1
    lo, hi, full_lo, full_hi = 0, L, 0, L
    if CAUSAL:
        lo = first - shift
        full_lo = last - shift
    if WINDOW:
        # Any sink among the keys: every later query sees it. All of them sinks: sees them all.
        hi = tl.where(first < sinks, L, tl.minimum(L, last + window - shift))
        full_hi = tl.where(last < sinks, L, tl.minimum(L, first + window - shift))
        if not CAUSAL:
            lo = tl.where(first < sinks, 0, first - window + 1 - shift)
            full_lo = tl.where(last < sinks, 0, last - window + 1 - shift)
    whole = tl.maximum(full_hi, 0) // BLOCK
    # Rows past the end weigh nothing, so the last block may be a full one.
    whole = tl.where(full_hi >= L, tl.cdiv(L, BLOCK), whole)
    hi = tl.cdiv(tl.maximum(hi, 0), BLOCK)
    lo = tl.minimum(tl.maximum(lo, 0) // BLOCK, hi)
    a = tl.minimum(tl.maximum(tl.cdiv(tl.maximum(full_lo, 0), BLOCK), lo), hi)
    b = tl.minimum(tl.maximum(whole, a), hi)
    return lo, a, b, hi


class Blocks(NamedTuple):
    """One way to launch a kernel: queries and keys per block, warps, pipeline stages."""

    block_m: int
    block_n: int
    num_warps: int = 4
    num_stages: int = 2


_fastest: dict[tuple, Blocks] = {}


def padded(width: int) -> int:
    """The next power of two, at least the 16 that matrix instructions need."""
    return max(16, 1 << (width - 1).bit_length())


def precision(dtype: torch.dtype, target: str | None = None) -> str:
    """How `tl.dot` multiplies on a compile target, or here: ``input_precision`` for this dtype.

    Float32 as three TF32 products, where the hardware has TF32: nearly as exact as float32, and
    still on matrix instructions. AMD's matrix instructions take float32 as it is.
    """
    amd = torch.version.hip is not None if target is None else target.startswith("gfx")
    return "tf32x3" if dtype == torch.float32 and not amd else "ieee"


def is_interpreted(kernel: Any) -> bool:
    """Does calling ``kernel`` run Triton's interpreter? It was decided when it was decorated."""
    return not isinstance(kernel, triton.JITFunction)


def check_device(name: str, kernel: Any, *tensors: torch.Tensor) -> None:
    """Raise a plain error where ``kernel`` cannot run on these tensors."""
    if triton is None:
        raise ImportError(f"{name} needs Triton, which is not installed (pip install triton)")
    if is_interpreted(kernel):
        if any(x.dtype == torch.bfloat16 for x in tensors):
            raise TypeError(f"{name}: Triton's interpreter cannot compute in bfloat16")
    elif not all(x.is_cuda for x in tensors):
        raise ValueError(
            f"{name}: expected CUDA tensors, got {[str(x.device) for x in tensors]}; on a CPU "
            "use a method's plain PyTorch form (corelib.primitives)"
        )


def launch(
    kernel: Any,
    grid: Callable[[Blocks], tuple],
    candidates: Sequence[Blocks],
    arguments: Mapping[str, Any],
    key: tuple = (),
) -> None:
    """Launch ``kernel`` with the fastest of ``candidates``; ``key`` says what must be timed anew.

    The candidates are timed at the first launch of a key, on the device, never at import. The
    kernel must not read what it writes. Under interpretation the first candidate is taken.
    """

    def run(blocks: Blocks) -> None:
        m, n, warps, stages = blocks
        options = {} if is_interpreted(kernel) else {"num_warps": warps, "num_stages": stages}
        kernel[grid(blocks)](**arguments, BLOCK_M=m, BLOCK_N=n, **options)

    key = (kernel.__name__, torch.cuda.current_device(), *key) if len(candidates) > 1 else key
    if len(candidates) > 1 and key not in _fastest:
        _fastest[key] = min(candidates, key=lambda blocks: _milliseconds(lambda: run(blocks)))
    run(candidates[0] if len(candidates) == 1 else _fastest[key])


def _milliseconds(call: Callable[[], None]) -> float:
    """Median time of ``call`` on the device; infinite where it does not fit."""
    try:
        return triton.testing.do_bench(call, warmup=5, rep=20, return_mode="median")
    except triton.runtime.errors.OutOfResources:
        return float("inf")
