"""A key/value cache that packs the prompt once, after prefill, and keeps what is generated exact.

Many methods have this shape: read the prompt with full attention, then store it some other way
(low rank, clusters, fewer bits, another tier), and decode over the packed prompt and the exact
*tail* of newer tokens. `PromptCache` keeps the contract of `corelib.contracts.KVCache` for them; a
method derives from it and gives `PromptCache.pack`, which returns a `PackedPrompt` or None.

The first stretch of tokens that a layer attends with is its prompt. Cutting into a packed prompt
(`crop` or `realign` below its length) unpacks it; after a `crop` the next prefill packs again.
"""

from __future__ import annotations

import dataclasses
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from corelib.primitives import (
    attention,
    masked_attention_reference,
    merge_partials,
    visible_keys,
)

TIERS = ("device", "host")
OutAndLse = tuple[Float[Tensor, "B H n V"], Float[Tensor, "B H n"]]


@runtime_checkable
class PackedPrompt(Protocol):
    """A prompt in a method's own form."""

    length: int

    def attend(self, q: Tensor, scale: float | None) -> tuple[Tensor, Tensor]:
        """``(out, lse)`` of ``q (B, H, n, D)`` over the prompt; every query comes after it."""
        ...

    def unpack(self) -> tuple[Tensor, Tensor]:
        """Keys and values ``(B, G, length, D)``, as exact as they are still known."""
        ...

    def rows(self, rows: Tensor) -> PackedPrompt:
        """The same for these batch rows."""
        ...

    def bytes(self, tier: str) -> int:
        """Bytes held in ``tier``."""
        ...


@dataclasses.dataclass
class _Layer:
    """A packed prompt (or none), then exact keys and values ``(B, G, T, D)``."""

    k: Tensor
    v: Tensor
    prompt: PackedPrompt | None = None
    read: bool = False  # has the prompt been attended with, and so been packed or left as it is?

    @property
    def packed(self) -> int:
        return 0 if self.prompt is None else self.prompt.length

    def __len__(self) -> int:
        return self.packed + self.k.shape[2]


class PromptCache:
    """The contract's cache, but for `pack`. ``pads (B,)``: empty slots before short rows."""

    def __init__(self) -> None:
        self.layers: dict[int, _Layer] = {}
        self.pads: Tensor | None = None

    def pack(self, k: Tensor, v: Tensor, q: Tensor) -> PackedPrompt | None:
        """The prompt ``k, v (B, G, n, D)`` in packed form; None leaves it as it is.

        ``q (B, H, L, D)`` are the queries that it was last read with: all of them (``L = n``),
        but for a prompt that was cut and went on.
        """
        raise NotImplementedError

    def append(self, layer: int, k: Float[Tensor, "B G n D"], v: Float[Tensor, "B G n V"]) -> None:
        """Add ``k, v`` behind what ``layer`` holds; a new layer starts empty."""
        if layer not in self.layers:
            self.layers[layer] = _Layer(k, v)
            return
        held = self.layers[layer]
        if held.k.shape[:2] != k.shape[:2] or held.k.shape[3] != k.shape[3]:
            raise ValueError(
                f"k: layer {layer} holds (B, G, ·, D) = {tuple(held.k.shape)}, got {tuple(k.shape)}"
            )
        held.k, held.v = torch.cat([held.k, k], 2), torch.cat([held.v, v], 2)

    def attend(
        self, layer: int, q: Float[Tensor, "B H n D"], *, scale: float | None = None
    ) -> Float[Tensor, "B H n V"]:
        """Causal attention of ``q``, aligned with the last keys, over what ``layer`` holds."""
        if layer not in self.layers:
            raise ValueError(f"layer: nothing held for layer {layer}, only {sorted(self.layers)}")
        held = self.layers[layer]
        if held.prompt is not None and q.shape[2] > held.k.shape[2]:
            raise ValueError(
                f"q: expected at most the {held.k.shape[2]} tokens after the packed prompt, "
                f"got {q.shape[2]}"
            )
        out, lse = self._attend_tail(held, q, scale)
        if held.prompt is not None:
            return merge_partials(out, lse, *held.prompt.attend(q, scale))[0]
        if not held.read and self.pads is None:
            held.prompt = self.pack(held.k, held.v, q)
            if held.prompt is not None:  # new tensors: a slice would keep the prompt alive
                held.k, held.v = (
                    x.new_empty(*x.shape[:2], 0, x.shape[3]) for x in (held.k, held.v)
                )
        held.read = True
        return out

    def _attend_tail(self, held: _Layer, q: Tensor, scale: float | None) -> OutAndLse:
        if self.pads is None:
            return attention(q, held.k, held.v, causal=True, scale=scale, return_lse=True)
        T = held.k.shape[2]
        visible = visible_keys(q.shape[2], T, causal=True, device=q.device)
        visible = visible & (torch.arange(T, device=q.device) >= self.pads[:, None, None, None])
        return masked_attention_reference(q, held.k, held.v, visible, scale=scale, return_lse=True)

    def crop(self, length: int) -> None:
        """Forget everything from position ``length`` on."""
        if not 0 <= length <= len(self):
            raise ValueError(f"length: expected 0 to {len(self)}, got {length}")
        longest = 0 if self.pads is None else int(self.pads.max())
        for held in self.layers.values():
            if length - longest < held.packed:
                self._unpack(held)
                held.read = False
            keep = length - held.packed
            held.k, held.v = held.k[:, :, :keep], held.v[:, :, :keep]
        if self.pads is not None:
            self.pads = self.pads.clamp(max=length)

    def gather_rows(self, rows: Int[Tensor, " R"]) -> None:
        """Keep these batch rows, in this order (rows may repeat)."""
        for held in self.layers.values():
            held.k, held.v = held.k[rows], held.v[rows]
            held.prompt = None if held.prompt is None else held.prompt.rows(rows)
        if self.pads is not None:
            self.pads = self.pads[rows]

    def realign(self, lengths: Int[Tensor, " B"]) -> None:
        """Keep the first ``lengths[b]`` positions of row ``b``, then align rows to the right."""
        held = len(self) - (0 if self.pads is None else self.pads)
        if bool((lengths < 0).any()) or bool((lengths > held).any()):
            raise ValueError(f"lengths: expected 0 to {held} in each row, got {lengths.tolist()}")
        for layer in self.layers.values():
            if int(lengths.min()) < layer.packed:
                self._unpack(layer)
        width = int(lengths.max())
        old = torch.zeros_like(lengths) if self.pads is None else self.pads
        pads = width - lengths
        for layer in self.layers.values():
            slots = torch.arange(width - layer.packed, device=lengths.device)
            index = (slots - pads[:, None] + old[:, None]).clamp(min=0)
            layer.k, layer.v = (_take(x, index) for x in (layer.k, layer.v))
        self.pads = pads if bool(pads.any()) else None

    def _unpack(self, held: _Layer) -> None:
        """Put the prompt back in front of the tail, behind the empty slots of short rows."""
        if held.prompt is None:
            return
        k, v = (torch.cat(pair, 2) for pair in zip(held.prompt.unpack(), (held.k, held.v)))
        if self.pads is not None:
            slots, pads = torch.arange(k.shape[2], device=k.device), self.pads[:, None]
            index = torch.where(slots < pads + held.packed, (slots - pads).clamp(min=0), slots)
            k, v = _take(k, index), _take(v, index)
        held.k, held.v, held.prompt = k, v, None

    def bytes(self, tier: str = "device") -> int:
        """Bytes held in ``tier``, with all that the packed form needs."""
        if tier not in TIERS:
            raise ValueError(f"tier: expected 'device' or 'host', got {tier!r}")
        held = 0
        for layer in self.layers.values():
            held += 0 if layer.prompt is None else layer.prompt.bytes(tier)
            held += layer.k.nbytes + layer.v.nbytes if tier == "device" else 0
        return held

    def __len__(self) -> int:
        return max(map(len, self.layers.values()), default=0)


def _take(x: Tensor, index: Int[Tensor, "B n"]) -> Tensor:
    """Positions ``index[b]`` of ``x (B, G, T, D)``."""
    index = index[:, None, :, None]
    return x.gather(2, index.expand(-1, x.shape[1], -1, x.shape[3]))
