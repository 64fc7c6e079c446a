"""Measures of language models, on models whose figures are known beforehand."""

import math

import pytest
import torch

from corelib.data import synthetic
from corelib.models import evaluate
from corelib.models.decoder import Decoder, DecoderConfig
from corelib.models.tokenizer import load_tokenizer

VOCAB = 2048
TEXT = "Now is the winter of our discontent\nMade glorious summer by this sun of York. " * 6


def uniform(ids, cache=None):
    return torch.zeros(*ids.shape, VOCAB)


def copier(ids, cache=None):
    """Says what followed the last time the present token was there; sure of it."""
    logits = torch.zeros(*ids.shape, VOCAB)
    for b, row in enumerate(ids.tolist()):
        follows = {}
        for t, token in enumerate(row):
            if token in follows:
                logits[b, t, follows[token]] = 20.0
            if t + 1 < len(row):
                follows[token] = row[t + 1]
    return logits


class Positions:
    """Gives each target a loss that tells where it stood: ``-log p = position`` of its input."""

    def __call__(self, ids, cache=None):
        B, L = ids.shape
        nats = 1.0 + torch.arange(L).float()
        logits = torch.full((B, L, VOCAB), 0.0)
        nxt = torch.roll(ids, -1, 1)
        # log-odds of p = exp(-nats) against the other ids, all equal
        odds = torch.log(torch.exp(-nats) / (1 - torch.exp(-nats)) * (VOCAB - 1))
        return logits.scatter(2, nxt[..., None], odds[None, :, None].expand(B, L, 1))


def test_bits_per_byte_of_the_uniform_law():
    tokenizer = load_tokenizer()
    tokens, size = len(tokenizer.encode(TEXT)), len(TEXT.encode())
    for context, stride in ((2048, 1024), (32, 8), (33, 7), (16, 15)):
        bits = evaluate.bits_per_byte(
            uniform, [TEXT, TEXT[:50]], tokenizer, context=context, stride=stride
        )
        more = len(tokenizer.encode(TEXT[:50]))
        assert bits == pytest.approx((tokens + more) * 11 / (size + 50), rel=1e-6)


def test_every_token_is_scored_with_enough_context():
    tokenizer, seen = load_tokenizer(), []

    def model(ids, cache=None):
        seen.append(ids.shape[1])
        return torch.zeros(*ids.shape, VOCAB)

    evaluate.bits_per_byte(model, [TEXT], tokenizer, context=40, stride=10)
    total = len(tokenizer.encode(TEXT)) + 1
    assert seen[:-1] == [39] * (len(seen) - 1) and len(seen) == 1 + math.ceil((total - 40) / 10)


def test_a_copier_solves_copying():
    generator = torch.Generator().manual_seed(0)
    batch = synthetic.mqar(4, 64, vocab=VOCAB, pairs=8, generator=generator)
    assert evaluate.answer_accuracy(copier, batch, rows=3) == 1.0
    assert evaluate.exact_match(copier, batch, rows=3) == 1.0
    assert evaluate.answer_accuracy(uniform, batch) < 0.05
    assert evaluate.exact_match(uniform, batch) == 0.0


def test_passkey_accuracy_of_a_reader():
    tokenizer = load_tokenizer()
    haystack = torch.tensor(tokenizer.encode(TEXT * 3))

    def reader(ids, cache=None):
        logits = torch.zeros(*ids.shape, VOCAB)
        for b, row in enumerate(ids):
            text = tokenizer.decode(row.tolist())
            number = text.split(" is ", 1)[1].lstrip()[:5] if "pass key" not in text[:1] else ""
            key = text.index("The pass key of ")
            number = text[key:].split(" is ", 1)[1][:5]
            for n, digit in enumerate(number):
                logits[b, len(row) - 5 + n, ord(digit)] = 1.0
        return logits

    found = evaluate.passkey_accuracy(reader, tokenizer, haystack, length=200, trials=6)
    assert found == 1.0
    none = evaluate.passkey_accuracy(uniform, tokenizer, haystack, length=200, trials=6)
    assert none == 0.0


def test_gain_of_context_and_loss_by_position():
    stream = torch.randint(0, VOCAB, (300,), generator=torch.Generator().manual_seed(0))
    by_position = evaluate.loss_by_position(Positions(), stream, length=9, rows=3)
    torch.testing.assert_close(by_position[:-1], 1.0 + torch.arange(7.0), rtol=1e-3, atol=1e-3)
    gain, error = evaluate.gain_of_context(uniform, stream, short=4, long=20, scored=4, rows=5)
    assert gain == pytest.approx(0.0, abs=1e-5) and error == pytest.approx(0.0, abs=1e-5)
    period = torch.randperm(VOCAB, generator=torch.Generator().manual_seed(0))[:16].repeat(20)
    gain, error = evaluate.gain_of_context(copier, period, short=4, long=20, scored=4, rows=5)
    assert gain > 7.0  # only the long context holds the last time


def test_induction_scores_find_a_head_made_by_hand():
    """Head 0 looks at what followed its own token, head 1 everywhere alike."""
    period, vocab = 6, 400

    def model(ids, cache):
        onehot = torch.eye(vocab)
        before = onehot[torch.roll(ids, 1, 1)][:, None]  # key t: the token at t - 1
        before[:, :, 0] = 0
        query = torch.cat([50 * onehot[ids][:, None], torch.zeros(len(ids), 1, 12, vocab)], 1)
        cache.append(0, before, torch.zeros_like(before))
        cache.attend(0, query, scale=1.0)
        return copier(ids)[..., :vocab]

    stripes, copied = evaluate.induction_scores(model, vocab=vocab, period=period, rows=4)
    assert stripes.shape == (1, 2)
    assert float(stripes[0, 0]) == pytest.approx(1.0, abs=1e-6)
    even = sum(1 / (t + 1) for t in range(period, 2 * period)) / period
    assert float(stripes[0, 1]) == pytest.approx(even, rel=1e-5)
    assert copied == 1.0


def test_the_recorder_attends_like_the_cache():
    config = DecoderConfig(
        vocab=20, width=16, layers=2, heads=4, kv_heads=2, head_width=4, hidden=8
    )
    model = Decoder(config).double()
    ids = torch.arange(12).view(2, 6)
    recorder = evaluate.AttentionRecorder()
    torch.testing.assert_close(model(ids, recorder), model(ids), rtol=1e-10, atol=1e-12)
    assert recorder.weights[1].shape == (2, 4, 6, 6)
    torch.testing.assert_close(recorder.weights[1].sum(-1), torch.ones(2, 4, 6).double())


def test_acceptance_of_itself_and_of_a_stranger():
    stream = torch.arange(100) % VOCAB
    whole, same = evaluate.acceptance(uniform, uniform, stream, rows=2, length=20)
    assert whole == pytest.approx(1.0, abs=1e-4) and same == 1.0

    def sure(ids, cache=None):
        logits = torch.zeros(*ids.shape, VOCAB)
        logits[..., 5] = 100.0
        return logits

    taken, _ = evaluate.acceptance(uniform, sure, stream, rows=2, length=20)
    assert taken == pytest.approx(1 / VOCAB, rel=1e-3)


@pytest.mark.no_shape_checks
def test_errors():
    with pytest.raises(ValueError, match="stride: expected 1 to 9"):
        evaluate.bits_per_byte(uniform, [TEXT], load_tokenizer(), context=10, stride=10)
