"""Exact byte-level probabilities: the lemma by brute force, laws of known chains, a real model."""

from __future__ import annotations

import itertools
import math
import random

import pytest
import torch

from corelib.models.decoder import sampler
from corelib.models.tokenizer import load_tokenizer
from corelib.tokenization.byte_exact import (
    END,
    ByteEnsemble,
    ByteView,
    covers,
    example,
    generate_bytes,
    healed_next_byte,
    naive_next_byte,
)
from corelib.tokenization.shared import (
    ANYWHERE,
    WORDS,
    ByteTokenizer,
    ExactTokenModel,
    LongestMatch,
    Unigram,
    decode_bytes,
    reachable,
    train_bpe,
)

EXACT = dict(rtol=0, atol=1e-12)
AB = [65, 66, END]
TOKENIZERS = {
    "bytes": ByteTokenizer(),
    "longest": LongestMatch([b"A", b"B", b"AA"]),
    "long words": LongestMatch([b"A", b"B", b"AB", b"ABA", b"BBAA", b"AAAB"]),
    "unigram": Unigram({b"A": 0.3, b"B": 0.3, b"AB": 0.2, b"BA": 0.15, b"BAB": 0.1}),
    "bpe": train_bpe([b"ABAABBABABBAAB" * 3], 6, ANYWHERE),
}


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


class RandomModel:
    """Ids -> random logits that depend on all of them; every id is possible after every other."""

    def __init__(self, vocab):
        self.vocab = vocab

    def __call__(self, ids):
        rows = []
        for row in ids.tolist():
            here = [random.Random(str(row[: n + 1])) for n in range(len(row))]
            rows.append([[r.gauss(0, 1) for _ in range(self.vocab)] for r in here])
        return torch.tensor(rows, dtype=torch.float64)


def random_view(tokenizer):
    model = RandomModel(tokenizer.vocab)
    return ByteView(model, tokenizer, start=[tokenizer.end], end=tokenizer.end)


def restricted(model, tokenizer, ids):
    """``p(ids)`` under the model that may only choose ids of encodings."""
    p, end = 1.0, tokenizer.end
    for n, v in enumerate(ids):
        probs = model(torch.tensor([[end, *ids[:n]]]))[0, -1].softmax(0)
        kept = [reachable(tokenizer, (*ids[:n], w)) for w in range(end)]
        p *= probs[v] / (probs * torch.tensor([*kept, True])).sum() if v == end or kept[v] else 0.0
    return float(p)


# --- the law --------------------------------------------------------------------------------------


def test_the_papers_toy():
    """After "BA" the last token is A, and A is only written where no second A follows."""
    given_ = example()
    view = exact_view(**given_)
    assert naive_next_byte(view, b"BA")[AB].tolist() == [0.0, 1.0, 0.0]
    wanted = torch.tensor([0.4, 0.6, 0.0], dtype=torch.float64)
    torch.testing.assert_close(view.next_byte(b"BA")[AB], wanted, **EXACT)
    shares = view.reader(b"BA").covers()
    assert shares == {(1, 0): pytest.approx(0.6), (1, 2): pytest.approx(0.4)}
    assert sorted(shares) == covers(given_["tokenizer"], b"BA")


@pytest.mark.parametrize("name", ["longest", "long words", "unigram", "bpe"])
def test_the_byte_law_of_a_chain_comes_back(name):
    texts = example()["texts"]
    view = exact_view(texts, TOKENIZERS[name])
    for n in (0, 1, 3, 4, 6):
        for x in sorted({text[:n] for text in texts})[:8]:
            law = view.next_byte(x)
            torch.testing.assert_close(law, law_of(texts, x), **EXACT)
            share = sum(p for text, p in texts.items() if text.startswith(x))
            assert math.isclose(view.log_prob(x), math.log(share), abs_tol=1e-12)


@pytest.mark.parametrize("name", ["longest", "long words", "unigram"])
def test_the_lemma_by_brute_force_over_all_tokenizations(name):
    tokenizer = TOKENIZERS[name]
    view, model = random_view(tokenizer), RandomModel(tokenizer.vocab)
    for x in (b"A", b"BA", b"ABA"):
        found = []
        for n in range(1, len(x) + 1):
            for ids in itertools.product(range(tokenizer.end), repeat=n):
                spelled, left = decode_bytes(tokenizer, ids), decode_bytes(tokenizer, ids[:-1])
                if (
                    spelled.startswith(x)
                    and len(left) < len(x)
                    and tokenizer.encode(spelled) == [*ids]
                ):
                    found.append(ids)
        assert sorted(found) == covers(tokenizer, x)
        total = sum(restricted(model, tokenizer, ids) for ids in found)
        assert math.isclose(view.log_prob(x), math.log(total), abs_tol=1e-11)
        shares = view.reader(x).covers()
        assert sorted(shares) == sorted(found)
        assert math.isclose(sum(shares.values()), 1.0, abs_tol=1e-12)


@pytest.mark.parametrize("name", ["longest", "long words", "unigram"])
def test_next_bytes_sum_to_one(name):
    """Not by normalising: the probabilities of all longer texts add up to that of the text."""
    view = random_view(TOKENIZERS[name])
    for x in (b"", b"A", b"BAA"):
        ahead = view.next_byte(x).nonzero().flatten().tolist()
        longer = sum(math.exp(view.log_prob(x + bytes([b]))) for b in ahead if b != END)
        whole = longer + math.exp(view.log_prob(x, ended=True))
        assert math.isclose(whole, math.exp(view.log_prob(x)), rel_tol=1e-12)
        some = [b for b in ahead if b != END][:3]
        ratios = [math.exp(view.log_prob(x + bytes([b])) - view.log_prob(x)) for b in some]
        torch.testing.assert_close(
            view.next_byte(x)[some], torch.tensor(ratios, dtype=torch.float64), **EXACT
        )


@pytest.mark.parametrize("name", ["longest", "long words", "unigram"])
def test_texts_written_by_bytes_have_the_law_of_texts_written_by_tokens(name):
    tokenizer = TOKENIZERS[name]
    view, model = random_view(tokenizer), RandomModel(tokenizer.vocab)
    for n in range(4):
        for text in map(bytes, itertools.product(b"AB", repeat=n)):
            reader, p = view.reader(), 1.0
            for byte in text:
                p *= reader.law()[byte].item()
                reader.push(byte)
            p *= reader.law()[END].item()
            ids = [*tokenizer.encode(text), tokenizer.end]
            assert math.isclose(p, restricted(model, tokenizer, ids), rel_tol=1e-9)
            assert math.isclose(view.log_prob(text, ended=True), math.log(p), abs_tol=1e-10)


def test_sampled_bytes():
    given_, count = example(), 100
    chooser, seen = sampler(0), dict.fromkeys((b"AA", b"AB", b"BA", b"BB"), 0)
    view = exact_view(**given_)
    for _ in range(count):
        seen[generate_bytes(view.reader(), 2, chooser)] += 1
    expected = {b"AA": 20.0, b"AB": 30.0, b"BA": 25.0, b"BB": 25.0}
    chi2 = sum((seen[text] - n) ** 2 / n for text, n in expected.items())
    assert chi2 < 16  # 3 degrees of freedom: one seed in a thousand


# --- where the last cut is still open -------------------------------------------------------------


def test_what_encodes_itself_is_not_enough():
    """Two line ends: one token at the end, two before a letter. Both must be covers."""
    tokenizer = train_bpe([b"\n\n \n\n \n\n"], 3, WORDS)
    pair = tokenizer.encode(b"\n\n")
    assert len(pair) == 1 and set(covers(tokenizer, b"\n\n")) >= {tuple(pair), (10, 10)}
    view = exact_view({b"a\n\nb": 0.9, b"a\n\n b": 0.1}, tokenizer)
    assert naive_next_byte(view, b"a\n\n")[32].item() == 1.0
    wanted = torch.tensor([0.9, 0.1], dtype=torch.float64)
    torch.testing.assert_close(view.next_byte(b"a\n\n")[[98, 32]], wanted, **EXACT)
    leaky, model = random_view(tokenizer), RandomModel(tokenizer.vocab)
    p = restricted(model, tokenizer, [*pair, tokenizer.end])  # a text never ends behind (10, 10)
    assert math.isclose(leaky.log_prob(b"\n\n", ended=True), math.log(p), abs_tol=1e-10)


# --- baselines and ensembles ----------------------------------------------------------------------


def test_healing_goes_back_one_token_and_no_further():
    tokenizer = LongestMatch([b"a", b"b", b"c", b"d", b"abc"])
    texts = {b"abc": 0.9, b"abd": 0.1}
    view = exact_view(texts, tokenizer)
    torch.testing.assert_close(view.next_byte(b"ab"), law_of(texts, b"ab"), **EXACT)
    assert healed_next_byte(view, b"ab")[ord("d")] == 1.0  # "abc" began two tokens earlier
    toy = exact_view(**example())
    torch.testing.assert_close(healed_next_byte(toy, b"BA"), toy.next_byte(b"BA"), **EXACT)
    torch.testing.assert_close(healed_next_byte(toy, b""), toy.next_byte(b""), **EXACT)


def test_ensembles_of_different_vocabularies():
    texts = example()["texts"]
    other = {text: 1 / 64 for text in texts}
    names = ("longest", "long words", "bpe")
    same = ByteEnsemble([exact_view(texts, TOKENIZERS[name]).reader(b"BA") for name in names])
    torch.testing.assert_close(same.law(), law_of(texts, b"BA"), **EXACT)
    views = exact_view(texts, TOKENIZERS["longest"]), exact_view(other, TOKENIZERS["bpe"])
    mixed = ByteEnsemble([view.reader(b"B") for view in views], [3, 1])
    mixed.push(65)
    wanted = 0.75 * law_of(texts, b"BA") + 0.25 * law_of(other, b"BA")
    torch.testing.assert_close(mixed.law(), wanted, **EXACT)
    assert len(generate_bytes(mixed, 9, sampler(0))) == 4  # texts end after six bytes


# --- a decoder ------------------------------------------------------------------------------------


def test_shares_are_those_of_the_covers(views):
    view, tokenizer = views[0], load_tokenizer()
    reader = view.reader(b"of Scot")
    assert sorted(reader.covers()) == covers(tokenizer, b" Scot", WORDS)
    assert math.isclose(sum(reader.covers().values()), 1.0, rel_tol=1e-12)


def test_one_call_for_every_byte(decoder, shipped_view):
    view = shipped_view(decoder)
    reader = view.reader(b"the noble")
    reader.law()
    first = view.calls
    assert first <= 4 and len(view.leaked) == first
    written = generate_bytes(reader, 12, lambda law: law[:256].argmax())
    assert len(written) == 12 and view.calls <= first + 12


# --- bad input ------------------------------------------------------------------------------------

BAD = {
    "str": (lambda v: v.next_byte("BA"), TypeError, "text: expected bytes, got str"),
    "byte": (lambda v: v.reader().push(256), ValueError, "byte: expected 0 to 255, got 256"),
    "impossible": (lambda v: v.next_byte(b"BAC"), ValueError, "text: b'BAC' has probability zero"),
    "start": (
        lambda v: ByteView(v.model, v.tokenizer, start=[], end=3), ValueError, "start: expected",
    ),
    "end": (
        lambda v: ByteView(v.model, v.tokenizer, start=[3], end=4), ValueError, "end: .* below 4",
    ),
    "weights": (
        lambda v: ByteEnsemble([v.reader()], [0.0]), ValueError, "weights: expected 1 numbers",
    ),
    "boundary": (
        lambda v: ByteView(v.model, load_tokenizer(), start=[0], end=None), ValueError, "boundary:",
    ),
}  # fmt: skip


@pytest.mark.no_shape_checks
@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_named(case):
    call, error, message = BAD[case]
    with pytest.raises(error, match=message):
        call(exact_view(**example()))
