"""Witten-Bell n-grams against the formula written out, and as a law that sums to one."""

from collections import Counter

import numpy as np
import pytest

from corelib.models.ngram import WittenBell


def brute_force(texts, history, symbol, order):
    """The recursive formula, by counting again for every context."""
    if order == 0:
        return 1 / 256
    context = history[len(history) - order + 1 :] if order > 1 else b""
    followers = Counter()
    for text in texts:
        for i in range(len(context), len(text)):
            if text[i - len(context) : i] == context:
                followers[text[i]] += 1
    lower = brute_force(texts, history, symbol, order - 1)
    if not followers:
        return lower
    kinds = len(followers)
    return (followers[symbol] + kinds * lower) / (sum(followers.values()) + kinds)


@pytest.mark.parametrize("order", [1, 2, 3, 5])
def test_equals_the_formula(order):
    texts = [b"the cat sat on the mat", b"the dog", b"a"]
    model = WittenBell(order).fit(texts)
    asked = b"that hat\xff"
    for i, p in enumerate(model.probabilities(asked)):
        n = min(order, i + 1)
        assert p == pytest.approx(brute_force(texts, asked[:i], asked[i], n), rel=1e-12)


def test_sums_to_one_over_all_bytes():
    model = WittenBell(4).fit([b"abracadabra, abracadabra"])
    for history in (b"abr", b"xyz", b"a, "):
        total = sum(model.probabilities(history + bytes([x]))[-1] for x in range(256))
        assert total == pytest.approx(1.0, rel=1e-12)


def test_more_context_helps_on_text():
    from corelib.data import documents

    train = [documents("shakespeare", "valid")["tempest.txt"].encode()]
    held_out = documents("shakespeare", "valid")["romeo_and_juliet.txt"].encode()[:20000]
    bits = [WittenBell(order).fit(train).bits(held_out) / len(held_out) for order in (1, 2, 3)]
    assert bits[0] > bits[1] + 0.5 > bits[2] + 0.8 and np.isfinite(bits).all()


@pytest.mark.no_shape_checks
def test_errors():
    with pytest.raises(ValueError, match="order: expected 1 to 8"):
        WittenBell(9)
    with pytest.raises(ValueError, match="call fit"):
        WittenBell(2).bits(b"a")
