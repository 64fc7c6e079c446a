"""Sliding-window attention with sinks, in blocks, and the ring that decoding keeps.

Query ``i`` sees itself, the ``window - 1`` keys before it, and the first ``sinks`` keys
(Longformer, arXiv 2004.05150; sinks: StreamingLLM, arXiv 2309.17453). Cut the queries into blocks
at least as long as the window: the keys of a block lie in the block itself, in the one before, and
among the sinks. Nothing else is read.

    block b:  keys [ sinks | block b - 1 | block b ],  one mask for all blocks but the first few

* `sliding_window_attention` is that, in operators that every device and compiler has: one call of
  PyTorch's attention for the first blocks and one for all others.
* ``attention(q, k, v, causal=True, window=..., sinks=...)`` computes the same with gradients of its
  own (on a CPU in narrower tiles that hide less of what they read, which takes 0.5 to 0.85 of the
  time here; on a GPU in a kernel) and takes queries that continue a cache. Layers use that one.
* `RingCache` holds what decoding needs: ``sinks + window`` keys and values, whatever the length.

Memory and time grow with ``L * (sinks + 2 * window)``, so that blocks pay against dense causal
attention from about ``L = 4 * window`` on.
Oracle: `attention_reference` under ``masks.attention_mask(causal=True, window=..., sinks=...)``.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from ._checks import check_attention, check_options
from .attention import attention

FEWEST_ROWS = 32  # of a block: narrower ones are all overhead


def sliding_window_attention(
    q: Float[Tensor, "B H L D"],
    k: Float[Tensor, "B G L D"],
    v: Float[Tensor, "B G L V"],
    *,
    window: int,
    sinks: int = 0,
    scale: float | None = None,
) -> Float[Tensor, "B H L V"]:
    """Causal attention to the last ``window`` keys and the first ``sinks``, block by block.

    ``scale=None`` means ``D ** -0.5``; query head ``h`` reads key head ``h // (H // G)``.

    Raises ValueError or TypeError for shapes, dtypes or options that do not fit.
    """
    check_attention(q, k, v, window, sinks, scale)
    if window is None:
        raise TypeError("window: expected an int, got None")
    L, sinks = q.shape[2], min(sinks, q.shape[2])
    if k.shape[2] != L:
        raise ValueError(f"k: expected the length of q, {L}, got {k.shape[2]}")
    if not L:
        return v.new_zeros(*q.shape[:3], v.shape[-1])
    rows = min(max(window, FEWEST_ROWS), L)
    blocks = -(-L // rows)
    queries = _blocks(q, rows, blocks)
    keys, values = (_two_blocks(x, rows, blocks, sinks) for x in (k, v))
    alike = min(blocks, -(-sinks // rows) + 1)  # from here on no block touches the sinks: one mask
    outs = []
    for part in (slice(0, alike), slice(alike, blocks)):
        if part.start < part.stop:
            mask = _visible(range(part.start, min(part.stop, alike + 1)), rows, window, sinks, q)
            outs.append(_attend(queries[:, part], keys[:, part], values[:, part], mask, scale))
    return torch.cat(outs, 1).transpose(1, 2).flatten(2, 3)[:, :, :L]


def _blocks(x: Tensor, rows: int, blocks: int) -> Tensor:
    """``(B, H, L, D) -> (B, blocks, H, rows, D)``, zeros behind the last."""
    padded = F.pad(x, (0, 0, 0, rows * blocks - x.shape[2]))
    return padded.unflatten(2, (blocks, rows)).transpose(1, 2)


def _two_blocks(x: Tensor, rows: int, blocks: int, sinks: int) -> Tensor:
    """The sinks, the block before and the block itself, ``(B, blocks, G, sinks + 2 rows, D)``."""
    own = _blocks(x, rows, blocks)
    before = F.pad(own, (0, 0, 0, 0, 0, 0, 1, 0))[:, :-1]
    first = x[:, None, :, :sinks].expand(-1, blocks, -1, -1, -1)
    return torch.cat([first, before, own], 3)


def _visible(numbers: range, rows: int, window: int, sinks: int, like: Tensor) -> Tensor:
    """``(blocks, rows, sinks + 2 rows)``: near keys are seen in their block, far ones as sinks."""
    first = torch.arange(numbers.start, numbers.stop, device=like.device)[:, None, None] * rows
    i = first + torch.arange(rows, device=like.device)[:, None]
    j = first - rows + torch.arange(2 * rows, device=like.device)
    near = (j >= 0) & (j <= i) & (i - j < window)
    far = i - torch.arange(sinks, device=like.device) >= window
    return torch.cat([far.expand(-1, -1, sinks), near], -1)


def _attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float | None) -> Tensor:
    """Every block by itself: blocks become batch rows; a mask for each, or one for all."""
    B, blocks = q.shape[:2]
    mask = (mask.repeat(B, 1, 1) if len(mask) == blocks else mask)[:, None]
    q, k, v = (x.flatten(0, 1) for x in (q, k, v))
    gqa = q.shape[1] != k.shape[1]
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=gqa)
    return out.unflatten(0, (B, blocks))


class RingCache:
    """The first ``sinks`` keys and values and a ring of the last ``window``, for decoding.

    Position ``p`` lives in slot ``p`` (a sink) or ``sinks + (p - sinks) % window``, where it takes
    the place of one that has just left the window. Slots are not in order; attention does not
    mind, because positions are in the keys already. Written in place: no gradients through it.
    """

    def __init__(self, window: int, sinks: int = 0):
        if window is None:
            raise TypeError("window: expected an int, got None")
        check_options(window, sinks, None)
        self.window, self.sinks, self.seen = window, sinks, 0
        self.k: Tensor | None = None
        self.v: Tensor | None = None

    def extend(self, k: Float[Tensor, "B G n D"], v: Float[Tensor, "B G n V"]) -> None:
        """Take in the next ``n`` positions, and forget what no later query sees."""
        for name, x, held in (("k", k, self.k), ("v", v, self.v)):
            wanted = None if held is None else (*held.shape[:2], k.shape[2], held.shape[3])
            if x.shape[:3] != k.shape[:3] or wanted not in (None, tuple(x.shape)):
                raise ValueError(f"{name}: expected shape {wanted}, got {tuple(x.shape)}")
        if self.k is None:
            slots = self.sinks + self.window
            self.k, self.v = (x.new_empty(*x.shape[:2], slots, x.shape[3]) for x in (k, v))
        end = self.seen + k.shape[2]
        p = torch.arange(self.seen, end, device=k.device)
        kept = p[(p < self.sinks) | (p >= end - self.window)]
        for held, x in ((self.k, k), (self.v, v)):
            held[:, :, self._slots(kept)] = x[:, :, kept - self.seen].detach()
        self.seen = end

    def attend(
        self, q: Float[Tensor, "B H 1 D"], *, scale: float | None = None
    ) -> Float[Tensor, "B H 1 V"]:
        """Attention of the query at the last position."""
        if self.k is None:
            raise ValueError("attend: expected a cache with at least one key, got an empty one")
        return attention(
            q, self.k[:, :, : len(self)], self.v[:, :, : len(self)], causal=False, scale=scale
        )

    def step(
        self,
        q: Float[Tensor, "B H 1 D"],
        k: Float[Tensor, "B G 1 D"],
        v: Float[Tensor, "B G 1 V"],
        *,
        scale: float | None = None,
    ) -> Float[Tensor, "B H 1 V"]:
        """One position of decoding: `extend`, then `attend`."""
        self.extend(k, v)
        return self.attend(q, scale=scale)

    def ordered(self) -> tuple[Tensor, Tensor] | None:
        """Keys and values from the oldest on, None when there are none.

        Put in front of the keys of the next stretch, they make ``attention(..., causal=True,
        window=..., sinks=...)`` go on: all that it would see beyond them is out of sight.
        """
        if self.k is None:
            return None
        first = min(self.sinks, self.seen)
        ranges = (0, first), (max(first, self.seen - self.window), self.seen)
        p = torch.cat([torch.arange(*ends, device=self.k.device) for ends in ranges])
        slots = self._slots(p)
        return self.k[:, :, slots], self.v[:, :, slots]

    def copy(self) -> RingCache:
        """Another cache with the same content."""
        twin = RingCache(self.window, self.sinks)
        twin.seen = self.seen
        if self.k is not None:
            twin.k, twin.v = self.k.clone(), self.v.clone()
        return twin

    def bytes(self) -> int:
        """Bytes held; the same from the first key on."""
        return 0 if self.k is None else self.k.nbytes + self.v.nbytes

    def __len__(self) -> int:
        return min(self.seen, self.sinks + self.window)

    def _slots(self, p: Tensor) -> Tensor:
        return torch.where(p < self.sinks, p, self.sinks + (p - self.sinks) % self.window)
