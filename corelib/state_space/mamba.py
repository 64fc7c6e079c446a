"""Mamba's block (arXiv 2312.00752): a state space model whose step, input and output select.

    x, z = in_proj(input)            x = silu(conv(x))            dt, B, C = x_proj(x)
    y = selective_scan(x, softplus(dt_proj(dt)), A, B, C, D, z)   output = out_proj(y)

The idea: let ``dt``, ``B`` and ``C`` depend on the input, so that the model decides at every step
what to write, what to read and how much to forget. A constant ``dt`` makes S4's filter of it
again, and then it cannot copy selectively (section 3.1).

| here     | paper | shape                          |
|:---------|:------|:-------------------------------|
| x, z     | x, z  | (B, L, E), E = expand * C      |
| dt       | Delta | (B, L, E), through rank R      |
| A        | A     | (E, N), ``-exp(A_log)``        |
| B, C     | B, C  | (B, L, N)                      |

Parameters have the names and shapes of transformers' ``MambaMixer``: its ``state_dict`` loads.
State: the convolution's last inputs ``(B, E, W - 1)`` and the scan's ``(B, E, N)``, whatever L is.
Time O(L E N) for the scan. Oracle: transformers' ``MambaForCausalLM``, whole and step by step.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from ..primitives import causal_short_conv, selective_scan


class MambaState(NamedTuple):
    """What a block knows of the past: recent inputs of the convolution, state of the scan."""

    inputs: Float[Tensor, "B E inputs"]
    scan: Float[Tensor, "B E N"]


class MambaBlock(nn.Module):
    """A sequence mixer ``(B, L, C) -> (B, L, C)``.

    Args:
        width: C. state: N. expand: E / C. conv: W, inputs that the convolution sees.
        rank: R, of the projection to ``dt``; None is C / 16, rounded up.
    """

    def __init__(
        self,
        width: int,
        *,
        state: int = 16,
        expand: int = 2,
        conv: int = 4,
        rank: int | None = None,
    ):
        super().__init__()
        inner, self.rank = expand * width, math.ceil(width / 16) if rank is None else rank
        self.in_proj = nn.Linear(width, 2 * inner, bias=False)
        self.conv1d = nn.Conv1d(inner, inner, conv, groups=inner)
        self.x_proj = nn.Linear(inner, self.rank + 2 * state, bias=False)
        self.dt_proj = nn.Linear(self.rank, inner)
        self.A_log = nn.Parameter(torch.arange(1.0, state + 1).log().repeat(inner, 1))
        self.D = nn.Parameter(torch.ones(inner))
        self.out_proj = nn.Linear(inner, width, bias=False)
        nn.init.uniform_(self.dt_proj.weight, -(self.rank**-0.5), self.rank**-0.5)
        with torch.no_grad():
            self.dt_proj.bias.copy_(initial_dt_bias(inner))

    def forward(
        self, x: Float[Tensor, "B L C"], state: MambaState | None = None
    ) -> tuple[Float[Tensor, "B L C"], MambaState]:
        """The outputs, and the state behind the last input."""
        state = self.init_state(len(x)) if state is None else state
        parts = self.in_proj(x).to(self.D.dtype)
        with torch.autocast(x.device.type, enabled=False):  # only projections may be narrower
            y, state = self._mix(parts, state)
        return self.out_proj(y), state

    def _mix(self, parts: Tensor, state: MambaState) -> tuple[Tensor, MambaState]:
        """Convolution and scan: what stands between the two projections."""
        x, z = parts.mT.chunk(2, 1)
        weight, bias = self.conv1d.weight[:, 0], self.conv1d.bias
        x, inputs = causal_short_conv(x, weight, bias, state=state.inputs, return_state=True)
        x = F.silu(x)
        dt, B, C = self._selection(x)
        y, scan = selective_scan(
            x,
            dt,
            -self.A_log.exp(),
            B,
            C,
            self.D,
            z,
            dt_bias=self.dt_proj.bias,
            dt_softplus=True,
            state=state.scan,
            return_state=True,
        )
        return y.mT, MambaState(inputs, scan)

    def step(
        self, x_t: Float[Tensor, "B C"], state: MambaState
    ) -> tuple[Float[Tensor, "B C"], MambaState]:
        """One input more."""
        y, state = self(x_t[:, None], state)
        return y[:, 0], state

    def init_state(self, batch: int) -> MambaState:
        """Nothing seen yet."""
        inner, conv = self.conv1d.weight.shape[0], self.conv1d.weight.shape[2]
        scan_dtype = torch.promote_types(self.D.dtype, torch.float32)
        return MambaState(
            self.D.new_zeros(batch, inner, conv - 1),
            self.D.new_zeros(batch, *self.A_log.shape, dtype=scan_dtype),
        )

    def _selection(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """``dt (B, E, L)`` without its bias, ``B`` and ``C (B, N, L)``, of ``x (B, E, L)``."""
        N = self.A_log.shape[1]
        dt, B, C = self.x_proj(x.mT).split([self.rank, N, N], 2)
        return self.dt_proj.weight @ dt.mT, B.mT, C.mT


def initial_dt_bias(channels: int, low: float = 1e-3, high: float = 0.1) -> Tensor:
    """``softplus`` of it is log-uniform between ``low`` and ``high`` (section 3.6)."""
    dt = torch.exp(torch.rand(channels) * math.log(high / low) + math.log(low))
    return dt + torch.log(-torch.expm1(-dt))


def example() -> dict:
    """A block of width 6 with 4 states and six tokens for it."""
    torch.manual_seed(0)
    return dict(mixer=MambaBlock(6, state=4).double(), x=torch.randn(2, 6, 6, dtype=torch.float64))
