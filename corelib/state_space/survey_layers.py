"""Minimal layers that the surveys compare and no other module has: two ancestors and the controls.

Each is a sequence mixer on ``(B, L, C)`` without norm or residual, in the fewest lines that keep
what its paper changed:

* `LSSL` (arXiv 2110.13985): ``x' = A x + B u`` with HiPPO's dense ``A``, bilinear; the kernel
  ``C A_bar^t B_bar`` from powers of a matrix, ``O(N^2 L)``. That cost is what S4 removed. Here
  ``A`` and ``B`` stay as they are; steps and ``C`` are learned.
* `H3` (2212.14052): ``q * diag_ssm(shift_ssm(k) * v)``, heads one channel wide, so that the outer
  product of keys and values is a product.
* `CausalAttention` (1706.03762, rotary positions 2104.09864) and `GatedRecurrence` (the GRU,
  1406.1078): what state space models are held against.
* `Hybrid`: a Mamba block, and attention on top of it (Jamba, 2403.19887, has one layer of attention
  in eight, and experts).

Oracles: for `LSSL` the loop of dense matrices, for `CausalAttention`
``torch.nn.functional.scaled_dot_product_attention``, for all of them `corelib.testing.conformance`.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from corelib.primitives import (
    attention,
    bilinear,
    causal_short_conv,
    fft_conv,
    rope_frequencies,
    rope_half_split,
)

from .dplr import final_state, free_outputs, krylov
from .mamba import MambaBlock
from .s4_state import S4State
from .s4d import S4D
from .shared import hippo_legs

Sequence = Float[Tensor, "B L C"]


class ByForward(nn.Module):
    """A mixer whose `step` is `forward` on one position."""

    def step(self, x_t: Float[Tensor, "B C"], state: Any) -> tuple[Float[Tensor, "B C"], Any]:
        y, state = self(x_t[:, None], state)
        return y[:, 0], state


class LSSL(ByForward):
    """HiPPO's dense matrix for every channel; the state is ``(B, C, N)``."""

    SYSTEM = ("log_step",)

    def __init__(self, channels: int, state_size: int = 64, step_min=1e-3, step_max=1e-1):
        super().__init__()
        A, B = hippo_legs(state_size)
        dtype = torch.get_default_dtype()
        self.register_buffer("A", A.to(dtype))
        self.register_buffer("B", B.to(dtype))
        low, high = math.log(step_min), math.log(step_max)
        self.log_step = nn.Parameter(low + (high - low) * torch.rand(channels))
        self.C = nn.Parameter(torch.randn(channels, state_size) / state_size**0.5)
        self.skip = nn.Parameter(torch.randn(channels))

    def discrete(self) -> tuple[Tensor, Tensor]:
        """``A_bar (C, N, N)`` and ``B_bar (C, N)``."""
        channels = len(self.skip)
        A, B = (m.expand(channels, *m.shape) for m in (self.A, self.B[:, None]))
        A_bar, B_bar = bilinear(A, B, self.log_step.exp())
        return A_bar, B_bar[..., 0]

    def kernel(self, L: int) -> Float[Tensor, "C L"]:
        """``C A_bar^t B_bar``, without the skip connection."""
        return torch.einsum("cn,cnl->cl", self.C, krylov(*self.discrete(), L))

    def init_state(self, batch: int) -> Float[Tensor, "B C N"]:
        return self.C.new_zeros(batch, *self.C.shape)

    def forward(self, x: Sequence, state: Tensor | None = None) -> tuple[Sequence, Tensor]:
        u, (A_bar, B_bar) = x.mT, self.discrete()
        y = fft_conv(u.contiguous(), self.kernel(x.shape[1])) + self.skip[:, None] * u
        if state is not None:
            y = y + free_outputs(A_bar, self.C, state, x.shape[1])
        return y.mT, final_state(A_bar, B_bar, u, state)


class H3State(NamedTuple):
    """The last keys, and the diagonal system's state."""

    keys: Float[Tensor, "B C inputs"]
    memory: S4State


class H3(ByForward):
    """``q * memory(shift(k) * v)``: comparing with what stood just before, and keeping what fits.

    Args:
        width: C. state_size: of the diagonal system. taps: of the shift.
    """

    def __init__(self, width: int, state_size: int = 64, *, taps: int = 4):
        super().__init__()
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.taps = nn.Parameter(torch.randn(width, taps) / taps**0.5)
        self.memory = S4D(width, state_size)
        self.out = nn.Linear(width, width, bias=False)

    def init_state(self, batch: int) -> H3State:
        width, taps = self.taps.shape
        return H3State(self.taps.new_zeros(batch, width, taps - 1), self.memory.init_state(batch))

    def forward(self, x: Sequence, state: H3State | None = None) -> tuple[Sequence, H3State]:
        state = self.init_state(len(x)) if state is None else state
        q, k, v = self.qkv(x).chunk(3, -1)
        k, keys = causal_short_conv(k.mT, self.taps, state=state.keys, return_state=True)
        y, memory = self.memory(k.mT * v, state.memory)
        return self.out(q * y), H3State(keys, memory)


class KeysAndValues(NamedTuple):
    """A cache that grows: ``(B, G, S, D)`` each."""

    k: Float[Tensor, "B G S D"]
    v: Float[Tensor, "B G S D"]


class CausalAttention(ByForward):
    """Softmax attention over the past; ``heads`` queries share ``kv_heads`` keys and values."""

    def __init__(self, width: int, heads: int = 2, kv_heads: int = 1):
        super().__init__()
        if width % heads or heads % kv_heads:
            raise ValueError(
                f"heads, kv_heads: expected heads to divide width ({width}) and kv_heads to "
                f"divide heads, got {heads} and {kv_heads}"
            )
        self.heads, self.kv_heads, self.head_width = heads, kv_heads, width // heads
        self.qkv = nn.Linear(width, (heads + 2 * kv_heads) * self.head_width, bias=False)
        self.out = nn.Linear(width, width, bias=False)

    def init_state(self, batch: int) -> KeysAndValues:
        nothing = self.out.weight.new_zeros(batch, self.kv_heads, 0, self.head_width)
        return KeysAndValues(nothing, nothing)

    def forward(
        self, x: Sequence, state: KeysAndValues | None = None
    ) -> tuple[Sequence, KeysAndValues]:
        state = self.init_state(len(x)) if state is None else state
        parts = self.qkv(x).unflatten(-1, (-1, self.head_width)).transpose(1, 2)
        q, k, v = parts.split([self.heads, self.kv_heads, self.kv_heads], 1)
        at = torch.arange(x.shape[1], device=x.device) + state.k.shape[2]
        frequencies = rope_frequencies(self.head_width).to(x)
        q, k = (rope_half_split(part, at, frequencies) for part in (q, k))
        state = KeysAndValues(torch.cat([state.k, k], 2), torch.cat([state.v, v], 2))
        y = attention(q, *state, causal=True)
        return self.out(y.transpose(1, 2).flatten(2)), state


class GatedRecurrence(ByForward):
    """A GRU of ``hidden`` units, and a linear map back to the width."""

    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.gru = nn.GRU(width, hidden, batch_first=True)
        self.out = nn.Linear(hidden, width, bias=False)

    def init_state(self, batch: int) -> Float[Tensor, "B hidden"]:
        return self.out.weight.new_zeros(batch, self.gru.hidden_size)

    def forward(self, x: Sequence, state: Tensor | None = None) -> tuple[Sequence, Tensor]:
        state = self.init_state(len(x)) if state is None else state
        h, last = self.gru(x, state[None])
        return self.out(h), last[0]


class Hybrid(ByForward):
    """A Mamba block, then attention over its outputs, added: one layer of each."""

    def __init__(self, width: int, state_size: int = 16, *, heads: int = 2, kv_heads: int = 1):
        super().__init__()
        self.recurrent = MambaBlock(width, state=state_size, expand=1)
        self.attention = CausalAttention(width, heads, kv_heads)

    def init_state(self, batch: int) -> tuple:
        return self.recurrent.init_state(batch), self.attention.init_state(batch)

    def forward(self, x: Sequence, state: tuple | None = None) -> tuple[Sequence, tuple]:
        recurrent, cache = self.init_state(len(x)) if state is None else state
        y, recurrent = self.recurrent(x, recurrent)
        more, cache = self.attention(y, cache)
        return y + more, (recurrent, cache)
