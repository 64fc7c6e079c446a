"""The gradient of `monarch_fft_conv` in the kernel's spectrum.

With ``v`` and ``y`` the unitary transforms of the gated input and of the gated gradient,

    d_spectrum = sum_batch v* y

A program goes through its pairs of rows and keeps its sum in registers; where several share a
channel, their sums are added up afterwards, in a fixed order: runs repeat exactly. (With the
gradient of the input in the same pass, the transforms of 4,096 points no longer fit into the
registers.)
"""

from __future__ import annotations

from torch import Tensor

from corelib.kernels._monarch_tables import Plan
from corelib.kernels._shared import jit, tl
from corelib.kernels.monarch_fft_conv import (
    Launches,
    load_complex,
    load_pair,
    pair_places,
    specialisation,
    to_frequencies,
)

__all__ = ["backward_bytes", "spectrum_gradient"]


@jit
def _monarch_spectrum(
    u, in_gate, d_out, out_gate, first, twiddle, second, d_spectrum, B, H, L, pairs,
    N2: tl.constexpr, ROWS: tl.constexpr, K1: tl.constexpr, K2: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """``d_spectrum (splits, H, 2, K1, K2)``; program ``(channel, split)``, as in the forward."""
    head = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1)
    f, f_imag = load_complex(first, K1, ROWS)
    w, w_imag = load_complex(twiddle, K1, N2)
    s, s_imag = load_complex(second, N2, K2)
    total = tl.zeros([K1, K2], tl.float32)
    total_imag = tl.zeros([K1, K2], tl.float32)
    v, v_imag = total, total_imag
    # Two steps a pair, for the input and for the gradient: the code holds one transform, not two.
    splits = tl.num_programs(1)
    for step in range(0, 2 * tl.cdiv(pairs - split, splits)):
        pair, gradient = split + step // 2 * splits, step % 2 == 1
        one, two, exists, both = pair_places(pair, head, B, H, L, ROWS, N2)
        if gradient:
            x, x_imag = load_pair(d_out, out_gate, one, two, exists, both)
        else:
            x, x_imag = load_pair(u, in_gate, one, two, exists, both)
        y, y_imag = to_frequencies(x, x_imag, f, f_imag, w, w_imag, s, s_imag, PRECISION)
        total += tl.where(gradient, v * y + v_imag * y_imag, 0.0)
        total_imag += tl.where(gradient, v * y_imag - v_imag * y, 0.0)
        v, v_imag = y, y_imag
    place = d_spectrum + (split * H + head) * 2 * K1 * K2
    at = tl.arange(0, K1)[:, None] * K2 + tl.arange(0, K2)[None, :]
    tl.store(place + at, total)
    tl.store(place + K1 * K2 + at, total_imag)


def spectrum_gradient(run: Launches, u, in_gate, d_out, out_gate, spectrum: Tensor) -> Tensor:
    """The gradient of ``spectrum (H, 2, K1, K2)``."""
    parts = spectrum.new_empty(run.splits, *spectrum.shape)
    run.run(_monarch_spectrum, u, u, in_gate, d_out, out_gate, *run.tables, parts)
    return parts.sum(0)


def backward_bytes(
    B: int, H: int, L: int, plan: Plan, *, in_gate: bool = False, out_gate: bool = False,
    splits: int = 1, itemsize: int = 2,
) -> int:  # fmt: skip
    """Bytes that the kernels of the backward pass move, all gradients asked for.

    One launch for the spectrum, one for the input and its gate, one for an output gate; each reads
    what it needs of the signals once, and for each program the tables.
    """
    signals = (2 + in_gate + out_gate) + (2 + 3 * in_gate + out_gate) + out_gate * (3 + in_gate)
    programs = (2 + out_gate) * (8 * plan.K1 * plan.K2 + plan.table_numbers * itemsize)
    return signals * B * H * L * itemsize + H * splits * programs


SPECIALISATIONS = [
    specialisation("_monarch_spectrum", kind, N, ("u", "in_gate", "d_out", "out_gate"))
    for kind, N in (("fp16", 4096), ("fp32", 512))
]
