"""What the serving methods share: two memories with a meter between them, and choosing pages.

*Two tiers.* The device is where attention runs; the host has room. `PagedStore` keeps pages on the
host and hands out copies of those asked for; `TierMeter` adds up what crosses the link. On a
machine without a GPU both tiers are the same memory and the bytes are what counts. `plan_fetch`
says which pages of a new choice are not on the device yet, and which slots they may take.

*Choosing pages.* A page (chunk) is a stretch of ``page`` neighbouring tokens. Scores are
``(B, G, P)``, one for each page and key/value head: `landmark_scores` (ShadowKV, arXiv 2410.21465)
compares a query with one key per page, `bound_scores` (Quest, arXiv 2406.10774) with the smallest
box around its keys. `top_pages` takes the best, with the first and last ones on request;
`page_positions` turns pages into the token positions that `corelib.primitives.gather_decode` reads.
"""

from __future__ import annotations

import dataclasses

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

Pages = Int[Tensor, "B G pages"]


@dataclasses.dataclass
class TierMeter:
    """Bytes that crossed between the tiers, and pages found on the device (``hits``) or not."""

    to_device: int = 0
    to_host: int = 0
    hits: int = 0
    misses: int = 0

    def reset(self) -> None:
        self.to_device = self.to_host = self.hits = self.misses = 0

    @property
    def hit_rate(self) -> float:
        """Share of the wanted pages that were on the device already; 0 when none was wanted."""
        return self.hits / max(1, self.hits + self.misses)


class PagedStore:
    """Pages ``(B, G, P, page, width)`` on the host; ``meter`` counts what is put in and fetched.

    Pinned where they come from a GPU, so that copies can overlap with computing.
    """

    def __init__(self, pages: Float[Tensor, "B G P page width"], meter: TierMeter):
        self.device, self.meter = pages.device, meter
        self.pages = pages.contiguous().cpu()
        if self.device.type == "cuda":
            self.pages = self.pages.pin_memory()
        meter.to_host += self.pages.nbytes

    def fetch(self, ids: Int[Tensor, "B G m"]) -> Float[Tensor, "B G m page width"]:
        """Copies of these pages, on the device; -1 gives zeros and moves nothing."""
        B, G, P, page, width = self.pages.shape
        ids = ids.to(self.pages.device)
        lists = torch.arange(B * G, device=ids.device).view(B, G, 1) * P
        wanted = ids >= 0
        found = F.embedding((lists + ids)[wanted], self.pages.view(B * G * P, page * width))
        self.meter.to_device += found.nbytes
        out = self.pages.new_zeros(*ids.shape, page * width, device=self.device)
        out[wanted.to(self.device)] = found.to(self.device, non_blocking=True)
        return out.view(*ids.shape, page, width)

    def rows(self, rows: Int[Tensor, " R"]) -> PagedStore:
        """A store of these batch rows; nothing crosses between the tiers."""
        kept = PagedStore.__new__(PagedStore)
        kept.device, kept.meter = self.device, self.meter
        kept.pages = self.pages[rows.to(self.pages.device)]
        return kept

    @property
    def nbytes(self) -> int:
        return self.pages.nbytes


def plan_fetch(
    held: Int[Tensor, "B G m"], wanted: Int[Tensor, "B G m"], pages: int
) -> tuple[Int[Tensor, "B G x"], Int[Tensor, "B G x"]]:
    """What to load so that the slots that hold pages ``held`` come to hold ``wanted``.

    ``held`` may name empty slots as -1; ``wanted`` are ``m`` different pages of ``pages``. Returns
    ``(slots, ids)``: page ``ids`` goes into slot ``slots``, and -1 pads heads that lack fewer. What
    is wanted and held stays where it is; the order of the slots means nothing to attention.
    """
    keep = _marked(wanted, pages).gather(2, held.masked_fill(held < 0, pages))
    missing = ~_marked(held, pages).gather(2, wanted)
    count = int(missing.sum(-1).max()) if missing.numel() else 0
    slots = keep.int().argsort(dim=-1, stable=True)[..., :count]  # the free ones come first
    order = missing.int().argsort(dim=-1, descending=True, stable=True)[..., :count]
    ids = wanted.gather(2, order).masked_fill(~missing.gather(2, order), -1)
    return slots, ids


def _marked(ids: Tensor, pages: int) -> Tensor:
    """``(B, G, pages + 1)``, True at the pages in ``ids``; the last entry, for -1, is False."""
    marks = torch.zeros(*ids.shape[:2], pages + 1, dtype=torch.bool, device=ids.device)
    marks.scatter_(2, ids.masked_fill(ids < 0, pages), True)
    marks[..., pages] = False
    return marks


# --- choosing pages -------------------------------------------------------------------------------


def landmark_scores(
    q: Float[Tensor, "B H L D"], landmarks: Float[Tensor, "B G P D"], *, scale: float | None = None
) -> Float[Tensor, "B G P"]:
    """How much of a softmax over the landmarks each page gets.

    Per query head ``softmax(scale * q . landmark)``, added over the queries, and the largest over
    the heads of a group: what any head wants is worth fetching for all.
    """
    shares = _products(q, landmarks, scale).softmax(-1)
    return shares.sum(3).amax(2)


def bound_scores(
    q: Float[Tensor, "B H L D"],
    low: Float[Tensor, "B G P D"],
    high: Float[Tensor, "B G P D"],
    *,
    scale: float | None = None,
) -> Float[Tensor, "B G P"]:
    """Quest: no key of the page has a larger ``scale * q . k`` than this, for any head or query.

    ``sum_d max(q_d low_d, q_d high_d)``, the largest over queries and heads of the group.
    """
    bound = _products(q.clamp(min=0), high, scale) + _products(q.clamp(max=0), low, scale)
    return bound.amax((2, 3))


def _products(q: Tensor, keys: Tensor, scale: float | None) -> Tensor:
    """``(B, G, H / G, L, P)``, in float32 at least; a group's heads are rows of one product."""
    wide = torch.promote_types(q.dtype, torch.float32)
    (B, H, L, D), G = q.shape, keys.shape[1]
    rows = q.to(wide).reshape(B, G, H // G * L, D) * (D**-0.5 if scale is None else scale)
    return (rows @ keys.to(wide).mT).unflatten(2, (H // G, L))


def page_bounds(
    k: Float[Tensor, "B G S D"], page: int
) -> tuple[Float[Tensor, "B G P D"], Float[Tensor, "B G P D"]]:
    """The smallest and largest value of each channel in each page; the last may be shorter."""
    if k.shape[2] == 0 or page < 1:
        raise ValueError(f"k, page: expected a token and a page of 1, got {k.shape[2]} and {page}")
    short = -k.shape[2] % page
    whole = torch.cat([k, k[:, :, -1:].expand(-1, -1, short, -1)], 2).unflatten(2, (-1, page))
    return whole.amin(3), whole.amax(3)


def top_pages(
    scores: Float[Tensor, "B G P"], count: int, *, first: int = 0, last: int = 0
) -> Pages:
    """The ``count`` best pages (all, if there are fewer), among them the first and last few.

    ``first`` (attention sinks) and ``last`` (recent text) pages are always taken, and counted.
    """
    if first < 0 or last < 0 or count < first + last:
        raise ValueError(f"count: expected at least first + last, {first} + {last}, got {count}")
    P = scores.shape[-1]
    if first or last:
        place = torch.arange(P, device=scores.device)
        scores = scores.masked_fill((place < first) | (place >= P - last), torch.inf)
    return scores.topk(min(count, P), -1, sorted=False).indices


def page_positions(
    ids: Int[Tensor, "B G m"], page: int, length: int | None = None
) -> Int[Tensor, "B G n"]:
    """The token positions of pages, ``page`` for each; -1 for page -1 and from ``length`` on."""
    positions = ids[..., None] * page + torch.arange(page, device=ids.device)
    absent = (ids < 0)[..., None].expand(positions.shape)
    if length is not None:
        absent = absent | (positions >= length)
    return positions.masked_fill(absent, -1).flatten(2)
