"""RAT and local attention in turn: the hybrid of RAT (arXiv 2507.04416), see `rat`.

RAT reaches far and blurs what is inside a chunk; attention with a window is sharp and short. Layers
take turns, each behind a norm and beside a residual. A decoding step reads the ends of all chunks
in one kind of layer and ``window`` keys in the other: cost and cache grow with half the layers'
``L / chunk``. The paper's window is 1024.
"""

from __future__ import annotations

from corelib.linear_time.local_attention import LocalAttention
from corelib.linear_time.rat import CHUNK, RAT
from corelib.linear_time.stack import MixerStack


class RATHybrid(MixerStack):
    """``layers`` in turn, RAT first; a sequence mixer whose state is a list."""

    def __init__(
        self, C: int, heads: int, *, chunk: int = CHUNK, window: int = 1024, layers: int = 2
    ):
        if layers < 1:
            raise ValueError(f"layers: expected at least 1, got {layers}")
        super().__init__(
            LocalAttention(C, heads, window=window) if i % 2 else RAT(C, heads, chunk=chunk)
            for i in range(layers)
        )
