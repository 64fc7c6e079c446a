"""S4: Efficiently Modeling Long Sequences with Structured State Spaces (arXiv 2111.00396).

Idea: a linear recurrence is a convolution with a kernel as long as the sequence; if its matrix is
diagonal plus rank one, the kernel's spectrum is four Cauchy sums, and the kernel an inverse FFT.

    x[t] = A_bar x[t-1] + B_bar u[t]       y[t] = 2 Re(C x[t]) + skip u[t]              (recurrence)
    y = fft_conv(u, kernel)                kernel[t] = 2 Re(C A_bar^t B_bar)           (convolution)
    spectrum = h (S(C~ B) - h c S(C~ p) S(p* B) / (1 + h c S(p* p))) e^(i a)     kernel = irfft(...)

at the angles ``a = pi k / L``, with ``h = step / 2``, ``c = cos a`` and the Cauchy sums
``S(w) = sum w / (i sin a - h poles cos a)`` of `corelib.state_space.cauchy`. This is the paper's
algorithm 1 with ``z = exp(-2 i a)``: ``2 / (1 + z)`` and ``(1 - z) / (1 + z)``, which are singular
at ``z = -1``, come as ``e^(i a) / cos a`` and ``i tan a``, and the cosines cancel.

| here        | paper       | what                                                   | shape       |
|:------------|:------------|:-------------------------------------------------------|:------------|
| poles       | Lambda      | of A = diag(poles) - p p*; one of each conjugate pair  | (C, N/2)    |
| p, B        | P = Q, B    | rank-one part, input                                   | (C, N/2)    |
| C_tilde, C~ | C (I-A^L)   | what is learned in place of C, at ``length`` L         | (C, N/2)    |
| step        | Delta       | log-uniform in 0.001 .. 0.1 at first                   | (C,)        |
| skip        | D           | the input itself                                       | (C,)        |

Exact: convolution and recurrence agree to rounding, for every length and across pieces (a carried
state is not in the paper; `dplr.final_state` and `dplr.free_outputs` give it). As in the
authors' later code, ``Q = P`` and ``poles.real = -exp(...)``, so that no training step can make the
system unstable. Left out: dropout, and sharing A and B between channels.
Cost, with ``N`` the state: ``O(N L + L log L)`` time a channel for a stretch, ``O(N)`` for a step.
The recurrence and both kernels as functions: `corelib.state_space.dplr_kernel`.
Oracles: ``scipy.signal`` (``cont2discrete``, ``lfilter``), dense matrix powers in float64.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor, nn

from corelib.primitives.fft_conv import fft_conv, two_sided_fft_conv

from .dplr import (
    StepForm,
    discrete_form,
    double_tilde,
    dplr_step,
    final_state,
    free_outputs,
    from_tilde,
    output_row,
    step_form,
    to_pairs,
    to_real,
    to_tilde,
)
from .dplr_kernel import s4_kernel, s4_kernel_reference, s4_reference  # noqa: F401
from .s4_state import S4State, check_input
from .shared import Dplr, dplr_legs, parameter_groups  # noqa: F401  (what a user of S4 wants here)


class S4(nn.Module):
    """One S4 system for each channel: a sequence mixer on ``(B, L, C)``.

    Args:
        channels: width of the input and of the output.
        state_size: ``N``, real numbers of state a channel; even.
        length: ``C_tilde`` is learned for kernels of this length. Shorter inputs take its first
            taps; longer ones are exact too, at the price of a few matrix products.
        step_min, step_max: steps are drawn log-uniformly between. A channel of step ``s`` sees
            about ``1 / s`` inputs back.
    """

    #: Parameters that the paper trains more slowly and without weight decay.
    SYSTEM = ("log_rate", "frequency", "p", "B", "log_step")

    def __init__(
        self,
        channels: int,
        state_size: int = 64,
        length: int = 1024,
        *,
        step_min: float = 1e-3,
        step_max: float = 1e-1,
    ):
        super().__init__()
        for name, value in (("channels", channels), ("length", length)):
            if value < 1:
                raise ValueError(f"{name}: expected at least 1, got {value}")
        if not 0 < step_min <= step_max:
            got = f"{step_min} and {step_max}"
            raise ValueError(f"step_min, step_max: expected 0 < step_min <= step_max, got {got}")
        self.channels, self.length = channels, length
        system = Dplr(*(x.expand(channels, -1) for x in dplr_legs(state_size)))
        low, high = math.log(step_min), math.log(step_max)
        log_step = low + (high - low) * torch.rand(channels, dtype=torch.float64)
        C = torch.randn(channels, state_size // 2, dtype=torch.complex128)
        C_tilde = to_tilde(system, C, log_step.exp(), length)
        self.log_rate = self._parameter((-system.poles.real).log())
        self.frequency = self._parameter(system.poles.imag)
        self.p = self._parameter(torch.view_as_real(system.p.resolve_conj()))
        self.B = self._parameter(torch.view_as_real(system.B.resolve_conj()))
        self.C_tilde = self._parameter(torch.view_as_real(C_tilde.resolve_conj()))
        self.log_step = self._parameter(log_step)
        self.skip = nn.Parameter(torch.randn(channels))

    @staticmethod
    def _parameter(value: Tensor) -> nn.Parameter:
        return nn.Parameter(value.to(torch.get_default_dtype()).clone())

    def system(self) -> Dplr:
        """The continuous system of each channel."""
        poles = torch.complex(-self.log_rate.exp(), self.frequency)
        return Dplr(poles, torch.view_as_complex(self.p), torch.view_as_complex(self.B))

    def discrete(self) -> tuple[Float[Tensor, "C N N"], Float[Tensor, "C N"]]:
        """The recurrence of each channel as dense real matrices (`dplr.discrete_form`)."""
        return discrete_form(self.system(), self.log_step.exp())

    def step_form(self) -> StepForm:
        """The recurrence of each channel, for `step`."""
        system, step = self.system(), self.log_step.exp()
        C = from_tilde(system, torch.view_as_complex(self.C_tilde), step, self.length)
        return step_form(system, C, step)

    def kernel(self, L: int) -> Float[Tensor, "C L"]:
        """The convolution kernel of each channel, without the skip connection."""
        system, step, length = self.system(), self.log_step.exp(), self.length
        C_tilde = torch.view_as_complex(self.C_tilde)
        while length < L:
            C_tilde, length = double_tilde(system, C_tilde, step, length), 2 * length
        return s4_kernel(system, C_tilde, step, length)[:, :L]

    def forward(
        self, x: Float[Tensor, "B L C"], state: S4State | None = None
    ) -> tuple[Float[Tensor, "B L C"], S4State]:
        """A stretch as a convolution; ``state`` is what an earlier stretch or step returned."""
        check_input(x, ("B", "L"), self)
        u = x.transpose(1, 2)
        kernel = self.kernel(x.shape[1])
        first = kernel[:, :1] + self.skip[:, None]  # the skip connection is one more tap at lag 0
        y = fft_conv(u, torch.cat([first, kernel[:, 1:]], -1))
        if state is None:
            return y.transpose(1, 2), S4State(lambda: self._state_after(u, None))
        form, start = state.form or self.step_form(), state.x
        A_bar, _ = self.discrete()
        y = y + free_outputs(A_bar, output_row(form.C), to_real(start), u.shape[-1])
        return y.transpose(1, 2), S4State(lambda: self._state_after(u, start), form)

    def _state_after(self, u: Tensor, start: Tensor | None) -> Tensor:
        A_bar, B_bar = self.discrete()
        return to_pairs(final_state(A_bar, B_bar, u, None if start is None else to_real(start)))

    def step(
        self, x_t: Float[Tensor, "B C"], state: S4State
    ) -> tuple[Float[Tensor, "B C"], S4State]:
        """One position as a recurrence."""
        check_input(x_t, ("B",), self)
        form = state.form or self.step_form()
        x, y = dplr_step(form, state.x, x_t)
        return y + self.skip * x_t, S4State(lambda: x, form)

    def init_state(self, batch: int) -> S4State:
        """The state before any input: zeros."""
        form = self.step_form()
        return S4State(lambda: form.decay.new_zeros(batch, *form.decay.shape), form)


class TwoSidedS4(nn.Module):
    """S4 in both directions at once: ``(B, L, C) -> (B, L, C)``, not causal, so without steps."""

    def __init__(self, channels: int, state_size: int = 64, length: int = 1024, **options: float):
        super().__init__()
        self.past = S4(channels, state_size, length, **options)
        self.future = S4(channels, state_size, length, **options)
        del self.future.skip  # the input itself is added once

    def forward(self, x: Float[Tensor, "B L C"]) -> Float[Tensor, "B L C"]:
        check_input(x, ("B", "L"), self.past)
        past, future = self.past.kernel(x.shape[1]), self.future.kernel(x.shape[1])
        y = two_sided_fft_conv(x.transpose(1, 2), past, future)
        return y.transpose(1, 2) + self.past.skip * x


class S4Block(nn.Module):
    """The paper's residual block: LayerNorm, `S4`, GELU, then a gated linear map (GLU)."""

    def __init__(self, channels: int, state_size: int = 64, length: int = 1024, **options: float):
        super().__init__()
        self.norm = nn.LayerNorm(channels)
        self.mixer = S4(channels, state_size, length, **options)
        self.out = nn.Linear(channels, 2 * channels)

    def forward(self, x: Tensor, state: S4State | None = None) -> tuple[Tensor, S4State]:
        y, state = self.mixer(self.norm(x), state)
        return x + self.gated(y), state

    def step(self, x_t: Tensor, state: S4State) -> tuple[Tensor, S4State]:
        y, state = self.mixer.step(self.norm(x_t), state)
        return x_t + self.gated(y), state

    def init_state(self, batch: int) -> S4State:
        return self.mixer.init_state(batch)

    def gated(self, y: Tensor) -> Tensor:
        """What follows the mixer, without the skip."""
        return nn.functional.glu(self.out(nn.functional.gelu(y)), -1)


def example() -> dict:
    """Six inputs on two channels, and a system of size 4 with steps 0.1 and 0.5.

    >>> y, state = s4_reference(**example())
    >>> y.shape, state.shape
    (torch.Size([1, 2, 6]), torch.Size([1, 2, 2]))
    """
    u = torch.tensor([[[1.0, 0, 0, 0, 0, 0], [0, 1, 2, 0, -1, 0]]], dtype=torch.float64)
    system = Dplr(*(x.expand(2, -1) for x in dplr_legs(4)))
    C = torch.tensor([[1 - 1j, 0.5j], [0.25, 1]], dtype=torch.complex128)
    return dict(u=u, system=system, C=C, step=torch.tensor([0.1, 0.5], dtype=torch.float64))
