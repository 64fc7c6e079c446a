"""Untrained memories: which pairs each kind can still tell."""

import random

import pytest
import torch

from corelib.evaluation import memories
from corelib.evaluation.needle_tasks import every_needle, short_id


def remembered(memory, pairs, width=32, haystacks=3):
    """Share of haystacks in which the pair at each place is recalled."""
    rng = random.Random(0)
    hits = torch.zeros(haystacks, pairs)
    answer = memories.recall(memory, width=width)
    for row in hits:
        questions = every_needle(pairs, rng, short_id(6))
        for i, (said, question) in enumerate(zip(answer(questions), questions)):
            row[i] = said.strip('"') == question.answer[0]
    return hits.mean(0)


def test_attention_holds_every_pair():
    assert remembered(memories.softmax_memory, 40).min() == 1


def test_a_window_holds_the_last_pairs_and_no_other():
    found = remembered(memories.window_memory(5), 20)
    assert found[-5:].min() == 1 and found[:-5].max() == 0


def test_a_state_holds_some_and_a_decaying_one_the_latest():
    assert remembered(memories.state_memory, 5).min() == 1
    assert 0.1 < remembered(memories.state_memory, 60, haystacks=1).mean() < 0.9
    fading = remembered(memories.decaying_memory(6), 40, haystacks=2)
    assert fading[-6:].mean() > 0.9 and fading[:15].mean() < 0.3


def test_the_delta_rule_replaces_and_a_plain_sum_adds():
    torch.manual_seed(0)
    k, v = torch.randn(2, 1, 1, 6, 8, dtype=torch.float64)
    k = k / k.norm(dim=-1, keepdim=True)
    k[:, :, 5] = k[:, :, 1]  # the last pair gives an old key a new value
    asked = k[:, :, 5:]
    assert torch.allclose(memories.delta_memory(asked, k, v), v[:, :, 5:])
    assert not torch.allclose(memories.state_memory(asked, k, v), v[:, :, 5:], atol=0.1)
    assert remembered(memories.delta_memory, 5).min() == 1


def test_a_hybrid_has_the_window_and_more():
    both = remembered(memories.hybrid_memory(5, 12), 40)
    assert both[-5:].min() == 1
    assert both[-15:-5].mean() > 0.5 and both[:10].mean() < 0.5


def test_the_state_is_the_sum_of_outer_products():
    torch.manual_seed(0)
    k, v = torch.randn(2, 1, 1, 9, 8, dtype=torch.float64)
    q = torch.randn(1, 1, 3, 8, dtype=torch.float64)
    by_hand = sum(torch.outer(k[0, 0, t], v[0, 0, t]) for t in range(9))
    assert torch.allclose(memories.state_memory(q, k, v)[0, 0], q[0, 0] @ by_hand)
    fading = sum(torch.outer(k[0, 0, t], v[0, 0, t]) * 0.5 ** ((8 - t) / 3) for t in range(9))
    assert torch.allclose(memories.decaying_memory(3)(q, k, v)[0, 0], q[0, 0] @ fading)
    far = memories.decaying_memory(3)
    unit = k / k.norm(dim=-1, keepdim=True)
    both = memories.hybrid_memory(2, 3)
    there = both(unit[:, :, 8:], unit, v) - far(unit[:, :, 8:], unit, v)
    assert torch.allclose(there, v[:, :, 8:], atol=1e-3)  # in the window: attention's answer
    gone = torch.zeros_like(q)
    assert both(gone, unit, v).abs().max() < 1e-6  # nothing fits: neither has anything to say


@pytest.mark.no_shape_checks
def test_errors_name_the_argument():
    with pytest.raises(ValueError, match="window: expected at least 1, got 0"):
        memories.window_memory(0)
    with pytest.raises(ValueError, match="half_life: expected more than 0 pairs, got 0"):
        memories.decaying_memory(0)
    with pytest.raises(ValueError, match="width: expected at least 1, got 0"):
        memories.recall(memories.softmax_memory, width=0)
