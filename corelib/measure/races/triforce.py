"""TriForce on `text_lm` with 1,900 tokens in the cache: calls, bytes and time, greedy.

Everybody writes the same tokens. On this CPU a call costs about as much for its weights as for its
cache, and a middle call costs what a target call costs, so three levels cannot win time here; what
they save is what the paper saves, bytes of keys and values, and they are counted. `modelled_step`
puts the counted calls on the paper's model and context, where a cache outweighs the weights; those
times are modelled and not measured.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator

import torch
from jaxtyping import Int
from torch import Tensor

from ...contracts import LanguageModel
from ...decoding.partial_cache import PartialCache, RetrievalKVCache, SinkCache
from ...decoding.shared import Drafter, model_drafter, no_draft, speculative_decode
from ...decoding.triforce import chain_drafter, read_prompt, triforce_generate
from ..hardware import A100
from ..race import race
from . import Row, register, rows

SIZES = dict(budget=256, chunk=8, sinks=16, recent=112)
LEVELS = ("tiny", "middle", "outer")


@dataclasses.dataclass
class Counted:
    """A decode of ``tokens``: calls of each level, and bytes of keys and values they read.

    ``rounds``: middle calls before each outer call, where there are three levels.
    """

    tokens: list[int]
    calls: dict[str, int]
    kv_bytes: dict[str, int]
    acceptance: float = 0.0
    rounds: list[int] = dataclasses.field(default_factory=list)

    @property
    def tokens_per_call(self) -> float:
        """Per call over the whole cache, the prompt's apart."""
        return (len(self.tokens) - 1) / max(self.calls["outer"], 1)

    @property
    def bytes_per_token(self) -> float:
        return sum(self.kv_bytes.values()) / max(len(self.tokens) - 1, 1)


def held_out_prompt(length: int, corpus: str = "shakespeare") -> Int[Tensor, "1 L"]:
    """The document mark and the beginning of a text that the models never saw."""
    from ...data import documents
    from ...models.tokenizer import load_tokenizer

    tokenizer = load_tokenizer()
    text = "\n".join(documents(corpus, "test").values())[: 8 * length]
    return torch.tensor([[tokenizer.doc, *tokenizer.encode(text)][:length]])


def _counted(report, full: PartialCache, prompt: int, **drafting: tuple[int, PartialCache]):
    a_position = full.bytes() // max(len(full), 1)
    calls = dict.fromkeys(LEVELS, 0) | {"outer": report.target_calls - 1}
    read = dict.fromkeys(LEVELS, 0) | {"outer": full.read - prompt * a_position}
    for level, (number, cache) in drafting.items():
        calls[level], read[level] = number, cache.read
    return Counted(report.tokens, calls, read, report.acceptance)


def plain(target: LanguageModel, ids: Tensor, new: int) -> Counted:
    """A token a call, over everything."""
    full = PartialCache()
    report = speculative_decode(target, ids, new, no_draft, cache=full)
    return _counted(report, full, ids.shape[1])


def one_level(
    target: LanguageModel, tiny: LanguageModel, ids: Tensor, new: int, gamma: int = 4, **options
) -> Counted:
    """The tiny model drafts for the target, over sinks and recent text."""
    full, near = PartialCache(), SinkCache(SIZES["sinks"], options.get("recent", SIZES["recent"]))
    one = model_drafter(tiny, gamma, cache=near)
    calls = 0

    def draft(tokens: list[int], start: int, most: int):
        nonlocal calls
        if len(full) == 0:
            return no_draft(tokens, start, most)
        if len(near) == 0:
            read_prompt(tiny, tokens[:start], near)
            near.read = 0
        near.crop(min(len(near), len(tokens) - 1))
        near.trim()
        drafted = one(tokens, start, most)
        calls += len(drafted.tokens)
        return drafted

    report = speculative_decode(target, ids, new, draft, cache=full)
    return _counted(report, full, ids.shape[1], tiny=(calls, near))


def retrieval_only(target: LanguageModel, ids: Tensor, new: int, gamma: int = 6) -> Counted:
    """The target drafts for itself over a retrieved cache, a token a call."""
    full, retrieved = PartialCache(), RetrievalKVCache(SIZES["budget"], SIZES["chunk"])
    chain: Drafter = chain_drafter(target, no_draft, gamma, cache=retrieved)
    calls = 0

    def draft(tokens: list[int], start: int, most: int):
        nonlocal calls
        if len(full) == 0:
            return no_draft(tokens, start, most)
        if not retrieved.built:
            retrieved.build(full)
        retrieved.refresh(full)
        drafted = chain(tokens, start, most)
        calls += len(drafted.tokens)
        return drafted

    report = speculative_decode(target, ids, new, draft, cache=full)
    return _counted(report, full, ids.shape[1], middle=(calls, retrieved))


def three_levels(
    target: LanguageModel, tiny: LanguageModel, ids: Tensor, new: int, gamma: int = 6, **options
) -> Counted:
    """TriForce with the sizes of this race."""
    report = triforce_generate(target, tiny, ids, new, gamma=gamma, **SIZES | options)
    calls = dict(tiny=report.tiny_calls, middle=report.middle.target_calls)
    calls["outer"] = report.outer.target_calls - 1
    acceptance = report.outer.acceptance
    return Counted(report.tokens, calls, report.kv_bytes, acceptance, report.rounds)


@register("triforce", "text_lm with 1,900 tokens in its cache: three levels against one and none")
def triforce(quick: bool) -> Iterator[Row]:
    from ...models import zoo

    target, tiny = zoo.load("text_lm"), zoo.load("draft_lm")
    ids, new = held_out_prompt(300 if quick else 1900), 6 if quick else 64
    decoders: dict[str, Callable[[], Counted]] = {
        "corelib": lambda: three_levels(target, tiny, ids, new),
        "plain greedy": lambda: plain(target, ids, new),
        "one level: draft_lm": lambda: one_level(target, tiny, ids, new),
        "one level: retrieval": lambda: retrieval_only(target, ids, new),
    }
    runs = {name: lambda run=run: torch.tensor(run().tokens) for name, run in decoders.items()}
    shape = f"{ids.shape[1]} ids read, {new} written, budget {SIZES['budget']}, float32"
    yield from rows(race(runs, repeats=2, min_time=0.0), what="prompt and text", shape=shape)
    for name, run in decoders.items():
        made = run()
        note = f"{made.tokens_per_call:.2f} tokens a call, {made.bytes_per_token / 1e6:.2f} MB KV"
        yield Row(what="per token", shape=f"{made.calls}", contestant=name, note=note)


# --- modelled -------------------------------------------------------------------------------------

#: Bytes (16 bits a number) and layers of Llama2-7B and of the 68M model that drafts for it.
LLAMA = dict(weights=2 * 6.74e9, position=2 * 32 * 32 * 128 * 2)
TINY = dict(weights=2 * 68e6, position=2 * 2 * 12 * 64 * 2)


def modelled_step(made: Counted, context: int, *, budget: int = 4096, recent: int = 256) -> float:
    """Seconds a token that reading weights and caches would take on an A100, at least.

    ``made``: whose calls are used as they were counted; the rest is the paper's shapes.
    """
    calls = {level: n / max(len(made.tokens) - 1, 1) for level, n in made.calls.items()}
    full, some = (LLAMA["weights"] + n * LLAMA["position"] for n in (context, budget))
    near = TINY["weights"] + recent * TINY["position"]
    read = calls["outer"] * full + calls["middle"] * some + calls["tiny"] * near
    return read / A100.bandwidth
