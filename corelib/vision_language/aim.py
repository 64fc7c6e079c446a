"""AIM: merge vision tokens before the language model, prune them inside it (arXiv 2412.03248).

Idea: near-duplicate vision tokens are merged before the first layer, and what is left is pruned on
a schedule over depth by how much attention it receives. Nothing is trained.

    merge    tokens that are most alike (cosine), pair by pair, down to a share of them
    rank     s <- mean_h A_h^T s,  from s = 1 / L:  one step is the mean attention received
    prune    layer l sees the share r(l) of the merged tokens:
             r(l) = 1 up to l1,  falls linearly,  0 from l2 on

| here        | paper            | what                                                       |
|:------------|:-----------------|:-----------------------------------------------------------|
| ratio       | retention ratio  | share of the tokens that merging leaves (0.25 for video)   |
| l1, l2      | l_1, l_2         | first layer that prunes, first that sees no vision token   |
| shares      | A                | ``(B, H, L, L)``, softmax over keys                        |
| iters       | –                | steps of PageRank: 1                                       |
| most        | –                | share that a pass of merging may remove: 0.5 as in ToMe    |

Exact: ``ratio=1`` with ``l1`` at the number of layers is the model unchanged; merging keeps the sum
of what is merged. Approximate: all else. Text is never pruned, and a token keeps the position of
its place in the image, a merged one that of the token it was merged into (our choice: the core file
of the released code was not at hand). Different: ``most`` allows small passes, because a pass of
half merges every token of one side, also those that are like no other. `column_importance` sums
the columns of the map without holding it.

Late tokens are seen by few rows, so that the mean attention received favours early ones. Steps of
PageRank must stay few: under a causal mask the first token is seen by all and sees itself only, so
that the iteration drains towards it (`pagerank_importance` with many ``iters``).

Basis: reviews and the abstract; ``l1 = 14``, ``l2 = 22`` of 28 layers and one step are from
memory. Cost: one product of all queries with all keys for each layer that prunes
(`accounting.score_flops`), and what is saved behind it. Oracle: the unpruned model; the mean of the
map's rows.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from .shared import Look, Prefilled, Prompt, Pruner, best, make_prompt, prefill, received
from .token_merging import Merged, merge_to_ratio, tome_merge

__all__ = [
    "aim_prefill",
    "aim_pruner",
    "column_importance",
    "example",
    "merge_prompt",
    "merge_to_ratio",
    "pagerank_importance",
    "piecewise_schedule",
    "tome_merge",
]


def pagerank_importance(shares: Float[Tensor, "B H L L"], iters: int = 1) -> Float[Tensor, "B L"]:
    """Rank of every token in the graph of attention, from the map itself: the reference.

    ``s <- mean over heads of A^T s``, ``iters`` times from ``1 / L``. It always adds up to 1.
    """
    _check_iters(iters)
    mean = shares.mean(1)
    ranks = mean.new_full(mean.shape[:2], 1 / mean.shape[2])
    for _ in range(iters):
        ranks = (ranks[:, None] @ mean)[:, 0]
    return ranks


def column_importance(
    q: Float[Tensor, "B H L D"], k: Float[Tensor, "B G L D"], iters: int = 1
) -> Float[Tensor, "B L"]:
    """`pagerank_importance` of causal attention, without the map: weighted column sums."""
    _check_iters(iters)
    ranks = None
    for _ in range(iters):
        ranks = received(q, k, ranks)
    return ranks


def _check_iters(iters: int) -> None:
    if iters < 1:
        raise ValueError(f"iters: expected at least 1, got {iters}")


def piecewise_schedule(layers: int, l1: int = 14, l2: int = 22) -> list[float]:
    """The share of vision tokens that enters each layer: 1 up to ``l1``, 0 from ``l2`` on.

    >>> piecewise_schedule(8, l1=2, l2=6)
    [1.0, 1.0, 1.0, 0.75, 0.5, 0.25, 0.0, 0.0]

    With ``l1 = l2`` all tokens leave before that layer.
    """
    if layers < 1 or not 0 <= l1 <= l2:
        raise ValueError(f"l1, l2: expected 0 <= l1 <= l2 and a layer, got {l1}, {l2}, {layers}")
    falling = [(l2 - layer) / max(1, l2 - l1) for layer in range(layers)]
    return [1.0 if n < l1 else min(1.0, max(0.0, r)) for n, r in enumerate(falling)]


def aim_pruner(counts: list[int], iters: int = 1) -> Pruner:
    """A pruner that lets ``counts[l]`` vision tokens into layer ``l``; they must not rise."""
    if any(a < b for a, b in zip(counts, counts[1:])):
        raise ValueError(f"counts: expected numbers that do not rise, got {counts}")

    def prune(look: Look) -> Tensor | None:
        n = counts[look.layer + 1]
        if n >= look.prompt.vision:
            return None
        if n == 0:  # nobody to rank
            return look.prompt.places[:, :0]
        return best(look.of_vision(column_importance(look.q, look.k, iters)), n)

    return prune


def merge_prompt(prompt: Prompt, ratio: float, *, most: float = 0.5) -> tuple[Prompt, Merged]:
    """``prompt`` with its vision tokens merged to a share ``ratio``; each keeps its position."""
    first, last = prompt.first, prompt.first + prompt.vision
    merged = merge_to_ratio(prompt.x[:, first:last], ratio, most=most)
    shorter = prompt.keep(merged.place)
    x = torch.cat([prompt.x[:, :first], merged.x, prompt.x[:, last:]], 1)
    return Prompt(x, shorter.positions, shorter.places, first, prompt.end), merged


def aim_prefill(
    model: Any,
    prompt: Prompt,
    cache: Any,
    *,
    ratio: float = 0.25,
    l1: int = 14,
    l2: int = 22,
    iters: int = 1,
    most: float = 0.5,
) -> Prefilled:
    """Read ``prompt`` by AIM: merge to ``ratio``, then prune on the schedule from ``l1`` to ``l2``.

    ``most``: the share of the tokens that one pass of merging may remove (`merge_to`).

    ``model``, ``cache``: see `shared.prefill`. Set ``l1`` and ``l2`` to the depth of your model:
    the defaults are for 28 layers. Raises ``ValueError`` for a ratio, layers or steps that make no
    sense.
    """
    _check_iters(iters)
    shares = piecewise_schedule(len(model.layers), l1, l2)
    prompt, _ = merge_prompt(prompt, ratio, most=most)
    counts = [round(share * prompt.vision) for share in shares]
    if counts[0] < prompt.vision:  # no layer has looked yet: all or nothing
        prompt = prompt.keep(prompt.places[:, :0])
    return prefill(model, prompt, cache, aim_pruner(counts, iters))


def example() -> dict:
    """Six vision tokens, two of them equal and two alike, between one word and two.

    >>> prompt = example()["prompt"]
    >>> merge_prompt(prompt, 2 / 3)[1].source
    tensor([[0, 0, 1, 1, 2, 3]])
    """
    vision = torch.tensor(
        [[1.0, 0, 0], [1, 0, 0], [0, 1, 0], [0, 1, 0.2], [0, 0, 1], [-1, -1, 0]]
    ).double()
    before, after = torch.ones(1, 1, 3).double(), torch.ones(1, 2, 3).double()
    return {"prompt": make_prompt(before, vision[None], after)}
