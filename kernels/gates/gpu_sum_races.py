"""Races of Cauchy and Vandermonde sums and of long convolutions; see `gpu_ground`.

Contestants: the formula as a matrix and a product, and ``torch.fft``.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from corelib.kernels.gates.gpu_ground import HALF, Contest, Ground, both_titles, contestants_of


def cauchy(on: Ground, backward: bool) -> Contest:
    from corelib.kernels.cauchy import backward_bytes, cauchy_sums, forward_bytes

    M, C, P, K = 4, on.size(512, 3), 32, on.size(2049, 9)
    poles = torch.complex(-0.1 - on.rand(C, P), 3 * on.randn(C, P))
    weights = torch.complex(on.randn(M, C, P), on.randn(M, C, P))
    angles = torch.linspace(0, 1.5, K, device=on.device)
    sine, cosine = angles.sin(), angles.cos()

    def plain(weights, poles):
        near = 1j * sine - poles[..., None] * cosine
        far = 1j * sine - poles[..., None].conj() * cosine
        return torch.einsum("mcp,cpk->mck", weights, 1 / near) + torch.einsum(
            "mcp,cpk->mck", weights.conj(), 1 / far
        )

    def real(function):
        return lambda *given: torch.view_as_real(function(*given))

    functions = {
        "kernel": real(lambda weights, poles: cauchy_sums(weights, poles, sine, cosine)),
        "matrix and product": real(plain),
    }
    least = forward_bytes(M, C, P, K) + (backward_bytes(M, C, P, K) if backward else 0)
    flops = 24 * C * P * K * (3 if backward else 1)
    return Contest(
        contestants_of(functions, [weights, poles], backward), least, flops, tolerance=1e-3
    )


def vandermonde(on: Ground, backward: bool) -> Contest:
    from corelib.kernels.vandermonde import backward_bytes, forward_bytes, vandermonde_sums

    C, P, L = on.size(1024, 3), 32, on.size(4096, 40)
    rates = torch.complex(-0.01 - 0.1 * on.rand(C, P), on.randn(C, P))
    weights = torch.complex(on.randn(C, P), on.randn(C, P))
    t = torch.arange(L, device=on.device)

    def plain(weights, rates):
        return 2 * torch.einsum("cp,cpl->cl", weights, torch.exp(rates[..., None] * t)).real

    functions = {"kernel": lambda w, r: vandermonde_sums(w, r, L), "matrix and product": plain}
    least = forward_bytes(C, P, L) + (backward_bytes(C, P, L) if backward else 0)
    return Contest(
        contestants_of(functions, [weights, rates], backward), bytes=least, tolerance=3e-3
    )


def long_convolution(on: Ground, gated: bool, backward: bool) -> Contest:
    from corelib.kernels.monarch_fft_conv import monarch_fft_conv

    B, H, L = on.size(16, 2), on.size(768, 3), on.size(2048, 100)
    dtype = torch.float16 if not on.small else torch.float32
    leaves = [on.randn(B, H, L, dtype=dtype), on.randn(H, L) / L]
    leaves += [on.randn(B, H, L, dtype=dtype) for _ in range(2 * gated)]

    def by_fft(u, kernel, in_gate=None, out_gate=None):
        x = u if in_gate is None else u * in_gate
        spectrum = torch.fft.rfft(x.float(), 2 * L) * torch.fft.rfft(kernel, 2 * L)
        y = torch.fft.irfft(spectrum, 2 * L)[..., :L].to(u.dtype)
        return y if out_gate is None else y * out_gate

    functions = {
        "kernel": monarch_fft_conv,
        "torch.fft": by_fft,
        "torch.fft, compiled": on.compiled(by_fft),
    }
    least = (2 + 2 * gated) * leaves[0].nbytes * (2.5 if backward else 1)
    return Contest(contestants_of(functions, leaves, backward), bytes=int(least), tolerance=HALF)


#: Kernel module -> what is raced -> the race.
SUM_RACES: dict[str, dict[str, Callable[[Ground], Contest]]] = {
    "cauchy": both_titles(cauchy, "4 sums, 512 channels, 32 poles, 2049 frequencies"),
    "vandermonde": both_titles(vandermonde, "1024 channels, 32 poles, 4096 taps"),
    "monarch_fft_conv": {
        **both_titles(long_convolution, "B16 H768 L2048 float16", False),
        **both_titles(long_convolution, "gated", True),
    },
}
