"""MInference's offline part: which shape each head gets, at equal kernel cost; and a cache that
lets any model of the contract prefill with the shapes found (see ``minference``).

    cost(pattern)  = scores that the kernel computes, per head          (`computed_scores`)
    gap(pattern)   = outputs that differ from dense by more than 0.005  (`output_gap`)
    pattern of h   = the candidate with the smallest gap of h, after each was scaled to the budget

Gaps that differ by less than half a percent of the outputs count as equal, and the earlier shape is
taken: an A-shape before one that has to be estimated (ours; the paper does not say).
Scaling (`at_cost`) halves the interval of one factor on all sizes: the largest pattern that stays
within the budget. Costs depend on the prompt, so they are counted on the sample's own queries.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from corelib.primitives import attention, visible_keys
from corelib.primitives.vertical_slash import kept_keys

from .minference import (
    FORCED,
    Pattern,
    a_shape,
    block_sparse,
    choose_blocks,
    choose_lines,
    estimate_vertical_slash,
    minference_attention,
    vertical_slash,
)

#: Shapes of the released search, to be scaled to a budget.
SHAPES = (
    a_shape(100, 800), vertical_slash(30, 800), vertical_slash(500, 700),
    vertical_slash(3500, 100), vertical_slash(1000, 4096), block_sparse(100),
)  # fmt: skip
THRESHOLD = 5e-3
TIE = 5e-3  # share of the outputs: closer gaps are equal, and the earlier shape is taken


def computed_scores(
    q: Float[Tensor, "B H L D"],
    k: Float[Tensor, "B G S D"],
    pattern: Pattern,
    *,
    block: int = 64,
    last: int = 64,
    forced: tuple[int, int] = FORCED,
    scale: float | None = None,
) -> Int[Tensor, "B H"]:
    """Scores that the kernel computes for ``pattern``, per batch row and head.

    Whole tiles count: a slash takes ``block`` keys for a block of queries, a column one.
    """
    (B, H, L, _), S = q.shape, k.shape[2]
    kind, first, second = pattern
    if kind == "a_shape":
        seen = torch.arange(S - L + 1, S + 1, device=q.device).clamp(min=0)  # keys up to a query
        kept = seen.clamp(max=second) + (seen - second).clamp(min=0, max=first)
        return kept.sum().expand(B, H)
    if kind == "block_sparse":
        return choose_blocks(q, k, first, block=block, scale=scale).counts.sum(-1) * block**2
    sums = estimate_vertical_slash(q, k, last=last, scale=scale)
    lines = choose_lines(*sums, first, second, forced=forced)
    by_slash, by_column = kept_keys(*(x.flatten(0, 1) for x in lines), L, block)
    last_key = torch.arange(0, L, block, device=q.device).add(block).clamp(max=L) + S - L
    seen = torch.arange(S, device=q.device) < last_key[:, None]
    return ((by_slash | by_column) & seen).sum((-1, -2)).view(B, H) * block


def output_gap(out: Float[Tensor, "B H L V"], dense: Float[Tensor, "B H L V"]) -> Int[Tensor, " H"]:
    """How many numbers of each head's output are off by more than 0.005."""
    return ((out - dense).abs() > THRESHOLD).sum((0, 2, 3))


def scaled(pattern: Pattern, factor: float) -> Pattern:
    """All sizes times ``factor``; at least one of each."""
    kind, *sizes = pattern
    return Pattern(kind, *(max(1, round(size * factor)) if size else 0 for size in sizes))


def at_cost(
    pattern: Pattern, budget: float, cost: Callable[[Pattern], float], *, steps: int = 7
) -> Pattern:
    """The largest multiple of ``pattern`` that costs at most ``budget``, or the smallest one."""
    low, high = 0.0, 1.0
    while high < 1024 and cost(scaled(pattern, high)) <= budget:
        low, high = high, 2 * high
    for _ in range(steps):
        middle = (low + high) / 2
        low, high = (middle, high) if cost(scaled(pattern, middle)) <= budget else (low, middle)
    return scaled(pattern, low)


@torch.no_grad()
def search_head_patterns(
    q: Float[Tensor, "B H L D"],
    k: Float[Tensor, "B G S D"],
    v: Float[Tensor, "B G S V"],
    *,
    budget: float,
    shapes: Sequence[Pattern] = SHAPES,
    block: int = 64,
    last: int = 64,
    forced: tuple[int, int] = FORCED,
    scale: float | None = None,
) -> tuple[list[Pattern], Int[Tensor, "shapes H"]]:
    """Every head's best shape on one sample, and the gaps of all shapes.

    ``budget``: share of the scores of dense causal attention, 0 to 1; each shape is scaled for
    each head so that its kernel computes at most so many.
    """
    if not 0 < budget <= 1:
        raise ValueError(f"budget: expected a share above 0 and up to 1, got {budget}")
    (B, H, L, _), (_, G, S, _) = q.shape, k.shape
    options = dict(block=block, last=last, forced=forced, scale=scale)
    allowed = budget * B * int(visible_keys(L, S, causal=True).sum())
    dense = attention(q, k, v, causal=True, scale=scale)
    gaps, fitted = torch.zeros(len(shapes), H, dtype=torch.long), [[] for _ in shapes]
    for h in range(H):
        g = h // (H // G)
        one = q[:, h : h + 1], k[:, g : g + 1], v[:, g : g + 1]
        for n, shape in enumerate(shapes):

            def cost(pattern: Pattern, pair=one[:2]) -> int:
                return int(computed_scores(*pair, pattern, **options).sum())

            fitted[n].append(at_cost(shape, allowed, cost))
            out = minference_attention(*one, fitted[n][h], **options)
            gaps[n, h] = output_gap(out, dense[:, h : h + 1])[0]
    best = gaps <= gaps.amin(0) + TIE * dense[:, 0].numel()
    return [fitted[int(best[:, h].int().argmax())][h] for h in range(H)], gaps


class SparsePrefill:
    """A cache around another that prefills with patterns and decodes densely.

    The first stretch of more than one token is attended with ``patterns[layer]`` (a pattern for all
    heads, or one per head); whatever follows goes to ``cache``. Batches with padding stay dense.
    """

    def __init__(
        self,
        cache,
        patterns: Sequence,
        *,
        block: int = 64,
        last: int = 64,
        forced: tuple[int, int] = FORCED,
    ) -> None:
        self.cache, self.patterns = cache, list(patterns)
        self.options = dict(block=block, last=last, forced=forced)
        self._held: dict[int, int] = {}  # tokens that went through here, by layer
        self._prompt: dict[int, tuple[Tensor, Tensor]] = {}
        self._started = len(cache) > 0

    def append(self, layer: int, k: Float[Tensor, "B G n D"], v: Float[Tensor, "B G n D"]) -> None:
        """Add ``k, v`` behind what ``layer`` holds."""
        padded = getattr(self.cache, "pads", None) is not None
        if not (self._started or padded or self._held.get(layer)):
            self._prompt[layer] = k, v
        self._held[layer] = self._held.get(layer, 0) + k.shape[2]
        self.cache.append(layer, k, v)

    def crop(self, length: int) -> None:
        """Forget everything from position ``length`` on; from 0 on, a new prompt may come."""
        self.cache.crop(length)
        self._held = {layer: min(n, length) for layer, n in self._held.items()}

    def attend(
        self, layer: int, q: Float[Tensor, "B H n D"], *, scale: float | None = None
    ) -> Float[Tensor, "B H n D"]:
        """Sparse over the prompt that was just appended, else what the cache does."""
        prompt = self._prompt.pop(layer, None)
        if prompt is None or q.shape[2] != prompt[0].shape[2]:
            return self.cache.attend(layer, q, scale=scale)
        patterns = self.patterns[layer]
        return minference_attention(q, *prompt, patterns, scale=scale, **self.options)

    def __len__(self) -> int:
        return len(self.cache)

    def __getattr__(self, name: str):
        """Everything else of the contract: gather_rows, realign, bytes, pads."""
        return getattr(self.cache, name)
