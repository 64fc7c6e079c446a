"""The walks home on a clock: what the verifier accepts, what is demonstrated, chance level."""

from __future__ import annotations

import itertools

import pytest
import torch

from corelib.training.clock import ClockWalk

pytestmark = pytest.mark.method("hapo")
SMALL = ClockWalk(hours=5, moves=(1, 3), most_moves=3)  # ids: hours 0-4, +1 is 5, +3 is 6, end is 7


def reward(task, hour, answer):
    padded = answer + [task.eos] * (task.longest - len(answer))
    return task.rewards(torch.tensor([[hour]]), torch.tensor([padded])).item()


@pytest.mark.parametrize(
    ("answer", "right"),
    [
        ([5, 3, 5, 4, 5, 0, 7], 1),  # +1 three times
        ([6, 0, 7], 1),
        ([6, 0, 7, 3, 3, 3, 3], 1),  # nobody reads what stands behind the end
        ([6, 1, 7], 0),  # a slip: 2 + 3 is 0
        ([5, 3, 7], 0),  # not home
        ([6, 0, 5, 7], 0),  # a move without its hour
        ([3, 0, 7], 0),  # no move at all
        ([7], 0),
        ([5, 3, 5, 4, 6, 2, 6], 0),  # cut off
    ],
)
def test_a_right_answer_calculates_well_and_ends_at_home(answer, right):
    task, hour = SMALL, 2
    assert task.rewards(torch.tensor([[hour]]), torch.tensor([answer])).item() == right


def test_whoever_is_at_home_need_not_move():
    assert reward(SMALL, 0, [7]) == 1


def test_rewards_agree_with_the_definition_for_every_answer():
    """All 8^5 answers of a short task, against the walk as text."""
    task = ClockWalk(hours=4, moves=(1,), most_moves=2)
    answers = torch.tensor(list(itertools.product(range(task.vocab), repeat=5)))
    got = task.rewards(torch.full((len(answers), 1), 2), answers)
    right = [a for a, r in zip(answers.tolist(), got.tolist()) if r]
    assert all(a[:5] == [4, 3, 4, 0, 5] for a in right) and len(right) == 1


def test_demonstrations_are_right_or_cut_off():
    task = ClockWalk(hours=7, moves=(1, 3), most_moves=4)
    ids, said = task.demonstrations(300, torch.Generator().manual_seed(0))
    answers, said = ids[:, 1:], said[:, 1:]
    rewards = task.rewards(ids[:, :1], answers)
    ended = ((answers == task.eos) & said).any(1)
    assert torch.equal(rewards.bool(), ended) and 0 < rewards.mean() < 1
    lengths = said.sum(1)
    assert torch.equal(said, torch.arange(task.longest) < lengths[:, None])
    first_home = [(a[1::2].tolist() + [0]).index(0) for a in answers]
    for home, n, done in zip(first_home, lengths.tolist(), ended.tolist()):
        assert n == (2 * home + 3 if done else 2 * task.most_moves)


def test_random_success_is_the_share_of_demonstrations_that_end():
    task = ClockWalk()
    _, said = task.demonstrations(40_000, torch.Generator().manual_seed(1))
    cut_off = said.sum(1) == 2 * task.most_moves
    assert abs((~cut_off).double().mean().item() - task.random_success()) < 0.012


def test_random_success_counts_every_sequence_of_moves():
    task, home = SMALL, 0
    for hour, steps in itertools.product(range(1, 5), itertools.product((1, 3), repeat=3)):
        places = itertools.accumulate(steps, initial=hour)
        home += any(p % 5 == 0 for p in places) / 32
    assert task.random_success() == pytest.approx(home, abs=1e-12)


def test_prompts_cover_all_hours_but_home():
    every = ClockWalk().every_prompt()
    assert every.flatten().tolist() == list(range(1, 30))
    drawn = ClockWalk().prompts(2000, torch.Generator().manual_seed(0))
    assert set(drawn.flatten().tolist()) == set(range(1, 30))


def test_words_and_forks():
    task = ClockWalk()
    ids = torch.tensor([14, 31, 21, 31, 28, 30, 29, 30, 0, 32])
    assert " ".join(task.words(ids)) == "14 +7 21 +7 28 +1 29 +1 0 end"
    assert task.rewards(ids[None, :1], ids[None, 1:]).item() == 1
    assert task.forks(ids[None, 1:])[0].tolist() == [True, False] * 4 + [True]


@pytest.mark.no_shape_checks
@pytest.mark.parametrize(
    ("wrong", "name"),
    [(dict(hours=1), "hours"), (dict(moves=()), "moves"), (dict(moves=(30,)), "moves")]
    + [(dict(most_moves=0), "most_moves")],
)
def test_errors_name_the_argument(wrong, name):
    with pytest.raises(ValueError, match=name):
        ClockWalk(**wrong)
