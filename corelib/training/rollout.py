"""Sampled answers: many rows at once through a KV cache, with what a policy gradient needs of them.

Rows end at different times. A row that has ended leaves the batch (`KVCache.gather_rows`), so that
a long answer does not make the short ones wait in the arithmetic; every random choice still goes
through ``chooser(probs (R, vocab))`` with all rows in place, so that it may depend on the row.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ..contracts import Chooser, LanguageModel

#: A number, or a function of the logits: ``(rows, vocab) -> (rows,)``.
Temperature = float | Callable[[Tensor], Tensor]


class TokenStats(NamedTuple):
    """Of each token: its log-probability, and the entropy of the law it was drawn from (nats)."""

    log_prob: Tensor
    entropy: Tensor


class Rollout(NamedTuple):
    """``R`` answers of at most ``T`` tokens to prompts of ``P`` tokens.

    Attributes:
        ids: ``(R, P + T)``, filled up with the end token.
        mask: ``(R, T)``, True at the tokens of an answer, its end token among them.
        log_prob, entropy: ``(R, T)``, under the model that answered at temperature 1, whatever the
            temperature of the sampling was; 0 outside of the mask.
    """

    ids: Tensor
    mask: Tensor
    log_prob: Tensor
    entropy: Tensor

    @property
    def answers(self) -> Tensor:
        """``(R, T)``."""
        return self.ids[:, -self.mask.shape[1] :]

    @property
    def prompts(self) -> Tensor:
        """``(R, P)``."""
        return self.ids[:, : -self.mask.shape[1]]

    @property
    def lengths(self) -> Tensor:
        """``(R,)``: tokens of each answer."""
        return self.mask.sum(1)


def entropy_of(logits: Float[Tensor, "*R vocab"]) -> Float[Tensor, "*R"]:
    """Of the law that ``logits`` stand for, in nats."""
    return torch.special.entr(logits.softmax(-1)).sum(-1)


def token_stats(logits: Float[Tensor, "*R vocab"], tokens: Int[Tensor, "*R"]) -> TokenStats:
    """Log-probability of ``tokens`` and entropy, both ``(*R)``, from logits; float32 at least."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    picked = logits.log_softmax(-1).gather(-1, tokens[..., None])[..., 0]
    return TokenStats(picked, entropy_of(logits))


def answer_stats(model: LanguageModel, rollout: Rollout) -> TokenStats:
    """What ``model`` says of a rollout's answers ``(R, T)``, in one parallel call."""
    width = rollout.mask.shape[1]
    logits = model(rollout.ids[:, :-1])[:, -width:]
    return token_stats(logits, rollout.answers)


@torch.no_grad()
def rollout(
    model: LanguageModel,
    prompts: Int[Tensor, "R P"],
    longest: int,
    *,
    chooser: Chooser,
    eos: int,
    new_cache: Callable[[], Any],
    temperature: Temperature = 1.0,
) -> Rollout:
    """Answers of at most ``longest`` tokens to ``prompts``, row by row until `eos`.

    Args:
        model: ``(ids, cache) -> logits``.
        prompts: of one length; a prompt that is asked several times stands in several rows.
        chooser: ``probs (R, vocab) -> (R,)``; a row that has ended is certain of ``eos``.
        eos: the token that ends an answer.
        new_cache: makes an empty cache with ``gather_rows``.
        temperature: of the sampling; a function of the logits may differ from row to row.
    """
    _check(prompts, longest, temperature)
    rows, cache, feed = torch.arange(len(prompts)), new_cache(), prompts
    shape = (len(prompts), longest)
    tokens, mask = torch.full(shape, eos), torch.zeros(shape, dtype=torch.bool)
    stats: list[TokenStats] = []
    for t in range(longest):
        logits = model(feed, cache)[:, -1]
        heat = temperature(logits)[:, None] if callable(temperature) else temperature
        probs = torch.zeros(len(prompts), logits.shape[-1], dtype=logits.dtype)
        probs[:, eos] = 1.0
        probs[rows] = (logits / heat).softmax(-1)
        tokens[:, t] = chooser(probs)
        mask[rows, t] = True
        stats.append(_spread(token_stats(logits, tokens[rows, t]), rows, len(prompts)))
        going = tokens[rows, t] != eos
        if not bool(going.any()):
            break
        if not bool(going.all()):
            cache.gather_rows(going.nonzero()[:, 0])
        rows = rows[going]
        feed = tokens[rows, t : t + 1]
    missing = longest - len(stats)
    padded = [torch.nn.functional.pad(torch.stack(x, 1), (0, missing)) for x in zip(*stats)]
    return Rollout(torch.cat([prompts, tokens], 1), mask, *padded)


def _spread(stats: TokenStats, rows: Tensor, count: int) -> TokenStats:
    """Into all rows, 0 where a row has ended."""
    return TokenStats(*(x.new_zeros(count).index_copy(0, rows, x) for x in stats))


def _check(prompts: Tensor, longest: int, temperature: Temperature) -> None:
    if prompts.dim() != 2 or 0 in prompts.shape:
        raise ValueError(f"prompts: expected (R, P), neither 0, got {tuple(prompts.shape)}")
    if longest < 1:
        raise ValueError(f"longest: expected at least 1 token, got {longest}")
    if not callable(temperature) and not temperature > 0:
        raise ValueError(f"temperature: expected a positive number, got {temperature}")
