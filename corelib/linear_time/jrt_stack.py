"""JRT-RNN's stack: few layers that read the prompt both ways, few with windows, the rest short.

The 360M model of Just Read Twice (arXiv 2407.05483) has 26 layers: 5 of prefix linear attention
(`jrt`), which reach everything and blur it; 5 of attention with a window, which are sharp and
short; and gated convolutions of width 3 for the rest, as in Based (arXiv 2402.18668). All of them
decode with a state of fixed size. Each stands behind a norm and beside a residual.

    gated convolution:  y = out(conv(x) * gate(x))
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from corelib.linear_time.jrt import PrefixLinearAttention
from corelib.linear_time.local_attention import LocalAttention
from corelib.linear_time.stack import MixerStack
from corelib.primitives import causal_short_conv

KINDS = "pwc"


class GatedShortConv(nn.Module):
    """A causal convolution of ``width`` taps times a gate; a sequence mixer."""

    def __init__(self, C: int, *, width: int = 3):
        super().__init__()
        if width < 1:
            raise ValueError(f"width: expected at least 1, got {width}")
        self.gate, self.out = nn.Linear(C, C), nn.Linear(C, C, bias=False)
        self.conv = nn.Parameter(torch.empty(C, width).uniform_(-1, 1) * width**-0.5)

    def init_state(self, batch: int) -> Float[Tensor, "B C inputs"]:
        """The ``width - 1`` inputs before the first: zeros."""
        return self.conv.new_zeros(batch, len(self.conv), self.conv.shape[1] - 1)

    def forward(
        self, x: Float[Tensor, "B L C"], state: Float[Tensor, "B C inputs"] | None = None
    ) -> tuple[Float[Tensor, "B L C"], Float[Tensor, "B C inputs"]]:
        """``(y, state)`` over a stretch of tokens."""
        near, state = causal_short_conv(x.mT, self.conv, state=state, return_state=True)
        return self.out(near.mT * self.gate(x)), state

    def step(
        self, x_t: Float[Tensor, "B C"], state: Float[Tensor, "B C inputs"]
    ) -> tuple[Float[Tensor, "B C"], Float[Tensor, "B C inputs"]]:
        """One token."""
        y, state = self(x_t[:, None], state)
        return y[:, 0], state


class JRTStack(MixerStack):
    """Layers named by ``pattern``; a sequence mixer whose state is a list, one for each layer.

    Args:
        pattern: a letter a layer: ``p`` prefix linear attention, ``w`` attention with a window,
            ``c`` gated short convolution.
        features: width of queries and keys of ``p``.
        window: of ``w``; the released model takes 64.
    """

    def __init__(
        self, C: int, heads: int, *, pattern: str = "cpwccc", features: int = 16, window: int = 64
    ):
        if not pattern or set(pattern) - set(KINDS):
            raise ValueError(f"pattern: expected letters of {KINDS!r}, got {pattern!r}")
        make = {
            "p": lambda: PrefixLinearAttention(C, heads, features=features),
            "w": lambda: LocalAttention(C, heads, window=window),
            "c": lambda: GatedShortConv(C),
        }
        super().__init__(make[kind]() for kind in pattern)
        self.pattern = pattern

    def forward(
        self, x: Float[Tensor, "B L C"], state: list | None = None, *, prefix: int = 0
    ) -> tuple[Float[Tensor, "B L C"], list]:
        """``(y, state)``; the first ``prefix`` tokens are read both ways by the ``p`` layers."""
        told = [dict(prefix=prefix) if kind == "p" else {} for kind in self.pattern]
        return self.run(x, state, told)


def example() -> dict:
    """A stack of one layer of each kind, and what it reads.

    >>> inputs = example()
    >>> inputs["stack"](inputs["x"], prefix=6)[0].shape
    torch.Size([2, 9, 8])
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        stack = JRTStack(8, 2, pattern="cpw", features=4, window=3)
        return dict(stack=stack, x=torch.randn(2, 9, 8))
