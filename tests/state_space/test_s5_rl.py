"""Scans across the ends of episodes, and an agent whose memory is one."""

from __future__ import annotations

import doctest

import pytest
import torch

from corelib.measure.races import s5_rl as recorded_runs
from corelib.measure.races.scans import GRUMemory
from corelib.primitives import diagonal_scan, scan_reference
from corelib.state_space import s5_rl
from corelib.state_space.memory_tasks import Environment
from corelib.state_space.s5_rl import (
    ActorCritic,
    Flagged,
    MemoryChain,
    RandomProjection,
    Reach,
    RecurrentPPO,
    S5Block,
    S5Layer,
    advantages,
    scan_reset,
    then,
)

EXACT = dict(atol=1e-12, rtol=1e-10)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def inputs(L=13, B=2, C=3, dtype=torch.complex128):
    g = generator(L)

    def normal(*shape):
        return torch.randn(shape, generator=g, dtype=dtype)

    reset = torch.rand(B, L, generator=g) < 0.25
    return dict(decay=normal(B, L, C), x=normal(B, L, C), state=normal(B, C)), reset


def test_doctest():
    failures, tests = doctest.testmod(s5_rl)
    assert tests and not failures


# --- the operator ---------------------------------------------------------------------------------


def test_the_operator_is_associative():
    g = generator()

    def element():
        a, b = torch.randn(2, 500, 1, generator=g, dtype=torch.complex128)
        return Flagged(a, b, torch.rand(500, 1, generator=g) < 0.5)

    a, b, c = element(), element(), element()
    left, right = then(then(a, b), c), then(a, then(b, c))
    for one, other in zip(left, right, strict=True):
        torch.testing.assert_close(one, other, atol=1e-14, rtol=1e-14)
    assert not torch.equal(then(a, b).x, then(b, a).x)


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
@pytest.mark.parametrize("L", [1, 2, 13, 32])
def test_three_ways_to_the_same_states(L, dtype):
    """The paper's operator on a tree, the loop with resets, and the scan of masked decays."""
    given, reset = inputs(L, dtype=dtype)
    results = []
    for run in (scan_reset, scan_reference, diagonal_scan):
        leaves = {name: x.clone().requires_grad_() for name, x in given.items()}
        h = run(leaves["decay"], leaves["x"], reset=reset, state=leaves["state"])
        weights = torch.linspace(-1, 2, h.numel(), dtype=dtype).view_as(h)
        total = (h * weights).sum()
        total = total.real + total.imag if h.is_complex() else total
        results.append([h, *torch.autograd.grad(total, list(leaves.values()))])
    for other in results[1:]:
        for one, two in zip(results[0], other, strict=True):
            torch.testing.assert_close(one, two, **EXACT)


def test_packed_episodes_equal_episodes_apart():
    torch.manual_seed(0)
    layer = S5Block(3, 6, step_min=0.05, step_max=0.5).double()
    lengths = [4, 1, 7, 5]
    x = torch.randn(1, sum(lengths), 3, dtype=torch.float64)
    resets = torch.zeros(1, x.shape[1], dtype=torch.bool)
    resets[0, torch.tensor(lengths).cumsum(0)[:-1]] = True
    state = torch.randn(1, 3, dtype=torch.complex128)
    apart, start = [], state
    for episode in x.split(lengths, 1):
        y, last = layer(episode, start)
        apart.append(y)
        start = layer.init_state(1)
    packed, after = layer(x, state, resets)
    torch.testing.assert_close(packed, torch.cat(apart, 1), **EXACT)
    torch.testing.assert_close(after, last, **EXACT)


def test_nothing_crosses_a_reset():
    torch.manual_seed(0)
    layer, x = S5Layer(3, 6).double(), torch.randn(2, 12, 3, dtype=torch.float64)
    resets = torch.zeros(2, 12, dtype=torch.bool)
    resets[0, 7] = True
    state = torch.randn(2, 3, dtype=torch.complex128, requires_grad=True)
    y, _ = layer(x.requires_grad_(), state, resets)
    of_x, of_state = torch.autograd.grad(y[:, 7:].sum(), (x, state))
    assert not of_x[0, :7].any() and not of_state[0].any()
    assert of_x[1, :7].all() and of_state[1].all()


# --- the agent ------------------------------------------------------------------------------------


def agent(environment, width=8, state_size=8):
    torch.manual_seed(0)
    return ActorCritic(environment, [S5Block(width, state_size) for _ in range(2)], width)


def trainer(environment, steps=9, **options):
    return RecurrentPPO(agent(environment), environment, steps=steps, **options)


@pytest.mark.parametrize(
    "environment",
    [lambda: MemoryChain(3, 5), lambda: RandomProjection(Reach(2, 5, steps=2), episodes=2)],
    ids=["choices", "pushes"],
)
def test_learning_sees_what_acting_saw(environment):
    """One scan over a rollout, from the stored state, gives the law and value of every step."""
    ppo = trainer(environment())
    for turn in range(2):
        rollout = ppo.collect()
        law, value, state = ppo.policy(rollout.observation, rollout.state, rollout.resets)
        log_prob = ppo.policy.log_prob(law, rollout.action)[0]
        torch.testing.assert_close(log_prob, rollout.log_prob, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(value, rollout.value, atol=1e-5, rtol=1e-5)
        assert rollout.resets.any(1).all() and bool(rollout.state[0].any()) == (turn == 1)
        torch.testing.assert_close(ppo._now[1], state, atol=1e-5, rtol=1e-5)


def test_advantages_are_the_textbook_loop():
    g = generator()
    reward, value = torch.randn(2, 3, 11, generator=g, dtype=torch.float64)
    done = torch.rand(3, 11, generator=g) < 0.3
    behind = torch.randn(3, generator=g, dtype=torch.float64)
    got = advantages(reward, value, done, behind, discount=0.9, trace=0.8)
    for b in range(3):
        gain, ahead = 0.0, behind[b].item()
        for t in reversed(range(11)):
            alive = 1.0 - float(done[b, t])
            gain = reward[b, t] + 0.9 * ahead * alive - value[b, t] + 0.9 * 0.8 * alive * gain
            ahead = value[b, t]
            torch.testing.assert_close(got[b, t], gain, **EXACT)


def test_a_group_is_learned_from_alone():
    ppo = trainer(MemoryChain(3, 4), steps=6)  # not whole episodes: the state matters
    _, rollout, rows = ppo.collect(), ppo.collect(), torch.tensor([2, 0])
    gain = torch.randn(4, 6, generator=generator())
    wanted = torch.autograd.grad(ppo.loss(rollout, gain, rows), ppo.policy.act[-1].weight)[0]
    for x in (gain, rollout.observation, rollout.log_prob, rollout.value, *rollout.state):
        x[[1, 3]] = torch.nan
    got = torch.autograd.grad(ppo.loss(rollout, gain, rows), ppo.policy.act[-1].weight)[0]
    assert torch.equal(got, wanted) and wanted.any()
    rollout.state[0][rows] = 0
    other = torch.autograd.grad(ppo.loss(rollout, gain, rows), ppo.policy.act[-1].weight)[0]
    assert not torch.allclose(other, wanted)


def test_the_gru_that_it_is_raced_against():
    """Called from cut to cut, it is a GRU that starts afresh at resets."""
    torch.manual_seed(0)
    memory, x = GRUMemory(4).double(), torch.randn(3, 20, 4, dtype=torch.float64)
    resets = torch.rand(3, 20, generator=generator()) < 0.1
    state, y = memory.init_state(3), []
    for t in range(20):
        out, state = memory.step(x[:, t], state, resets[:, t])
        y.append(out)
    whole, after = memory(x, None, resets)
    torch.testing.assert_close(whole, torch.stack(y, 1), **EXACT)
    torch.testing.assert_close(after, state, **EXACT)
    alone, _ = memory.gru(x[1:2, : int(resets[1].nonzero()[0, 0])])
    torch.testing.assert_close(whole[1:2, : alone.shape[1]], alone, **EXACT)


def test_it_learns_to_remember():
    torch.manual_seed(0)
    task = MemoryChain(2, 128)
    ppo = RecurrentPPO(ActorCritic(task, [S5Block(8, 8)], 8), task, steps=6, lr=1e-2)
    curve = ppo.train(18)
    assert abs(curve[0]) < 0.4 and max(curve[-4:]) > 0.8, curve


def test_recorded_runs():
    """Trained beforehand: within a trial the agent gets better, and it was no better before."""
    runs = recorded_runs.recorded()
    assert [run["seed"] for run in runs] == list(recorded_runs.SEEDS)
    for run in runs:
        assert len(run["curve"]) == recorded_runs.ROLLOUTS
        assert len(run["after"]) == recorded_runs.STEPS * recorded_runs.EPISODES
        assert sum(run["after"][4:]) > sum(run["after"][:4]) > sum(run["before"][:4]) + 0.5
    again = recorded_runs.agent(0).collect().reward.mean(0)
    torch.testing.assert_close(again, torch.tensor(runs[0]["before"]), atol=0.02, rtol=0)


# --- the tasks ------------------------------------------------------------------------------------


def test_memory_chain():
    task = MemoryChain(3, 64)
    seen = [task.start()]
    cue = seen[0][:, 2]
    assert set(cue.tolist()) == {-1.0, 1.0}
    for t in range(1, 4):
        after = task.step(torch.zeros(64, dtype=torch.long))
        assert not after.reward.any() and not after.done.any()
        assert not after.observation[:, 2].any()
        assert (after.observation[:, 0] - (1 - t / 3)).abs().max() < 1e-6
        assert bool((after.observation[:, 1] == (t == 3)).all())
    right = (cue > 0).long()
    right[0] = 1 - right[0]
    after = task.step(right)
    assert after.reward.tolist() == [-1.0] + [1.0] * 63 and after.done.all()
    assert after.observation[:, 2].abs().eq(1).all()
    assert isinstance(task, Environment)


def test_a_projection_lasts_for_a_trial():
    task = RandomProjection(Reach(2, 4, steps=2), episodes=3)
    seen, matrices = task.start(), []
    assert seen[:, -2:].all() and not seen[:, 2:4].any()
    for t in range(1, 13):
        matrices.append((task.looking, task.steering))
        action = torch.full((4, 2), 0.1 * t)
        before = task.inner.point
        after = task.step(action)
        if t % 2:  # within an episode: the point moved as steered, and is seen through the matrix
            moved = before + task.inner.speed * (task.steering @ action[..., None])[..., 0].clamp(
                -1, 1
            )
            torch.testing.assert_close(task.inner.point, moved)
        looked = (task.looking @ task.inner.point[..., None])[..., 0]
        torch.testing.assert_close(after.observation[:, :2], looked)
        assert bool((after.done == (t % 6 == 0)).all())
        assert bool((after.observation[:, -2] == (t % 2 == 0)).all())
        assert torch.equal(after.observation[:, -1] == 1, after.done)
        if t % 6:
            assert torch.equal(after.observation[:, 2:4], action)
    for one, other in zip(matrices[0], matrices[5]):
        assert torch.equal(one, other)
    for one, other in zip(matrices[5], matrices[6]):
        assert not torch.allclose(one, other)
        torch.testing.assert_close(one @ one.mT, torch.eye(2).expand(4, 2, 2), atol=1e-5, rtol=0)


def test_reaching_is_possible():
    task = Reach(2, 8, steps=3)
    point = task.start()
    torch.testing.assert_close(point.norm(dim=-1), torch.ones(8))
    rewards = []
    for _ in range(3):
        point, reward, done = task.step(-point / task.speed)
        rewards.append(reward)
    assert done.all() and (torch.stack(rewards)[1:] > -0.5).all()


@pytest.mark.no_shape_checks
def test_wrong_arguments():
    with pytest.raises(ValueError, match="delay, batch: expected at least 1, got 0 and 2"):
        MemoryChain(0, 2)
    with pytest.raises(ValueError, match="dims, batch, steps: expected at least 1"):
        Reach(0, 2)
    with pytest.raises(ValueError, match="environment: expected actions that are numbers"):
        RandomProjection(MemoryChain(2, 2))
    with pytest.raises(ValueError, match="episodes: expected at least 1, got 0"):
        RandomProjection(Reach(1, 2), episodes=0)
    with pytest.raises(ValueError, match="parts: expected 1 to 2, got 3"):
        trainer(MemoryChain(2, 2), parts=3)
    with pytest.raises(ValueError, match="steps, epochs: expected at least 1, got 0"):
        trainer(MemoryChain(2, 2), steps=0)
