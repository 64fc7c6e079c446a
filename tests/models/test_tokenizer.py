"""Byte-pair encoding: round trips on any bytes, exact byte counts, and a hand-checked training."""

import hypothesis
import hypothesis.strategies as st
import pytest
import torch

from corelib.data import documents
from corelib.models.tokenizer import SPECIAL, Tokenizer, load_tokenizer, train_bpe


@hypothesis.given(st.binary(max_size=200))
@hypothesis.settings(deadline=None, max_examples=150)
def test_round_trip_of_any_bytes(data):
    tokenizer = load_tokenizer()
    ids = tokenizer.encode(data)
    assert tokenizer.decode_bytes(ids) == data
    assert tokenizer.bytes_of(torch.tensor(ids, dtype=torch.int64)) == len(data)
    assert all(i < tokenizer.n_plain for i in ids)


@hypothesis.given(st.text(max_size=100))
@hypothesis.settings(deadline=None, max_examples=100)
def test_round_trip_of_any_text(text):
    tokenizer = load_tokenizer()
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_the_shipped_tokenizer():
    tokenizer = load_tokenizer()
    assert tokenizer.vocab == 2048 and len(set(tokenizer.bytes[: tokenizer.n_plain])) == 2044
    text = documents("shakespeare", "test")["macbeth.txt"]
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text and len(text) / len(ids) > 2.4
    assert tokenizer.encode("is 48213.")[-6:] == [ord(c) for c in "48213."]  # digits stay single


def test_training_by_hand():
    """aaab aaab aab: first (a a), 5 times by overlap, then what the counts of the words say."""
    tokenizer = train_bpe(["aab", "\n", "aab", "\n", "ab"], 256 + 2 + len(SPECIAL))
    assert tokenizer.merges == [(97, 98), (97, 256)]
    assert tokenizer.encode("aab") == [257] and tokenizer.encode("b") == [98]


def naive_bpe(words, wanted):
    """Count all pairs afresh before every merge."""
    words = {tuple(w): n for w, n in words.items()}
    merges = []
    while len(merges) < wanted:
        counts = {}
        for word, n in words.items():
            for pair in zip(word, word[1:], strict=False):
                counts[pair] = counts.get(pair, 0) + n
        best = min(counts, key=lambda pair: (-counts[pair], pair))
        merges.append(best)
        merged = {}
        for word, n in words.items():
            out, i = [], 0
            while i < len(word):
                hit = word[i : i + 2] == best
                out.append(255 + len(merges) if hit else word[i])
                i += 2 if hit else 1
            merged[tuple(out)] = merged.get(tuple(out), 0) + n
        words = merged
    return merges


def test_training_agrees_with_counting_afresh():
    from collections import Counter

    from corelib.tokenization.shared import WORDS

    text = documents("shakespeare", "valid")["tempest.txt"][:6000]
    words = Counter(WORDS.split(text.encode()))
    fast = train_bpe([text], 256 + 60 + len(SPECIAL)).merges
    assert fast == naive_bpe(words, 60)


def test_save_and_load(tmp_path):
    tokenizer = train_bpe(["the thing that they thought"], 270)
    tokenizer.save(tmp_path / "t.json")
    again = load_tokenizer(tmp_path / "t.json")
    assert (again.merges, again.special) == (tokenizer.merges, tokenizer.special)


@pytest.mark.no_shape_checks
def test_errors(tmp_path):
    with pytest.raises(FileNotFoundError, match="python -m corelib.models.tokenizer"):
        load_tokenizer(tmp_path / "none.json")
    with pytest.raises(ValueError, match="vocab: expected at least 260"):
        train_bpe(["a"], 100)
    with pytest.raises(TypeError, match="text: expected str or bytes, got list"):
        Tokenizer([]).encode([1, 2])
