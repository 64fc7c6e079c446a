"""Simple hardware-efficient long convolutions (arXiv 2302.06646): kernels learned tap by tap.

Idea: no structure at all. Learn the kernel itself, as long as the sequence, and keep it in order
with a soft threshold: taps that the data does not ask for stay exactly zero.

    kernel = dropout(squash(smooth(weight), lam))         y = fft_conv(u, kernel) + skip u
    squash(k, lam) = sign(k) max(|k| - lam, 0)            = argmin_z (z - k)^2 / 2 + lam |z|
    smooth(k, width)[t] = mean of k[t - width // 2] ... k[t + width // 2]       zeros outside

| here   | paper, code | what                                                        | shape      |
|:-------|:------------|:------------------------------------------------------------|:-----------|
| weight | K, kernel   | learned; `small_random` or `double_exponential` at first    | (C, l_max) |
| lam    | lambda, lam | the threshold; 0 for none                                   |            |
| width  | 2 p + 1     | taps of the running mean, odd; 1 for none                   |            |
| skip   | D           | the input itself                                            | (C,)       |

**The trap.** ``d squash / d k`` is 1 where ``|k| > lam`` and 0 elsewhere. With lam above every tap
the kernel is zero *and has no gradient*: it stays zero for ever. The released class has
``lam=0.1`` and starts at 0.002 randn, which is just that; the released experiments set lam to 0.002
(ListOps) or 0.003 (text, pixels), so that a third or a seventh of the taps start alive. The
default here is 0.002, and a layer none of whose taps would be alive is refused. Single taps are
caught likewise: one that starts below lam never moves, so without `smooth` the threshold is in part
a random pruning.

Order as released: smooth, squash, drop. Exact: all of it, pieces with a carried state too. Left
out: several kernels a channel, dropout of activations, and smoothing of the spectrum with a
Gaussian (which multiplies the kernel by a window). The paper's second half, FlashButterfly, is
`corelib.linear_time.butterfly`.
Cost: ``C l_max`` parameters, ``O(L log L)`` time a channel for a stretch, ``O(l_max)`` for a step.
Oracles: brute-force minimisation for `squash`, ``scipy.ndimage`` and ``scipy.signal`` for the rest.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from .shared import LongConvolution, check_count

Kernel = Float[Tensor, "*channels L"]

# --- the regularisers -----------------------------------------------------------------------------


def squash_reference(k: Kernel, lam: float) -> Kernel:
    """The soft threshold as the paper writes it."""
    return k.sign() * (k.abs() - lam).clamp_min(0)


def squash(k: Kernel, lam: float) -> Kernel:
    """Soft threshold: towards zero by ``lam``, and no further than zero; ``lam=0`` changes nothing.

    No gradient passes where the result is zero. Raises ValueError for a negative ``lam``.
    """
    if not lam >= 0:
        raise ValueError(f"lam: expected at least 0, got {lam}")
    return F.softshrink(k, float(lam)) if lam else k


def smooth_reference(k: Kernel, width: int = 7) -> Kernel:
    """The running mean, tap by tap."""
    half, L = _half(width), k.shape[-1]
    rows = [k[..., max(0, t - half) : t + half + 1].sum(-1) / width for t in range(L)]
    return torch.stack(rows, -1) if rows else k.clone()


def smooth(k: Kernel, width: int = 7) -> Kernel:
    """Running mean over ``width`` taps, an odd number; beyond both ends there are zeros.

    The sum is always divided by ``width``, so the first and last taps shrink.
    """
    half, L = _half(width), k.shape[-1]
    if not half or not k.numel():
        return k.clone()
    return F.avg_pool1d(k.reshape(1, -1, L), width, 1, half).view_as(k)


def roughness(k: Kernel) -> Float[Tensor, " *channels"]:
    """Energy of the steps between neighbours over the energy of the kernel: 2 for white noise.

    0 for a constant, 4 for a kernel that changes sign at every tap; 0 for a kernel of zeros.
    """
    energy = k.square().sum(-1)
    return k.diff(dim=-1).square().sum(-1) / energy.clamp_min(torch.finfo(k.dtype).tiny)


# --- where a kernel may start ---------------------------------------------------------------------


def small_random(channels: int, L: int) -> Float[Tensor, "C L"]:
    """Normal, with standard deviation 0.002, at every lag alike."""
    return 0.002 * torch.randn(channels, L)


def double_exponential(channels: int, L: int) -> Float[Tensor, "C L"]:
    """``0.02 randn exp(-rate j / L)`` at lag ``j``, ``rate = (C // 2)^(i / C)`` for channel ``i``.

    The first channels reach over the whole length, the last over about ``2 L / C`` of it.
    """
    rate = float(channels // 2) ** (torch.arange(channels) / channels)
    return 0.02 * torch.randn(channels, L) * torch.exp(-rate[:, None] * torch.arange(L) / L)


# --- the layer ------------------------------------------------------------------------------------


class LongConv(LongConvolution):
    """The paper's layer, a sequence mixer on ``(B, L, C)``: convolution, GELU, a gated linear map.

    Args:
        channels: width of the input and of the output.
        l_max: taps of the kernel; older inputs are not seen.
        lam: threshold of `squash`.
        width: taps of `smooth`, odd; 1 leaves the kernel alone.
        kernel_dropout: share of the taps that is dropped in training.
        start: ``(channels, l_max) -> (C, L)``: `small_random`, `double_exponential` or your own.
    """

    def __init__(
        self,
        channels: int,
        l_max: int,
        *,
        lam: float = 0.002,
        width: int = 1,
        kernel_dropout: float = 0.0,
        start: Callable[[int, int], Tensor] = small_random,
    ):
        super().__init__(channels, l_max)
        if not 0 <= kernel_dropout < 1:
            raise ValueError(f"kernel_dropout: expected 0 <= share < 1, got {kernel_dropout}")
        self.lam, self.width, self.kernel_dropout = lam, width, kernel_dropout
        weight = start(channels, l_max)
        if weight.shape != (channels, l_max):
            got = tuple(weight.shape)
            raise ValueError(f"start: expected a kernel of shape ({channels}, {l_max}), got {got}")
        if lam and not squash(smooth(weight, width), lam).any():
            largest = smooth(weight, width).abs().max().item()
            raise ValueError(
                f"lam: expected less than the largest tap of the start, {largest:.3g}, got {lam}: "
                "squash passes no gradient to taps below it, and the kernel would stay zero"
            )
        self.weight = nn.Parameter(weight.to(self.skip.dtype))
        self.out = nn.Linear(channels, 2 * channels)

    def kernel(self, L: int) -> Float[Tensor, "C K"]:
        """The first ``min(L, taps)`` taps of each channel, without the skip connection."""
        weight = self.weight[:, : L + self.width // 2]  # the mean looks so far ahead
        taps = squash(smooth(weight, self.width)[:, :L], self.lam)
        return F.dropout(taps, self.kernel_dropout, self.training)

    def mix(self, y: Float[Tensor, "*batch C"]) -> Float[Tensor, "*batch C"]:
        """GELU, then a linear map with a gate (GLU)."""
        return F.glu(self.out(F.gelu(y)), -1)


def _half(width: int) -> int:
    check_count("width", width)
    if width % 2 == 0:
        raise ValueError(f"width: expected an odd number, got {width}")
    return width // 2


def example() -> dict:
    """A kernel of six taps, two of them larger than the threshold.

    >>> squash(**example())
    tensor([ 0.5000,  0.0000,  0.0000, -1.0000,  0.0000,  0.0000])
    """
    return dict(k=torch.tensor([1.0, 0.25, 0.5, -1.5, 0.0, 0.5]), lam=0.5)
