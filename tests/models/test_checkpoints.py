"""The shipped checkpoints: small, quick to load, described, and as good as their cards say."""

import math

import pytest
import torch

from corelib.models import evaluate, zoo
from corelib.models.mixture import masked_batch, token_stream
from corelib.models.recipes import RECIPES
from corelib.models.recurrent import StateCache
from corelib.models.tokenizer import load_tokenizer

DECODERS = ("text_lm", "draft_lm")
RECURRENT = ("mamba_lm", "mamba2_lm")
TEXT = (*DECODERS, *RECURRENT, "text_lm_recall", "encoder")


def test_all_are_there_and_small():
    assert {*TEXT, "text_dlm", "tiny_vlm", "grid_dit", "frame_sr"} <= set(zoo.names())
    size = sum(path.stat().st_size for path in zoo.FOLDER.glob("*.safetensors"))
    assert size <= 60e6
    text, draft = (zoo.load(name).n_parameters for name in DECODERS)
    assert draft <= text / 3


@pytest.mark.parametrize("name", TEXT)
def test_the_card_says_what_a_user_needs(name):
    card, recipe = zoo.card(name), RECIPES[name]
    for word in ("Data", "Training", "Command", "Known limits", f"models.train {name}", "minutes"):
        assert word in card
    model = zoo.load(name)
    assert model.config == recipe.config and f"{model.n_parameters:,} parameters" in card
    curve = zoo.figures(name)["curve"]
    assert curve[-1]["step"] == recipe.steps and curve[-1]["tokens"] == recipe.tokens
    if recipe.start is None:  # one that goes on from released weights learns tasks, not text
        assert curve[-1]["valid"] < curve[0]["valid"]


def test_text_lm_met_its_bars_when_it_was_released():
    figures = zoo.figures("text_lm")["figures"]
    for corpus in ("shakespeare", "python"):
        ngram = figures[f"bits per byte, {corpus}, order-5 n-gram"]
        assert figures[f"bits per byte, {corpus}"] < ngram
    assert figures["passkey accuracy at 2048 tokens"] >= 0.9  # aimed at 0.95: see the card
    gain, error = (
        figures["nats a token saved by context 1900 over 512"], figures["its standard error"]
    )  # fmt: skip
    assert gain > 2 * error
    assert figures["strongest induction head"] > 0.5
    assert figures["copied right on repeated random tokens"] > 0.8


def test_text_lm_recall_met_the_bar_that_text_lm_missed():
    """On 200 trials when it was released, and again here on a few others."""
    figures = zoo.figures("text_lm_recall")["figures"]
    assert figures["passkey accuracy at 2048 tokens"] >= 0.95
    for corpus in ("shakespeare", "python"):
        ngram = figures[f"bits per byte, {corpus}, order-5 n-gram"]
        assert figures[f"bits per byte, {corpus}"] < 0.85 * ngram
    found = evaluate.passkey_accuracy(
        zoo.load("text_lm_recall"), load_tokenizer(), token_stream("test"), trials=8, seed=1
    )
    assert found >= 0.75  # two of eight wrong: once in some thousand times at 0.99


def test_text_lm_still_does_what_its_card_says():
    """A sample of the card's figures, measured again on the stored weights."""
    model, tokenizer = zoo.load("text_lm"), load_tokenizer()
    stripes, copied = evaluate.induction_scores(model, vocab=tokenizer.n_plain, period=32, rows=4)
    assert float(stripes.max()) > 0.5 and copied > 0.8
    test = token_stream("test", "shakespeare")[:513]
    nats = evaluate.token_nats(model, test[None]).sum()
    bits = float(nats) / math.log(2) / tokenizer.bytes_of(test[1:])
    card = zoo.figures("text_lm")["figures"]["bits per byte, shakespeare"]
    assert 0.7 * card < bits < 1.4 * card
    right = evaluate.passkey_accuracy(model, tokenizer, test, length=400, trials=6)
    assert right >= 5 / 6


@pytest.mark.parametrize("name", RECURRENT)
def test_recurrent_models_read_and_go_on_step_by_step(name):
    """They beat the n-gram, do as their cards say, and their states carry what they have read."""
    model, figures = zoo.load(name), zoo.figures(name)["figures"]
    for corpus in ("shakespeare", "python"):
        ngram = figures[f"bits per byte, {corpus}, order-5 n-gram"]
        assert figures[f"bits per byte, {corpus}"] < ngram
    test = token_stream("test", "shakespeare")[4000:5025]
    bits = float(evaluate.token_nats(model, test[None]).sum()) / math.log(2)
    card = figures["bits per byte, shakespeare"]
    assert 0.7 * card < bits / load_tokenizer().bytes_of(test[1:]) < 1.4 * card
    cache = StateCache()
    with torch.no_grad():
        whole = model(test[None, :24])
        model(test[None, :20], cache)
        held = cache.bytes()
        last = [model(test[None, t : t + 1], cache) for t in range(20, 24)]
    torch.testing.assert_close(torch.cat(last, 1), whole[:, 20:], atol=1e-3, rtol=1e-3)
    assert cache.bytes() == held


def test_draft_lm_is_accepted_often():
    target, draft = zoo.load("text_lm"), zoo.load("draft_lm")
    taken, same = evaluate.acceptance(target, draft, token_stream("test"), rows=4, length=256)
    stored = zoo.figures("draft_lm")["figures"]
    assert abs(taken - stored["tokens that text_lm accepts"]) < 0.1
    assert taken > 0.5 and same > 0.4


def test_encoder_fills_gaps_better_than_the_most_frequent_token():
    model, generator = zoo.load("encoder"), torch.Generator().manual_seed(1)
    ids, targets, weights = masked_batch(token_stream("test"), 2, 256, generator)
    hidden = weights > 0
    with torch.no_grad():
        right = (model(ids)[hidden].argmax(-1) == targets[hidden]).float().mean()
    stream = token_stream("test")
    most = float(stream.bincount().max()) / len(stream)
    assert float(right) > 2 * most
