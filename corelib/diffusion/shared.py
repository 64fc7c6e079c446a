"""The masked-diffusion engine: hide tokens, learn to fill them in, fill in from nothing.

A text ``x0 (B, L)`` is destroyed by replacing tokens by the mask id: at time ``t`` each is hidden
with probability ``t``. A net that reads in all directions learns the law of each hidden token given
what is left. The bound on ``-log p(x0)`` (Sahoo et al., arXiv 2406.07524; Shi et al., 2406.04329;
Ou et al., 2406.03736) is, with ``n`` tokens in all and ``m`` of them hidden,

    E over t ~ U(0, 1) of (1 / t) * sum over hidden i of -log p(x0_i | rest)          the integral
  = E over m ~ U{1 … n} of (n / m) * the same sum, a set of size m                    `hide`
  = sum over sets M of (m - 1)! (n - m)! / n! * sum over i in M of -log p(x0_i | rest)
  = the mean code length of x0 over all orders of writing it, one token at a time     `tabular`

because a set of size ``m`` is what is still hidden at one of ``n`` moments, in that share of the
``n!`` orders. Generating starts with everything hidden; each step asks the net once and commits
some slots, chosen by a policy (`policies`). With one slot a step and a net that knows the true
conditionals the joint law is exact; with more it is a product of marginals.

A *net* is a callable ``ids (B, L) -> logits (B, L, vocab)``: position ``i`` says which token stands
at ``i``. To decode with the prefix cache it also takes a cache, makes one by ``new_cache()``, and
may say by ``lookback`` how many positions before a slot its answer is read from (0 by default).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from .policies import Policy, View, max_prob
from .reader import Net, Reader, without_mask

# --- hiding and learning --------------------------------------------------------------------------


class Noised(NamedTuple):
    """``ids (B, L)`` with some tokens hidden, and the weight ``(B, L)`` of each in the loss."""

    ids: Int[Tensor, "B L"]
    weights: Float[Tensor, "B L"]


def hide(
    x0: Int[Tensor, "B L"],
    mask_id: int,
    generator: torch.Generator,
    *,
    free: Bool[Tensor, "B L"] | None = None,
) -> Noised:
    """Hide ``m`` of the ``free`` tokens of each row (by default all), ``m`` uniform from 1 up.

    The weights ``1 / m`` make the weighted sum of ``-log p`` the bound per free token. The sizes of
    a batch are spread evenly over their range, which leaves their law and calms the mean.
    Raises ValueError for a row in which nothing is free.
    """
    free = torch.ones_like(x0, dtype=torch.bool) if free is None else free
    number = free.sum(1)
    if not bool(number.gt(0).all()):
        raise ValueError("free: expected at least one free token in every row")
    rows = torch.randperm(len(x0), generator=generator)
    level = (rows + torch.rand(len(x0), generator=generator)) / len(x0)
    size = (level * number).long().clamp(max=number - 1) + 1
    order = torch.rand(x0.shape, generator=generator).masked_fill(~free, 2.0).argsort(1).argsort(1)
    hidden = order < size[:, None]
    return Noised(x0.masked_fill(hidden, mask_id), hidden / size[:, None])


def hide_in_time(x0: Int[Tensor, "B L"], mask_id: int, generator: torch.Generator) -> Noised:
    """The integral's own form: ``t`` uniform, each token hidden with probability ``t``.

    The weights are ``1 / (t L)``; the same mean as `hide`, with more variance.
    """
    t = torch.rand(len(x0), 1, generator=generator)
    hidden = torch.rand(x0.shape, generator=generator) < t
    return Noised(x0.masked_fill(hidden, mask_id), hidden / (t * x0.shape[1]))


def weighted_nats(
    logits: Float[Tensor, "B L vocab"],
    x0: Int[Tensor, "B L"],
    weights: Float[Tensor, "B L"],
    mask_id: int,
) -> Float[Tensor, " B"]:
    """The weighted sum of ``-log p(x0)`` of each row; nothing is ever spent on the mask itself."""
    logits = without_mask(logits, mask_id)
    nats = F.cross_entropy(logits.transpose(1, 2), x0, reduction="none")
    return nats.mul(weights).sum(1)


# --- decoding -------------------------------------------------------------------------------------


class Decode(NamedTuple):
    """What a decoder made.

    ``tokens (B, P + gen_len)``: the prompt and what follows. ``step_map (B, gen_len)``: the step
    in which each slot was committed, from 0. ``nfe``: calls of the net. ``call_map``: the call
    whose answer decided each slot; the same as ``step_map`` where every step has its own call.
    ``fed``: positions that the net read in all calls together, per row of the batch.
    """

    tokens: Int[Tensor, "B LN"]
    step_map: Int[Tensor, "B N"]
    nfe: int
    call_map: Int[Tensor, "B N"]
    fed: int


def greedy(probs: Float[Tensor, "*B vocab"]) -> Int[Tensor, "*B"]:
    """The chooser that takes the most likely token."""
    return probs.argmax(-1)


def quotas(slots: int, steps: int) -> list[int]:
    """How many of ``slots`` each of ``steps`` commits: as even as possible, larger ones first."""
    if not 1 <= steps <= max(slots, 1):
        raise ValueError(f"steps: expected 1 to {slots}, one slot a step at least; got {steps}")
    return [slots // steps + (n < slots % steps) for n in range(steps)]


def blocks_of(
    prompt: Tensor, gen_len: int, steps: int | None, block_len: int | None
) -> list[tuple[int, int, list[int]]]:
    """``(first slot, slot behind the last, quotas)`` of every block, left to right.

    Raises ValueError for a prompt that is no ``(B, P)``, a negative length, or steps that cannot
    be shared out among the blocks.
    """
    if prompt.dim() != 2:
        raise ValueError(f"prompt: expected (B, P), got {tuple(prompt.shape)}")
    if gen_len < 0:
        raise ValueError(f"gen_len: expected at least 0, got {gen_len}")
    block_len = max(gen_len, 1) if block_len is None else block_len
    if block_len < 1:
        raise ValueError(f"block_len: expected at least 1, got {block_len}")
    steps = gen_len if steps is None else steps
    P, made = prompt.shape[1], []
    count = -(-gen_len // block_len)
    if gen_len and not count <= steps <= gen_len:
        raise ValueError(
            f"steps: expected {count} (a step for each block) to {gen_len} (one for each slot), "
            f"got {steps}"
        )
    for n, lo in enumerate(range(0, gen_len, block_len)):
        hi = min(lo + block_len, gen_len)
        share = steps * hi // gen_len - steps * lo // gen_len
        left = count - n - 1  # blocks behind this one need a step each
        share = min(max(share, 1), hi - lo, steps - sum(len(q) for _, _, q in made) - left)
        made.append((P + lo, P + hi, quotas(hi - lo, share)))
    return made


class MaskedDiffusion:
    """A net and its mask id: the loss to train it with, the static decoder to run it with."""

    def __init__(self, net: Net, mask_id: int):
        if mask_id < 0:
            raise ValueError(f"mask_id: expected at least 0, got {mask_id}")
        self.net, self.mask_id = net, mask_id

    def loss(
        self,
        x0: Int[Tensor, "B L"],
        generator: torch.Generator,
        *,
        free: Bool[Tensor, "B L"] | None = None,
    ) -> Float[Tensor, ""]:
        """An unbiased estimate of the bound, in nats per free token, mean over the rows."""
        noised = hide(x0, self.mask_id, generator, free=free)
        return weighted_nats(self.net(noised.ids), x0, noised.weights, self.mask_id).mean()

    def decode(
        self,
        prompt: Int[Tensor, "B P"],
        gen_len: int,
        *,
        steps: int | None = None,
        block_len: int | None = None,
        policy: Policy = max_prob,
        cache: str = "none",
        chooser: Callable[[Tensor], Tensor] = greedy,
    ) -> Decode:
        """Fill in ``gen_len`` slots behind ``prompt``.

        Args:
            steps: calls to spend where the policy keeps to a quota; None is one for each slot.
            block_len: finish so many slots before looking at the next; None is all at once.
            policy: which slots are committed, see `policies`.
            cache: ``"none"`` or ``"prefix"``, see `Reader`.
            chooser: ``law (..., vocab) -> token (...)``; the most likely one by default.
        """
        ids = F.pad(prompt, (0, max(gen_len, 0)), value=self.mask_id)
        step_map = torch.full_like(ids, -1)
        reader = Reader(self.net, self.mask_id, cache)
        for lo, hi, plan in blocks_of(prompt, gen_len, steps, block_len):
            plan = iter(plan)
            while bool((open_ := ids[:, lo:hi] == self.mask_id).any()):
                law, step = reader.laws(ids, lo, hi), reader.calls
                drawn = chooser(law)
                take = commit(policy, View(open_, law, drawn, next(plan, 1)))
                ids[:, lo:hi] = torch.where(take, drawn, ids[:, lo:hi])
                step_map[:, lo:hi] = torch.where(take, step - 1, step_map[:, lo:hi])
        step_map = step_map[:, prompt.shape[1] :]
        return Decode(ids, step_map, reader.calls, step_map, reader.fed)


def commit(policy: Policy, view: View) -> Bool[Tensor, "B n"]:
    """The open slots that the policy takes. Raises ValueError where it takes none of a row."""
    take = policy(view) & view.open
    if bool((view.open.any(1) & ~take.any(1)).any()):
        raise ValueError("policy: expected at least one slot of every unfinished row, got none")
    return take
