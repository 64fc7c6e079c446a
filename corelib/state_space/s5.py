"""S5: one diagonal system for all channels together (arXiv 2208.04933), with resets.

Idea: S4 gives every channel a system of its own, S5 one system with many inputs and outputs. Its
state is small enough to be formed at every step, so a scan takes the place of the convolution, and
what a scan can do, the layer can: start from a given state, and forget at given steps (Lu et al.,
arXiv 2303.03982).

    x[t] = keep[t] decay x[t-1] + gain B u[t]       y[t] = 2 Re(C x[t]) + skip u[t]
    decay = exp(step poles)      gain = (decay - 1) / poles      keep[t] = 0 at a reset, else 1

| here         | paper       | what                                             | shape      |
|:-------------|:------------|:-------------------------------------------------|:-----------|
| poles        | Lambda      | HiPPO-N: LegS without its rank-one part          | (P,)       |
| B, C         | V* B, C V   | input and output of each pole                    | (P, C), (C, P) |
| step         | Delta       | of each pole, log-uniform in 0.001 .. 0.1        | (P,)       |
| skip         | D           | the input itself                                 | (C,)       |
| resets       | d           | the past is forgotten before this input is added | (B, L)     |

``P = N / 2``, one of each conjugate pair. The paper draws real Gaussian ``B`` and ``C`` and turns
them by HiPPO's eigenvectors ``V``; as ``V`` is unitary and no eigenvector is the conjugate of
another that is kept, what comes out is exactly a complex Gaussian, and is drawn as one. As in
`S4D`, ``poles.real = -exp(...)`` keeps the system stable (released: clipped, or free). Left out:
several copies of a smaller HiPPO matrix (the paper's blocks), dropout.
Cost: ``O(C P)`` a step for B and C, ``O(P)`` for the scan, linear in L.
Oracles: `s5_reference`, a loop; ``scipy.signal`` on the dense system.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Bool, Complex, Float
from torch import Tensor, nn

from corelib.primitives.diagonal_scan import diagonal_scan
from corelib.primitives.discretise import zero_order_hold_diagonal

from .shared import dplr_legs

State = Complex[Tensor, "B P"]


def s5_reference(
    u: Float[Tensor, "B L C"],
    decay: Complex[Tensor, " P"],
    enter: Complex[Tensor, "P C"],
    C: Complex[Tensor, "C P"],
    *,
    resets: Bool[Tensor, "B L"] | None = None,
    state: State | None = None,
) -> tuple[Float[Tensor, "B L C"], State]:
    """The recurrence, one step after the other, without the skip: outputs and the last state."""
    x = decay.new_zeros(u.shape[0], len(decay)) if state is None else state
    outputs = []
    for t, u_t in enumerate(u.unbind(1)):
        if resets is not None:
            x = torch.where(resets[:, t, None], torch.zeros_like(x), x)
        x = decay * x + u_t.to(enter.dtype) @ enter.mT
        outputs.append(2 * (x @ C.mT).real)
    return torch.stack(outputs, 1), x


class S5System(nn.Module):
    """Poles and steps: what `S5Layer` and its convolutional form have in common.

    Args:
        state_size: ``N``, real numbers of state; even.
        step_min, step_max: steps are drawn log-uniformly between.
    """

    #: Parameters that the paper trains more slowly and without weight decay.
    SYSTEM = ("log_rate", "frequency", "log_step")

    def __init__(self, state_size: int, step_min: float = 1e-3, step_max: float = 1e-1):
        super().__init__()
        if not 0 < step_min <= step_max:
            got = f"{step_min} and {step_max}"
            raise ValueError(f"step_min, step_max: expected 0 < step_min <= step_max, got {got}")
        poles, dtype = dplr_legs(state_size).poles, torch.get_default_dtype()
        low, high = math.log(step_min), math.log(step_max)
        self.log_rate = nn.Parameter((-poles.real).log().to(dtype))
        self.frequency = nn.Parameter(poles.imag.to(dtype))
        self.log_step = nn.Parameter(low + (high - low) * torch.rand(len(poles)))

    def discrete(self) -> tuple[Complex[Tensor, " P"], Complex[Tensor, " P"]]:
        """``(decay, gain)`` of every pole, by the zero-order hold."""
        poles = torch.complex(-self.log_rate.exp(), self.frequency)
        step = self.log_step.exp()
        decay, gain = zero_order_hold_diagonal(poles[:, None], step)
        return decay[:, 0], gain[:, 0]


def complex_normal(*shape: int, variance: float) -> nn.Parameter:
    """Complex Gaussian numbers of that variance, as pairs of real ones ``(*shape, 2)``."""
    return nn.Parameter(math.sqrt(variance / 2) * torch.randn(*shape, 2))


class S5Layer(nn.Module):
    """One system for all channels: a sequence mixer on ``(B, L, C)``, with resets.

    Args:
        channels: width of the input and of the output.
        state_size: ``N``, real numbers of state for all channels together; even.
        step_min, step_max: steps are drawn log-uniformly between.
    """

    SYSTEM = ("B",)

    def __init__(
        self, channels: int, state_size: int = 64, *, step_min: float = 1e-3, step_max: float = 1e-1
    ):
        super().__init__()
        if channels < 1:
            raise ValueError(f"channels: expected at least 1, got {channels}")
        self.channels = channels
        self.system = S5System(state_size, step_min, step_max)
        self.B = complex_normal(state_size // 2, channels, variance=1 / channels)
        self.C = complex_normal(channels, state_size // 2, variance=2 / state_size)
        self.skip = nn.Parameter(torch.randn(channels))

    def discrete(self) -> tuple[Tensor, Tensor, Tensor]:
        """``(decay (P,), enter (P, C), C (C, P))`` of the recurrence."""
        decay, gain = self.system.discrete()
        return decay, gain[:, None] * torch.view_as_complex(self.B), torch.view_as_complex(self.C)

    def forward(
        self,
        x: Float[Tensor, "B L C"],
        state: State | None = None,
        resets: Bool[Tensor, "B L"] | None = None,
    ) -> tuple[Float[Tensor, "B L C"], State]:
        """A stretch as one scan, from ``state`` and across all ``resets``."""
        _check_input(x, ("B", "L"), self)
        decay, enter, C = self.discrete()
        fed = torch.view_as_complex((x @ _pairs(enter.mT).flatten(1)).unflatten(-1, (-1, 2)))
        h = diagonal_scan(decay, fed, reset=resets, state=state)
        state = h[:, -1] if x.shape[1] else self.init_state(len(x)) if state is None else state
        return self._read(h, C, x), state

    def step(
        self, x_t: Float[Tensor, "B C"], state: State, reset: Bool[Tensor, " B"] | None = None
    ) -> tuple[Float[Tensor, "B C"], State]:
        """One position; rows where ``reset`` is True forget ``state`` first."""
        _check_input(x_t, ("B",), self)
        decay, enter, C = self.discrete()
        if reset is not None:
            state = state.masked_fill(reset[:, None], 0)
        h = decay * state + x_t.to(enter.dtype) @ enter.mT
        return self._read(h, C, x_t), h

    def _read(self, h: Tensor, C: Tensor, x: Tensor) -> Tensor:
        """``2 Re(C h) + skip x``, as one product of real matrices."""
        C = _pairs(C.conj())  # Re(C h) = C.real h.real - C.imag h.imag
        return 2 * torch.view_as_real(h).flatten(-2) @ C.flatten(1).mT + self.skip * x

    def init_state(self, batch: int) -> State:
        """Zeros."""
        nothing = self.skip.new_zeros(batch, len(self.system.log_step))
        return torch.complex(nothing, nothing)


class S5Block(nn.Module):
    """The residual block of the paper: LayerNorm, `S5Layer`, GELU, then a gated linear map."""

    def __init__(self, channels: int, state_size: int = 64, **options: float):
        super().__init__()
        self.norm = nn.LayerNorm(channels)
        self.mixer = S5Layer(channels, state_size, **options)
        self.out = nn.Linear(channels, 2 * channels)

    def forward(
        self, x: Tensor, state: Tensor | None = None, resets: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        y, state = self.mixer(self.norm(x), state, resets)
        return x + self._gated(y), state

    def step(
        self, x_t: Tensor, state: Tensor, reset: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        y, state = self.mixer.step(self.norm(x_t), state, reset)
        return x_t + self._gated(y), state

    def init_state(self, batch: int) -> Tensor:
        return self.mixer.init_state(batch)

    def _gated(self, y: Tensor) -> Tensor:
        return nn.functional.glu(self.out(nn.functional.gelu(y)), -1)


def _pairs(x: Tensor) -> Tensor:
    return torch.view_as_real(x.resolve_conj())


def _check_input(x: Tensor, axes: tuple[str, ...], layer: S5Layer) -> None:
    if x.dim() != len(axes) + 1 or x.shape[-1] != layer.channels:
        raise ValueError(
            f"x: expected ({', '.join(axes)}, {layer.channels}), got shape {tuple(x.shape)}"
        )
    if x.dtype != layer.skip.dtype:
        raise TypeError(f"x: expected the layer's dtype, {layer.skip.dtype}, got {x.dtype}")
