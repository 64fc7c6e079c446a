"""What the long convolutions share: a layer around a kernel, whatever the kernel is made of.

    y[t] = sum_{lag < taps} kernel[lag] u[t - lag] + skip u[t]        mixed[t] = mix(y[t])

A convolution has no small state: to go on, it needs every input that its kernel still reaches, the
last ``taps - 1``. So `ConvState` grows up to that size and then stays. A step costs ``O(taps)`` a
channel, a stretch of ``L`` inputs ``O(L log L)``.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from corelib.primitives.fft_conv import fft_conv, two_sided_fft_conv


class ConvState(NamedTuple):
    """The inputs so far, oldest first, as many as the kernel reaches: ``(B, C, n < taps)``.

    ``reach (C, taps)`` is the kernel that steps use, its longest lag first, the skip connection
    added at lag 0. It belongs to the parameters at the time it was made; None until a step asks.
    """

    inputs: Tensor
    reach: Tensor | None = None


class LongConvolution(nn.Module):
    """A causal convolution of each channel: a sequence mixer on ``(B, L, C)``.

    Subclasses say what the kernel is (`kernel`) and what follows it (`mix`, with the map ``out``).

    Args:
        channels: width of the input and of the output.
        taps: how many inputs the kernel sees, the present one counted.
    """

    def __init__(self, channels: int, taps: int):
        super().__init__()
        for name, value in (("channels", channels), ("taps", taps)):
            check_count(name, value)
        self.channels, self.taps = channels, taps
        self.skip = nn.Parameter(torch.randn(channels))

    def kernel(self, L: int) -> Float[Tensor, "C K"]:
        """The first ``min(L, taps)`` taps of each channel, without the skip connection."""
        raise NotImplementedError

    def mix(self, y: Float[Tensor, "*batch C"]) -> Float[Tensor, "*batch C"]:
        """What follows the convolution, at each position by itself."""
        raise NotImplementedError

    def forward(
        self, x: Float[Tensor, "B L C"], state: ConvState | None = None
    ) -> tuple[Float[Tensor, "B L C"], ConvState]:
        """A stretch; ``state`` is what an earlier stretch or step returned."""
        check_input(x, ("B", "L"), self)
        u = x.transpose(1, 2)
        if state is not None:
            u = torch.cat([state.inputs, u], -1)
        total = u.shape[-1]
        if not x.shape[1]:
            return x.clone(), ConvState(u)
        y = fft_conv(u, with_skip(self.kernel(total), self.skip))[..., total - x.shape[1] :]
        return self.mix(y.transpose(1, 2)), ConvState(u[..., max(0, total - self.taps + 1) :])

    def step(
        self, x_t: Float[Tensor, "B C"], state: ConvState
    ) -> tuple[Float[Tensor, "B C"], ConvState]:
        """One position: the kernel's sum as it stands."""
        check_input(x_t, ("B",), self)
        reach = state.reach
        if reach is None:
            reach = with_skip(self.kernel(self.taps), self.skip).flip(-1)
        window = torch.cat([state.inputs, x_t[..., None]], -1)
        n = window.shape[-1]
        y = torch.einsum("bcn,cn->bc", window, reach[:, self.taps - n :])
        return self.mix(y), ConvState(window[..., max(0, n - self.taps + 1) :], reach)

    def init_state(self, batch: int) -> ConvState:
        """No inputs yet."""
        return ConvState(self.skip.new_zeros(batch, self.channels, 0))


class TwoSided(nn.Module):
    """A long convolution that looks both ways: ``(B, L, C) -> (B, L, C)``, so without steps.

    Made of two layers of one kind, ``TwoSided(SGConv, channels, l_max)``; the second gives only its
    kernel, whose first tap weighs the next input.
    """

    def __init__(self, kind: type[LongConvolution], *arguments, **options):
        super().__init__()
        self.past, self.future = (kind(*arguments, **options) for _ in range(2))
        del self.future.skip, self.future.out  # added once, mixed once

    def forward(self, x: Float[Tensor, "B L C"]) -> Float[Tensor, "B L C"]:
        check_input(x, ("B", "L"), self.past)
        if not x.shape[1]:
            return x.clone()
        kernels = (side.kernel(x.shape[1]) for side in (self.past, self.future))
        past, future = kernels
        y = two_sided_fft_conv(x.transpose(1, 2), with_skip(past, self.past.skip), future)
        return self.past.mix(y.transpose(1, 2))


def with_skip(kernel: Float[Tensor, "C K"], skip: Float[Tensor, " C"]) -> Float[Tensor, "C K"]:
    """The skip connection is one more tap at lag 0."""
    return torch.cat([kernel[:, :1] + skip[:, None], kernel[:, 1:]], -1)


def check_input(x: Tensor, axes: tuple[str, ...], layer: LongConvolution) -> None:
    """``x`` has these axes, then the layer's channels, in the layer's dtype."""
    if x.dim() != len(axes) + 1 or x.shape[-1] != layer.channels:
        wanted = ", ".join((*axes, str(layer.channels)))
        raise ValueError(f"x: expected ({wanted}), got shape {tuple(x.shape)}")
    if x.dtype != layer.skip.dtype:
        raise TypeError(f"x: expected the layer's dtype, {layer.skip.dtype}, got {x.dtype}")


def check_count(name: str, value: int) -> None:
    """A whole number of at least 1."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name}: expected a whole number of at least 1, got {value!r}")
