"""The masked-diffusion model: the shift, two-way attention, caches and trees, batches, training."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from corelib.models import masked_diffusion, train, zoo
from corelib.models.cache import DenseCache
from corelib.models.decoder import Decoder, DecoderConfig
from corelib.models.diffusion_figures import (
    copying,
    decoder_bits,
    filled_in,
    judged,
    ngram_bits,
)
from corelib.models.kinds import find_kind
from corelib.models.masked_diffusion import (
    DraftTree,
    MaskedDiffusionLM,
    bound_bits,
    diffusion_rows,
    text_windows,
    tree_mask,
)
from corelib.models.ngram import WittenBell
from corelib.models.recipes import RECIPES, Recipe, Stage, from_dict
from corelib.models.tokenizer import load_tokenizer
from corelib.primitives import masked_attention_reference

CONFIG = DecoderConfig(width=16, layers=2, heads=2, kv_heads=1, head_width=8, hidden=24)
TINY = Recipe(
    "tiny", "masked_diffusion", CONFIG, (Stage(32, 4, 4),), lr=1e-2, warmup=2, eval_every=2
)


def gen(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def net():
    return MaskedDiffusionLM(CONFIG, seed=0).double().requires_grad_(False)


@pytest.fixture
def short_stream(monkeypatch):
    ids = torch.tensor(load_tokenizer().encode("To be, or not to be: that is the question. " * 80))
    monkeypatch.setattr(masked_diffusion, "token_stream", lambda split: ids)
    return ids


def test_it_is_the_decoder_shifted_by_one_and_reading_both_ways(net):
    ids = torch.randint(0, 2000, (2, 9), generator=gen())
    two_way = Decoder(CONFIG, seed=0).double()
    for block in two_way.layers:
        block.self_attn.causal = False
    logits = net(ids)
    torch.testing.assert_close(logits[:, 1:], two_way(ids)[:, :-1], rtol=0, atol=1e-12)
    assert (logits[:, 0] == 0).all()
    changed = ids.clone()
    changed[:, 7] = 3
    assert ((net(changed) - logits).abs().amax((0, 2)) > 0)[1:].all()  # everyone sees everyone


def test_weights_of_a_decoder_fit(net):
    MaskedDiffusionLM(CONFIG, seed=None).load_state_dict(Decoder(CONFIG, seed=3).state_dict())


def test_a_cache_continues_and_the_tree_equals_separate_rows(net):
    ids = torch.randint(0, 2000, (1, 6), generator=gen())
    drafts = torch.randint(0, 2000, (3, 4), generator=gen(1))
    cache = net.new_cache()
    net(ids, cache)
    held = {n: (k.clone(), v.clone()) for n, (k, v) in cache.layers.items()}
    tree = net.tree(drafts, cache)
    for n, (k, v) in cache.layers.items():
        assert k.equal(held[n][0]) and v.equal(held[n][1])  # the prefix stays as it is
    for row, expected in zip(drafts, tree, strict=True):
        alone = net.new_cache()
        alone.layers = dict(held)
        torch.testing.assert_close(net(row[None], alone)[0], expected, rtol=0, atol=1e-12)
    whole = torch.cat([net(row[None]) for row in drafts])
    torch.testing.assert_close(net.tree(drafts), whole, rtol=0, atol=1e-12)


def test_the_tree_mask_is_a_prefix_and_an_interval():
    mask = tree_mask(2, 3, 2)[0, 0].long().tolist()
    assert mask[0] == mask[1] == [1, 1, 1, 1, 0, 0, 0, 0]
    assert mask[2] == [1, 1, 0, 0, 1, 1, 0, 0] and mask[5] == [1, 1, 0, 0, 0, 0, 1, 1]


def test_merged_intervals_are_attention_under_the_tree_mask():
    for prefix in (0, 5):
        cache = DenseCache()
        cache.layers = {0: tuple(torch.randn(2, 1, 2, prefix, 8, generator=gen(1)).double())}
        tree = DraftTree(cache if prefix else None, 3)
        q = torch.randn(1, 4, 6, 8, generator=gen(2)).double()
        tree.append(0, *torch.randn(2, 1, 2, 6, 8, generator=gen(3)).double())
        mask = tree_mask(prefix, 3, 2)
        expected = masked_attention_reference(q, *tree.layers[0], mask)
        torch.testing.assert_close(tree.attend(0, q), expected, rtol=0, atol=1e-12)


def test_rows_of_text_and_of_repeats(short_stream):
    stream = torch.arange(5000)
    ids, free = diffusion_rows(stream, 400, 64, gen(), repeats=0.25)
    assert not free[:, 0].any() and free.any(1).all() and free[:, -1].all()
    again = (ids[:, 1:] < ids[:, :-1]).any(1)
    assert 60 < int(again.sum()) < 140
    text = ids[~again]
    assert (text.diff(dim=1) == 1).all()
    whole = (free.sum(1) == 63) & ~again
    assert 100 < int(whole.sum()) < 200
    first = free[again].long().argmax(1)
    period = (ids[again][:, 1:] < ids[again][:, :-1]).long().argmax(1) + 1
    assert (first >= period).all()  # the first time is always given


def test_training_goes_on_bit_for_bit_and_learns(short_stream, tmp_path):
    through = train.run(TINY, tmp_path / "a", log=lambda line: None)
    half = train.Trainer(TINY, tmp_path / "b")
    for _ in range(2):
        half.step()
    half.save()
    rest = train.run(TINY, tmp_path / "b", log=lambda line: None)
    for a, b in zip(through.model.parameters(), rest.model.parameters(), strict=True):
        assert a.equal(b)
    assert [point["step"] for point in through.curve] == [2, 4]
    longer = dataclasses.replace(TINY, stages=(Stage(32, 4, 30),), eval_every=30)
    trained = train.run(longer, tmp_path / "c", log=lambda line: None)
    assert trained.curve[-1]["valid"] < through.curve[0]["valid"] - 0.3
    assert from_dict(dataclasses.asdict(TINY)) == TINY


def test_the_recipe_starts_from_the_decoder():
    recipe = RECIPES["text_dlm"]
    assert recipe.start == "text_lm" and find_kind(recipe.kind).unit == "bits per byte, a bound"


def test_the_bound_of_a_net_that_says_nothing(short_stream):
    """All logits equal: log2 of the ids that it may say, for each token."""

    class Blank:
        def __call__(self, ids):
            return torch.zeros(*ids.shape, 2048)

    bits = bound_bits(Blank(), short_stream, rows=20, length=33)
    windows = text_windows(short_stream, 20, 33)
    size = load_tokenizer().bytes_of(windows[:, 1:])
    expected = torch.tensor(2047.0).log2().item() * 20 * 32 / size
    assert bits == pytest.approx(expected, rel=1e-5)
    assert decoder_bits(Blank(), windows) == pytest.approx(
        torch.tensor(2048.0).log2().item() * 20 * 32 / size, rel=1e-5
    )
    assert judged(Blank(), windows, 10).tolist() == pytest.approx([11.0] * 20)


def test_an_oracle_fills_in_everything(short_stream):
    windows = text_windows(short_stream, 10, 20)

    class Oracle:
        def __init__(self):
            self.at = 0

        def __call__(self, ids):
            part = windows[self.at : self.at + len(ids)]
            self.at += len(ids)
            return torch.nn.functional.one_hot(part, 2048).float()

    assert filled_in(Oracle(), windows, 0.5) == 1.0
    prompts, answers = copying(short_stream, 3, passage=12, given=4)
    assert prompts.shape == (3, 16) and prompts[:, 12:].equal(prompts[:, :4])
    assert answers.equal(prompts[:, 4:12])


def test_the_ngram_is_asked_for_the_same_bytes():
    ids = torch.tensor([load_tokenizer().encode("to be or not to be")])
    ngram = WittenBell(2).fit([b"to be or not to be, that is the question"])
    given = len(load_tokenizer().decode_bytes(ids[0, :1].tolist()))
    probs = ngram.probabilities(b"to be or not to be")[given:]
    bits = -float(torch.from_numpy(probs).log2().mean())
    assert ngram_bits(ngram, ids) == pytest.approx(bits)


@pytest.mark.skipif("text_dlm" not in zoo.names(), reason="not released")
def test_the_released_model_fills_in_better_than_chance():
    found = zoo.figures("text_dlm")["figures"]
    assert found["right of 20% hidden tokens"] > found["right of 80% hidden tokens"] > 0.05


@pytest.mark.no_shape_checks
def test_errors_name_the_argument():
    with pytest.raises(ValueError, match="given: expected 1 to 47, got 48"):
        copying(torch.arange(100), 2, given=48)
