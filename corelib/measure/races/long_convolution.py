"""A convolution as long as the sequence: corelib's against what a user would write.

The direct convolution takes part while it has a chance; scipy has no gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from ...primitives.fft_conv import fft_conv
from ..gradients import forward_backward
from ..race import Missing
from ..scaling import sweep
from . import Row, peer, register, rows

B, C = 4, 64
LONGEST_DIRECT = 1024


def _by_hand(u: Tensor, kernel: Tensor) -> Tensor:
    """The obvious three transforms."""
    L = u.shape[-1]
    spectrum = torch.fft.rfft(u, n=2 * L) * torch.fft.rfft(kernel, n=2 * L)
    return torch.fft.irfft(spectrum, n=2 * L)[..., :L]


def _conv1d(u: Tensor, kernel: Tensor) -> Tensor:
    L = u.shape[-1]
    return F.conv1d(F.pad(u, (L - 1, 0)), kernel.flip(-1)[:, None], groups=C)


def _scipy(u: Tensor, kernel: Tensor) -> Callable | Missing:
    signal = peer("scipy.signal")
    if isinstance(signal, Missing):
        return signal
    a, b = u.numpy(), kernel[None].numpy()
    return lambda: torch.from_numpy(signal.fftconvolve(a, b, axes=-1)[..., : u.shape[-1]])


@register("long-convolution", "a causal convolution as long as its input")
def long_convolution(quick: bool) -> Iterator[Row]:
    lengths = (64, 128) if quick else (256, 512, 1024, 2048, 4096, 8192, 16384)

    def inputs(L: int) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(0)
        u = torch.randn(B, C, L, generator=generator)
        return u, torch.randn(C, L, generator=generator) / L**0.5

    def forward(L: int) -> dict[str, Callable | Missing]:
        u, kernel = inputs(L)
        runs = {
            "corelib": lambda: fft_conv(u, kernel),
            "torch.fft": lambda: _by_hand(u, kernel),
            "scipy fftconvolve": _scipy(u, kernel),
        }
        direct = {"conv1d": lambda: _conv1d(u, kernel)} if L <= LONGEST_DIRECT else {}
        return runs | direct

    def both(L: int) -> dict[str, Callable]:
        runs = {"corelib": fft_conv, "torch.fft": _by_hand}
        runs |= {"conv1d": _conv1d} if L <= LONGEST_DIRECT else {}
        return {name: forward_backward(run, *inputs(L)) for name, run in runs.items()}

    shape = f"B{B} C{C} float32"
    options = dict(tolerance=1e-4, repeats=3, min_time=0.05)
    yield from rows(sweep(lengths, forward, **options), what="forward", shape=shape)
    yield from rows(sweep(lengths, both, **options), what="forward + backward", shape=shape)
