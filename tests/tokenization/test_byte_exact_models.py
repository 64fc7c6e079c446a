"""Exact byte laws of the shipped models and of tokenizers that look ahead."""

from __future__ import annotations

import math
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from corelib.data import documents
from corelib.models import zoo
from corelib.tokenization.byte_exact import (
    END,
    ByteView,
    healed_next_byte,
    naive_next_byte,
)
from corelib.tokenization.shared import (
    WORDS,
    ExactTokenModel,
    train_bpe,
)

pytestmark = pytest.mark.method("byte_exact")

EXACT = dict(rtol=0, atol=1e-12)


def exact_view(texts, tokenizer):
    model = ExactTokenModel(texts, tokenizer)
    return ByteView(model, tokenizer, start=[tokenizer.end], end=tokenizer.end)


def law_of(texts, x):
    """The law of the next byte after ``x``, from the texts themselves."""
    law = torch.zeros(257, dtype=torch.float64)
    for text, p in texts.items():
        if text.startswith(x):
            law[text[len(x)] if len(text) > len(x) else END] += p
    return law / law.sum()


# --- where the last cut is still open -------------------------------------------------------------

PARTS = [b"a", b"ab", b" ", b"  ", b"\n", b"\n\n", b".", b"7", b" a"]


@settings(deadline=None, max_examples=8)
@given(st.lists(st.lists(st.sampled_from(PARTS), max_size=5).map(b"".join), min_size=1, max_size=6))
def test_cuts_that_look_ahead(pieces):
    """GPT-2's policy: the law of the texts comes back, blank runs and line ends included."""
    texts = {text: 1 / len(set(pieces)) for text in pieces}
    tokenizer = train_bpe([b" ".join(pieces), b"\n\n  a\n\n  ab\n\n"], 10, WORDS)
    view = exact_view(texts, tokenizer)
    for x in {text[:n] for text in texts for n in range(len(text) + 1)}:
        torch.testing.assert_close(view.next_byte(x), law_of(texts, x), **EXACT)
        p = sum(p for text, p in texts.items() if text.startswith(x))
        assert math.isclose(view.log_prob(x), math.log(p), abs_tol=1e-12)


# --- a decoder ------------------------------------------------------------------------------------


@pytest.mark.parametrize("x", [b"the questi", b"be, \n\n", b""])
def test_cache_and_restart_change_nothing(views, x):
    view, plain = views
    law = view.next_byte(x)
    torch.testing.assert_close(law, plain.next_byte(x), **EXACT)
    torch.testing.assert_close(law, view.reader(x, restart=False).law(), **EXACT)
    ratio = math.exp(view.log_prob(x + b"e") - view.log_prob(x))
    assert math.isclose(law[101].item(), ratio, rel_tol=1e-9)


@pytest.mark.skipif("text_lm" not in zoo.names(), reason="text_lm is not in the zoo")
def test_mid_token_prompts_on_text_lm(shipped_view):
    """Words of a held-out play, cut inside: how surprised is each by the byte that follows?"""
    text = documents("shakespeare", "test")["macbeth.txt"].encode()
    view, draw = shipped_view(zoo.load("text_lm")), random.Random(1)
    bits = {naive_next_byte: 0.0, ByteView.next_byte: 0.0}
    for _ in range(6):
        at = draw.randrange(400, len(text) - 100)
        while not (text[at - 1 : at].isalpha() and text[at : at + 1].isalpha()):
            at += 1
        for form in bits:
            law = form(view, text[at - 80 : at])
            assert math.isclose(law.sum().item(), 1.0, rel_tol=1e-9)
            bits[form] -= law[text[at]].log2().item() / 6
    assert bits[ByteView.next_byte] < bits[naive_next_byte] - 0.3


@pytest.mark.skipif("text_lm" not in zoo.names(), reason="text_lm is not in the zoo")
def test_prompts_of_the_lab_on_text_lm(shipped_view):
    """ " th" is never followed by "e", for " the" is a token; bytes know better. Healing goes back
    one token, and "retur" parts from "return" earlier."""
    view = shipped_view(zoo.load("text_lm"))
    prompt, code = b"ROMEO.\nWhat light is this? It is th", b"def main():\n    retur"
    assert naive_next_byte(view, prompt)[ord("e")] < 0.02 < 0.5 < view.next_byte(prompt)[ord("e")]
    assert healed_next_byte(view, code)[ord("n")] < 0.9 < view.next_byte(code)[ord("n")]


# --- bad input ------------------------------------------------------------------------------------
