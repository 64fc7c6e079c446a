"""Prompts and the prefill that prunes: nothing dropped is the model, what is dropped is gone."""

from __future__ import annotations

import pytest
import torch

from corelib.models.cache import DenseCache
from corelib.models.evaluate import AttentionRecorder
from corelib.models.vlm import VLMConfig
from corelib.vision_language import shared
from corelib.vision_language.shared import answer, best, fastv, make_prompt, pool, prefill

SMALL = VLMConfig(
    width=32, layers=4, heads=4, kv_heads=2, head_width=8, hidden=32, rows=3, columns=4,
    vision_width=16, vision_heads=2,
)  # fmt: skip
EXACT = dict(atol=1e-10, rtol=1e-10)


@pytest.fixture(scope="module")
def setting(make_setting):
    return make_setting(SMALL)


def test_nothing_pruned_is_the_model(setting):
    model, images, ids, prompt = setting
    cache, plain = DenseCache(), DenseCache()
    got = prefill(model, prompt, cache)
    wanted = model(ids, plain, images)
    torch.testing.assert_close(got.logits, wanted[:, -1], **EXACT)
    assert got.counts == [12] * 4 and len(cache) == len(plain) == got.end == 18
    said = answer(model, got, 3)
    for n in range(3):
        assert torch.equal(said[:, n], wanted[:, -1].argmax(-1))
        wanted = model(said[:, n : n + 1], plain)


def run_on_kept(model, prompt, kept_after):
    """The same by masks: every token runs through all layers, the dropped are hidden as keys."""
    x, positions = prompt.x, prompt.positions
    B, L, _ = x.shape
    alive = torch.ones(B, L, dtype=torch.bool)
    states = []
    for n, block in enumerate(model.layers):
        states.append(alive)
        hidden = torch.ones(L, L, dtype=torch.bool).triu(1) | ~alive[:, None]

        class Masked:
            def append(self, layer, k, v):
                self.k, self.v = (t.repeat_interleave(2, 1) for t in (k, v))

            def attend(self, layer, q, *, scale=None):
                scores = (q @ self.k.mT * 8**-0.5).masked_fill(hidden[:, None], -torch.inf)  # noqa: B023
                return scores.softmax(-1).nan_to_num(0.0) @ self.v

        x = block(x, positions, model.frequencies, Masked(), n)
        if n in kept_after:
            places = torch.zeros(B, 12, dtype=torch.bool).scatter_(1, kept_after[n], True)
            alive = torch.cat([alive[:, :1], places, alive[:, 13:]], 1)
    return model.logits(model.norm(x))[:, -1], states


def test_dropping_is_hiding_at_the_old_positions(setting):
    model, _, _, prompt = setting
    generator = torch.Generator().manual_seed(1)
    seven = torch.rand(2, 12, generator=generator).topk(7).indices.sort(1).values
    three = torch.stack([seven[:, 0], seven[:, 2], seven[:, 6]], 1)
    wanted, _ = run_on_kept(model, prompt, {0: seven, 2: three})

    def prune(look):
        chosen = {0: seven, 2: torch.tensor([[0, 2, 6]] * 2)}
        return chosen.get(look.layer)

    got = prefill(model, prompt, DenseCache(), prune)
    torch.testing.assert_close(got.logits, wanted, **EXACT)
    assert got.counts == [12, 7, 7, 3]
    assert torch.equal(got.entered[1], seven) and torch.equal(got.entered[3], three)


def test_the_cache_of_a_layer_holds_what_entered_it(setting):
    model, _, _, prompt = setting
    cache = DenseCache()
    got = prefill(model, prompt, cache, fastv(0.5))
    held = [cache.layers[n][0].shape[2] for n in range(4)]
    assert held == [18, 18, 12, 12] and got.counts == [12, 12, 6, 6]
    answer(model, got, 3)
    assert [cache.layers[n][0].shape[2] for n in range(4)] == [20, 20, 14, 14]


def test_decoding_goes_on_at_the_position_behind_the_whole_prompt(setting):
    """One more word fed by `answer` is one more word in the prompt."""
    model, _, _, prompt = setting
    got = prefill(model, prompt, DenseCache(), fastv(0.25, after=0))
    kept = got.entered[1]
    said = answer(model, got, 2)
    longer = make_prompt(
        prompt.x[:, :1],
        prompt.x[:, 1:13],
        torch.cat([prompt.x[:, 13:], model.embed(said[:, :1])], 1),
    )
    again = prefill(model, longer, DenseCache(), lambda look: kept if look.layer == 0 else None)
    assert torch.equal(again.logits.argmax(-1), said[:, 1])


def test_scores_are_sums_of_the_attention_map(setting):
    model, images, ids, prompt = setting
    recorder = AttentionRecorder()
    model(ids, recorder, images)
    found = {}

    def spy(look):
        found[look.layer] = [f(look) for f in (shared.from_all, shared.from_text, shared.from_last)]

    prefill(model, prompt, DenseCache(), spy)
    assert sorted(found) == [0, 1, 2]  # nobody is asked behind the last layer
    for layer, scores in found.items():
        shares = recorder.weights[layer].mean(1)[:, :, 1:13]
        for got, wanted in zip(scores, (shares.mean(1), shares[:, 13:].mean(1), shares[:, -1])):
            torch.testing.assert_close(got, wanted, **EXACT)


def test_best_keeps_the_order_of_places():
    scores = torch.tensor([[0.1, 0.9, 0.3, 0.8]])
    assert best(scores, 2).tolist() == [[1, 3]] and best(scores, 0).shape == (1, 0)


def test_lots_are_drawn_by_a_seed_and_differ_by_row(setting):
    prompt = setting[3]
    drawn = [shared.thin(prompt, 0.5, seed).places for seed in (0, 0, 1)]
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])
    assert not torch.equal(drawn[0][0], drawn[0][1])
    short = shared.thin(prompt, 0.5)
    assert torch.equal(short.positions[:, 1:7], short.places + 1) and short.end == 18
    picked = prompt.x.gather(1, (short.places + 1)[..., None].expand(-1, -1, 32))
    assert torch.equal(short.x[:, 1:7], picked)


def test_pooling_takes_means_at_mean_positions(setting):
    model, _, _, prompt = setting
    short = pool(prompt, 4, 2)
    squares = [[0, 1, 4, 5], [2, 3, 6, 7], [8, 9], [10, 11]]
    for n, square in enumerate(squares):
        mean = prompt.x[:, [1 + place for place in square]].mean(1)
        torch.testing.assert_close(short.x[:, 1 + n], mean, **EXACT)
    assert short.positions[0].tolist() == [0, 3.5, 5.5, 9.5, 11.5, 13, 14, 15, 16, 17]
    assert short.places[0].tolist() == [0, 2, 8, 10]
    assert short.end == 18 and short.vision == 4 and short.text == 6
    assert prefill(model, short, DenseCache()).logits.isfinite().all()


def test_pooling_single_tokens_changes_nothing(setting):
    model, images, ids, prompt = setting
    got = prefill(model, pool(prompt, 4, 1), DenseCache())
    torch.testing.assert_close(got.logits, model(ids, images=images)[:, -1], **EXACT)


@pytest.mark.no_shape_checks
def test_bad_input_is_named(setting):
    with pytest.raises(ValueError, match="ratio: expected 0 to 1, got 2"):
        fastv(2)
    with pytest.raises(ValueError, match="n: expected 0 to 4, got 5"):
        best(torch.zeros(1, 4), 5)
    with pytest.raises(ValueError, match="columns: expected a divisor of 12 tokens and a side"):
        pool(setting[3], 5, 2)
