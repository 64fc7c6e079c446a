"""S4D: a state space layer whose matrix is diagonal (arXiv 2206.11893).

Idea: leave out S4's rank-one part. What remains of ``x' = A x + B u, y = C x`` is one number for
each pole, and the convolution kernel is a plain sum of powers:

    kernel[t] = 2 Re sum_n C[n] gain[n] B[n] exp(step poles[n] t)           (`vandermonde_sums`)
    x[t] = decay x[t-1] + gain B u[t]       y[t] = 2 Re(C x[t]) + skip u[t]

with ``decay, gain`` from the zero-order hold. Where such a system starts is a choice of its own:
`s4d_legs` drops the rank-one part of HiPPO and halves ``B``, which approaches HiPPO as the state
grows, but not at all frequencies alike; `corelib.state_space.ptd` gives a start that does.

| here          | paper       | what                                              | shape       |
|:--------------|:------------|:--------------------------------------------------|:------------|
| poles         | Lambda      | one of each conjugate pair                        | (C, P)      |
| B, C          | B, C        | input and output of each pole                     | (C, P)      |
| step          | Delta       | log-uniform in 0.001 .. 0.1 at first              | (C,)        |
| skip          | D           | the input itself                                  | (C,)        |

Exact: convolution, recurrence and pieces with a carried state agree to rounding. Left out: dropout.
Cost: ``O(P L + L log L)`` time a channel for a stretch, ``O(P)`` for a step.
Oracles: ``scipy.signal`` on the dense system, `diagonal_scan`.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from jaxtyping import Complex, Float
from torch import Tensor, nn

from corelib.primitives.discretise import zero_order_hold_diagonal
from corelib.primitives.fft_conv import fft_conv

from .s4_state import S4State, check_input
from .shared import dplr_legs
from .vandermonde import vandermonde_moments, vandermonde_sums


class Diagonal(NamedTuple):
    """A diagonal system for an `S4D` layer to start from: one of each conjugate pair.

    ``basis (N, P)``, where there is one, says how a row ``C`` over the ``N`` states of the system
    that was diagonalised reads the diagonal one: ``C @ basis``. A real pole stands alone, with half
    its ``B``.
    """

    poles: Complex[Tensor, " P"]
    B: Complex[Tensor, " P"]
    basis: Complex[Tensor, "N P"] | None = None


def s4d_legs(N: int) -> Diagonal:
    """HiPPO-LegS without its rank-one part, and half its ``B`` (S4D, section 4.1)."""
    system = dplr_legs(N)
    return Diagonal(system.poles, system.B / 2)


def s4d_lin(N: int) -> Diagonal:
    """Evenly spaced frequencies ``pi n``, all at real part -1/2 (S4D-Lin)."""
    if N < 2 or N % 2:
        raise ValueError(f"N: expected an even size, at least 2, got {N}")
    frequencies = math.pi * torch.arange(N // 2, dtype=torch.float64)
    poles = torch.complex(torch.full_like(frequencies, -0.5), frequencies)
    return Diagonal(poles, torch.ones_like(poles))


class S4D(nn.Module):
    """One diagonal system for each channel: a sequence mixer on ``(B, L, C)``.

    Args:
        channels: width of the input and of the output.
        state_size: ``N`` of the default start, `s4d_legs`; even.
        start: another `Diagonal` for all channels to start from, in place of the default. With a
            ``basis``, the outputs are learned as rows over the states that it maps from.
        step_min, step_max: steps are drawn log-uniformly between.
    """

    #: Parameters that the paper trains more slowly and without weight decay.
    SYSTEM = ("log_rate", "frequency", "B", "log_step")

    def __init__(
        self,
        channels: int,
        state_size: int = 64,
        *,
        start: Diagonal | None = None,
        step_min: float = 1e-3,
        step_max: float = 1e-1,
    ):
        super().__init__()
        if channels < 1:
            raise ValueError(f"channels: expected at least 1, got {channels}")
        if not 0 < step_min <= step_max:
            got = f"{step_min} and {step_max}"
            raise ValueError(f"step_min, step_max: expected 0 < step_min <= step_max, got {got}")
        start = s4d_legs(state_size) if start is None else start
        if not bool((start.poles.real < 0).all()):
            raise ValueError("start: expected poles with negative real parts (a stable system)")
        self.channels = channels
        low, high = math.log(step_min), math.log(step_max)
        self.log_step = _parameter(low + (high - low) * torch.rand(channels, dtype=torch.float64))
        poles, B = (x.expand(channels, -1) for x in (start.poles, start.B))
        self.log_rate = _parameter((-poles.real).log())
        self.frequency = _parameter(poles.imag)
        self.B = _parameter(torch.view_as_real(B.resolve_conj().contiguous()))
        basis = start.basis
        if basis is not None:  # in real numbers, so that `.double()` and `.half()` take it along
            basis = torch.view_as_real(basis).to(torch.get_default_dtype())
        self.register_buffer("basis", basis)
        if basis is None:
            C = torch.randn(*poles.shape, dtype=torch.complex128)
            self.C = _parameter(torch.view_as_real(C))
        else:
            self.C = _parameter(torch.randn(channels, basis.shape[0], dtype=torch.float64))
        self.skip = nn.Parameter(torch.randn(channels))

    def system(self) -> tuple[Tensor, Tensor, Tensor]:
        """``(poles, B, C)`` of each channel, ``(C, P)`` complex."""
        poles = torch.complex(-self.log_rate.exp(), self.frequency)
        if self.basis is None:
            C = torch.view_as_complex(self.C)
        else:
            C = torch.complex(*(self.C @ part for part in self.basis.unbind(-1)))
        return poles, torch.view_as_complex(self.B), C

    def discrete(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """``(rates, decay, enter, C)``: ``x[t] = decay x[t-1] + enter u[t]``, decay = exp(rates)"""
        poles, B, C = self.system()
        step = self.log_step.exp()
        decay, gain = zero_order_hold_diagonal(poles, step)
        return step[:, None] * poles, decay, gain * B, C

    def kernel(self, L: int) -> Float[Tensor, "C L"]:
        """The convolution kernel of each channel, without the skip connection."""
        rates, _, enter, C = self.discrete()
        return vandermonde_sums(C * enter, rates, L)

    def forward(
        self, x: Float[Tensor, "B L C"], state: S4State | None = None
    ) -> tuple[Float[Tensor, "B L C"], S4State]:
        """A stretch as a convolution; ``state`` is what an earlier stretch or step returned."""
        check_input(x, ("B", "L"), self)
        u, L = x.transpose(1, 2), x.shape[1]
        rates, decay, enter, C = self.discrete()
        kernel = vandermonde_sums(C * enter, rates, L)
        first = kernel[:, :1] + self.skip[:, None]  # the skip connection is one more tap at lag 0
        y = fft_conv(u, torch.cat([first, kernel[:, 1:]], -1)) if L else u
        start = None
        if state is not None:
            start = state.x
            weights = (C * decay * start).flatten(0, 1)
            free = vandermonde_sums(weights, rates.repeat(x.shape[0], 1), L)
            y = y + free.unflatten(0, start.shape[:2])
        return y.transpose(1, 2), S4State(lambda: _state_after(u, rates, enter, start))

    def step(
        self, x_t: Float[Tensor, "B C"], state: S4State
    ) -> tuple[Float[Tensor, "B C"], S4State]:
        """One position as a recurrence."""
        check_input(x_t, ("B",), self)
        _, decay, enter, C = self.discrete()
        x = decay * state.x + enter * x_t[..., None]
        return 2 * (C * x).real.sum(-1) + self.skip * x_t, S4State(lambda: x)

    def init_state(self, batch: int) -> S4State:
        """The state before any input: zeros."""
        nothing = self.log_rate.new_zeros(batch, *self.log_rate.shape)
        return S4State(lambda: torch.complex(nothing, nothing))


def _state_after(u: Tensor, rates: Tensor, enter: Tensor, start: Tensor | None) -> Tensor:
    x = enter * vandermonde_moments(u.flip(-1), rates)
    return x if start is None else x + torch.exp(rates * u.shape[-1]) * start


def _parameter(value: Tensor) -> nn.Parameter:
    return nn.Parameter(value.to(torch.get_default_dtype()).clone())
