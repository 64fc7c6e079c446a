"""The plain key/value cache: everything is kept, in the contract's form."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from .layers import attend


class DenseCache:
    """Keys and values of every layer, all positions, in tensors that grow.

    After `realign` rows may be of different lengths: they are aligned to the right, and ``pads
    (B,)`` counts the empty slots before each row, which `attend` never reads.
    """

    def __init__(self) -> None:
        self.layers: dict[int, tuple[Tensor, Tensor]] = {}
        self.pads: Tensor | None = None

    def append(self, layer: int, k: Float[Tensor, "B G n D"], v: Float[Tensor, "B G n D"]) -> None:
        """Add ``k, v`` behind what ``layer`` holds; a new layer starts empty."""
        if layer in self.layers:
            old_k, old_v = self.layers[layer]
            if old_k.shape[:2] != k.shape[:2] or old_k.shape[3] != k.shape[3]:
                raise ValueError(
                    f"k: layer {layer} holds (B, G, ·, D) = {tuple(old_k.shape)}, "
                    f"got {tuple(k.shape)}"
                )
            k, v = torch.cat([old_k, k], 2), torch.cat([old_v, v], 2)
        self.layers[layer] = (k, v)

    def attend(
        self, layer: int, q: Float[Tensor, "B H n D"], *, scale: float | None = None
    ) -> Float[Tensor, "B H n D"]:
        """Causal attention of ``q``, aligned with the last keys, over what ``layer`` holds."""
        if layer not in self.layers:
            raise ValueError(f"layer: nothing held for layer {layer}, only {sorted(self.layers)}")
        k, v = self.layers[layer]
        return attend(q, k, v, scale=scale, pads=self.pads)

    def crop(self, length: int) -> None:
        """Forget everything from position ``length`` on."""
        if not 0 <= length <= len(self):
            raise ValueError(f"length: expected 0 to {len(self)}, got {length}")
        self._map(lambda t: t[:, :, :length])
        if self.pads is not None:
            self.pads = self.pads.clamp(max=length)

    def gather_rows(self, rows: Int[Tensor, " R"]) -> None:
        """Keep these batch rows, in this order (rows may repeat)."""
        self._map(lambda t: t[rows])
        if self.pads is not None:
            self.pads = self.pads[rows]

    def realign(self, lengths: Int[Tensor, " B"]) -> None:
        """Keep the first ``lengths[b]`` positions of row ``b``, then align rows to the right."""
        held = len(self) - (0 if self.pads is None else self.pads)
        if bool((lengths < 0).any()) or bool((lengths > held).any()):
            raise ValueError(f"lengths: expected 0 to {held} in each row, got {lengths.tolist()}")
        width = int(lengths.max())
        first = torch.zeros_like(lengths) if self.pads is None else self.pads
        pads = width - lengths
        index = torch.arange(width)[None] - pads[:, None] + first[:, None]
        index = index.clamp(min=0)[:, None, :, None]
        self._map(lambda t: t.gather(2, index.expand(-1, t.shape[1], -1, t.shape[3])))
        self.pads = pads

    def bytes(self, tier: str = "device") -> int:
        """Bytes of keys and values held in ``tier``; nothing is ever on the host."""
        if tier not in ("device", "host"):
            raise ValueError(f"tier: expected 'device' or 'host', got {tier!r}")
        held = sum(t.numel() * t.element_size() for kv in self.layers.values() for t in kv)
        return held if tier == "device" else 0

    def __len__(self) -> int:
        return max((k.shape[2] for k, _ in self.layers.values()), default=0)

    def _map(self, change) -> None:
        self.layers = {n: (change(k), change(v)) for n, (k, v) in self.layers.items()}
