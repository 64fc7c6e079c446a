"""Which hidden slots to commit: the policies of masked-diffusion decoding.

A policy sees a block after one call of the net and says which open slots become final. *Ranked*
policies take the ``quota`` best by a score; *adaptive* ones take as many as are sure enough, and
always the surest.

| name          | score of a slot, or rule                                | from                   |
|:--------------|:--------------------------------------------------------|:-----------------------|
| random        | chance                                                  | the theory's own order |
| left_to_right | earlier is better                                       | autoregression         |
| max_prob      | probability of the drawn token                          | LLaDA, MaskGIT         |
| margin        | best probability minus the second                       | 2502.06768             |
| neg_entropy   | minus the entropy of the law                            | Dream                  |
| threshold     | all with probability of the drawn token >= ``tau``      | Fast-dLLM              |
| factor        | the largest k with (k + 1) (1 - k-th best) < ``f``      | Fast-dLLM, theorem 1   |
| entropy_bound | the surest while their entropies, but one, sum <= ``g`` | EB-sampler, 2505.24857 |
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor


class View(NamedTuple):
    """A block after a call: ``open`` slots, their laws, the tokens drawn, slots due this step."""

    open: Bool[Tensor, "B n"]
    law: Float[Tensor, "B n vocab"]
    drawn: Int[Tensor, "B n"]
    quota: int


Policy = Callable[[View], Tensor]
Score = Callable[[View], Tensor]


def best(
    score: Float[Tensor, "B n"], open_: Bool[Tensor, "B n"], count: int
) -> Bool[Tensor, "B n"]:
    """The ``count`` open slots with the largest score; of equal ones the leftmost."""
    order = score.masked_fill(~open_, -torch.inf).argsort(dim=1, descending=True, stable=True)
    rank = order.argsort(1)
    return (rank < count) & open_


class Ranked:
    """Commits the ``quota`` open slots with the best ``score``."""

    def __init__(self, score: Score):
        self.score = score

    def __call__(self, view: View) -> Bool[Tensor, "B n"]:
        return best(self.score(view), view.open, view.quota)


def confidence(view: View) -> Float[Tensor, "B n"]:
    """The probability of the drawn token."""
    return view.law.gather(-1, view.drawn[..., None])[..., 0]


def entropy(view: View) -> Float[Tensor, "B n"]:
    """The entropy of each slot's law, in nats."""
    return torch.special.entr(view.law).sum(-1)


def _margin(view: View) -> Float[Tensor, "B n"]:
    two = view.law.topk(2, -1).values
    return two[..., 0] - two[..., 1]


def _earliness(view: View) -> Float[Tensor, "B n"]:
    n = view.open.shape[1]
    return -torch.arange(n, dtype=view.law.dtype, device=view.law.device).expand(view.open.shape)


max_prob = Ranked(confidence)
margin = Ranked(_margin)
neg_entropy = Ranked(lambda view: -entropy(view))
left_to_right = Ranked(_earliness)


class RandomOrder:
    """Commits any ``quota`` open slots, picked one by one by ``chooser`` from a uniform law."""

    def __init__(self, chooser: Callable[[Tensor], Tensor]):
        self.chooser = chooser

    def __call__(self, view: View) -> Bool[Tensor, "B n"]:
        left, take = view.open.clone(), torch.zeros_like(view.open)
        for _ in range(view.quota):
            busy = left.any(1, keepdim=True)
            law = torch.where(busy, left, True).to(view.law.dtype)
            pick = self.chooser(law / law.sum(1, keepdim=True))
            take |= busy & F.one_hot(pick, left.shape[1]).bool()
            left &= ~take
        return take


def threshold(tau: float = 0.9) -> Policy:
    """Every slot whose drawn token has probability ``tau`` or more, and the surest."""
    if not 0 <= tau <= 1:
        raise ValueError(f"tau: expected 0 to 1, got {tau}")

    def policy(view):
        sure = confidence(view)
        return (sure >= tau) & view.open | best(sure, view.open, 1)

    return policy


def factor(f: float = 1.0) -> Policy:
    """The ``k`` surest, with the largest ``k`` such that ``(k + 1) (1 - k-th best) < f``.

    With ``f = 1`` greedy decoding of all of them at once gives the most likely combination, if the
    probabilities are right (Fast-dLLM, theorem 1).
    """
    if not f > 0:
        raise ValueError(f"f: expected a positive number, got {f}")

    def policy(view):
        sure = confidence(view).masked_fill(~view.open, -1.0)
        order = sure.argsort(dim=1, descending=True, stable=True)
        k = torch.arange(1, sure.shape[1] + 1, device=sure.device)
        fits = (k + 1) * (1 - sure.gather(1, order)) < f
        count = torch.where(fits, k, 1).amax(1, keepdim=True)
        return (order.argsort(1) < count) & view.open

    return policy


def entropy_bound(g: float = 0.1) -> Policy:
    """The surest slots, while the entropies of all but the least sure sum to at most ``g`` nats."""
    if g < 0:
        raise ValueError(f"g: expected at least 0, got {g}")

    def policy(view):
        unsure = entropy(view).masked_fill(~view.open, torch.inf)
        order = unsure.argsort(dim=1, stable=True)
        ranked = unsure.gather(1, order)
        within = ranked.cumsum(1) - ranked <= g
        return within.gather(1, order.argsort(1)) & view.open

    return policy


#: Name -> how to make it. `RandomOrder` needs a chooser, the adaptive ones their bound.
POLICIES: dict[str, Callable[..., Policy]] = {
    "random": RandomOrder,
    "left_to_right": lambda: left_to_right,
    "max_prob": lambda: max_prob,
    "margin": lambda: margin,
    "neg_entropy": lambda: neg_entropy,
    "threshold": threshold,
    "factor": factor,
    "entropy_bound": entropy_bound,
}


def make_policy(name: str, **options) -> Policy:
    """The policy ``name`` of `POLICIES`, made with ``options``."""
    if name not in POLICIES:
        raise ValueError(f"name: expected one of {', '.join(POLICIES)}; got {name!r}")
    return POLICIES[name](**options)
