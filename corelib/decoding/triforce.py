"""TriForce: hierarchical speculative decoding for long contexts (arXiv 2404.11912).

Idea: at a long context a call of the target is slow for its cache, not for its weights. So let the
target draft for itself over a small cache retrieved from the large one, and, as its weights have to
be read too, let a tiny model that sees only the newest text draft for that drafter.

    s = tiny, over sinks and recent text      m = target, over B retrieved      p = target, over all
    middle, until gamma drafted:  x ~ s;  one call of m;  keep x with min(1, m(x) / s(x)) and add
                                  y ~ m;  otherwise add one token of residual(m, s)
    outer:  one call of p over all that was drafted, each token's law being m:
                                  keep with min(1, p / m), otherwise residual(p, m);  all kept: p

After the middle level each drafted token has the law m, given those before it, whatever s was; so
the outer level has the law p, whatever m was.

| here         | paper           | what                                                  |
|:-------------|:----------------|:------------------------------------------------------|
| target, tiny | M_p, M_q        | ``(ids, cache) -> logits``, one vocabulary            |
| gamma        | gamma_2         | tokens to draft for a call over the whole cache       |
| budget       | B, 4K           | positions of the retrieved cache, for each key head   |
| chunk        | chunk size, 8   | neighbouring positions that are retrieved together    |
| sinks, recent| 16 and the rest | what the tiny model sees                              |

Chunks are chosen once, by the product of their mean key with the last query of the prompt; what is
generated takes the place of the lowest ranked (`RetrievalKVCache`). All laws are changed alike; the
paper samples with `PAPER_LAW`.

Exact: the law of the output is that of plain sampling, and greedy decoding gives the same tokens
(in exact arithmetic; calls over one and over many tokens may round a near tie apart).
Different: after a rejection the released middle loop draws from m instead of the residual. Its
tokens then do not have the law m, and the output's law is off (`from_middle`); ours draws from the
residual. Ours reads one token and its successor in a middle call, the released one always
``gamma + 1`` slots, for CUDA graphs. Left out: CUDA graphs, offloading, trees of guesses.
Cost, for each ``gamma`` or so tokens: one read of the whole cache, and ``gamma / 2`` to ``gamma``
reads of ``budget`` positions and of the tiny model's few.
Oracle: enumeration of the output's law; plain greedy decoding; compare ``utils/decoding.py`` and
``models/cache.py`` of Infini-AI-Lab/TriForce.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import torch
from jaxtyping import Int
from torch import Tensor

from ..contracts import Chooser, LanguageModel
from .enumeration import AttentiveModel
from .partial_cache import PartialCache, RetrievalKVCache, SinkCache
from .shared import (
    DecodeReport,
    Draft,
    Drafter,
    Verifier,
    decide,
    greedy_law,
    lossless,
    model_drafter,
    speculative_decode,
    token_law,
)

Law = Callable[[Tensor], Tensor]
PAPER_LAW: Law = functools.partial(token_law, temperature=0.6, top_p=0.9)


@dataclasses.dataclass
class TriForceReport:
    """What a decode did. ``tokens``: the new ids.

    ``outer``: calls over the whole cache, the prompt's among them; ``middle``: calls over the
    retrieved one, and ``rounds``, how many of them came before each outer call; ``tiny_calls``.
    ``kv_bytes``: keys and values read by each level (``"tiny"``, ``"middle"``, ``"outer"``) behind
    the prompt.
    """

    outer: DecodeReport
    middle: DecodeReport
    rounds: list[int]
    tiny_calls: int
    kv_bytes: dict[str, int]

    @property
    def tokens(self) -> list[int]:
        return self.outer.tokens


# --- the middle level -----------------------------------------------------------------------------


def chain_drafter(
    middle: LanguageModel,
    inner: Drafter,
    gamma: int,
    *,
    law: Law = greedy_law,
    verifier: Verifier | None = None,
    cache: PartialCache | None = None,
    report: DecodeReport | None = None,
    device: torch.device | str | None = None,
) -> Drafter:
    """``middle`` drafts at least ``gamma`` tokens (or ``most``) with ``inner``'s guesses.

    Args:
        middle: the drafting model; its laws are those that the outer level checks against.
        inner: a drafter of the same interface; a token is asked of it at a time.
        gamma: drafting stops when that many are there; the last call may add one more.
        law: makes probabilities of the middle model's logits.
        verifier: decides about guesses; by default lossless.
        cache: of the middle model; None reads everything again in each call.
        report: is told what each call of ``middle`` did.
        device: where ``middle`` takes its ids.
    """
    if gamma < 1:
        raise ValueError(f"gamma: expected at least 1, got {gamma}")
    verifier = lossless(law) if verifier is None else verifier
    report = DecodeReport() if report is None else report

    @torch.no_grad()
    def draft(tokens: list[int], start: int, most: int) -> Draft:
        drawn, laws = [], []
        while len(drawn) < min(gamma, most):
            so_far = tokens + drawn
            guess = inner(so_far, start, 1)
            feed = so_far[0 if cache is None else len(cache) :] + guess.tokens
            ids = torch.tensor([feed], device=device)
            logits = middle(ids, cache)[0, -len(guess.tokens) - 1 :]
            kept, emitted = verifier(guess, logits)
            if cache is not None:
                cache.crop(len(so_far) + kept)
            drawn += [*guess.tokens[:kept], emitted]
            laws.append(law(logits)[: kept + 1])
            counts = (len(guess.tokens), kept, len(feed))
            for column, entry in zip((report.drafted, report.accepted, report.fed), counts):
                column.append(entry)
        drawn = drawn[:most]
        return Draft(drawn, torch.cat(laws)[: len(drawn)] if laws else None)

    return draft


def from_middle(law: Law, chooser: Chooser | None) -> Verifier:
    """The released middle loop's rule: a rejected guess is replaced by a token of m. Not lossless.

    For comparison only. Greedy decoding it does not harm: there m is certain.
    """

    def verify(draft: Draft, logits: Tensor) -> tuple[int, int]:
        m = law(logits)
        for i, token in enumerate(draft.tokens):
            keep = (m[i, token] / draft.laws[i][token]).clamp(max=1.0)
            if not decide(torch.stack([1 - keep, keep]), chooser):
                return i, decide(m[i], chooser)
        return len(draft.tokens), decide(m[-1], chooser)

    return verify


# --- three levels ---------------------------------------------------------------------------------


def triforce_generate(
    target: LanguageModel,
    tiny: LanguageModel,
    ids: Int[Tensor, "1 L"],
    new: int,
    *,
    gamma: int = 6,
    budget: int = 4096,
    chunk: int = 8,
    sinks: int = 16,
    recent: int = 240,
    law: Law = greedy_law,
    chooser: Chooser | None = None,
    eos: int | None = None,
    verifier: Verifier | None = None,
) -> TriForceReport:
    """Up to ``new`` tokens behind ``ids``, with the law (or greedy tokens) of ``target``.

    Args:
        target, tiny: ``(ids, cache) -> logits``, over the same ids.
        ids: the prompt, at least one token.
        gamma: tokens to draft for a call over the whole cache.
        budget, chunk: of `RetrievalKVCache`.
        sinks, recent: of `SinkCache`.
        law: of all three models, such as `PAPER_LAW`; greedy by default.
        chooser: takes every random choice; only needed where the law leaves one.
        eos: stop behind this id (it is kept).
        verifier: of the middle level; by default lossless.
    """
    full, retrieved, near = (
        PartialCache(),
        RetrievalKVCache(budget, chunk),
        SinkCache(sinks, recent),
    )
    middle, rounds, tiny_calls = DecodeReport(), [], 0
    one = model_drafter(tiny, 1, law=law, chooser=chooser, cache=near, device=ids.device)

    def guess(tokens: list[int], start: int, most: int) -> Draft:
        nonlocal tiny_calls
        tiny_calls += 1
        return one(tokens, start, most)

    rule = lossless(law, chooser) if verifier is None else verifier
    chain = chain_drafter(
        target, guess, gamma, law=law, verifier=rule, cache=retrieved, report=middle,
        device=ids.device,
    )  # fmt: skip

    def draft(tokens: list[int], start: int, most: int) -> Draft:
        if len(full) == 0:
            return Draft([])  # the prompt has not been read
        if not retrieved.built:
            retrieved.build(full)
            read_prompt(tiny, tokens[:start], near, device=ids.device)
            full.read = near.read = 0
        retrieved.refresh(full)
        near.crop(min(len(near), len(tokens) - 1))
        near.trim()
        drafted = chain(tokens, start, most)
        rounds.append(len(middle.fed) - sum(rounds))
        return drafted

    outer = speculative_decode(
        target, ids, new, draft, verifier=lossless(law, chooser), eos=eos, cache=full
    )
    if not retrieved.built:
        full.read = 0
    read = {"tiny": near.read, "middle": retrieved.read, "outer": full.read}
    return TriForceReport(outer, middle, rounds, tiny_calls, read)


@torch.no_grad()
def read_prompt(
    model: LanguageModel,
    tokens: list[int],
    cache: SinkCache,
    *,
    device: torch.device | str | None = None,
) -> None:
    """Read ``tokens`` piece by piece, never holding more than twice what the cache keeps."""
    for at in range(0, len(tokens), cache.recent):
        model(torch.tensor([tokens[at : at + cache.recent]], device=device), cache)
        cache.trim()


def example() -> dict:
    """Two tiny models of four ids: the first writes, the second guesses for it.

    >>> report = triforce_generate(**example())
    >>> len(report.tokens), report.outer.target_calls, report.middle.target_calls
    (9, 5, 9)
    """
    prompt = torch.randint(0, 4, (1, 24), generator=torch.Generator().manual_seed(1))
    sizes = dict(gamma=3, budget=8, chunk=4, sinks=2, recent=4)
    target, tiny = AttentiveModel(4, seed=1), AttentiveModel(4, seed=2)
    return dict(target=target, tiny=tiny, ids=prompt, new=9, **sizes)
