"""What decoders that draft and verify share: laws, acceptance, the loop, a report.

A cheap drafter proposes ``k`` tokens ``x_1 … x_k``, drawn from laws ``q_i``; the target reads all
of them in one call, which gives its laws ``p_1 … p_{k+1}``. From left to right (Leviathan et al.,
arXiv 2211.17192; Chen et al., arXiv 2302.01318):

    accept x_i with probability min(1, p_i(x_i) / q_i(x_i))
    at the first rejection emit one token of residual(p_i, q_i) ~ (p_i - q_i)+  and stop
    if all are accepted, emit one token of p_{k+1}

Each emitted token then has exactly the target's law, whatever ``q`` is. A drafter without chance is
``q`` = certainty; greedy decoding is ``p`` = certainty, which `greedy_law` makes of logits. One law
of the target serves both, so temperature, top-k and top-p are applied in one place (`token_law`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ..contracts import Chooser, KVCache, LanguageModel
from .enumeration import AttentiveModel, TabularModel, exact_law, total_variation  # noqa: F401

# --- laws -----------------------------------------------------------------------------------------


def greedy_law(logits: Float[Tensor, "*B vocab"]) -> Float[Tensor, "*B vocab"]:
    """Certainty of the most likely token (of several equal ones the first)."""
    one_hot = torch.nn.functional.one_hot(logits.argmax(-1), logits.shape[-1])
    return one_hot.to(torch.promote_types(logits.dtype, torch.float32))


def token_law(
    logits: Float[Tensor, "*B vocab"],
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float = 1.0,
) -> Float[Tensor, "*B vocab"]:
    """Softmax at ``temperature``, cut to the ``top_k`` best, then to the fewest with ``top_p``.

    ``temperature=0`` is `greedy_law`. Float32 at least.
    """
    if temperature < 0:
        raise ValueError(f"temperature: expected at least 0, got {temperature}")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k: expected at least 1 or None, got {top_k}")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p: expected a share above 0 and at most 1, got {top_p}")
    if temperature == 0:
        return greedy_law(logits)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature
    probs, order = logits.softmax(-1).sort(dim=-1, descending=True, stable=True)
    probs = probs[..., :top_k] / probs[..., :top_k].sum(-1, keepdim=True)
    before = probs.cumsum(-1) - probs
    probs = probs.masked_fill(before >= top_p, 0.0)
    kept = probs / probs.sum(-1, keepdim=True)
    return torch.zeros_like(logits).scatter(-1, order[..., :top_k], kept)


def decide(probs: Float[Tensor, " vocab"], chooser: Chooser | None) -> int:
    """One index by the chooser, which is not asked when only one outcome is possible."""
    possible = probs.nonzero()
    if len(possible) == 1:
        return int(possible)
    if chooser is None:
        raise ValueError("chooser: expected one, as the law leaves a choice; got None")
    return int(chooser(probs))


# --- acceptance -----------------------------------------------------------------------------------


def residual(
    p: Float[Tensor, "*B vocab"], q: Float[Tensor, "*B vocab"]
) -> Float[Tensor, "*B vocab"]:
    """What ``p`` wants beyond ``q``: ``(p - q)+`` normalised; ``p`` where nothing is left."""
    over = (p - q).clamp(min=0)
    total = over.sum(-1, keepdim=True)
    return torch.where(total > 0, over / total.clamp(min=torch.finfo(p.dtype).tiny), p)


def speculative_accept(
    p: Float[Tensor, " vocab"], q: Float[Tensor, " vocab"], token: int, chooser: Chooser | None
) -> tuple[bool, int]:
    """Keep the drafted ``token`` (drawn from ``q``) or emit one of the residual: law ``p``."""
    if not q[token] > 0:
        raise ValueError(f"token: expected one that its law q can draw, got {token}")
    keep = (p[token] / q[token]).clamp(max=1.0)
    if decide(torch.stack([1 - keep, keep]), chooser):
        return True, token
    return False, decide(residual(p, q), chooser)


class Draft(NamedTuple):
    """Drafted tokens, and the laws ``(k, vocab)`` they were drawn from (None: without chance)."""

    tokens: list[int]
    laws: Tensor | None = None


Drafter = Callable[[list[int], int, int], Draft]  # (all ids, length of the prompt, most) -> draft
Verifier = Callable[[Draft, Tensor], tuple[int, int]]  # (draft, logits (k + 1, vocab))


def lossless(
    law: Callable[[Tensor], Tensor] = greedy_law, chooser: Chooser | None = None
) -> Verifier:
    """The verifier that keeps the target's law: ``(draft, logits) -> (kept, next token)``."""

    def verify(draft: Draft, logits: Tensor) -> tuple[int, int]:
        p = law(logits)
        for i, token in enumerate(draft.tokens):
            q = certainty(token, p.shape[-1], p) if draft.laws is None else draft.laws[i]
            kept, emitted = speculative_accept(p[i], q, token, chooser)
            if not kept:
                return i, emitted
        return len(draft.tokens), decide(p[-1], chooser)

    return verify


def certainty(token: int, vocab: int, like: Tensor) -> Float[Tensor, " vocab"]:
    """The law of a token that was not drawn but given."""
    return like.new_zeros(vocab).index_fill(0, torch.tensor(token, device=like.device), 1.0)


# --- the loop -------------------------------------------------------------------------------------


@dataclasses.dataclass
class DecodeReport:
    """What a decode did: one entry of each list is one call of the target.

    ``tokens``: the new ids; ``drafted`` and ``accepted``: how many ids were proposed and kept;
    ``fed``: how many ids the target read, the prompt in its first call.
    """

    tokens: list[int] = dataclasses.field(default_factory=list)
    drafted: list[int] = dataclasses.field(default_factory=list)
    accepted: list[int] = dataclasses.field(default_factory=list)
    fed: list[int] = dataclasses.field(default_factory=list)

    @property
    def target_calls(self) -> int:
        return len(self.fed)

    @property
    def tokens_per_call(self) -> float:
        """1 for plain decoding."""
        return len(self.tokens) / self.target_calls

    @property
    def acceptance(self) -> float:
        """The share of drafted ids that were kept (0 when nothing was drafted)."""
        return sum(self.accepted) / max(sum(self.drafted), 1)

    def kept_at_depth(self) -> list[float]:
        """For each place in a draft: the share of drafts that long that were kept so far."""
        pairs = list(zip(self.drafted, self.accepted, strict=True))
        long_enough = [[a for d, a in pairs if d > i] for i in range(max(self.drafted, default=0))]
        return [sum(a > i for a in kept) / len(kept) for i, kept in enumerate(long_enough)]

    def modelled_speedup(self, draft_cost: float) -> float:
        """Over plain decoding if a call costs 1, however much it reads, and a draft that much."""
        drafts = sum(d > 0 for d in self.drafted)
        return len(self.tokens) / (self.target_calls + draft_cost * drafts)


@torch.no_grad()
def speculative_decode(
    target: LanguageModel,
    ids: Int[Tensor, "1 L"],
    new: int,
    drafter: Drafter,
    *,
    verifier: Verifier | None = None,
    eos: int | None = None,
    cache: KVCache | None = None,
) -> DecodeReport:
    """Up to ``new`` tokens behind ``ids``: draft, verify in one call, keep what passes, repeat.

    Args:
        target: ``(ids, cache) -> logits``.
        ids: the prompt, one row, at least one token.
        drafter: ``(all ids so far, length of the prompt, most tokens) -> Draft``.
        verifier: by default `lossless` greedy decoding.
        eos: stop behind this id (it is kept).
        cache: an empty cache; None reads everything again in each call.
    """
    if ids.dim() != 2 or ids.shape[0] != 1 or ids.shape[1] < 1:
        raise ValueError(f"ids: expected (1, L) with at least one token, got {tuple(ids.shape)}")
    if new < 0:
        raise ValueError(f"new: expected at least 0, got {new}")
    if cache is not None and len(cache):
        raise ValueError(f"cache: expected an empty one, got {len(cache)} tokens")
    verifier = lossless() if verifier is None else verifier
    tokens, start, report = ids[0].tolist(), ids.shape[1], DecodeReport()
    while len(tokens) < start + new and not (len(tokens) > start and tokens[-1] == eos):
        draft = drafter(tokens, start, start + new - len(tokens) - 1)
        feed = tokens[0 if cache is None else len(cache) :] + draft.tokens
        logits = target(torch.tensor([feed], device=ids.device), cache)[0]
        kept, emitted = verifier(draft, logits[len(feed) - len(draft.tokens) - 1 :])
        fresh = draft.tokens[:kept] + [emitted]
        fresh = fresh[: fresh.index(eos) + 1] if eos in fresh else fresh
        if cache is not None:
            cache.crop(len(tokens) + min(kept, len(fresh)))
        tokens += fresh
        for column, entry in zip(
            (report.drafted, report.accepted, report.fed),
            (len(draft.tokens), min(kept, len(fresh)), len(feed)),
            strict=True,
        ):
            column.append(entry)
    report.tokens = tokens[start:]
    return report


# --- plain drafters -------------------------------------------------------------------------------


def no_draft(tokens: list[int], start: int, most: int) -> Draft:
    """Nothing: plain decoding, a token a call."""
    return Draft([])


def prompt_lookup(longest: int = 10, ngram: int = 3) -> Drafter:
    """What followed the last ``ngram`` ids (or fewer) where they stood last before."""

    def draft(tokens: list[int], start: int, most: int) -> Draft:
        for n in range(min(ngram, len(tokens) - 1), 0, -1):
            for at in range(len(tokens) - n - 1, -1, -1):
                if tokens[at : at + n] == tokens[-n:]:
                    return Draft(tokens[at + n : at + n + min(longest, most)])
        return Draft([])

    return draft


def model_drafter(
    model: LanguageModel,
    gamma: int,
    *,
    law: Callable[[Tensor], Tensor] = greedy_law,
    chooser: Chooser | None = None,
    cache: KVCache | None = None,
    device: torch.device | str | None = None,
) -> Drafter:
    """``gamma`` tokens of a smaller model with their laws; its empty ``cache`` is kept in step.

    ``device``: where the model takes its ids.
    """

    @torch.no_grad()
    def draft(tokens: list[int], start: int, most: int) -> Draft:
        drawn, laws = [], []
        if cache is not None:
            cache.crop(min(len(cache), len(tokens) - 1))
        for _ in range(min(gamma, most)):
            feed = (tokens + drawn)[0 if cache is None else len(cache) :]
            logits = model(torch.tensor([feed], device=device), cache)
            laws.append(law(logits[0, -1]))
            drawn.append(decide(laws[-1], chooser))
        return Draft(drawn, torch.stack(laws) if laws else None)

    return draft
