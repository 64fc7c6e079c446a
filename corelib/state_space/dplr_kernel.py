"""S4's convolution kernel (arXiv 2111.00396): by powers of its matrix, and from four Cauchy sums.

For a system ``diag(poles) - p p*`` of each channel (`corelib.state_space.shared.Dplr`), with ``C``
as its row and ``h = step / 2``:

    kernel[t] = 2 Re(C A_bar^t B_bar)                                        `s4_kernel_reference`
    spectrum = h (S(C~ B) - h c S(C~ p) S(p* B) / (1 + h c S(p* p))) e^(i a)           `s4_kernel`

`s4` explains the second line, the paper's algorithm 1. `s4_reference` is the recurrence that the
kernel stands for. Cost: ``O(N^2 L)`` by powers, ``O(N L + L log L)`` from the spectrum.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Complex, Float
from torch import Tensor

from .cauchy import cauchy_sums
from .dplr import discrete_form, output_row, to_pairs, to_real
from .shared import Dplr

Row = Complex[Tensor, "C P"]
Steps = Float[Tensor, " C"]

# --- the reference --------------------------------------------------------------------------------


def s4_reference(
    u: Float[Tensor, "B C L"], system: Dplr, C: Row, step: Steps, start: Tensor | None = None
) -> tuple[Float[Tensor, "B C L"], Complex[Tensor, "B C P"]]:
    """The recurrence, one step after the other with dense matrices: outputs and last state."""
    A_bar, B_bar = discrete_form(system, step)
    row, outputs = output_row(C), []
    x = u.new_zeros(*u.shape[:2], row.shape[-1]) if start is None else to_real(start)
    for u_t in u.unbind(-1):
        x = torch.einsum("cnm,bcm->bcn", A_bar, x) + B_bar * u_t[..., None]
        outputs.append((row * x).sum(-1))
    return torch.stack(outputs, -1), to_pairs(x)


def s4_kernel_reference(system: Dplr, C: Row, step: Steps, L: int) -> Float[Tensor, "C L"]:
    """``kernel[t] = C A_bar^t B_bar``, one power after the other."""
    A_bar, x = discrete_form(system, step)
    row, taps = output_row(C), []
    for _ in range(L):
        taps.append((row * x).sum(-1))
        x = torch.einsum("cnm,cm->cn", A_bar, x)
    return torch.stack(taps, -1)


# --- the fast form --------------------------------------------------------------------------------


def s4_kernel(system: Dplr, C_tilde: Row, step: Steps, L: int) -> Float[Tensor, "C L"]:
    """The same kernel from its spectrum; ``C_tilde`` is ``to_tilde(system, C, step, L)``."""
    return s4_kernel_untied(system, system.p, C_tilde, step, L)


def s4_kernel_untied(
    system: Dplr, q: Row, C_tilde: Row, step: Steps, L: int
) -> Float[Tensor, "C L"]:
    """`s4_kernel` of ``diag(poles) - p q*``: see `corelib.state_space.hurwitz`."""
    poles, p, B = system
    angles = torch.arange(L // 2 + 1, dtype=torch.float64, device=step.device) * (math.pi / L)
    sine, cosine = angles.sin().to(step.dtype), angles.cos().to(step.dtype)
    half = step[:, None] / 2
    weights = torch.stack([C_tilde * B, C_tilde * p, q.conj() * B, q.conj() * p])
    through, left, right, loop = cauchy_sums(weights, half * poles, sine, cosine)
    gain = half * cosine
    spectrum = through - gain * left * right / (1 + gain * loop)
    return torch.fft.irfft(half * torch.complex(cosine, sine) * spectrum, n=L)
