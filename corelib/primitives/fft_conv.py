"""Long convolution: every output is a weighted sum of all earlier inputs, by way of the FFT.

    y[t] = sum_{j <= t} kernel[t - j] u[j]                                    (`fft_conv`)
    y[t] = sum_{j <= t} kernel[t - j] u[j] + sum_{j > t} ahead[j - t - 1] u[j]
                                                                    (`two_sided_fft_conv`)
    y[t] = out_gate[t] sum_{j <= t} kernel[t - j] in_gate[j] u[j]           (`gated_fft_conv`)

Multiplying two spectra convolves their signals around a circle, so both are padded with zeros to a
circle that is long enough that nothing comes round: at least ``L + K - 1`` points. The cost is
``O(L log L)`` for each channel, against ``O(L K)`` for the sums as they stand
(`direct_conv_reference`).

The gradients are correlations with the same spectra, which are kept from the forward pass: forward
and backward take six transforms in all, where differentiating the plain formula takes more and
longer ones. Half precision is computed in float32. Not differentiable twice.

Oracle: ``scipy.signal.fftconvolve`` and ``torch.nn.functional.conv1d``.
"""

from __future__ import annotations

import functools

import torch
from jaxtyping import Float
from torch import Tensor

from ._checks import check_same_kind


def fft_conv(
    u: Float[Tensor, "*batch_and_channels L"], kernel: Float[Tensor, "*channels K"]
) -> Float[Tensor, "*batch_and_channels L"]:
    """Causal convolution of ``u (..., *channels, L)`` with ``kernel (*channels, K)``.

    Each channel has a kernel of its own; the axes before the channels are batch axes. ``K`` may be
    shorter or longer than ``L`` (lags from ``L`` on reach nothing). Adding a skip connection
    ``D * u`` is adding ``D`` to ``kernel[..., 0]``.

    Raises:
        ValueError: ``u``'s last axes before the length are not the kernel's channels (nothing is
            broadcast), or the kernel has no tap.
        TypeError: other dtypes than one floating-point dtype for both.
    """
    _check(u, kernel=kernel)
    L = u.shape[-1]
    if u.numel() == 0:
        return u.clone()
    taps = kernel if kernel.shape[-1] <= L else kernel[..., :L]
    return _convolve(u, taps, fast_length(L + taps.shape[-1] - 1))


def two_sided_fft_conv(
    u: Float[Tensor, "*batch_and_channels L"],
    kernel: Float[Tensor, "*channels K"],
    ahead: Float[Tensor, "*channels K_ahead"],
) -> Float[Tensor, "*batch_and_channels L"]:
    """`fft_conv`, plus what comes later: input ``t + 1 + lag`` weighs ``ahead[..., lag]``.

    Both kernels share one circle, ``ahead`` laid out backwards from its end, so that the second
    direction costs no further transform of ``u``. Raises as `fft_conv` does.
    """
    _check(u, kernel=kernel, ahead=ahead)
    L = u.shape[-1]
    if u.numel() == 0:
        return u.clone()
    taps, back = kernel[..., :L], ahead[..., : L - 1].flip(-1)
    circle = fast_length(2 * L - 1)
    gap = taps.new_zeros(*taps.shape[:-1], circle - taps.shape[-1] - back.shape[-1])
    return _convolve(u, torch.cat([taps, gap, back], -1), circle)


def gated_fft_conv(
    u: Float[Tensor, "*batch_and_channels L"],
    kernel: Float[Tensor, "*channels K"],
    in_gate: Float[Tensor, "*batch_and_channels L"] | None = None,
    out_gate: Float[Tensor, "*batch_and_channels L"] | None = None,
) -> Float[Tensor, "*batch_and_channels L"]:
    """`fft_conv` between two gates of ``u``'s shape, as in H3 and Hyena; None leaves one out.

    Raises as `fft_conv` does; ValueError also for a gate of another shape.
    """
    _check_gates(u, in_gate=in_gate, out_gate=out_gate)
    y = fft_conv(u if in_gate is None else u * in_gate, kernel)
    return y if out_gate is None else y * out_gate


def direct_conv_reference(
    u: Float[Tensor, "*batch_and_channels L"], kernel: Float[Tensor, "*channels K"]
) -> Float[Tensor, "*batch_and_channels L"]:
    """`fft_conv`, lag by lag: ``O(L K)``, and obviously right."""
    _check(u, kernel=kernel)
    L, y = u.shape[-1], torch.zeros_like(u)
    for lag in range(min(L, kernel.shape[-1])):
        moved = torch.nn.functional.pad(u, (lag, 0))[..., :L]
        y = y + kernel[..., lag, None] * moved
    return y


@functools.lru_cache(maxsize=256)
def fast_length(n: int) -> int:
    """The smallest ``2**a``, ``3 * 2**a`` or ``5 * 2**a`` that is at least ``n``: a quick FFT."""
    return min(odd << max(0, (-(-n // odd) - 1).bit_length()) for odd in (1, 3, 5))


def _convolve(u: Tensor, kernel: Tensor, circle: int) -> Tensor:
    if u.dtype in (torch.float16, torch.bfloat16):
        return _convolve(u.float(), kernel.float(), circle).to(u.dtype)
    if torch.is_grad_enabled() and (u.requires_grad or kernel.requires_grad):
        return _CircularConv.apply(u, kernel, circle)
    spectrum = torch.fft.rfft(u, n=circle)
    spectrum *= torch.fft.rfft(kernel, n=circle)
    return torch.fft.irfft(spectrum, n=circle)[..., : u.shape[-1]]


class _CircularConv(torch.autograd.Function):
    """Convolution around a circle; the first ``L`` points of it."""

    @staticmethod
    def forward(ctx, u, kernel, circle):
        u_spectrum = torch.fft.rfft(u, n=circle)
        kernel_spectrum = torch.fft.rfft(kernel, n=circle)
        ctx.save_for_backward(u_spectrum, kernel_spectrum)
        ctx.sizes = circle, u.shape[-1], kernel.shape[-1]
        return torch.fft.irfft(u_spectrum * kernel_spectrum, n=circle)[..., : u.shape[-1]]

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, d_y):
        u_spectrum, kernel_spectrum = ctx.saved_tensors
        circle, L, K = ctx.sizes
        d_u = d_kernel = None
        spectrum = torch.fft.rfft(d_y, n=circle)
        if ctx.needs_input_grad[0]:
            product = spectrum * kernel_spectrum.conj_physical()
            d_u = torch.fft.irfft(product, n=circle)[..., :L]
        if ctx.needs_input_grad[1]:
            product = torch.mul(spectrum, u_spectrum.conj())
            batch = tuple(range(product.dim() - kernel_spectrum.dim()))
            product = product.sum(batch) if batch else product
            d_kernel = torch.fft.irfft(product, n=circle)[..., :K]
        return d_u, d_kernel, None


def _fits(u: Tensor, kernel: Tensor) -> bool:
    """All that `_check` asks for, in one go: a short convolution takes only 0.1 ms itself."""
    if not (isinstance(u, Tensor) and isinstance(kernel, Tensor)):
        return False
    n = kernel.dim()
    return (
        kernel.dtype is u.dtype
        and u.dtype.is_floating_point
        and kernel.device == u.device
        and 0 < n <= u.dim()
        and kernel.shape[-1] > 0
        and u.shape[-n:-1] == kernel.shape[:-1]
    )


def _check(u: Tensor, **kernels: Tensor) -> None:
    for kernel in kernels.values():
        if not _fits(u, kernel):
            break
    else:
        return
    check_same_kind(u=u, **kernels)
    for name, kernel in kernels.items():
        channels = tuple(kernel.shape[:-1])
        if kernel.dim() == 0 or u.dim() < kernel.dim():
            raise ValueError(
                f"{name}: expected a length and at most the axes of u, {tuple(u.shape)}, "
                f"got shape {tuple(kernel.shape)}"
            )
        if tuple(u.shape[u.dim() - kernel.dim() : -1]) != channels:
            raise ValueError(
                f"{name}: expected the channels of u, {tuple(u.shape[:-1])}, as its axes before "
                f"the length, got {channels}"
            )
        if kernel.shape[-1] == 0:
            raise ValueError(f"{name}: expected at least one tap, got shape {tuple(kernel.shape)}")


def _check_gates(u: Tensor, **gates: Tensor | None) -> None:
    given = {name: gate for name, gate in gates.items() if gate is not None}
    check_same_kind(u=u, **given)
    for name, gate in given.items():
        if gate.shape != u.shape:
            raise ValueError(
                f"{name}: expected the shape of u, {tuple(u.shape)}, got {tuple(gate.shape)}"
            )
