"""Advantages, the clipped surrogate, its means, GRPO and DAPO: against loops over single tokens."""

from __future__ import annotations

import statistics

import pytest
import torch

from corelib.testing import assert_same
from corelib.training.policy_gradient import (
    EPS,
    Experience,
    clipped_surrogate,
    dapo,
    group_advantage,
    grpo,
    informative,
    sequence_mean,
    token_mean,
)
from corelib.training.rollout import Rollout

pytestmark = pytest.mark.method("hapo")


def batch(rewards, lengths, seed=0, width=7):
    """An experience with those rewards and lengths, and a new policy's log-probabilities."""
    generator = torch.Generator().manual_seed(seed)
    rewards, lengths = torch.tensor(rewards, dtype=torch.float64), torch.tensor(lengths)
    mask = torch.arange(width) < lengths.flatten()[:, None]
    old, entropy = -2 * torch.rand(2, *mask.shape, generator=generator, dtype=torch.float64)
    new = old + torch.empty_like(old).uniform_(-0.6, 0.6, generator=generator)
    ids = torch.zeros(len(mask), width + 1, dtype=torch.long)
    answers = Rollout(ids, mask, old * mask, -entropy * mask)
    return Experience(answers, rewards), new.requires_grad_()


REWARDS = [[1.0, 0.0, 0.0], [1.0, 1.0, 1.0], [0.0, 1.0, 1.0]]
LENGTHS = [[2, 7, 5], [3, 3, 1], [7, 1, 4]]
ROWS = torch.arange(9)


def loss_by_hand(experience, log_prob, low, high, *, by_token, keep=lambda group: True):
    """The objective with nothing but floats and one tensor element at a time."""
    answers, rewards = experience
    sums, counts = [], []
    for row in range(len(answers.mask)):
        group = rewards[row // rewards.shape[1]].tolist()
        if not keep(group):
            continue
        spread = statistics.stdev(group) + EPS
        gain = (group[row % rewards.shape[1]] - statistics.mean(group)) / spread
        total, tokens = 0.0, 0
        for t in range(int(answers.mask[row].sum())):
            ratio = torch.exp(log_prob[row, t] - answers.log_prob[row, t])
            if gain >= 0:
                each = -gain * ratio if ratio < 1 + high else -gain * (1 + high)
            else:
                each = -gain * ratio if ratio > 1 - low else -gain * (1 - low)
            total, tokens = total + each, tokens + 1
        sums.append(total)
        counts.append(tokens)
    if by_token:
        return sum(sums) / sum(counts)
    return sum(s / n for s, n in zip(sums, counts)) / len(sums)


def test_grpo_and_its_gradient_are_those_of_the_loop():
    experience, new = batch(REWARDS, LENGTHS)
    expected = loss_by_hand(experience, new, 0.2, 0.2, by_token=False)
    got = grpo(experience)(new, ROWS)
    assert_same(got, expected, tolerance=1e-12)
    want = torch.autograd.grad(expected, new, retain_graph=True)[0]
    assert_same(torch.autograd.grad(got, new)[0], want, tolerance=1e-12)


def test_dapo_and_its_gradient_are_those_of_the_loop():
    experience, new = batch(REWARDS, LENGTHS)
    keep = lambda group: len(set(group)) > 1  # noqa: E731
    expected = loss_by_hand(experience, new, 0.2, 0.28, by_token=True, keep=keep)
    got = dapo(experience)(new, ROWS)
    assert_same(got, expected, tolerance=1e-12)
    want = torch.autograd.grad(expected, new)[0]
    assert_same(torch.autograd.grad(got, new)[0], want, tolerance=1e-12)
    assert (want[3:6] == 0).all() and (want[0:3] != 0).any()


def test_rows_may_come_in_parts_and_in_any_order():
    experience, new = batch(REWARDS, LENGTHS)
    order = torch.tensor([4, 0, 8, 2])
    whole = Experience(Rollout(*(x[order] for x in experience.rollout)), experience.rewards)
    mask, old = whole.rollout.mask, whole.rollout.log_prob
    gain = group_advantage(experience.rewards).flatten()[order][:, None].expand(old.shape)
    got = grpo(experience)(new[order], order)
    assert_same(got, sequence_mean(clipped_surrogate(new[order], old, gain), mask))


def test_advantages_of_a_group_sum_to_zero_over_its_answers():
    rewards = torch.tensor([[1.0, 0.0, 0.0, 0.0], [0.3, 0.9, 0.1, 0.2]], dtype=torch.float64)
    got = group_advantage(rewards)
    assert_same(got.sum(1), torch.zeros(2).double(), tolerance=1e-12)
    assert_same(got.std(1), torch.ones(2).double(), tolerance=1e-4)
    assert (group_advantage(torch.ones(2, 3)) == 0).all()


def test_informative_groups_are_neither_all_right_nor_all_wrong():
    rewards = torch.tensor([[1.0, 1.0], [0.0, 1.0], [0.0, 0.0]])
    assert informative(rewards).tolist() == [False, True, False]


@pytest.mark.parametrize(
    ("ratio", "gain", "loss", "slope"),
    [
        (1.0, 1.0, -1.0, True),
        (1.1, 1.0, -1.1, True),
        (1.5, 1.0, -1.3, False),  # up enough
        (0.5, 1.0, -0.5, True),  # it fell although it was good: pull it up
        (0.5, -1.0, 0.9, False),  # down enough
        (1.5, -1.0, 1.5, True),
        (20.0, -1.0, 4.0, False),  # dual clip
        (20.0, 1.0, -1.3, False),
    ],
)
def test_where_the_surrogate_stops(ratio, gain, loss, slope):
    log_prob = torch.tensor([ratio], dtype=torch.float64).log().requires_grad_()
    old, gain = torch.zeros(1).double(), torch.tensor([gain]).double()
    got = clipped_surrogate(log_prob, old, gain, clip_low=0.1, clip_high=0.3, dual_clip=4.0)
    assert got.item() == pytest.approx(loss, abs=1e-12)
    assert bool(torch.autograd.grad(got.sum(), log_prob)[0] != 0) is slope


def test_bounds_may_differ_by_token():
    experience, new = batch(REWARDS, LENGTHS)
    gain, old = torch.randn_like(new).detach(), experience.rollout.log_prob
    low, high = torch.rand(2, *new.shape, dtype=torch.float64)
    got = clipped_surrogate(new, old, gain, clip_low=low, clip_high=high)
    for i, t in ((0, 0), (4, 6), (8, 3)):
        bounds = dict(clip_low=low[i, t].item(), clip_high=high[i, t].item())
        assert_same(got[i, t], clipped_surrogate(new[i, t], old[i, t], gain[i, t], **bounds))


def test_the_two_means_weigh_long_answers_differently():
    mask = torch.tensor([[True, False, False, False], [True] * 4])
    values = torch.tensor([[8.0, 99.0, 99.0, torch.nan], [1.0, 1.0, 1.0, 1.0]])
    assert token_mean(values, mask).item() == pytest.approx(12 / 5)
    assert sequence_mean(values, mask).item() == pytest.approx((8 + 1) / 2)
    nothing = torch.zeros(2, 4, dtype=torch.bool)
    assert token_mean(values, nothing) == 0 and sequence_mean(values, nothing) == 0


def test_a_batch_that_says_nothing_leaves_the_policy_alone():
    experience, new = batch([[1.0, 1.0], [0.0, 0.0]], [[2, 3], [4, 7]])
    for objective in (grpo, dapo):
        loss = objective(experience)(new, torch.arange(4))
        assert (torch.autograd.grad(loss, new)[0] == 0).all()


@pytest.mark.no_shape_checks
def test_errors_name_the_argument():
    with pytest.raises(ValueError, match="rewards"):
        group_advantage(torch.ones(3, 1))
    with pytest.raises(ValueError, match="rewards"):
        group_advantage(torch.ones(3))
    x = torch.zeros(1)
    with pytest.raises(ValueError, match="dual_clip"):
        clipped_surrogate(x, x, x, dual_clip=1.0)
