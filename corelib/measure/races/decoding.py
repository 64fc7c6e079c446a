"""Decoding on this machine: what drafting and verifying brings on the shipped language model.

`text_lm` is no corrector of grammar, but there is a near-copy that it writes reliably: its own
text. Somebody edits what it wrote, and asks for it again; the answer is what it was, and the edited
text is the source. Everybody writes the same tokens, in float32 with a cache. The time on a CPU
says little about a GPU: here reading 48 tokens costs several times as much as reading one, there
about the same, and the number of calls is what counts. Both are in the table.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from jaxtyping import Int
from torch import Tensor

from ...decoding.aggressive_decoding import input_guided
from ...decoding.shared import Drafter, no_draft, prompt_lookup, speculative_decode
from ..race import Missing, race
from . import Row, peer, register, rows


def code_prompt(length: int = 48) -> Int[Tensor, "1 L"]:
    """The document mark and ``length`` ids of a Python file that the language models never saw.

    What `text_lm` writes behind 48 of them has few repetitions, unlike most of its greedy text.
    """
    from ...data import documents
    from ...models.tokenizer import load_tokenizer

    if length < 1:
        raise ValueError(f"length: expected at least 1, got {length}")
    tokenizer = load_tokenizer()
    code = documents("python", "test")["mistune/__main__.py"]
    return torch.tensor([[tokenizer.doc, *tokenizer.encode(code[600:])[:length]]])


def edited(source: list[int], edits: int, vocab: int = 2000, seed: int = 0) -> list[int]:
    """``source`` with ``edits`` of its ids, evenly spread, replaced by random ones."""
    if not 0 <= edits <= len(source):
        raise ValueError(f"edits: expected 0 to {len(source)}, got {edits}")
    draw = torch.Generator().manual_seed(seed)
    source = list(source)
    for number, token in enumerate(torch.randint(0, vocab, (edits,), generator=draw).tolist()):
        source[(2 * number + 1) * len(source) // (2 * edits)] = token
    return source


def lookup_in(source: list[int], longest: int = 10, ngram: int = 3) -> Drafter:
    """Prompt lookup that searches ``source`` as well, as if it stood before the prompt."""
    look = prompt_lookup(longest, ngram)
    return lambda tokens, start, most: look([*source, *tokens], start, most)


def _theirs(model, prompt: Tensor, new: int) -> Callable | Missing:
    transformers = peer("transformers")
    if isinstance(transformers, Missing):
        return transformers
    from ...hf import to_transformers

    twin = to_transformers(model)
    options = dict(do_sample=False, pad_token_id=0, attention_mask=torch.ones_like(prompt))
    options |= dict(prompt_lookup_num_tokens=10, max_new_tokens=new, eos_token_id=int(prompt[0, 0]))
    return lambda: twin.generate(prompt, **options)[0, prompt.shape[1] :]


@register("decoding-rewrite", "text_lm writes an edited text again: tokens a target call, and time")
def decoding_rewrite(quick: bool) -> Iterator[Row]:
    from ...models import zoo
    from ...models.cache import DenseCache

    model, prompt, new = zoo.load("text_lm"), code_prompt(), 8 if quick else 48

    def decode(drafter: Drafter):
        return speculative_decode(model, prompt, new, drafter, cache=DenseCache())

    written = decode(no_draft).tokens
    source = edited(written, 1 if quick else 3)
    drafters: dict[str, Drafter] = {
        "corelib": input_guided(source),
        "corelib, nothing edited": input_guided(written),
        "plain greedy": no_draft,
        "prompt lookup, source before the prompt": lookup_in(source),
    }
    contestants: dict[str, Callable | Missing] = {
        name: lambda drafter=drafter: torch.tensor(decode(drafter).tokens)
        for name, drafter in drafters.items()
    }
    contestants["transformers, prompt lookup without a source"] = _theirs(model, prompt, new)
    shape = f"{prompt.shape[1]} ids read, {new} written, float32"
    result = race(contestants, repeats=2 if quick else 5, min_time=0.0)
    yield from rows(result, what="rewrite", shape=shape)
    for name, drafter in drafters.items():
        report = decode(drafter)
        note = f"{report.tokens_per_call:.2f} tokens a call"
        yield Row(what="calls", shape=f"{report.target_calls} calls", contestant=name, note=note)
