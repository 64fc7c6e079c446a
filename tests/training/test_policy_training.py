"""The training loop: it imitates, it raises the reward, and equal seeds give equal runs."""

from __future__ import annotations

import copy

import pytest
import torch

from corelib.models.cache import DenseCache
from corelib.models.decoder import Decoder, DecoderConfig, sampler
from corelib.training.clock import ClockWalk
from corelib.training.policy_gradient import grpo
from corelib.training.policy_training import collect, imitate, improve, summary, train
from corelib.training.rollout import answer_stats

pytestmark = pytest.mark.method("hapo")
TASK = ClockWalk(hours=6, moves=(1, 3), most_moves=3)


@pytest.fixture(scope="module")
def start():
    sizes = dict(width=16, layers=1, heads=2, kv_heads=2, head_width=8, hidden=32, context=16)
    model = Decoder(DecoderConfig(vocab=TASK.vocab, **sizes, qkv_bias=True), seed=0)
    losses = imitate(model, TASK.demonstrations, steps=60, lr=2e-2, rows=32)
    return model, losses


def learn(model, steps, **options):
    model = copy.deepcopy(model)
    settings = dict(lr=6e-3, prompts=8, group=4, chooser=sampler(0), new_cache=DenseCache)
    return model, train(model, TASK, grpo, steps=steps, **settings | options)


def test_imitation_learns_what_can_be_learnt(start):
    """A fair coin at every fork is all that is left: less than ln 2 = 0.69 a token."""
    _, losses = start
    assert losses[0] > 2.0 and sum(losses[-5:]) / 5 < 0.5


def test_reinforcement_raises_the_reward(start):
    _, curve = learn(start[0], 16)
    rewards = [point["reward"] for point in curve]
    assert sum(rewards[-4:]) > sum(rewards[:4]) + 1.0
    assert set(curve[0]) == {"reward", "entropy", "length"}


def test_equal_seeds_give_equal_runs(start):
    (one, first), (two, second) = learn(start[0], 2), learn(start[0], 2)
    assert first == second
    for a, b in zip(one.parameters(), two.parameters()):
        assert torch.equal(a, b)
    assert learn(start[0], 2, seed=1)[1] != first


def test_the_temperature_follows_the_step_before(start):
    asked = []

    def heat(experience):
        asked.append(experience)
        return lambda logits: torch.full(logits.shape[:1], 1e-4)  # as good as greedy

    _, curve = learn(start[0], 2, next_temperature=heat, describe=lambda e: {"all": e})
    assert [point["all"] for point in curve] == asked
    greedy = asked[1].rollout.answers.view(8, 4, -1)
    assert (greedy == greedy[:, :1]).all()
    warm = asked[0].rollout.answers.view(8, 4, -1)
    assert not (warm == warm[:, :1]).all()


def test_groups_are_answers_to_one_prompt(start):
    options = dict(chooser=sampler(0), new_cache=DenseCache)
    generator = torch.Generator().manual_seed(0)
    got = collect(start[0], TASK, prompts=3, group=4, generator=generator, **options)
    asked = got.rollout.prompts.view(3, 4)
    assert (asked == asked[:, :1]).all()
    rewards = TASK.rewards(got.rollout.prompts, got.rollout.answers)
    assert torch.equal(got.rewards, rewards.view(3, 4))
    said = summary(got)
    assert said["reward"] == rewards.mean().item()
    assert said["length"] == got.rollout.mask.sum().item() / 12
    assert said["entropy"] == pytest.approx(
        got.rollout.entropy.sum().item() / got.rollout.mask.sum()
    )


def test_every_answer_is_used_once(start):
    model = copy.deepcopy(start[0])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    options = dict(chooser=sampler(0), new_cache=DenseCache)
    generator = torch.Generator().manual_seed(0)
    experience = collect(model, TASK, prompts=3, group=4, generator=generator, **options)
    seen = []

    def objective(given):
        assert given is experience

        def loss(log_prob, rows):
            seen.extend(rows.tolist())
            want = answer_stats(model, experience.rollout).log_prob[rows]
            torch.testing.assert_close(log_prob, want)
            return log_prob.sum()

        return loss

    improve(model, optimizer, experience, objective, updates=5, generator=generator)
    assert sorted(seen) == list(range(12)) and seen != sorted(seen)
