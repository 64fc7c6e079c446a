"""Long convolutions between gates: by FFT, by matrix products, as written by hand, compiled.

A CPU has no matrix units, so the products of `monarch_conv` are expected to lose here; they take
part to show by how much. The gated row is where calls could be fused, and where a compiler can.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from ...linear_time.butterfly import butterfly_conv
from ...linear_time.flashfftconv import partial_conv
from ...primitives.fft_conv import fft_conv, gated_fft_conv
from ...primitives.monarch import causal_points, monarch_conv, monarch_factors
from ..gradients import forward_backward
from ..race import Missing
from ..scaling import sweep
from . import Row, register, rows

B, C = 2, 32
SHAPE = f"B{B} C{C} float32"
LONGEST_DIRECT, LONGEST_COMPILED, KEPT_TAPS = 1024, 4096, 64
OPTIONS = dict(tolerance=1e-4, repeats=3, min_time=0.05)


def by_hand(u: Tensor, kernel: Tensor) -> Tensor:
    """The obvious three transforms."""
    L = u.shape[-1]
    spectrum = torch.fft.rfft(u, n=2 * L) * torch.fft.rfft(kernel, n=2 * L)
    return torch.fft.irfft(spectrum, n=2 * L)[..., :L]


def by_hand_gated(u: Tensor, kernel: Tensor, in_gate: Tensor, out_gate: Tensor) -> Tensor:
    return out_gate * by_hand(in_gate * u, kernel)


def direct(u: Tensor, kernel: Tensor) -> Tensor:
    L = u.shape[-1]
    return F.conv1d(F.pad(u, (L - 1, 0)), kernel.flip(-1)[:, None], groups=kernel.shape[0])


def _inputs(L: int, gated: bool) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    u, in_gate, out_gate = torch.randn(3, B, C, L, generator=generator)
    kernel = torch.randn(C, L, generator=generator) / L**0.5
    return [u, kernel, in_gate, out_gate] if gated else [u, kernel]


def _compiled(run: Callable, *inputs: Tensor) -> Callable | Missing:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # complex numbers go to the library
            compiled = torch.compile(run, dynamic=False)
            compiled(*inputs)
    except Exception as problem:  # no C++ compiler, an older PyTorch, another processor
        return Missing(f"does not compile here ({type(problem).__name__})")
    return compiled


def _contestants(inputs: list[Tensor], compiled: bool) -> dict[str, Callable | Missing]:
    L, gated = inputs[0].shape[-1], len(inputs) > 2
    factors = monarch_factors(causal_points(L, L))
    hand = by_hand_gated if gated else by_hand
    runs = {
        "corelib": gated_fft_conv if gated else fft_conv,
        "torch.fft": hand,
        "matrix products": lambda *x: monarch_conv(*x, factors=factors),
    }
    if not gated:
        runs["butterfly, 16 rows"] = lambda *x: butterfly_conv(*x, 16)
    if compiled and L <= LONGEST_COMPILED:
        runs["torch.fft compiled"] = _compiled(hand, *inputs)
    if not gated and L <= LONGEST_DIRECT:
        runs["conv1d"] = direct
    return runs


def _bind(runs: dict, make: Callable) -> dict:
    return {name: run if isinstance(run, Missing) else make(run) for name, run in runs.items()}


def _rows(gated: bool, quick: bool) -> Iterator[Row]:
    lengths = (64, 128) if quick else tuple(1 << p for p in range(8, 17))
    shorter = lengths[:7]  # to 16K: backward takes three times as long

    def forward(L: int) -> dict:
        inputs = _inputs(L, gated)
        return _bind(_contestants(inputs, not quick), lambda run: lambda: run(*inputs))

    def both(L: int) -> dict:
        inputs = _inputs(L, gated)
        runs = _contestants(inputs, compiled=False)
        return _bind(runs, lambda run: forward_backward(run, *inputs))

    with torch.no_grad():
        yield from rows(sweep(lengths, forward, **OPTIONS), what="forward", shape=SHAPE)
    yield from rows(sweep(shorter, both, **OPTIONS), what="forward + backward", shape=SHAPE)


@register("fft-convolution", "a long convolution by FFT, by matrix products, in three passes")
def fft_convolution(quick: bool) -> Iterator[Row]:
    yield from _rows(False, quick)


@register("gated-fft-convolution", "the same between two gates")
def gated_fft_convolution(quick: bool) -> Iterator[Row]:
    yield from _rows(True, quick)


@register("partial-convolution", "64 taps of a kernel: in blocks or around one circle")
def partial_convolution(quick: bool) -> Iterator[Row]:
    lengths = (64, 128) if quick else (1024, 4096, 16384, 32768, 65536)

    def contestants(L: int) -> dict[str, Callable]:
        u, kernel = _inputs(L, False)
        taps = kernel[:, :KEPT_TAPS]
        shifted = taps.flip(-1)[:, None]
        return {
            "corelib": lambda: partial_conv(u, kernel, taps.shape[-1]),
            "one circle": lambda: fft_conv(u, taps),
            "conv1d": lambda: F.conv1d(F.pad(u, (taps.shape[-1] - 1, 0)), shifted, groups=C),
        }

    with torch.no_grad():
        yield from rows(sweep(lengths, contestants, **OPTIONS), what="forward", shape=SHAPE)
