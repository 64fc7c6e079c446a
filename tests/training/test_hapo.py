"""HAPO: signal, temperature, advantages over tokens, clipping, redistribution, and their loss."""

from __future__ import annotations

import math

import pytest
import torch

from corelib.testing import assert_same
from corelib.training.hapo import (
    EntropyScale,
    adaptive_temperature,
    asymmetric_clip,
    entropy_scale,
    entropy_signal,
    example,
    hapo,
    hapo_loss,
    hapo_loss_reference,
    hapo_released,
    next_temperature,
    redistribute,
    released_entropy_signal,
    token_group_advantage,
)
from corelib.training.policy_gradient import (
    EPS,
    Experience,
    clipped_surrogate,
    dapo,
    group_advantage,
    token_mean,
)
from corelib.training.rollout import Rollout, entropy_of

ENTROPY = torch.tensor([[0.69, 0.01, 0.5, 0.002, 0.9, 0.0]], dtype=torch.float64)
ALL = torch.ones(1, 6, dtype=torch.bool)


def moved(seed=0, far=0.9):
    """The example's parts, and log-probabilities of a policy that has moved ``far``."""
    experience = example()
    answers, rewards = experience
    generator = torch.Generator().manual_seed(seed)
    step = torch.empty_like(answers.log_prob).uniform_(-far, far, generator=generator)
    new = (answers.log_prob + step).requires_grad_()
    advantage = token_group_advantage(rewards, answers.mask.view(2, 3, 6)).view(6, 6)
    signal = entropy_signal(answers.entropy, entropy_scale(answers.entropy, answers.mask))
    return experience, new, (answers.log_prob, advantage, signal, answers.mask)


# ---- the signal


def test_the_signal_by_hand():
    """Pivot: of six sorted log entropies the one at place 0.8 * 5 = 4, that of 0.69."""
    scale = entropy_scale(ENTROPY, ALL)
    assert scale.pivot == pytest.approx(math.log(0.69))
    above, below = math.log(0.9 / 0.69), math.log(0.69 / 1e-8)
    expected = [0.0, -math.log(69) / below, -math.log(0.69 / 0.5) / below]
    expected += [-math.log(345) / below, math.log(0.9 / 0.69) / above, -1.0]
    assert_same(entropy_signal(ENTROPY, scale)[0], torch.tensor(expected).double(), tolerance=1e-7)


def test_dividing_by_the_root_mean_square_first_cancels():
    generator = torch.Generator().manual_seed(0)
    entropy = torch.rand(9, 30, generator=generator, dtype=torch.float64) ** 4
    mask = torch.rand(9, 30, generator=generator) < 0.7
    scale = entropy_scale(entropy, mask)
    z = entropy.clamp(min=1e-8).log() - scale.pivot
    z = z / z[mask].square().mean().sqrt()
    most, least = z[mask].max(), z[mask].min()
    want = torch.where(z > 0, z / most, z / -least).clamp(-1, 1)
    assert_same(entropy_signal(entropy, scale), want, tolerance=1e-12)


def test_the_signal_rises_with_entropy_and_stays_between_its_ends():
    scale = entropy_scale(ENTROPY, ALL)
    rising = torch.logspace(-12, 1, 200, dtype=torch.float64)
    signal = entropy_signal(rising, scale)
    assert (signal.diff() >= 0).all() and signal[0] == -1 and signal[-1] == 1
    inside = (rising > 1e-8) & (rising < 0.9)
    assert (signal[inside].diff() > 0).all()


@pytest.mark.parametrize(("quantile", "below"), [(0.8, 801), (0.2, 201), (0.0, 1), (1.0, 1001)])
def test_four_fifths_of_the_tokens_lie_at_or_below_the_pivot(quantile, below):
    entropy = torch.rand(1, 1001, generator=torch.Generator().manual_seed(0)).double()
    mask = torch.ones(1, 1001, dtype=torch.bool)
    signal = entropy_signal(entropy, entropy_scale(entropy, mask, quantile=quantile))
    assert int((signal <= 0).sum()) == below


def test_what_is_outside_of_the_mask_does_not_count():
    mask = ALL.clone()
    mask[0, 4:] = False
    poisoned = ENTROPY.clone()
    poisoned[0, 4:] = torch.nan
    assert entropy_scale(poisoned, mask) == entropy_scale(ENTROPY[:, :4], ALL[:, :4])


def test_tokens_that_are_all_alike_and_no_tokens_have_no_signal():
    same = torch.full((2, 3), 0.4)
    scale = entropy_scale(same, torch.ones(2, 3, dtype=torch.bool))
    assert (entropy_signal(same, scale) == 0).all()
    none = entropy_scale(same, torch.zeros(2, 3, dtype=torch.bool))
    assert (entropy_signal(same, none) == 0).all()


def test_the_released_signal_takes_sure_tokens_for_open_ones():
    scale = entropy_scale(ENTROPY, ALL)
    ours, theirs = entropy_signal(ENTROPY, scale), released_entropy_signal(ENTROPY, scale)
    z = ENTROPY.clamp(min=1e-8).log() - scale.pivot
    published = torch.where(z > 0, z / z.max(), z / z.min())  # a negative by a negative
    assert_same(theirs, published, tolerance=1e-12)
    assert (theirs >= 0).all() and theirs[0, 5] == 1 and ours[0, 5] == -1
    low, _ = asymmetric_clip(theirs)
    assert (low == 0.2).all()
    assert (asymmetric_clip(ours)[0] > 0.2).any()


# ---- temperature


def test_temperature_by_hand():
    scale = EntropyScale(math.log(0.3), math.log(2.0), math.log(3000.0))
    logits = torch.tensor([[0.0, 0.0, 0.0], [9.0, 0.0, 0.0]], dtype=torch.float64)
    low = entropy_of(logits)[1].item()
    got = adaptive_temperature(logits, scale, base=0.8, tau=0.1)
    want = 0.8 * (1 - 0.1 * math.log(0.3 / low) / math.log(3000))
    assert got.tolist() == pytest.approx([0.8 * 1.1, want])  # log 3 is above the largest: clamped
    assert (adaptive_temperature(logits, scale, tau=0.0) == 1).all()


def test_the_next_temperature_uses_the_scale_of_this_batch():
    experience = example()
    answers = experience.rollout
    logits = 9 * torch.randn(5, 8, generator=torch.Generator().manual_seed(0)).double()
    want = adaptive_temperature(logits, entropy_scale(answers.entropy, answers.mask), tau=0.2)
    assert_same(next_temperature(experience, tau=0.2)(logits), want)
    raised = next_temperature(experience, tau=0.2, signal_of=released_entropy_signal)(logits)
    assert (raised >= 1).all() and not (want >= 1).all()


# ---- advantages


def test_token_advantages_of_a_group_sum_to_zero_and_grpos_do_not():
    rewards = torch.tensor([[1.0, 0.0, 1.0]], dtype=torch.float64)
    mask = (torch.arange(9) < torch.tensor([2, 9, 3])[:, None])[None]  # wrong answers are long
    got = token_group_advantage(rewards, mask)
    assert got.sum().abs() < 1e-12 and (got[~mask] == 0).all()
    assert (group_advantage(rewards)[:, :, None] * mask).sum() < -5
    assert got[mask].square().mean().item() == pytest.approx(1.0, abs=1e-5)


def test_token_advantages_by_hand():
    """Rewards 1, 0 with 1 and 3 tokens: mean 1/4, variance 3/16."""
    mask = torch.tensor([[[True, False, False], [True, True, True]]])
    got = token_group_advantage(torch.tensor([[1.0, 0.0]], dtype=torch.float64), mask)
    std = math.sqrt(3) / 4 + EPS
    assert got[0, 0].tolist() == pytest.approx([0.75 / std, 0, 0])
    assert got[0, 1].tolist() == pytest.approx([-0.25 / std] * 3)


def test_equal_lengths_give_grpo_up_to_the_convention_of_the_deviation():
    rewards = torch.tensor([[1.0, 0.0, 0.0, 1.0, 0.5]], dtype=torch.float64)
    got = token_group_advantage(rewards, torch.ones(1, 5, 4, dtype=torch.bool))[..., 0]
    sample, population = rewards.std(1), rewards.std(1, unbiased=False)
    assert_same(got * (population + EPS), group_advantage(rewards) * (sample + EPS))


def test_an_advantage_that_gets_too_large_sends_its_group_back():
    """One short right answer among long wrong ones: 1 token of 81, an advantage of 8.9."""
    rewards = torch.tensor([[1.0, 0.0, 0.0], [1.0, 0.0, 0.0]], dtype=torch.float64)
    lengths = torch.tensor([[1, 40, 40], [20, 40, 40]])
    mask = torch.arange(40) < lengths[:, :, None]
    got, usual = token_group_advantage(rewards, mask), group_advantage(rewards)
    assert_same(got[0], usual[0][:, None] * mask[0])
    assert_same(got[1].sum(), torch.zeros(()).double(), tolerance=1e-12)
    assert (got[1, 0, 0] - usual[1, 0]).abs() > 0.5


# ---- clipping and redistribution


def test_clipping_widens_downwards_for_sure_tokens_and_upwards_for_open_ones():
    signal = torch.tensor([-1.0, -0.5, 0.0, 0.5, 1.0], dtype=torch.float64)
    low, high = asymmetric_clip(signal, clip=0.2, alpha=0.8)
    assert low.tolist() == pytest.approx([0.36, 0.28, 0.2, 0.2, 0.2])
    assert high.tolist() == pytest.approx([0.2, 0.2, 0.2, 0.28, 0.36])


def test_redistribution_by_hand():
    """Open tokens count more once they have left the zone, sure ones less while they are in it."""
    signal = torch.tensor([0.5, 0.5, -0.5, -0.5, 0.0, -1.0], dtype=torch.float64)
    ratio = torch.tensor([1.0, 1.2, 1.0, 1.2, 1.0, 0.99], dtype=torch.float64)
    bounds = asymmetric_clip(signal)
    got = redistribute(torch.full((6,), -2.0).double(), signal, ratio, *bounds)
    assert got.tolist() == pytest.approx([-2.0, -3.0, -1.0, -2.0, -2.0, 0.0])
    edge = torch.tensor([1.149, 1.151], dtype=torch.float64)  # 1 + 0.3 / 2: the wider zone counts
    bounds = asymmetric_clip(signal[:2])
    assert redistribute(torch.ones(2).double(), signal[:2], edge, *bounds).tolist() == [1.0, 1.5]


# ---- the loss


@pytest.mark.parametrize("options", [{}, dict(alpha=0.3, beta=0.7, clip=0.1, dual_clip=2.0)])
@pytest.mark.parametrize("far", [0.0, 0.15, 0.9, 3.0])
def test_loss_and_gradient_are_those_of_the_loop(far, options):
    _, new, parts = moved(far=far)
    got, want = hapo_loss(new, *parts, **options), hapo_loss_reference(new, *parts, **options)
    assert_same(got, want, tolerance=1e-12)
    expected = torch.autograd.grad(want, new)[0]
    assert_same(torch.autograd.grad(got, new)[0], expected, tolerance=1e-12)
    assert (expected[parts[-1]] != 0).any() and (expected[~parts[-1]] == 0).all()


def test_without_alpha_and_beta_it_is_the_token_mean_of_ppo():
    _, new, (old, advantage, signal, mask) = moved()
    plain = token_mean(clipped_surrogate(new, old, advantage, dual_clip=10.0), mask)
    assert_same(hapo_loss(new, old, advantage, signal, mask, alpha=0.0, beta=0.0), plain)
    assert abs(hapo_loss(new, old, advantage, signal, mask) - plain) > 1e-3


def test_the_objective_is_the_loss_of_its_parts():
    experience, new, parts = moved()
    rows = torch.tensor([5, 0, 3, 1])
    want = hapo_loss(new[rows], *(x[rows] for x in parts), alpha=0.5)
    assert_same(hapo(experience, alpha=0.5)(new[rows], rows), want)
    old, advantage, signal, mask = parts
    want = hapo_loss(new[rows], *(x[rows] for x in (old, advantage, signal.abs(), mask)))
    assert_same(hapo_released(experience)(new[rows], rows), want)
    assert abs(want - hapo(experience)(new[rows], rows)) > 1e-3


def test_with_equal_lengths_and_no_entropy_it_is_dapo_without_the_higher_clip():
    """All that is then left is the other convention of the standard deviation."""
    experience, new, _ = moved()
    answers = experience.rollout._replace(mask=torch.ones(6, 6, dtype=torch.bool))
    experience = Experience(answers, experience.rewards)
    rows = torch.arange(6)
    got = hapo(experience, alpha=0.0, beta=0.0)(new, rows)
    want = dapo(experience, clip_high=0.2)(new, rows)
    assert_same(got, want * math.sqrt(3 / 2), tolerance=1e-5)


def test_groups_that_say_nothing_do_not_count():
    """Neither their tokens in the mean nor their entropies in the signal."""
    experience, new, _ = moved()
    answers, rewards = experience
    silent = Experience(
        Rollout(*(torch.cat([x, x[:3]]) for x in answers))._replace(
            entropy=torch.cat([answers.entropy, 9.0 * answers.entropy[:3]])
        ),
        torch.cat([rewards, torch.ones(1, 3).double()]),
    )
    rows = torch.arange(6)
    assert_same(hapo(silent)(new, rows), hapo(experience)(new, rows))
    nothing = Experience(answers, torch.ones_like(rewards))
    gradient = torch.autograd.grad(hapo(nothing)(new, rows), new)[0]
    assert (gradient == 0).all()


def test_one_token_answers():
    mask = torch.ones(2, 1, dtype=torch.bool)
    log_prob = torch.tensor([[-0.5], [-1.0]], dtype=torch.float64)
    answers = Rollout(torch.zeros(2, 2, dtype=torch.long), mask, log_prob, log_prob.neg())
    experience = Experience(answers, torch.tensor([[1.0, 0.0]], dtype=torch.float64))
    assert torch.isfinite(hapo(experience)(log_prob, torch.arange(2)))


@pytest.mark.no_shape_checks
def test_errors_name_the_argument():
    with pytest.raises(ValueError, match="quantile"):
        entropy_scale(ENTROPY, ALL, quantile=1.5)
    with pytest.raises(ValueError, match="tau"):
        adaptive_temperature(ENTROPY, EntropyScale(0, 1, 1), tau=1.0)
    with pytest.raises(ValueError, match="rewards"):
        token_group_advantage(torch.ones(2, 1), torch.ones(2, 1, 3, dtype=torch.bool))
