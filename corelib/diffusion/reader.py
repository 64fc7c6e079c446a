"""Asking a net about a block of slots, with or without the keys and values of the prefix."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

Net = Callable[..., Tensor]
CACHES = ("none", "prefix")


def without_mask(logits: Float[Tensor, "*B vocab"], mask_id: int) -> Float[Tensor, "*B vocab"]:
    """Logits in float32 at least, the mask ruled out: no text has it."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if mask_id >= logits.shape[-1]:
        return logits
    ids = torch.arange(logits.shape[-1], device=logits.device)
    return logits.masked_fill(ids == mask_id, -torch.inf)


class Reader:
    """Asks the net about one block: everything anew, or behind the cached keys of the prefix.

    ``"prefix"`` (Fast-dLLM, arXiv 2505.22618): a block's first call reads everything and keeps the
    keys and values of what stands before the block; the block's other calls read from there on.
    Exact for nets whose prefix does not look into the block (block-causal ones, or of a single
    layer); for others the kept keys are those of the block's first call.
    """

    def __init__(self, net: Net, mask_id: int, cache: str = "none"):
        if cache not in CACHES:
            raise ValueError(f"cache: expected one of {CACHES}, got {cache!r}")
        if cache == "prefix" and not hasattr(net, "new_cache"):
            raise TypeError("net: expected a net with new_cache() for cache='prefix', got none")
        self.net, self.mask_id, self.kind = net, mask_id, cache
        self.lookback = getattr(net, "lookback", 0)
        self.calls, self.fed = 0, 0
        self.cache: Any = None
        self.start = -1

    def laws(self, ids: Int[Tensor, "B L"], lo: int, hi: int) -> Float[Tensor, "B n vocab"]:
        """The laws of slots ``lo … hi - 1``; one call."""
        if self.kind == "none":
            logits = self._call(ids)[:, lo:hi]
        elif lo != self.start:  # a new block
            self.cache, self.start = self.net.new_cache(), lo
            logits = self._call(ids, self.cache)[:, lo:hi]
        else:
            logits = self._call(ids[:, self.kept :], self.cache)[:, lo - self.kept : hi - self.kept]
        if self.cache is not None:
            self.cache.crop(self.kept)
        return without_mask(logits, self.mask_id).softmax(-1)

    @property
    def kept(self) -> int:
        """Positions whose keys stay while the block is worked on."""
        return max(self.start - self.lookback, 0)

    def draft_laws(
        self, drafts: Int[Tensor, "D L"], lo: int, hi: int, layout: str
    ) -> Float[Tensor, "D n vocab"]:
        """The laws of slots ``lo … hi - 1`` in each of ``D`` versions of one text; one call.

        ``layout``: the versions are rows of a batch, or branches of a tree (``net.tree``).
        """
        D, kept = len(drafts), self.kept if self.kind == "prefix" else 0
        tails, cache = drafts[:, kept:], self.cache
        if layout == "tree":
            logits = self._count(
                tails, tails.numel(), self.net.tree, *([] if cache is None else [cache])
            )
        elif cache is None:
            logits = self._count(tails, tails.numel(), self.net)
        else:
            rows = copy.copy(cache)  # its lists are replaced, not changed
            rows.gather_rows(torch.zeros(D, dtype=torch.long, device=drafts.device))
            logits = self._count(tails, tails.numel(), self.net, rows)
        return without_mask(logits[:, lo - kept : hi - kept], self.mask_id).softmax(-1)

    def _call(self, ids: Tensor, *cache: Any) -> Tensor:
        return self._count(ids, ids.shape[1], self.net, *cache)

    def _count(self, ids: Tensor, fed: int, net: Net, *cache: Any) -> Tensor:
        self.calls += 1
        self.fed += fed
        with torch.no_grad():
            return net(ids, *cache)
