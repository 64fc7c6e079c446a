"""The exact denoiser: a net that knows the joint law of short texts, and what follows from it.

With few tokens everything can be summed: the true law of each hidden token given the others, the
bound of `shared` over all sets, the code length over all orders. Nothing here is sampled, so
identities hold to the last digits of float64.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from .shared import Net, weighted_nats


class TabularDenoiser:
    """A net: ``ids (B, L) -> logits (B, L, vocab)``, the logs of the exact conditionals.

    Args:
        joint: ``(vocab,) * L`` probabilities; the mask id is ``vocab``.

    A given slot is certain of its token. Where the given tokens are impossible, hidden slots say
    that all tokens are equally likely.
    """

    def __init__(self, joint: Tensor):
        if joint.dim() < 1 or len(set(joint.shape)) != 1:
            raise ValueError(f"joint: expected (vocab,) * L, got {tuple(joint.shape)}")
        if bool((joint < 0).any()) or not math.isclose(float(joint.sum()), 1.0, rel_tol=1e-9):
            raise ValueError("joint: expected probabilities that sum to 1")
        self.joint, self.vocab, self.length = joint.double(), joint.shape[0], joint.dim()
        self.mask_id = self.vocab
        rows = itertools.product(range(self.vocab), repeat=self.length)
        self.texts: Tensor = torch.tensor(list(rows))  # (vocab ** L, L), in the order of joint
        self._one_hot = torch.nn.functional.one_hot(self.texts, self.vocab).double()

    def __call__(self, ids: Int[Tensor, "B L"]) -> Float[Tensor, "B L vocab"]:
        hidden = ids == self.mask_id
        fits = ((ids[:, None] == self.texts) | hidden[:, None]).all(-1)
        law = torch.einsum("bt,tlv->blv", fits * self.joint.flatten(), self._one_hot)
        total = law.sum(-1, keepdim=True)
        law = torch.where(total > 0, law / total.clamp(min=1e-300), 1 / self.vocab)
        given = torch.nn.functional.one_hot(ids.clamp(max=self.vocab - 1), self.vocab)
        return torch.where(hidden[..., None], law, given.double()).log()

    def log_prob(self, x0: Int[Tensor, "B L"]) -> Float[Tensor, " B"]:
        """The true ``log p``."""
        return self.joint[tuple(x0.T)].log()


def exact_bound(net: Net, x0: Int[Tensor, "B L"], mask_id: int) -> Float[Tensor, " B"]:
    """The bound in nats: all sets of size ``m`` with weight ``(m - 1)! (L - m)! / L!`` each."""
    B, L = x0.shape
    total = torch.zeros(B, dtype=torch.float64)
    for m in range(1, L + 1):
        weight = math.factorial(m - 1) * math.factorial(L - m) / math.factorial(L)
        for slots in itertools.combinations(range(L), m):
            hidden = torch.zeros(L, dtype=torch.bool)
            hidden[list(slots)] = True
            logits = net(x0.masked_fill(hidden, mask_id))
            total += weight * weighted_nats(logits, x0, hidden.expand(B, L).double(), mask_id)
    return total


def order_nats(
    net: Net, x0: Int[Tensor, "B L"], mask_id: int, order: Sequence[int]
) -> Float[Tensor, " B"]:
    """``-log p`` of writing ``x0`` one token at a time in this order, in nats."""
    ids, total = torch.full_like(x0, mask_id), torch.zeros(len(x0), dtype=torch.float64)
    for slot in order:
        one = torch.zeros(x0.shape, dtype=torch.float64)
        one[:, slot] = 1.0
        total += weighted_nats(net(ids), x0, one, mask_id)
        ids[:, slot] = x0[:, slot]
    return total


def mean_order_nats(net: Net, x0: Int[Tensor, "B L"], mask_id: int) -> Float[Tensor, " B"]:
    """The mean of `order_nats` over all ``L!`` orders."""
    orders = list(itertools.permutations(range(x0.shape[1])))
    return sum(order_nats(net, x0, mask_id, order) for order in orders) / len(orders)


def example(length: int = 3) -> TabularDenoiser:
    """A language of two words, ``a`` and ``b``: ``length`` slots, neighbours agree three times in
    four, so that no slot is independent of the others."""
    if length < 1:
        raise ValueError(f"length: expected at least 1, got {length}")
    joint = torch.zeros((2,) * length, dtype=torch.float64)
    for text in itertools.product(range(2), repeat=length):
        same = [a == b for a, b in itertools.pairwise(text)]
        joint[text] = 0.5 * math.prod(0.75 if s else 0.25 for s in same)
    return TabularDenoiser(joint)
