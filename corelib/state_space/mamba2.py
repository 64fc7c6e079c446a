"""Mamba-2's block (arXiv 2405.21060): one decay a head, so that the scan becomes matrix products.

    z, xBC, dt = in_proj(input)      x, B, C = silu(conv(xBC))
    y = ssd_chunked(x, softplus(dt + dt_bias), A, B, C, D)
    output = out_proj(norm(y * silu(z)))

The idea: with ``A`` a single number a head, a chunk's outputs are ``(L o C B^T) X`` with a
triangular matrix ``L`` of decays, attention with a mask; states can then be 4 to 16 times larger at
the same cost. Against Mamba, ``B`` and ``C`` come from the input side by side with ``x`` (no
projection after the convolution), heads share them in groups, and a norm stands before the output.

| here   | paper | shape                                  |
|:-------|:------|:---------------------------------------|
| x      | X     | (B, H, L, V), E = H * V = expand * C   |
| dt     | Delta | (B, H, L)                              |
| A      | A     | (H,), ``-exp(A_log)``                  |
| B, C   | B, C  | (B, G, L, N)                           |

Parameters have the names and shapes of transformers' ``Mamba2Mixer``: its ``state_dict`` loads.
State: the convolution's last inputs ``(B, E + 2 G N, W - 1)`` and the scan's ``(B, H, N, V)``
(transformers keeps ``(B, H, V, N)``). Oracle: transformers' ``Mamba2ForCausalLM``.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from ..primitives import causal_short_conv, ssd_chunked
from .mamba import initial_dt_bias


class Mamba2State(NamedTuple):
    """What a block knows of the past: recent inputs of the convolution, state of the scan."""

    inputs: Float[Tensor, "B channels inputs"]
    scan: Float[Tensor, "B H N V"]


class GatedRMSNorm(nn.Module):
    """``x * silu(z)``, divided by its root mean square over the last axis, times ``weight``."""

    def __init__(self, width: int, eps: float = 1e-5):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(width)), eps

    def forward(self, x: Float[Tensor, "B L E"], z: Float[Tensor, "B L E"]) -> Tensor:
        return F.rms_norm(x * F.silu(z), self.weight.shape, self.weight, self.eps)


class Mamba2Block(nn.Module):
    """A sequence mixer ``(B, L, C) -> (B, L, C)``.

    ``scan``: what runs the recurrence, a function with the arguments of `ssd_chunked`; another one
    may be put in its place.

    Args:
        width: C. state: N. expand: E / C. head_width: V, which divides E. groups: G, which divides
            the heads. conv: W, inputs that the convolution sees. chunk: steps multiplied at once.
    """

    scan = staticmethod(ssd_chunked)

    def __init__(
        self,
        width: int,
        *,
        state: int = 64,
        expand: int = 2,
        head_width: int = 64,
        groups: int = 1,
        conv: int = 4,
        chunk: int = 64,
    ):
        super().__init__()
        inner = expand * width
        if inner % head_width or (inner // head_width) % groups:
            raise ValueError(
                f"head_width, groups: expected a width that divides {inner} into heads that "
                f"{groups} groups divide, got {head_width}"
            )
        heads, self.state, self.groups, self.chunk = inner // head_width, state, groups, chunk
        channels = inner + 2 * groups * state
        self.in_proj = nn.Linear(width, inner + channels + heads, bias=False)
        self.conv1d = nn.Conv1d(channels, channels, conv, groups=channels)
        self.dt_bias = nn.Parameter(initial_dt_bias(heads))
        self.A_log = nn.Parameter(torch.empty(heads).uniform_(1, 16).log())
        self.D = nn.Parameter(torch.ones(heads))
        self.norm = GatedRMSNorm(inner)
        self.out_proj = nn.Linear(inner, width, bias=False)

    def forward(
        self, x: Float[Tensor, "B L C"], state: Mamba2State | None = None
    ) -> tuple[Float[Tensor, "B L C"], Mamba2State]:
        """The outputs, and the state behind the last input."""
        state = self.init_state(len(x)) if state is None else state
        parts = self.in_proj(x).to(self.D.dtype)
        with torch.autocast(x.device.type, enabled=False):  # only projections may be narrower
            y, state = self._mix(parts, state)
        return self.out_proj(y), state

    def _mix(self, parts: Tensor, state: Mamba2State) -> tuple[Tensor, Mamba2State]:
        """Convolution, scan and norm: what stands between the two projections."""
        inner, heads = len(self.norm.weight), len(self.D)
        channels = len(self.conv1d.weight)
        z, mixed, dt = parts.split([inner, channels, heads], 2)
        weight, bias = self.conv1d.weight[:, 0], self.conv1d.bias
        mixed, inputs = causal_short_conv(
            mixed.mT, weight, bias, state=state.inputs, return_state=True
        )
        x, B, C = F.silu(mixed).mT.split([inner, *2 * [self.groups * self.state]], 2)
        y, scan = self.scan(
            x.unflatten(2, (heads, -1)).transpose(1, 2),
            dt.mT,
            -self.A_log.exp(),
            *(part.unflatten(2, (self.groups, -1)).transpose(1, 2) for part in (B, C)),
            self.D,
            dt_bias=self.dt_bias,
            dt_softplus=True,
            chunk=self.chunk,
            state=state.scan,
            return_state=True,
        )
        return self.norm(y.transpose(1, 2).flatten(2), z), Mamba2State(inputs, scan)

    def step(
        self, x_t: Float[Tensor, "B C"], state: Mamba2State
    ) -> tuple[Float[Tensor, "B C"], Mamba2State]:
        """One input more."""
        y, state = self(x_t[:, None], state)
        return y[:, 0], state

    def init_state(self, batch: int) -> Mamba2State:
        """Nothing seen yet."""
        channels, _, conv = self.conv1d.weight.shape
        heads, scan_dtype = len(self.D), torch.promote_types(self.D.dtype, torch.float32)
        shape = batch, heads, self.state, len(self.norm.weight) // heads
        return Mamba2State(
            self.D.new_zeros(batch, channels, conv - 1),
            self.D.new_zeros(shape, dtype=scan_dtype),
        )


def example() -> dict:
    """A block of width 6 with two heads, 4 states, and six tokens for it."""
    torch.manual_seed(0)
    mixer = Mamba2Block(6, state=4, head_width=6, chunk=4).double()
    return dict(mixer=mixer, x=torch.randn(2, 6, 6, dtype=torch.float64))
