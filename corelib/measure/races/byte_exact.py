"""The next byte after a prompt, exactly: what it costs over asking for the next token.

A decoder of the shipped shape with random weights: the laws say nothing, their cost is the same.
Prompts of Shakespeare end inside a word. ``one call a cover`` is the lemma as it is written down,
every cover a sequence of its own that the model reads from the start; it must give the same law.
Asking for the next token computes something else and is raced unchecked.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from ...data import documents
from ...models.cache import DenseCache
from ...models.decoder import Decoder, DecoderConfig
from ...models.tokenizer import load_tokenizer
from ...tokenization.byte_exact import ByteView, covers, generate_bytes, naive_next_byte
from ...tokenization.shared import WORDS
from ..race import race
from ..scaling import sweep
from . import Row, register, rows

SHAPE = "B1 C256 layers4 vocab2048 float32"
OPTIONS = dict(repeats=3, min_time=0.05)


def fresh_view() -> ByteView:
    """A view that remembers nothing of earlier prompts but which ids may follow which."""
    tokenizer = load_tokenizer()
    options = dict(start=[tokenizer.doc], end=None, boundary=WORDS, new_cache=DenseCache)
    return ByteView(Decoder(DecoderConfig(qkv_bias=True)).eval(), tokenizer, **options)


def prompt_of(length: int) -> bytes:
    """About so many bytes of a held-out play, up to the third letter of a word."""
    text = documents("shakespeare", "test")["macbeth.txt"].encode()
    end = text.index(b" ", length) + 4
    while not text[end - 3 : end + 1].isalpha():
        end = text.index(b" ", end) + 4
    return text[end - length : end]


@torch.no_grad()
def one_call_a_cover(view: ByteView, text: bytes) -> Tensor:
    """The law, with the model asked anew for every cover of the text; bytes only."""
    cut = view.boundary.safe_cut(text)
    prefix, rest = tuple(view.tokenizer.encode(text[:cut])), text[cut:]
    law = torch.zeros(257, dtype=torch.float64)
    for ids in covers(view.tokenizer, rest, view.boundary):
        logits = view.model(torch.tensor([[*view.start, *prefix, *ids]]))[0].double()
        p = math.exp(sum(_log_next(view, logits, prefix, ids, n)[v] for n, v in enumerate(ids)))
        spelled = b"".join(view.tokenizer.bytes[v] for v in ids)
        if len(spelled) > len(rest):
            law[spelled[len(rest)]] += p
            continue
        for v, q in enumerate(_log_next(view, logits, prefix, ids, len(ids)).exp().tolist()):
            if q and view.tokenizer.bytes[v]:
                law[view.tokenizer.bytes[v][0]] += p * q
    return law / law.sum()


def _log_next(view: ByteView, logits: Tensor, prefix: tuple, ids: tuple, n: int) -> Tensor:
    """What follows the first ``n`` of ``ids``, among the ids that may."""
    allowed = view.followers.after(ids[:n])
    row = logits[len(view.start) + len(prefix) + n - 1]
    return row.masked_fill(~allowed, -math.inf).log_softmax(0)


@register("byte-exact-law", "the exact law of the next byte, by the length of the prompt")
def byte_exact_law(quick: bool) -> Iterator[Row]:
    view = fresh_view()

    def contestants(length: int) -> dict[str, Callable]:
        text = prompt_of(length)
        return {
            "corelib": lambda: view.next_byte(text)[:256],
            "one call a cover": lambda: one_call_a_cover(view, text)[:256],
        }

    def others(length: int) -> dict[str, Callable]:
        text = prompt_of(length)
        return {
            "corelib": lambda: view.next_byte(text),
            "next token, first byte": lambda: naive_next_byte(view, text),
        }

    lengths = (64, 128) if quick else (128, 256, 512, 1024, 2048)
    result = sweep(lengths, contestants, tolerance=1e-3, **OPTIONS)
    yield from rows(result, what="the same law", shape=SHAPE)
    result = sweep(lengths, others, check=None, **OPTIONS)
    yield from rows(result, what="against the biased law", shape=SHAPE)


@register("byte-exact-write", "writing byte by byte against writing token by token")
def byte_exact_write(quick: bool) -> Iterator[Row]:
    view, text = fresh_view(), prompt_of(256)
    count = 4 if quick else 32
    written = generate_bytes(view.reader(text), count, lambda law: law[:256].argmax())
    ids = view.tokenizer.encode(text + written)

    @torch.no_grad()
    def tokens() -> None:
        cache, first = DenseCache(), len(view.tokenizer.encode(text))
        view.model(torch.tensor([[*view.start, *ids[:first]]]), cache)
        for v in ids[first:]:
            view.model(torch.tensor([[v]]), cache)

    contestants = {
        "corelib": lambda: generate_bytes(view.reader(text), count, lambda law: law[:256].argmax()),
        "tokens of the same text": tokens,
    }
    yield from rows(race(contestants, check=None, **OPTIONS), what=f"{count} bytes", shape=SHAPE)
