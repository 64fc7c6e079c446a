"""ShadowKV's packed prompt: key factors and landmarks on the device, values on the host
(arXiv 2410.21465).

    packing    unrotated keys -> factors; chunks -> landmarks; values -> host; outliers, end: exact
    a step     best chunks by landmark -> fetch values, rebuild keys, those that are not there yet
               -> attention over the selected chunks, the outliers and the end of the prompt

`shadowkv` has the equations, the reference loop and the cache that appends what is generated.
Slots never move and each holds one chunk, so that a chunk selected again costs nothing.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from corelib.primitives import attention, rope_half_split
from corelib.primitives.gather_decode import take_rows

from .low_rank import KeyFactors, factor_keys, rebuild_keys
from .shared import PagedStore, TierMeter, landmark_scores, page_positions, plan_fetch, top_pages

Frequencies = Float[Tensor, " pairs"]
Ids = Int[Tensor, "B G m"]


def landmarks_and_outliers(
    keys: Float[Tensor, "B G S D"], chunk: int, outliers: int
) -> tuple[Float[Tensor, "B G P D"], Int[Tensor, "B G o"]]:
    """The mean key of each chunk, and the ``outliers`` chunks (per head) that it fits worst.

    ``keys`` are rotated and fill whole chunks.
    """
    if keys.shape[2] % chunk:
        raise ValueError(f"keys: expected whole chunks of {chunk}, got {keys.shape[2]} tokens")
    chunks = keys.unflatten(2, (-1, chunk))
    landmarks = chunks.mean(3)
    worst = F.cosine_similarity(chunks, landmarks[:, :, :, None], dim=-1).amin(-1)
    return landmarks, worst.topk(min(outliers, worst.shape[-1]), largest=False).indices


class ShadowPrompt:
    """A packed prompt of ``length`` tokens (`corelib.serving.prompt_cache.PackedPrompt`).

    ``keys, values`` are what attention reads, in slots that never move: ``m`` selected chunks,
    whose numbers are ``held (B, G, m)`` (-1: none yet), then the outliers, then the local tokens.
    """

    def __init__(
        self,
        k: Float[Tensor, "B G n D"],
        v: Float[Tensor, "B G n V"],
        frequencies: Frequencies,
        *,
        rank: int,
        budget: int,
        chunk: int,
        outliers: int,
        local: int,
        meter: TierMeter,
    ):
        self.length, self.chunk, self.frequencies = k.shape[2], chunk, frequencies
        self.chunks = self.length // chunk - local
        far = self.chunks * self.chunk
        places = torch.arange(far, device=k.device)
        unrotated = rope_half_split(k[:, :, :far], -places, self.frequencies)
        self.factors = factor_keys(unrotated, rank)
        landmarks, self.outliers = landmarks_and_outliers(k[:, :, :far], self.chunk, outliers)
        others = torch.ones(landmarks.shape[:3], dtype=torch.bool, device=k.device)
        others.scatter_(2, self.outliers, False)
        self.landmarks = landmarks[others].unflatten(0, (*others.shape[:2], -1))
        self.numbers = others.nonzero()[:, 2].unflatten(0, (*others.shape[:2], -1))
        self.store = PagedStore(v[:, :, :far].unflatten(2, (-1, self.chunk)), meter)
        m = min(budget // self.chunk, self.numbers.shape[2])
        self.held = torch.full_like(self.numbers[..., :m], -1)
        self.keys, self.values = (self._slots(x, m) for x in (k, v))

    def _slots(self, x: Tensor, m: int) -> Tensor:
        outliers = take_rows(x, page_positions(self.outliers, self.chunk))
        selected = x.new_zeros(*x.shape[:2], m * self.chunk, x.shape[3])
        return torch.cat([selected, outliers, x[:, :, self.chunks * self.chunk :]], 2)

    def attend(self, q: Tensor, scale: float | None) -> tuple[Tensor, Tensor]:
        """Select for ``q``, load what is missing, attend."""
        best = top_pages(landmark_scores(q, self.landmarks, scale=scale), self.held.shape[2])
        self.load(self.numbers.gather(2, best))
        return attention(q, self.keys, self.values, causal=False, scale=scale, return_lse=True)

    def load(self, wanted: Ids) -> None:
        """Bring the chunks ``wanted (B, G, m)`` into the slots; those that are there stay."""
        slots, ids = plan_fetch(self.held, wanted, self.chunks)
        missing = int((ids >= 0).sum())
        self.store.meter.misses += missing
        self.store.meter.hits += wanted.numel() - missing
        if missing == 0:
            return
        values = self.store.fetch(ids)
        keys = rebuild_keys(self.factors, page_positions(ids, self.chunk), self.frequencies)
        b, g, j = (ids >= 0).nonzero(as_tuple=True)
        slot = slots[b, g, j]
        self.held[b, g, slot] = ids[b, g, j]
        tokens = slot[:, None] * self.chunk + torch.arange(self.chunk, device=slot.device)
        self.values[b[:, None], g[:, None], tokens] = values[b, g, j]
        self.keys[b[:, None], g[:, None], tokens] = keys.unflatten(2, (-1, self.chunk))[b, g, j]

    def unpack(self) -> tuple[Tensor, Tensor]:
        """All keys, rebuilt where they are not held exactly, and all values."""
        every = torch.arange(self.chunks, device=self.keys.device)
        every = every.expand(*self.held.shape[:2], -1)
        keys = rebuild_keys(self.factors, page_positions(every, self.chunk), self.frequencies)
        first = self.held.shape[2] * self.chunk
        exact = self.outliers.shape[2] * self.chunk
        at = page_positions(self.outliers, self.chunk)[..., None].expand(-1, -1, -1, keys.shape[3])
        keys = keys.scatter(2, at, self.keys[:, :, first : first + exact])
        local = [x[:, :, first + exact :] for x in (self.keys, self.values)]
        values = self.store.fetch(every).flatten(2, 3)
        return torch.cat([keys, local[0]], 2), torch.cat([values, local[1]], 2)

    def rows(self, rows: Int[Tensor, " R"]) -> ShadowPrompt:
        """The same for these batch rows."""
        kept = ShadowPrompt.__new__(ShadowPrompt)
        kept.__dict__ |= self.__dict__
        for name in ("outliers", "landmarks", "numbers", "held", "keys", "values"):
            setattr(kept, name, getattr(self, name)[rows])
        kept.factors = KeyFactors(*(x[rows] for x in self.factors))
        kept.store = self.store.rows(rows)
        return kept

    def bytes(self, tier: str) -> int:
        if tier == "host":
            return self.store.nbytes
        names = ("outliers", "landmarks", "numbers", "held", "keys", "values")
        return sum(x.nbytes for x in (*self.factors, *(getattr(self, n) for n in names)))
