"""Minimal cells of the three paradigms that `corelib.state_space.mamba360` sorts models into.

* `LRU` (arXiv 2303.06349), recurrent: ``h = decay h + gamma B u``, ``y = Re(C h) + skip u`` with
  ``decay = exp(-exp(nu) + i exp(theta))`` drawn on a ring, and ``gamma = sqrt(1 - |decay|^2)`` at
  first, so that white noise of variance 1 keeps every state at variance 1, whatever its decay.
* `HGRN` (2311.04823), recurrent: ``h = f h + (1 - f) c`` with a forget gate ``f`` between a lower
  bound and 1, and an output gate. Here real (the paper's decays turn as well).
* `GSS` (2206.13947), gated: ``y = out(gelu(W u) * ssm(V u))`` with a diagonal system.
* `LiquidS4` (2209.12951), structural: besides the inputs, products of neighbouring inputs enter,
  ``h = decay h + sum over p <= order of enter^p u[t] u[t-1] ... u[t-p+1]``: a kernel for each order
  (the paper's KB form, whose kernels share poles and outputs).
* `S4ND` (2210.06583), structural: a diagonal system for each axis of a grid; the kernel is the
  outer product of theirs. Causal along each axis (the paper's images take both directions).

Only what makes the paradigm is kept: no norms, residuals or dropout around them.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Complex, Float
from torch import Tensor, nn

from corelib.primitives import diagonal_scan, fft_conv

from .s4_state import S4State
from .s4d import S4D
from .survey_layers import ByForward, Sequence
from .vandermonde import vandermonde_moments, vandermonde_sums

GridKernel = Float[Tensor, "C *grid"]


class LRU(ByForward):
    """The linear recurrent unit; the state is ``(B, P)`` complex, ``P = state_size / 2``.

    Args:
        width: C. state_size: real numbers of state for all channels together; even.
        r_min, r_max: the ring that decays are drawn from, evenly by area. max_phase: their angles.
    """

    SYSTEM = ("nu", "theta", "log_gamma")

    def __init__(
        self,
        width: int,
        state_size: int = 64,
        *,
        r_min: float = 0.9,
        r_max: float = 0.999,
        max_phase: float = 2 * math.pi,
    ):
        super().__init__()
        if state_size < 2 or state_size % 2:
            raise ValueError(f"state_size: expected an even size, at least 2, got {state_size}")
        if not 0 <= r_min < r_max < 1:
            raise ValueError(f"r_min, r_max: expected 0 <= r_min < r_max < 1, got {r_min}, {r_max}")
        P, even = state_size // 2, torch.rand(2, state_size // 2, dtype=torch.float64)
        squared = r_min**2 + (r_max**2 - r_min**2) * even[0]
        dtype = torch.get_default_dtype()
        self.nu = nn.Parameter((-squared.log() / 2).log().to(dtype))
        self.theta = nn.Parameter((max_phase * even[1]).log().to(dtype))
        self.log_gamma = nn.Parameter(((1 - squared).log() / 2).to(dtype))
        self.B = nn.Parameter(torch.randn(P, width, 2) / (2 * width) ** 0.5)
        self.C = nn.Parameter(torch.randn(width, P, 2) / P**0.5)
        self.skip = nn.Parameter(torch.randn(width))

    def decay(self) -> Complex[Tensor, " P"]:
        """``exp(-exp(nu) + i exp(theta))``: inside the unit circle whatever is learned."""
        return torch.exp(torch.complex(-self.nu.exp(), self.theta.exp()))

    def init_state(self, batch: int) -> Complex[Tensor, "B P"]:
        nothing = self.nu.new_zeros(batch, len(self.nu))
        return torch.complex(nothing, nothing)

    def states(self, x: Sequence, state: Tensor | None = None) -> Complex[Tensor, "B L P"]:
        """Every state."""
        enter = (self.log_gamma.exp()[:, None, None] * self.B).transpose(1, 2).flatten(0, 1)
        fed = torch.view_as_complex((x @ enter.mT).unflatten(-1, (-1, 2)))
        return diagonal_scan(self.decay(), fed, state=state)

    def forward(
        self, x: Sequence, state: Complex[Tensor, "B P"] | None = None
    ) -> tuple[Sequence, Complex[Tensor, "B P"]]:
        h = self.states(x, state)
        real, imaginary = self.C.unbind(-1)
        return h.real @ real.mT - h.imag @ imaginary.mT + self.skip * x, h[:, -1]


class HGRN(ByForward):
    """A linear recurrence with a data-dependent forget gate above a learned bound."""

    def __init__(self, width: int, state_size: int, *, lower: float = 0.5):
        super().__init__()
        if not 0 < lower < 1:
            raise ValueError(f"lower: expected more than 0 and less than 1, got {lower}")
        self.enter = nn.Linear(width, 3 * state_size)
        self.bound = nn.Parameter(torch.full((state_size,), math.log(lower / (1 - lower))))
        self.out = nn.Linear(state_size, width, bias=False)

    def init_state(self, batch: int) -> Float[Tensor, "B N"]:
        return self.bound.new_zeros(batch, len(self.bound))

    def forward(
        self, x: Sequence, state: Float[Tensor, "B N"] | None = None
    ) -> tuple[Sequence, Float[Tensor, "B N"]]:
        forget, candidate, gate = self.enter(x).chunk(3, -1)
        lower = self.bound.sigmoid()
        f = lower + (1 - lower) * forget.sigmoid()
        h = diagonal_scan(f, (1 - f) * F.silu(candidate), state=state)
        return self.out(h * gate.sigmoid()), h[:, -1]


class GSS(ByForward):
    """``out(gelu(gate(x)) * memory(gelu(enter(x))))``: a fixed system, and a gate beside it."""

    def __init__(self, width: int, state_size: int = 64):
        super().__init__()
        self.gate, self.enter = nn.Linear(width, width), nn.Linear(width, width)
        self.memory = S4D(width, state_size)
        self.out = nn.Linear(width, width)

    def init_state(self, batch: int) -> S4State:
        return self.memory.init_state(batch)

    def forward(self, x: Sequence, state: S4State | None = None) -> tuple[Sequence, S4State]:
        y, state = self.memory(F.gelu(self.enter(x)), state)
        return self.out(F.gelu(self.gate(x)) * y), state


class LiquidState(NamedTuple):
    """The system's state, and the last ``order - 1`` inputs, oldest first."""

    h: Complex[Tensor, "B C P"]
    inputs: Float[Tensor, "B C inputs"]


class LiquidS4(S4D):
    """S4D with products of up to ``order`` neighbouring inputs; ``order=1`` is S4D itself."""

    def __init__(self, channels: int, state_size: int = 64, *, order: int = 2, **options):
        if order < 1:
            raise ValueError(f"order: expected at least 1, got {order}")
        super().__init__(channels, state_size, **options)
        self.order = order

    def init_state(self, batch: int) -> LiquidState:
        inputs = self.skip.new_zeros(batch, self.channels, self.order - 1)
        return LiquidState(super().init_state(batch).x, inputs)

    def products(self, padded: Float[Tensor, "B C inputs"]) -> list[Float[Tensor, "B C L"]]:
        """``u[t] u[t-1] ... u[t-p+1]`` for ``p`` from 1; ``padded`` begins with earlier inputs."""
        L = padded.shape[-1] - self.order + 1
        shifted = [padded[..., self.order - 1 - p :][..., :L] for p in range(self.order)]
        found = [shifted[0]]
        for earlier in shifted[1:]:
            found.append(found[-1] * earlier)
        return found

    def forward(
        self, x: Sequence, state: LiquidState | None = None
    ) -> tuple[Sequence, LiquidState]:
        state = self.init_state(len(x)) if state is None else state
        rates, decay, enter, C = self.discrete()
        padded, L = torch.cat([state.inputs, x.mT], -1), x.shape[1]
        h = torch.exp(rates * L) * state.h
        free = (C * decay * state.h).flatten(0, 1)
        y = vandermonde_sums(free, rates.repeat(len(x), 1), L).unflatten(0, state.h.shape[:2])
        for p, product in enumerate(self.products(padded), 1):
            y = y + fft_conv(product.contiguous(), vandermonde_sums(C * enter**p, rates, L))
            h = h + enter**p * vandermonde_moments(product.flip(-1), rates)
        y = y + self.skip[:, None] * x.mT
        return y.mT, LiquidState(h, padded[..., padded.shape[-1] - self.order + 1 :])

    def step(
        self, x_t: Float[Tensor, "B C"], state: LiquidState
    ) -> tuple[Float[Tensor, "B C"], LiquidState]:
        """The recurrence itself."""
        _, decay, enter, C = self.discrete()
        padded = torch.cat([state.inputs, x_t[..., None]], -1)
        h = decay * state.h
        for p, product in enumerate(self.products(padded), 1):
            h = h + enter**p * product
        return 2 * (C * h).real.sum(-1) + self.skip * x_t, LiquidState(h, padded[..., 1:])


class S4ND(nn.Module):
    """One `S4D` kernel for each axis of a grid: ``(B, *grid, C) -> (B, *grid, C)``, no steps."""

    def __init__(self, channels: int, state_size: int = 64, *, dims: int = 2, **options):
        super().__init__()
        if dims < 1:
            raise ValueError(f"dims: expected at least 1, got {dims}")
        self.axes = nn.ModuleList(S4D(channels, state_size, **options) for _ in range(dims))
        for axis in self.axes:
            del axis.skip  # the input itself is added once
        self.skip = nn.Parameter(torch.randn(channels))

    def kernel(self, *grid: int) -> GridKernel:
        """The outer product of the axes' kernels, without the skip connection."""
        self._check(grid)
        kernel = self.axes[0].kernel(grid[0])
        for axis, size in zip(self.axes[1:], grid[1:]):
            along = axis.kernel(size).unflatten(1, (*[1] * (kernel.dim() - 1), size))
            kernel = kernel[..., None] * along
        return kernel

    def forward(self, x: Float[Tensor, "B *grid C"]) -> Float[Tensor, "B *grid C"]:
        """One axis after the other, which is convolving with the outer product."""
        self._check(x.shape[1:-1])
        y = x.movedim(-1, 1)
        for d, axis in enumerate(self.axes, 2):
            along = y.movedim((1, d), (-2, -1))
            y = fft_conv(along.contiguous(), axis.kernel(x.shape[d - 1])).movedim((-2, -1), (1, d))
        return y.movedim(1, -1) + self.skip * x

    def _check(self, grid: tuple[int, ...]) -> None:
        if len(grid) != len(self.axes):
            raise ValueError(f"x: expected a grid of {len(self.axes)} axes, got {tuple(grid)}")
