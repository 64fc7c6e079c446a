"""Structured State Space Models for In-Context Reinforcement Learning (arXiv 2303.03982).

Idea: an agent's rollout runs across the ends of episodes, where its memory must start afresh. Carry
that flag inside the scan's operator, and one parallel scan does the whole rollout, resets and all.

    (a, b, d) ∘ (a', b', d') = (a' a, a' b + b', d)    if d' = 0
                               (a', b', 1)             if d' = 1
    (1, h0, 0) ∘ (decay, x[1], d[1]) ∘ ... ∘ (decay, x[t], d[t])   has   b = h[t]

| here          | paper     | what                                               | shape        |
|:--------------|:----------|:---------------------------------------------------|:-------------|
| decay, x      | a, b      | of ``h[t] = decay[t] h[t-1] + x[t]``               | (B, L, C)    |
| reset, resets | d         | the past is forgotten before ``x[t]`` is added     | (B, L)       |
| state         | h0        | of each environment, kept between rollouts         | (B, C)       |

Because of the flags the operator is associative: a stretch that contains a reset forgets whatever
comes before it, however it was bracketed (`scan_reset`). The same states come from a plain scan of
decays that are 0 at resets, which is what `corelib.primitives.diagonal_scan` does and what the
layers use: three numbers fewer to carry, and gradients do not cross a reset either.

`S5Layer` and `S5Block` (`corelib.state_space.s5`) are the memory, `RecurrentPPO`
(`corelib.state_space.recurrent_ppo`) trains an agent with it, `MemoryChain` and `RandomProjection`
(`corelib.state_space.memory_tasks`) are what it is tried on. Ours: all sizes; Gaussian actions by
mean and log-deviation; a point to be pushed in place of the paper's simulated bodies.
Cost: linear in L; ``log L`` steps that wait for each other.
Oracles: a loop over time, episodes run one by one.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Bool, Inexact
from torch import Tensor

from corelib.primitives.associative_scan import associative_scan

from .memory_tasks import MemoryChain, RandomProjection, Reach
from .recurrent_ppo import ActorCritic, RecurrentPPO, advantages
from .s5 import S5Block, S5Layer

__all__ = [
    "ActorCritic",
    "Flagged",
    "MemoryChain",
    "RandomProjection",
    "Reach",
    "RecurrentPPO",
    "S5Block",
    "S5Layer",
    "advantages",
    "example",
    "scan_reset",
    "then",
]


class Flagged(NamedTuple):
    """``h -> decay h + x``, and whether the past was forgotten on the way, ``(B, C)`` each."""

    decay: Tensor
    x: Tensor
    reset: Tensor


def then(first: Flagged, second: Flagged) -> Flagged:
    """The operator: first the one, then the other. Associative."""
    cut = second.reset
    return Flagged(
        torch.where(cut, second.decay, second.decay * first.decay),
        torch.where(cut, second.x, second.decay * first.x + second.x),
        first.reset | cut,
    )


def scan_reset(
    decay: Inexact[Tensor, "B L C"],
    x: Inexact[Tensor, "B L C"],
    *,
    reset: Bool[Tensor, "B L"],
    state: Inexact[Tensor, "B C"],
) -> Inexact[Tensor, "B L C"]:
    """All states by the paper's operator on a tree: what `diagonal_scan` is checked against."""
    flags = reset[..., None].expand(x.shape)
    elements = [Flagged(*parts) for parts in zip(decay.unbind(1), x.unbind(1), flags.unbind(1))]
    start = Flagged(torch.ones_like(state), state, torch.zeros_like(state, dtype=torch.bool))
    prefixes = associative_scan(then, [start, *elements])
    return torch.stack([prefix.x for prefix in prefixes], 1)[:, 1:]


def example() -> dict:
    """Six steps of one complex channel, a reset at the fourth.

    >>> scan_reset(**example()).shape
    torch.Size([1, 6, 1])
    """
    x = torch.tensor([1.0, 0, 0, 2, 0, 1], dtype=torch.complex128)[None, :, None]
    reset = torch.tensor([[False, False, False, True, False, False]])
    state = torch.tensor([[4.0]], dtype=torch.complex128)
    return dict(decay=torch.full_like(x, 0.5 + 0.5j), x=x, reset=reset, state=state)
