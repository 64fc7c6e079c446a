"""The tokenizer kit: what encodings are, where they may be cut, and the exact model of a law."""

from __future__ import annotations

import itertools
import math
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from corelib.data import documents
from corelib.models.tokenizer import load_tokenizer
from corelib.models.tokenizer import train_bpe as train_shipped
from corelib.tokenization.shared import (
    ANYWHERE,
    BPE,
    WORDS,
    ByteTokenizer,
    ExactTokenModel,
    LongestMatch,
    Unigram,
    boundary_of,
    decode_bytes,
    markov_texts,
    reachable,
    train_bpe,
)

SAMPLE = b"ab ab aba\n\nab  a1b12 a.. b.\n\n  ba ab\n ab\n\n \n\n \n\n"
alphabet = st.lists(st.sampled_from([b"a", b"b", b"1", b".", b" ", b"\n"]), max_size=9).map(
    b"".join
)
letters = st.lists(st.sampled_from([b"a", b"b"]), max_size=9).map(b"".join)


KIT = {
    "bytes": ByteTokenizer(),
    "longest": LongestMatch([b"a", b"b", b"aa", b"aba", b"bb"]),
    "unigram": Unigram({b"a": 0.3, b"b": 0.3, b"ab": 0.2, b"ba": 0.2, b"aab": 0.1}),
    "bpe": train_bpe([b"abaabbababbaab" * 3], 8, ANYWHERE),
}


WORDS_KIT = train_bpe([SAMPLE], 12, WORDS)


@settings(deadline=None, max_examples=60)
@given(letters, st.sampled_from(sorted(KIT)))
def test_bytes_come_back_and_what_begins_an_encoding_is_one(text, name):
    tokenizer = KIT[name]
    ids = tokenizer.encode(text)
    assert decode_bytes(tokenizer, ids) == text
    for n in range(len(ids) + 1):
        assert tokenizer.encode(decode_bytes(tokenizer, ids[:n])) == ids[:n]
        assert reachable(tokenizer, ids[:n])


def test_longest_match_by_hand():
    tokenizer = LongestMatch([b"A", b"B", b"AA"])
    assert tokenizer.encode(b"AAABAB") == [2, 0, 1, 0, 1]
    assert tokenizer.end == 3 and tokenizer.vocab == 4
    assert not reachable(tokenizer, [0, 0]) and reachable(tokenizer, [2, 0])


@settings(deadline=None, max_examples=40)
@given(letters)
def test_unigram_is_the_best_of_all_segmentations(text):
    tokenizer = KIT["unigram"]

    def segmentations(rest):
        if not rest:
            yield []
        for n in range(1, len(rest) + 1):
            if rest[:n] in tokenizer.score:
                yield from ([rest[:n], *more] for more in segmentations(rest[n:]))

    best = max(sum(tokenizer.score[w] for w in words) for words in segmentations(text))
    found = sum(tokenizer.score[tokenizer.bytes[i]] for i in tokenizer.encode(text))
    assert found == pytest.approx(best, abs=1e-12)


def test_bpe_applies_the_merges_in_the_order_learnt():
    """Against the definition: every merge in turn, by a pattern over ids written as characters."""
    shipped = load_tokenizer()
    kit = BPE(shipped.merges, WORDS)
    for corpus in ("shakespeare", "python"):
        text = next(iter(documents(corpus, "test").values())).encode()[:1500]
        ids = []
        for piece in WORDS.split(text):
            word = "".join(map(chr, piece))
            for new, (a, b) in enumerate(shipped.merges, 256):
                word = word.replace(chr(a) + chr(b), chr(new))
            ids += map(ord, word)
        assert kit.encode(text) == shipped.encode(text) == ids
    assert kit.bytes[: kit.end] == shipped.bytes[: shipped.n_plain]


def test_training_learns_what_the_shipped_trainer_learns():
    text = documents("shakespeare", "test")["macbeth.txt"][:1500]
    assert train_bpe([text.encode()], 40).merges == train_shipped([text], 300).merges
    assert train_bpe([b"ab"], 5).merges == []  # nothing is there twice


def test_a_boundary_keeps_merges_inside_pieces():
    text = b"of the of the of the"
    joined = [b" " in word[1:] for word in train_bpe([text], 12, WORDS).bytes]
    assert not any(joined)
    assert any(b" " in word[1:] for word in train_bpe([text], 12, ANYWHERE).bytes)


@settings(deadline=None, max_examples=100)
@given(alphabet, alphabet)
def test_a_safe_cut_is_a_cut_whatever_comes(x, y):
    tokenizer = WORDS_KIT
    cut = WORDS.safe_cut(x)
    assert b"".join(WORDS.split(x)) == x
    whole = tokenizer.encode(x[:cut]) + tokenizer.encode(x[cut:] + y)
    assert tokenizer.encode(x + y) == whole


def test_safe_cuts_by_hand():
    cuts = {b"": 0, b"abc": 0, b"to be": 2, b"to be ": 5, b"a\n\n": 1, b" a": 0, b"a b c": 3}
    assert {x: WORDS.safe_cut(x) for x in cuts} == cuts


def test_reachable_is_what_the_encodings_of_all_texts_begin_with():
    """Texts of up to five of four bytes; and two line ends are two things."""
    words = WORDS_KIT
    begun, marks = set(), [b"a", b"1", b" ", b"\n"]
    for n in range(1, 6):
        for text in map(b"".join, itertools.product(marks, repeat=n)):
            ids = words.encode(text)
            begun |= {tuple(ids[:k]) for k in range(1, len(ids) + 1)}
    ids_of = [i for i, word in enumerate(words.bytes) if word and set(word) <= set(b"a1 \n")]
    for n in (1, 2, 3):
        for ids in itertools.product(ids_of, repeat=n):
            if len(decode_bytes(words, ids)) <= 3:
                assert reachable(words, ids) == (ids in begun), ids
    pair = words.encode(b"\n\n")
    assert len(pair) == 1 and words.encode(b"\n\na")[:2] == [10, 10]
    assert reachable(words, pair) and reachable(words, [10, 10])
    assert not reachable(words, words.encode(b"a") + words.encode(b"b"))


def test_exact_model_gives_every_text_its_probability():
    random.seed(0)
    texts = [b"", b"a", b"ab", b"aab", b"bbb"]
    law = dict(zip(texts, (0.1, 0.2, 0.3, 0.15, 0.25), strict=True))
    for tokenizer in KIT.values():
        model = ExactTokenModel(law, tokenizer)
        for text, p in law.items():
            ids = [tokenizer.end, *tokenizer.encode(text), tokenizer.end]
            logs = model(torch.tensor([ids]))[0]
            torch.testing.assert_close(logs.exp().sum(-1), torch.ones(len(ids)).double())
            found = sum(logs[n, ids[n + 1]] for n in range(len(ids) - 1))
            assert math.isclose(found.exp().item(), p, rel_tol=1e-12)


def test_a_chain_of_texts():
    law = markov_texts({"A": 1.0}, {"A": {"A": 0.25, "B": 0.75}, "B": {"B": 1.0}}, 3)
    assert law == {b"AAA": 0.0625, b"AAB": 0.1875, b"ABB": 0.75}


# --- bad input ------------------------------------------------------------------------------------

BAD = {
    "no bytes": (lambda: LongestMatch([b"a", b""]), "words: expected non-empty bytes"),
    "twice": (lambda: LongestMatch([b"a", b"a"]), "words: expected every word once"),
    "weights": (lambda: Unigram({b"a": 0.0}), "weights: expected positive numbers"),
    "unknown": (lambda: KIT["longest"].encode(b"abx"), r"no word begins with byte 120 \(pos.* 2"),
    "no words": (lambda: KIT["unigram"].encode(b"abx"), "text: the words do not make up"),
    "law": (lambda: ExactTokenModel({b"a": 0.5}, KIT["bytes"]), "texts: .* sum to 1, got 0.5"),
    "policy": (lambda: boundary_of(load_tokenizer()), "boundary: the tokenizer names none"),
    "cache": (
        lambda: ExactTokenModel({b"a": 1.0}, KIT["bytes"])(torch.tensor([[256]]), cache=1),
        "cache: this model reads whole sequences",
    ),
}  # fmt: skip


@pytest.mark.no_shape_checks
@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_named(case):
    call, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        call()
