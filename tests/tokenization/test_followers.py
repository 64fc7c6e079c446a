"""The quick test of what may follow, against encoding every pair."""

from __future__ import annotations

import math
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from corelib.data import documents
from corelib.models.tokenizer import load_tokenizer
from corelib.tokenization.followers import Followers, spine
from corelib.tokenization.shared import ANYWHERE, WORDS, LongestMatch, decode_bytes, train_bpe


def encoded(followers, tail):
    """By encoding the tail with every id."""
    return followers._encoded(tuple(tail))


def test_the_shipped_tokenizer():
    tokenizer = load_tokenizer()
    followers, random_ = Followers(tokenizer, WORDS), random.Random(0)
    for corpus in ("shakespeare", "python"):
        text = next(iter(documents(corpus, "test").values())).encode()[:2000]
        for _ in range(2):
            x = text[: random_.randrange(50, 2000)]
            tail = tuple(tokenizer.encode(x[WORDS.safe_cut(x) :]))
            assert torch.equal(followers.after(tail), encoded(followers, tail)), tail
    assert not followers.after((tokenizer.encode(" th")[0],))[ord("e")]
    assert not followers.after(())[tokenizer.doc]


@settings(deadline=None, max_examples=8)
@given(st.lists(st.sampled_from("ab.1 \n"), min_size=1, max_size=30), st.sampled_from([0, 4, 12]))
def test_learnt_merges_with_and_without_boundary(text, merges):
    data = "".join(text).encode()
    for boundary in (ANYWHERE, WORDS):
        tokenizer = train_bpe([data, data[::-1], b"aaaa aaab abab"], merges, boundary)
        followers = Followers(tokenizer)
        ids = tokenizer.encode(data)
        for n in {0, len(ids) // 2, len(ids)}:
            tail = ids[:n]
            if tokenizer.encode(decode_bytes(tokenizer, tail)) == tail:
                assert torch.equal(followers.after(tuple(tail)), encoded(followers, tail))


def test_equal_merges_happen_from_the_left():
    tokenizer = train_bpe([b"aaaa"], 1, ANYWHERE)  # one merge: aa
    followers, aa = Followers(tokenizer), 256
    assert tokenizer.encode(b"aaa") == [aa, ord("a")]
    assert followers.after((aa,))[[ord("a"), aa]].tolist() == [True, True]
    assert followers.after((ord("a"),))[[ord("a"), aa]].tolist() == [False, False]


def test_spines_by_hand():
    merges = [(97, 98), (256, 99), (100, 257)]  # ab, abc, dabc
    assert spine(merges, 258, 0) == [(258, math.inf), (100, 2)]
    assert spine(merges, 258, 1) == [(258, math.inf), (257, 2), (99, 1)]


def test_other_tokenizers_are_asked_whole():
    """Longest match: every neighbour may stand beside the next, the three together may not."""
    tokenizer = LongestMatch([b"a", b"b", b"c", b"abc"])
    followers = Followers(tokenizer)
    assert followers.after((0,))[1] and followers.after((1,))[2]
    assert not followers.after((0, 1))[2]
    assert followers.may_end((0, 1)) and not followers.may_end((0, 1, 2))


def test_where_a_text_may_end():
    tokenizer = train_bpe([b"\n\n \n\n \n\n"], 3, WORDS)
    followers = Followers(tokenizer)
    assert followers.may_end(tuple(tokenizer.encode(b"\n\n"))) and followers.may_end(())
    assert not followers.may_end((10, 10)) and followers.after((10, 10))[ord("a")]
    assert not followers.after((10, 10))[10]


@pytest.mark.no_shape_checks
def test_a_boundary_is_asked_for():
    with pytest.raises(ValueError, match="boundary: the tokenizer names none"):
        Followers(load_tokenizer())
