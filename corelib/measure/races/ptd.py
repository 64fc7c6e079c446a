"""Diagonal state spaces on this machine: their kernel, and a layer against S4's.

``by the formula`` writes the Vandermonde matrix down in complex numbers and sums, with autograd:
how S4D is usually given. S4 is raced unchecked, as what S4D replaces.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from ...state_space.s4 import S4
from ...state_space.s4d import S4D
from ...state_space.vandermonde import vandermonde_sums, vandermonde_sums_reference
from ..gradients import forward_backward
from ..scaling import sweep
from . import Row, register, rows

C, N = 64, 64
SHAPE = f"C{C} N{N} float32"
OPTIONS = dict(repeats=3, min_time=0.05)


def _weights_and_rates() -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    with torch.no_grad():
        rates, _, enter, row = S4D(C, N).discrete()
    return row * enter, rates


@register("vandermonde-sums", "the kernel of a diagonal state space: two tables against one matrix")
def vandermonde(quick: bool) -> Iterator[Row]:
    lengths = (64, 128) if quick else (256, 512, 1024, 2048, 4096)
    given = _weights_and_rates()
    runs = {"corelib": vandermonde_sums, "by the formula": vandermonde_sums_reference}

    def forward(L: int) -> dict[str, Callable]:
        return {name: lambda run=run: run(*given, L) for name, run in runs.items()}

    def both(L: int) -> dict[str, Callable]:
        return {
            name: forward_backward(_through_parts(run, L), *map(torch.view_as_real, given))
            for name, run in runs.items()
        }

    # the formula in complex64 is what limits the agreement at long lags
    yield from rows(sweep(lengths, forward, tolerance=2e-2, **OPTIONS), what="forward", shape=SHAPE)
    result = sweep(lengths, both, tolerance=2e-2, **OPTIONS)
    yield from rows(result, what="forward + backward", shape=SHAPE)


def _through_parts(run: Callable, L: int) -> Callable:
    """``run`` on real and imaginary parts, which the race can seed and compare."""
    return lambda *parts: run(*map(torch.view_as_complex, parts), L)


@register("s4d-against-s4", "an S4D layer against an S4 layer of one size (not the same function)")
def s4d_against_s4(quick: bool) -> Iterator[Row]:
    lengths = (64, 128) if quick else (256, 512, 1024, 2048, 4096)

    def contestants(L: int) -> dict[str, Callable]:
        torch.manual_seed(0)
        layers = {"corelib": S4D(C, N), "S4": S4(C, N, L)}
        x = torch.randn(2, L, C)
        return {
            name: forward_backward(lambda x, layer=layer: layer(x)[0], x)
            for name, layer in layers.items()
        }

    result = sweep(lengths, contestants, check=None, **OPTIONS)
    yield from rows(result, what="forward + backward", shape=f"B2 {SHAPE}")
