"""Contestants for the arena: four ways to mix positions, with the same number of parameters.

Each is a layer ``(B, L, C) -> (B, L, C)`` with four ``C x C`` matrices, so that in `lra` nothing
but the mixing differs. They return ``(y, state)`` as sequence mixers do. Only `DiagonalRecurrence`
reads from left to right and keeps the whole contract of `corelib.contracts.SequenceMixer`; the
others belong into encoders, see both sides and have no state (None).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from ..primitives import attention, visible_keys
from ..primitives.fft_conv import fft_conv

Sequence = Float[Tensor, "B L C"]


class NoMixing(nn.Module):
    """A two-layer network at each position by itself: whatever it gets right needs no context."""

    def __init__(self, width: int):
        super().__init__()
        self.up = nn.Linear(width, 2 * width, bias=False)
        self.down = nn.Linear(2 * width, width, bias=False)

    def forward(self, x: Sequence, state: None = None) -> tuple[Sequence, None]:
        return self.down(F.gelu(self.up(x))), None


class EncoderAttention(nn.Module):
    """Attention in both directions; with ``window``, over the keys with ``|i - j| < window``.

    >>> EncoderAttention(32, window=8)(torch.randn(1, 20, 32))[0].shape
    torch.Size([1, 20, 32])
    """

    def __init__(self, width: int, heads: int = 2, window: int | None = None):
        super().__init__()
        if width % heads:
            raise ValueError(f"heads: expected a divisor of width ({width}), got {heads}")
        self.heads, self.window = heads, window
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)

    def _project(self, x: Sequence) -> tuple[Tensor, Tensor, Tensor]:
        B, L, _ = x.shape
        return self.qkv(x).view(B, L, 3, self.heads, -1).permute(2, 0, 3, 1, 4).unbind(0)

    def forward(self, x: Sequence, state: None = None) -> tuple[Sequence, None]:
        y = attention(*self._project(x), causal=False, window=self.window)
        return self.out(y.transpose(1, 2).reshape(x.shape)), None

    def weights(self, x: Sequence) -> Float[Tensor, "B H L L"]:
        """Who looks where: the softmax itself, which `forward` never builds."""
        q, k, _ = self._project(x)
        L = x.shape[1]
        visible = visible_keys(L, L, causal=False, window=self.window)
        scores = q @ k.mT * q.shape[-1] ** -0.5
        return scores.masked_fill(~visible, -torch.inf).softmax(-1)


class DiagonalRecurrence(nn.Module):
    """``h_t = a h_(t-1) + (1 - a) u_t``, each channel with its own learnt memory, gated in and out.

    ``u = sigmoid(W_i x) * W_v x`` and ``y = W_o (silu(W_g x) * h)``. A diagonal linear recurrence
    with ``a`` fixed over time is a convolution with ``(1 - a) a^t``, computed by FFT. At the start
    the channels remember from 1 to ``memory`` positions, spread evenly in logarithms.
    """

    def __init__(self, width: int, memory: float = 256.0):
        super().__init__()
        self.inward = nn.Linear(width, 3 * width, bias=False)  # value, input gate, output gate
        self.out = nn.Linear(width, width, bias=False)
        rate = torch.logspace(0, -torch.log10(torch.tensor(memory)).item(), width)  # 1 / positions
        self.log_rate = nn.Parameter(rate.log())

    @property
    def log_decay(self) -> Float[Tensor, " C"]:
        return -self.log_rate.exp()

    def init_state(self, batch: int) -> Float[Tensor, "B C"]:
        return self.log_rate.new_zeros(batch, len(self.log_rate))

    def _inputs(self, x: Tensor) -> tuple[Tensor, Tensor]:
        value, gate, outward = self.inward(x).chunk(3, -1)
        return torch.sigmoid(gate) * value, F.silu(outward)

    def forward(
        self, x: Sequence, state: Float[Tensor, "B C"] | None = None
    ) -> tuple[Sequence, Float[Tensor, "B C"]]:
        u, outward = self._inputs(x)
        steps = torch.arange(1, x.shape[1] + 1, device=x.device, dtype=x.dtype)
        powers = torch.exp(steps[:, None] * self.log_decay)  # (L, C): a, a^2, …
        share = -torch.expm1(self.log_decay)  # 1 - a
        kernel = share * torch.exp((steps[:, None] - 1) * self.log_decay)
        h = fft_conv(u.mT.contiguous(), kernel.T.contiguous()).mT
        if state is not None:
            h = h + powers * state[:, None]
        return self.out(outward * h), h[:, -1]

    def step(
        self, x_t: Float[Tensor, "B C"], state: Float[Tensor, "B C"]
    ) -> tuple[Float[Tensor, "B C"], Float[Tensor, "B C"]]:
        u, outward = self._inputs(x_t)
        h = torch.exp(self.log_decay) * state - torch.expm1(self.log_decay) * u
        return self.out(outward * h), h


#: Name -> maker of a mixer of a given width: what the lab measures.
MIXERS = {
    "no mixing": NoMixing,
    "window attention": lambda width: EncoderAttention(width, window=8),
    "full attention": EncoderAttention,
    "linear recurrence": DiagonalRecurrence,
}
