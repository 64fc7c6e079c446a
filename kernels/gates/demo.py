"""Tiny kernels on which the gates themselves are tested. Nothing else uses them.

`vector_add` and `masked_matmul` have traffic that can be counted by hand, `naive_attention` writes
its score matrix to memory (the traffic that flash attention avoids), and ``_spilling_kernel`` needs
more registers than a GPU has.
"""

from __future__ import annotations

import torch

from corelib.kernels.gates.specialisation import Specialisation

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None

SPECIALISATIONS = [
    Specialisation(
        "_matmul_kernel",
        "fp16",
        "forward",
        {"a": "*fp16", "b": "*fp16", "out": "*fp16", "M": "i32", "N": "i32", "K": "i32"},
        {"BLOCK": 32, "PRECISION": "tf32"},
    ),
    Specialisation(
        "_matmul_kernel",
        "fp32 without matrix instructions",
        "forward",
        {"a": "*fp32", "b": "*fp32", "out": "*fp32", "M": "i32", "N": "i32", "K": "i32"},
        {"BLOCK": 32, "PRECISION": "ieee"},
    ),
    Specialisation(
        "_spilling_kernel",
        "spills",
        "forward",
        {"x": "*fp64", "out": "*fp64"},
        {"ROWS": 64},
        num_warps=1,
        overrides={"gfx942": {"constexprs": {"ROWS": 256}}},
    ),
    Specialisation(
        "_add_kernel",
        "fp32",
        "forward",
        {"x": "*fp32", "y": "*fp32", "out": "*fp32", "n": "i32"},
        {"BLOCK": 256},
    ),
]

if triton is not None:

    @triton.jit
    def _add_kernel(x, y, out, n, BLOCK: tl.constexpr):
        o = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        mask = o < n
        b_x = tl.load(x + o, mask=mask, other=0.0)
        b_y = tl.load(y + o, mask=mask, other=0.0)
        tl.store(out + o, b_x + b_y, mask=mask)

    @triton.jit
    def _matmul_kernel(a, b, out, M, N, K, BLOCK: tl.constexpr, PRECISION: tl.constexpr):
        o_m = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        o_n = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        acc = tl.zeros((BLOCK, BLOCK), dtype=tl.float32)
        for start in range(0, K, BLOCK):
            o_k = start + tl.arange(0, BLOCK)
            m_a = (o_m[:, None] < M) & (o_k[None, :] < K)
            m_b = (o_k[:, None] < K) & (o_n[None, :] < N)
            b_a = tl.load(a + o_m[:, None] * K + o_k[None, :], mask=m_a, other=0.0)
            b_b = tl.load(b + o_k[:, None] * N + o_n[None, :], mask=m_b, other=0.0)
            acc += tl.dot(b_a, b_b, input_precision=PRECISION)
        m_out = (o_m[:, None] < M) & (o_n[None, :] < N)
        p_out = out + o_m[:, None] * N + o_n[None, :]
        tl.store(p_out, acc.to(out.dtype.element_ty), mask=m_out)

    @triton.jit
    def _softmax_kernel(scores, S, scale, BLOCK: tl.constexpr):
        """One program a row, in place."""
        o = tl.arange(0, BLOCK)
        p = scores + tl.program_id(0) * S + o
        b_s = tl.load(p, mask=o < S, other=float("-inf")) * scale
        b_e = tl.exp(b_s - tl.max(b_s, axis=0))
        tl.store(p, b_e / tl.sum(b_e, axis=0), mask=o < S)

    @triton.jit
    def _histogram_kernel(x, counts, n, BLOCK: tl.constexpr):
        o = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        tl.atomic_add(counts + tl.load(x + o, mask=o < n), 1, mask=o < n)

    @triton.jit
    def _copy_kernel(x, out, ROWS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr):
        """Through tensor descriptors, which mask by themselves."""
        source = tl.make_tensor_descriptor(x, [ROWS, COLUMNS], [COLUMNS, 1], [BLOCK, COLUMNS])
        target = tl.make_tensor_descriptor(out, [ROWS, COLUMNS], [COLUMNS, 1], [BLOCK, COLUMNS])
        row = tl.program_id(0) * BLOCK
        target.store([row, 0], source.load([row, 0]))

    @triton.jit
    def _spilling_kernel(x, out, ROWS: tl.constexpr):
        """The sum keeps a whole tile of ROWS x 64 values alive in the registers of one warp."""
        o = tl.arange(0, ROWS)[:, None] * 64 + tl.arange(0, 64)[None, :]
        tile = tl.load(x + o)
        tl.store(out + o, tile - tl.sum(tile))


def vector_add(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """``x (n,) + y (n,)``."""
    out = torch.empty_like(x)
    n = x.numel()
    _add_kernel[(triton.cdiv(n, 256),)](x, y, out, n, BLOCK=256)
    return out


def masked_matmul(a: torch.Tensor, b: torch.Tensor, precision: str = "ieee") -> torch.Tensor:
    """``a (M, K) @ b (K, N)`` in tiles of 32 for any sizes."""
    (M, K), N = a.shape, b.shape[1]
    out = a.new_empty(M, N)
    grid = (triton.cdiv(M, 32), triton.cdiv(N, 32))
    _matmul_kernel[grid](a, b, out, M, N, K, BLOCK=32, PRECISION=precision)
    return out


def histogram(x: torch.Tensor, bins: int) -> torch.Tensor:
    """How often each of ``0 .. bins - 1`` is in ``x (n,)``."""
    counts = torch.zeros(bins, dtype=torch.int32)
    _histogram_kernel[(triton.cdiv(x.numel(), 64),)](x, counts, x.numel(), BLOCK=64)
    return counts


def copy_described(x: torch.Tensor) -> torch.Tensor:
    """A copy of ``x (rows, columns)``; columns a power of two."""
    out = torch.empty_like(x)
    rows, columns = x.shape
    _copy_kernel[(triton.cdiv(rows, 8),)](x, out, ROWS=rows, COLUMNS=columns, BLOCK=8)
    return out


def naive_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Attention of one head, ``q (L, D), k (S, D), v (S, V) -> (L, V)``, in three launches.

    The scores (L, S) go through memory four times: written, read and written by the softmax, read.
    """
    L, S = q.shape[0], k.shape[0]
    scores = masked_matmul(q, k.T.contiguous())
    _softmax_kernel[(L,)](scores, S, q.shape[1] ** -0.5, BLOCK=triton.next_power_of_2(S))
    return masked_matmul(scores, v)
