"""What a long convolution costs: operations and bytes counted, seconds modelled from a data sheet.

Section 3.2 of FlashFFTConv (arXiv 2311.05908): the more factors, the fewer operations, but the
smaller the products; and a step whose points do not fit on the chip pays for main memory.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from corelib.primitives.monarch_transform import balanced_factors

MATRIX_SIDE = 16  # products with a shorter side do not fill a matrix unit
CHIP_POINTS = 32768  # complex points in half precision that stay on the chip


class FFTCost(NamedTuple):
    """Counts for one convolution; ``seconds`` are modelled from a data sheet, not measured."""

    matrix_flops: float
    other_flops: float
    main_bytes: float
    chip_bytes: float
    seconds: float

    @property
    def flops(self) -> float:
        """All operations."""
        return self.matrix_flops + self.other_flops


def fft_cost_model(
    N: int, order: int, spec, *, rows: int = 1, chip_bandwidth: float = 19.5e12
) -> FFTCost:
    """A convolution around ``N`` real points by ``order`` products each way, in half precision.

    The paper's equation 2: each product runs at the rate of the matrix units when its side fills
    them, else at the rate of the rest; its result is kept on the chip when the transforms that
    are left fit there, else it goes out to main memory and back. Times add up.

    Args:
        N: points of the circle, even; the ``N / 2`` packed points are split into ``order`` factors.
        spec: a `corelib.measure.HardwareSpec` with rates for ``float16`` and ``float32``.
        rows: channels times batch.
        chip_bandwidth: bytes a second on the chip (A100: 108 processors, 128 bytes a clock).
    """
    _check_points(N)
    factors = balanced_factors(N // 2, order)
    if len(factors) != order:
        raise ValueError(f"order: expected at most the prime factors of {N // 2}, got {order}")
    M, left = rows * N / 2, N // 2
    matrix = other = main = chip = 0.0
    for side in factors:
        if side >= MATRIX_SIDE:
            matrix += 16 * M * side  # 8 for a complex multiply-add, there and back
        else:
            other += 16 * M * side
        moved = 2 * 2 * 4 * M  # read and written, there and back, 4 bytes a point
        chip, main = (chip, main + moved) if left > CHIP_POINTS else (chip + moved, main)
        left //= side
    other += 12 * M * (order - 1) + 14 * M  # twiddles; the product of packed spectra
    main += 2 * rows * N / 2 * 2  # N / 2 inputs and outputs: the zeros are not read
    rates = spec.peak("float16"), spec.peak("float32"), spec.bandwidth, chip_bandwidth
    seconds = sum(count / rate for count, rate in zip((matrix, other, main, chip), rates))
    return FFTCost(matrix, other, main, chip, seconds)


def library_cost_model(N: int, spec, *, rows: int = 1) -> FFTCost:
    """The same by calls to a library, in float32: each call reads and writes main memory.

    Padding, a transform, a product and an inverse; the kernel's own transform is left out.
    """
    _check_points(N)
    flops = rows * (5 * N * math.log2(N) + 3 * N)
    padded, spectrum = 4 * N, 8 * (N / 2 + 1)
    main = rows * (padded / 2 + padded + padded + 4 * spectrum + padded)
    return FFTCost(0.0, flops, main, 0.0, flops / spec.peak("float32") + main / spec.bandwidth)


def _check_points(N: int) -> None:
    if isinstance(N, bool) or not isinstance(N, int) or N < 4 or N % 2:
        raise ValueError(f"N: expected an even whole number of at least 4, got {N!r}")
