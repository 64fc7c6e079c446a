"""AIM: unchanged without merging and pruning, ranked as PageRank ranks, pruned as scheduled."""

from __future__ import annotations

import doctest

import pytest
import torch

from corelib.models.cache import DenseCache
from corelib.models.evaluate import AttentionRecorder
from corelib.models.vlm import VLMConfig
from corelib.primitives.column_sums import attention_column_sums_reference
from corelib.vision_language import aim
from corelib.vision_language.aim import (
    aim_prefill,
    column_importance,
    example,
    merge_prompt,
    pagerank_importance,
    piecewise_schedule,
)
from corelib.vision_language.shared import prefill

SMALL = VLMConfig(
    width=32, layers=6, heads=4, kv_heads=2, head_width=8, hidden=32, rows=4, columns=4,
    vision_width=16, vision_heads=2,
)  # fmt: skip
EXACT = dict(atol=1e-10, rtol=1e-10)


@pytest.fixture(scope="module")
def setting(make_setting):
    return make_setting(SMALL)


@pytest.mark.parametrize("l1", [6, 9])
def test_without_merging_and_pruning_it_is_the_model(setting, l1):
    model, images, ids, prompt = setting
    got = aim_prefill(model, prompt, DenseCache(), ratio=1.0, l1=l1, l2=l1 + 2)
    torch.testing.assert_close(got.logits, model(ids, images=images)[:, -1], **EXACT)
    assert got.counts == [16] * 6


def test_layers_see_what_the_schedule_says(setting):
    model, _, _, prompt = setting
    cache = DenseCache()
    got = aim_prefill(model, prompt, cache, ratio=0.5, l1=2, l2=5)
    assert got.counts == [8, 8, 8, 5, 3, 0]
    assert [cache.layers[n][0].shape[2] for n in range(6)] == [14, 14, 14, 11, 9, 6]
    for now, then in zip(got.entered, got.entered[1:]):
        assert all(set(b) <= set(a) for a, b in zip(now.tolist(), then.tolist()))


def test_who_stays_received_most_attention(setting):
    model, images, ids, prompt = setting
    got = aim_prefill(model, prompt, DenseCache(), ratio=1.0, l1=1, l2=5)
    recorder = AttentionRecorder()
    model(ids, recorder, images)
    received = recorder.weights[1].mean((1, 2))[:, 1:17]
    assert got.counts[:3] == [16, 16, 12]
    assert torch.equal(got.entered[2], received.topk(12).indices.sort(1).values)


def test_no_vision_token_at_all(setting):
    model, _, ids, prompt = setting
    got = aim_prefill(model, prompt, DenseCache(), ratio=1.0, l1=0, l2=0)
    assert got.counts == [0] * 6
    words = prompt.keep(torch.zeros(2, 0, dtype=torch.long))
    torch.testing.assert_close(got.logits, prefill(model, words, DenseCache()).logits, **EXACT)


def test_merged_tokens_keep_the_position_of_one_of_theirs(setting):
    _, _, _, prompt = setting
    short, merged = merge_prompt(prompt, 0.25)
    assert short.vision == 4 and short.text == prompt.text and short.end == prompt.end
    assert torch.equal(short.positions[:, 1:5], merged.place + 1)
    assert torch.equal(
        short.positions[:, [0, *range(5, 10)]], torch.tensor([[0, *range(17, 22)]] * 2)
    )
    weighted = (merged.size[..., None] * short.x[:, 1:5]).sum(1)
    torch.testing.assert_close(weighted, prompt.x[:, 1:17].sum(1), **EXACT)


def shares_of(B=2, H=4, L=23, seed=1):
    generator = torch.Generator().manual_seed(seed)
    q, k = (torch.randn(B, h, L, 8, generator=generator).double() for h in (H, H // 2))
    scores = q @ k.repeat_interleave(2, 1).mT * 8**-0.5
    hidden = torch.ones(L, L, dtype=torch.bool).triu(1)
    return q, k, scores.masked_fill(hidden, -torch.inf).softmax(-1)


def test_one_step_is_the_mean_attention_received():
    q, k, shares = shares_of()
    got = pagerank_importance(shares)
    torch.testing.assert_close(got, shares.mean((1, 2)), **EXACT)
    sums = attention_column_sums_reference(q, k, causal=True)
    torch.testing.assert_close(got, sums.mean(1) / 23, **EXACT)


@pytest.mark.parametrize("iters", [1, 2, 5])
def test_without_the_map_it_ranks_the_same(iters):
    q, k, shares = shares_of()
    wanted = pagerank_importance(shares, iters)
    torch.testing.assert_close(column_importance(q, k, iters), wanted, **EXACT)
    torch.testing.assert_close(wanted.sum(1), torch.ones(2).double(), **EXACT)
    power = torch.linalg.matrix_power(shares.mean(1).mT, iters)
    torch.testing.assert_close(wanted, power.sum(2) / 23, **EXACT)


def test_many_steps_drain_to_the_first_token():
    _, _, shares = shares_of()
    ranks = pagerank_importance(shares, 2000)
    assert bool((ranks[:, 0] > 0.999).all())
    assert bool((pagerank_importance(shares, 1)[:, 0] < 0.5).all())


def test_the_schedule():
    assert piecewise_schedule(28)[14:23] == [1.0, *[n / 8 for n in range(7, -1, -1)]]
    assert piecewise_schedule(28)[:14] == [1.0] * 14 and sum(piecewise_schedule(28)[22:]) == 0
    assert piecewise_schedule(4, 2, 2) == [1.0, 1.0, 0.0, 0.0]
    assert piecewise_schedule(3, 3, 9) == [1.0] * 3
    falling = piecewise_schedule(9, 1, 8)
    steps = [a - b for a, b in zip(falling[1:], falling[2:])]
    assert max(steps) - min(steps) < 1e-12


def test_example():
    assert doctest.testmod(aim).failed == 0
    prompt = example()["prompt"]
    assert merge_prompt(prompt, 2 / 3)[1].size.tolist() == [[2, 2, 1, 1]]


@pytest.mark.no_shape_checks
def test_bad_input_is_named(setting):
    model, _, _, prompt = setting
    with pytest.raises(ValueError, match="l1, l2: expected 0 <= l1 <= l2"):
        piecewise_schedule(6, 4, 3)
    with pytest.raises(ValueError, match="iters: expected at least 1, got 0"):
        aim_prefill(model, prompt, DenseCache(), iters=0)
    with pytest.raises(ValueError, match="ratio: expected more than 0"):
        aim_prefill(model, prompt, DenseCache(), ratio=0.0)
    with pytest.raises(ValueError, match="counts: expected numbers that do not rise"):
        aim.aim_pruner([1, 2])
