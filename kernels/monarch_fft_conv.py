"""Convolution by way of the FFT, all on the chip, as products of small matrices: forward, backward.

    y[b, h] = out_gate[b, h] * conv(in_gate[b, h] * u[b, h], kernel[h])

FlashFFTConv (arXiv 2311.05908, section 3.1): with ``N = N1 N2``, ``n = n1 N2 + n2`` and frequency
``k1 + N1 k2``, the transform of a signal laid out as a matrix ``X[n1, n2]`` is

    Y[k1, k2] = ((first X) * twiddle) second

with the two transform matrices and ``twiddle[k1, n2] = exp(-2 pi i k1 n2 / N)``. The kernel's
spectrum lies in the order of ``Y``, so that nothing is ever permuted, and the way back is the same
three steps in the opposite order. One program holds everything from the input to the output:

* two rows of the batch are the real and the imaginary part of one complex signal, which a real
  kernel (a Hermitian spectrum) leaves apart; the last row of an odd batch stands alone;
* the zeros that causality asks for are never read or multiplied: ``first`` has only the columns,
  and its adjoint only the rows, that hold signal;
* of a spectrum that is zero but for some rows and columns of the grid, only these are computed: the
  others are missing from the tables (`sparse_conv`);
* the program keeps tables and spectrum while it goes through the batch.

The transforms are unitary, so that float16 holds the spectra of inputs up to a thousand. Sums and
the product with the spectrum are float32; what enters a product of matrices, and the twiddles, have
the inputs' type. On the chip fits a circle of 4,096 points in half precision. In float32, where
NVIDIA's units take three products for one, it is 512 (`LONGEST`); a longer convolution is not for
this kernel.

Backward, gradients of the input and the gates are convolutions by the same kernel with a conjugate
spectrum or another gate; `monarch_fft_conv_backward` has the spectrum's. All transforms are made
again: nothing but the inputs is kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from corelib.kernels._monarch_tables import (
    LONGEST,
    SIDES,
    Plan,
    circle_for,
    kept_grid,
    plan_of,
    spectrum_grid,
    tables,
    warps_for,
)
from corelib.kernels._shared import check_device, is_interpreted, jit, precision, tl
from corelib.kernels.gates.specialisation import Specialisation

__all__ = ["LONGEST", "circle_for", "forward_bytes", "monarch_fft_conv", "sparse_conv"]

PROGRAMS = 512  # at least so many, if the batch allows: a GPU's worth


@jit
def load_complex(pointer, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Real and imaginary part of a table ``(2, ROWS, COLUMNS)``."""
    at = tl.arange(0, ROWS)[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    return tl.load(pointer + at), tl.load(pointer + ROWS * COLUMNS + at)


@jit
def pair_places(pair, head, B, H, L, ROWS: tl.constexpr, N2: tl.constexpr):
    """Where rows ``2 pair`` and ``2 pair + 1`` of the batch lie, and which of their steps exist."""
    n = tl.arange(0, ROWS)[:, None] * N2 + tl.arange(0, N2)[None, :]
    exists = n < L
    row = 2 * pair * H + head
    return row * L + n, (row + H) * L + n, exists, exists & (2 * pair + 1 < B)


@jit
def load_pair(pointer, gate, one, two, exists, both):
    """Two rows, each entry times its gate."""
    x = tl.load(pointer + one, mask=exists, other=0.0)
    x_imag = tl.load(pointer + two, mask=both, other=0.0)
    if gate is not None:
        x *= tl.load(gate + one, mask=exists, other=0.0)
        x_imag *= tl.load(gate + two, mask=both, other=0.0)
    return x, x_imag


@jit
def product(a, a_imag, b, b_imag, PRECISION: tl.constexpr):
    """The product of two complex matrices, summed in float32."""
    real = tl.dot(a, b, input_precision=PRECISION)
    real -= tl.dot(a_imag, b_imag, input_precision=PRECISION)
    imag = tl.dot(a, b_imag, input_precision=PRECISION)
    imag = tl.dot(a_imag, b, imag, input_precision=PRECISION)
    return real, imag


@jit
def turned(a, a_imag, w, w_imag):
    """Entry by entry ``a w``, in the type of ``w``."""
    a, a_imag = a.to(w.dtype), a_imag.to(w.dtype)
    return a * w - a_imag * w_imag, a * w_imag + a_imag * w


@jit
def to_frequencies(x, x_imag, f, f_imag, w, w_imag, s, s_imag, PRECISION: tl.constexpr):
    """``Y (K1, K2)`` of a signal ``(ROWS, N2)``."""
    a, a_imag = product(f, f_imag, x, x_imag, PRECISION)
    a, a_imag = turned(a, a_imag, w, w_imag)
    return product(a, a_imag, s, s_imag, PRECISION)


@jit
def to_time(y, y_imag, f, f_imag, w, w_imag, s, s_imag, PRECISION: tl.constexpr):
    """The conjugate of the signal whose spectrum is the conjugate of ``y``: no table is turned."""
    y, y_imag = y.to(s.dtype), y_imag.to(s.dtype)
    a, a_imag = product(y, y_imag, tl.trans(s), tl.trans(s_imag), PRECISION)
    a, a_imag = turned(a, a_imag, w, w_imag)
    return product(tl.trans(f), tl.trans(f_imag), a, a_imag, PRECISION)


@jit
def _monarch_conv(
    u, in_gate, out_gate, other_gate, first, twiddle, second, spectrum, out, other, B, H, L, pairs,
    ADJOINT: tl.constexpr, N2: tl.constexpr, ROWS: tl.constexpr, K1: tl.constexpr,
    K2: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Program ``(channel, split)``: every ``splits``-th pair of rows of one channel.

    ``other`` is the convolution under another output gate. ``ADJOINT``: the correlation.
    """
    head = tl.program_id(0).to(tl.int64)
    f, f_imag = load_complex(first, K1, ROWS)
    w, w_imag = load_complex(twiddle, K1, N2)
    s, s_imag = load_complex(second, N2, K2)
    k, k_imag = load_complex(spectrum + head * 2 * K1 * K2, K1, K2)
    if ADJOINT:
        k_imag = -k_imag
    for pair in range(tl.program_id(1), pairs, tl.num_programs(1)):
        one, two, exists, both = pair_places(pair, head, B, H, L, ROWS, N2)
        x, x_imag = load_pair(u, in_gate, one, two, exists, both)
        y, y_imag = to_frequencies(x, x_imag, f, f_imag, w, w_imag, s, s_imag, PRECISION)
        z, z_imag = y * k - y_imag * k_imag, -y * k_imag - y_imag * k
        c, c_imag = to_time(z, z_imag, f, f_imag, w, w_imag, s, s_imag, PRECISION)
        if other_gate is not None:
            gate = tl.load(other_gate + one, mask=exists, other=0.0)
            gate_imag = tl.load(other_gate + two, mask=both, other=0.0)
            tl.store(other + one, (c * gate).to(x.dtype), mask=exists)
            tl.store(other + two, (-c_imag * gate_imag).to(x.dtype), mask=both)
        if out_gate is not None:
            c *= tl.load(out_gate + one, mask=exists, other=0.0)
            c_imag *= tl.load(out_gate + two, mask=both, other=0.0)
        tl.store(out + one, c.to(x.dtype), mask=exists)
        tl.store(out + two, (-c_imag).to(x.dtype), mask=both)


def monarch_fft_conv(
    u: Tensor,
    kernel: Tensor,
    in_gate: Tensor | None = None,
    out_gate: Tensor | None = None,
    *,
    circle: int | None = None,
) -> Tensor:
    """``out_gate * conv(in_gate * u, kernel)``, ``(B, H, L)``; differentiable once in everything.

    Args:
        u: ``(B, H, L)``, float16, bfloat16 or float32.
        kernel: ``(H, K)`` real taps; float32, or the type of ``u``.
        in_gate, out_gate: as ``u``.
        circle: points of the circle, a power of two from 256. By default it has room for
            ``L + K - 1``, so that the convolution is causal, and taps from ``L`` on are cut off.
            On a smaller one outputs come round; ``circle = L`` is the circular convolution.

    Raises:
        ValueError, TypeError: shapes, sizes, dtypes or devices that do not fit.
        ImportError: Triton is missing.
    """
    N = _check(u, kernel, in_gate, out_gate, circle)
    if u.numel() == 0:
        return torch.zeros_like(u)
    kernel = kernel[:, : u.shape[2]] if circle is None else kernel
    plan = plan_of(u.shape[2], N)
    kept = tuple(range(plan.N1)), tuple(range(plan.N2))
    return convolve(u, spectrum_grid(kernel, N), in_gate, out_gate, plan, *kept)


def sparse_conv(
    u: Tensor,
    kernel: Tensor,
    keep1: int,
    keep2: int,
    in_gate: Tensor | None = None,
    out_gate: Tensor | None = None,
    *,
    circle: int | None = None,
) -> Tensor:
    """`monarch_fft_conv` with a block of the kernel's spectrum; what is zero is not multiplied.

    Kept are the frequencies ``k1 + N1 k2`` with ``k1 < keep1`` and ``k2 < keep2``, and their
    negatives (``N1, N2`` are `SIDES` of the circle). Rows and columns of the grid that hold any
    enter the products, padded to powers of two from 16. Arguments otherwise as there.
    """
    N = _check(u, kernel, in_gate, out_gate, circle)
    if u.numel() == 0:
        return torch.zeros_like(u)
    kernel = kernel[:, : u.shape[2]] if circle is None else kernel
    for name, keep, side in zip(("keep1", "keep2"), (keep1, keep2), SIDES[N], strict=True):
        if isinstance(keep, bool) or not isinstance(keep, int) or not 1 <= keep <= side:
            raise ValueError(f"{name}: expected 1 to {side}, got {keep!r}")
    kept = kept_grid(*SIDES[N], keep1, keep2)
    rows, columns = (torch.nonzero(kept.any(axis)).flatten().tolist() for axis in (1, 0))
    plan = plan_of(u.shape[2], N, len(rows), len(columns))
    spectrum = (spectrum_grid(kernel, N) * kept.to(u.device))[:, :, rows][..., columns]
    spectrum = F.pad(spectrum, (0, plan.K2 - len(columns), 0, plan.K1 - len(rows)))
    return convolve(u, spectrum, in_gate, out_gate, plan, tuple(rows), tuple(columns))


def convolve(
    u: Tensor, spectrum: Tensor, in_gate: Tensor | None, out_gate: Tensor | None, plan: Plan,
    rows: tuple[int, ...], columns: tuple[int, ...], splits: int | None = None,
) -> Tensor:  # fmt: skip
    """The convolution with a given ``spectrum (H, 2, K1, K2)``, float32.

    Rows ``2 b`` and ``2 b + 1`` of ``u`` are one complex signal: a spectrum that is not that of a
    real kernel mixes them as complex numbers do. ``splits`` programs share a channel's pairs.
    """
    gates = [None if gate is None else gate.contiguous() for gate in (in_gate, out_gate)]
    real = [gate for gate in gates if gate is not None]
    check_device("monarch_fft_conv", _monarch_conv, u, spectrum, *real)
    pairs = -(-u.shape[0] // 2)
    splits = min(pairs, splits or max(1, -(-PROGRAMS // u.shape[1])))
    ready = tables(plan, rows, columns, u.dtype, str(u.device))
    return _Convolution.apply(u.contiguous(), spectrum.contiguous(), *gates, plan, ready, splits)


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx, u, spectrum, in_gate, out_gate, plan, ready, splits):
        ctx.save_for_backward(u, spectrum, in_gate, out_gate)
        ctx.run = run = Launches(plan, ready, splits)
        return run.conv(u, in_gate, out_gate, None, spectrum)[0]

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, d_out):
        from corelib.kernels.monarch_fft_conv_backward import spectrum_gradient

        u, spectrum, in_gate, out_gate = ctx.saved_tensors
        needs, run, d_out = ctx.needs_input_grad, ctx.run, d_out.contiguous()
        d_u = d_spectrum = d_in = d_out_gate = None
        if needs[0] or needs[2]:
            other = u if needs[2] else None
            d_u, d_in = run.conv(d_out, out_gate, in_gate, other, spectrum, adjoint=True)
        if needs[1]:
            d_spectrum = spectrum_gradient(run, u, in_gate, d_out, out_gate, spectrum)
        if needs[3]:
            d_out_gate = run.conv(u, in_gate, d_out, None, spectrum)[0]
        return d_u, d_spectrum, d_in, d_out_gate, None, None, None


class Launches(NamedTuple):
    """How the kernels run on one kind of signal."""

    plan: Plan
    tables: tuple[Tensor, Tensor, Tensor]
    splits: int

    def conv(
        self, u, in_gate, out_gate, other_gate, spectrum, *, adjoint=False
    ) -> tuple[Tensor, Tensor | None]:
        """The convolution of ``in_gate * u``, under ``out_gate`` and under ``other_gate``."""
        out = torch.empty_like(u)
        other = None if other_gate is None else torch.empty_like(u)
        given = u, in_gate, out_gate, other_gate, *self.tables, spectrum, out, other
        self.run(_monarch_conv, u, *given, ADJOINT=adjoint)
        return out, other

    def run(self, kernel, u: Tensor, *tensors: Tensor | None, **constants) -> None:
        """``kernel`` on every channel, ``splits`` programs each."""
        B, H, L = u.shape
        options = dict(num_warps=warps_for(self.plan, u.dtype), num_stages=1)
        options = {} if is_interpreted(kernel) else options
        with torch.cuda.device(u.device) if u.is_cuda else nullcontext():
            kernel[(H, self.splits)](
                *tensors, B, H, L, -(-B // 2), **constants, **self.plan.constants,
                PRECISION=precision(u.dtype), **options,
            )  # fmt: skip


def forward_bytes(
    B: int, H: int, L: int, plan: Plan, *, gates: int = 0, splits: int = 1, itemsize: int = 2
) -> int:
    """Bytes that the forward pass moves: inputs, gates and outputs once; for each program its
    channel's spectrum and the tables, which all share (a cache holds them)."""
    programs = 8 * plan.K1 * plan.K2 + plan.table_numbers * itemsize
    return (2 + gates) * B * H * L * itemsize + H * splits * programs


def _check(u: Tensor, kernel: Tensor, in_gate, out_gate, circle: int | None) -> int:
    """The points of the circle, if all fits."""
    if u.dtype not in LONGEST:
        raise TypeError(f"u: expected float16, bfloat16 or float32, got {u.dtype}")
    if u.dim() != 3:
        raise ValueError(f"u: expected (B, H, L), got {tuple(u.shape)}")
    if kernel.dtype not in (u.dtype, torch.float32):
        raise TypeError(f"kernel: expected float32 or {u.dtype}, got {kernel.dtype}")
    if kernel.dim() != 2 or kernel.shape[0] != u.shape[1] or kernel.shape[1] == 0:
        raise ValueError(f"kernel: expected ({u.shape[1]}, K), got {tuple(kernel.shape)}")
    for name, gate in (("in_gate", in_gate), ("out_gate", out_gate)):
        if gate is not None and (gate.shape != u.shape or gate.dtype != u.dtype):
            wanted = f"{tuple(u.shape)} in {u.dtype}"
            raise ValueError(f"{name}: expected {wanted}, got {tuple(gate.shape)} in {gate.dtype}")
    return _circle(u.shape[2], kernel.shape[1], u.dtype, circle)


def _circle(L: int, K: int, dtype: torch.dtype, circle: int | None) -> int:
    longest = LONGEST[dtype]
    if circle is None:
        points = max(1, L + min(K, L) - 1)
        if (N := circle_for(points, dtype)) is None:
            raise ValueError(f"u: expected L + K - 1 up to {longest} in {dtype}, got {points}")
        return N
    if circle not in SIDES or not max(L, K) <= circle <= longest:
        wanted = f"one of {[N for N in SIDES if N <= longest]}, at least L and K, {max(L, K)}"
        raise ValueError(f"circle: expected {wanted}, got {circle}")
    return circle


def specialisation(
    kernel: str, kind: str, N: int, signals: Sequence[str], what: str = "", **constants
) -> Specialisation:
    """A row for a causal convolution of ``N / 2`` steps; ``kind`` is Triton's name of a type."""
    dtype = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}[kind]
    plan = plan_of(N // 2, N)
    signature = dict.fromkeys((*signals, "first", "twiddle", "second"), f"*{kind}")
    spectrum = "spectrum" if kernel == "_monarch_conv" else "d_spectrum"
    signature |= {spectrum: "*fp32"} | dict.fromkeys(("B", "H", "L", "pairs"), "i32")
    constants |= plan.constants | {"PRECISION": "tf32x3" if kind == "fp32" else "ieee"}
    amd = {"num_warps": warps_for(plan, dtype, "gfx942"), "constexprs": {"PRECISION": "ieee"}}
    return Specialisation(
        kernel=kernel,
        label=f"{kind} N={N}{what}",
        direction="backward" if what or kernel != "_monarch_conv" else "forward",
        signature=signature,
        constexprs=constants,
        num_warps=warps_for(plan, dtype, "sm_80"),
        num_stages=1,
        divisible=("L",),
        overrides={"gfx942": amd},
    )


_GATED = ("u", "in_gate", "out_gate", "out")
SPECIALISATIONS = [
    specialisation("_monarch_conv", kind, N, _GATED, other_gate=None, other=None, ADJOINT=False)
    for kind, N in (("fp16", 4096), ("bf16", 2048), ("fp32", 512))
]
SPECIALISATIONS += [
    specialisation(
        "_monarch_conv", kind, N, (*_GATED, "other_gate", "other"), " adjoint", ADJOINT=True
    )
    for kind, N in (("fp16", 4096), ("fp32", 512))
]
