"""DR-RL: truncated scores and their bounds, the mask, the environment and what can be learnt."""

from __future__ import annotations

import doctest
import itertools

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from corelib.linear_time import dr_rl
from corelib.linear_time.dr_rl import (
    RANKS,
    RankEnv,
    RankPolicy,
    choose,
    energy_ranks,
    example,
    factored_scores,
    fixed_ranks,
    low_rank_attention,
    oracle,
    random_ranks,
    rank_change_norm,
    rank_law,
    rebuild_qk,
    reinforce,
    score_error_bound,
    score_spectrum,
    score_work,
    svd_work,
    truncate_qk,
    truncate_scores,
    truncated_scores_reference,
    weight_stats,
)
from corelib.linear_time.low_rank_scores import factors_from_bases
from corelib.measure.work import count_work
from corelib.primitives import attention
from corelib.primitives.svd import gram_svd

EXACT = dict(atol=1e-10, rtol=1e-9)
H, G, D = 4, 2, 8


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).double()


def queries_and_keys(L=11, S=17):
    return normal(2, H, L, D), normal(2, G, S, D, seed=1)


def grouped(k):
    return k.repeat_interleave(H // G, 1)


# --- truncated scores -----------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [1, 3, 8])
@pytest.mark.parametrize("L, S", [(11, 17), (5, 17), (1, 1), (9, 3)])
def test_factored_scores_equal_the_rebuilt_ones(rank, L, S):
    q, k = queries_and_keys(L, S)
    wanted = truncated_scores_reference(q, k, rank)
    low_q, low_k = rebuild_qk(q, k, rank)
    torch.testing.assert_close(low_q @ grouped(low_k).mT, wanted, **EXACT)
    if rank < min(L, S):
        lost = (q - low_q).square().sum((2, 3))
        tail = torch.linalg.svdvals(q)[..., rank:].square().sum(-1)
        torch.testing.assert_close(lost, tail, **EXACT)
    torch.testing.assert_close(factored_scores(truncate_qk(q, k, rank)), wanted, **EXACT)
    if L >= D and S >= D:
        bases = factors_from_bases(q, k, gram_svd(q), gram_svd(k), rank)
        torch.testing.assert_close(factored_scores(bases), wanted, **EXACT)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("L, S", [(11, 17), (6, 4), (1, 1)])
def test_full_rank_is_attention(causal, L, S):
    q, k = queries_and_keys(L, S)
    v = normal(2, G, S, 5, seed=2)
    options = dict(causal=causal, scale=D**-0.5)
    for truncate in (truncate_qk, truncate_scores):
        out = low_rank_attention(truncate(q, k, D), v, **options)
        torch.testing.assert_close(out, attention(q, k, v, **options), **EXACT)


class Shapes(TorchDispatchMode):
    """The shapes of everything that operations make."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    @classmethod
    def _should_skip_dynamo(cls):
        return False  # saves the import of torch's compiler

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.seen |= {tuple(x.shape) for x in tree_leaves(out) if isinstance(x, torch.Tensor)}
        return out


def test_queries_and_keys_are_never_rebuilt():
    q, k = queries_and_keys(13, 29)
    factors = truncate_qk(q, k, 3)
    with Shapes() as made:
        factored_scores(factors)
    assert made.seen and not any(D in shape[-2:] for shape in made.seen)
    with Shapes() as made:
        truncated_scores_reference(q, k, 3)
    assert (2, H, 13, D) in made.seen
    heads = 2 * H  # rows and heads; a product's views cost nothing
    wanted = heads * (2 * 13 * 3 * 3 + 2 * 13 * 29 * 3)
    assert wanted <= count_work(lambda: factored_scores(factors)) <= 1.1 * wanted


def test_a_change_of_rank_is_the_root_of_what_lies_between():
    A = normal(12, 9)
    u, sigma, vh = torch.linalg.svd(A, full_matrices=False)
    low = {r: u[:, :r] * sigma[:r] @ vh[:r] for r in range(10)}
    V = normal(9, 4, seed=1)
    for r, r2 in itertools.product(range(9), repeat=2):
        change = low[r2] - low[r]
        torch.testing.assert_close(change.norm(), rank_change_norm(sigma, r, r2), **EXACT)
        least = sigma[min(r, r2)] * V.norm()
        assert (change @ V).norm() <= least + 1e-12
    assert rank_change_norm(sigma, 4, 4) == 0


def test_the_bound_on_the_scores_holds():
    for seed in range(5):
        q, k = normal(1, 1, 14, D, seed=seed), normal(1, 1, 20, D, seed=seed + 50)
        k = k * 0.5 ** torch.arange(D)
        for rank in range(1, D + 1):
            off = torch.linalg.matrix_norm(q @ k.mT - truncated_scores_reference(q, k, rank), 2)
            bound = score_error_bound(torch.linalg.svdvals(q), torch.linalg.svdvals(k), rank)
            assert (off <= bound + 1e-10).all() and (rank < D or bound.item() == 0)


def test_the_best_scores_of_a_rank_and_their_spectrum():
    q, k = queries_and_keys()
    A = q @ grouped(k).mT
    sigma = torch.linalg.svdvals(A)[..., :D]
    torch.testing.assert_close(score_spectrum(gram_svd(q), gram_svd(k)), sigma, **EXACT)
    for rank in (1, 4, 7):
        best = (A - factored_scores(truncate_scores(q, k, rank))).norm(dim=(2, 3))
        torch.testing.assert_close(best, rank_change_norm(sigma, rank, D), **EXACT)
        apart = (A - factored_scores(truncate_qk(q, k, rank))).norm(dim=(2, 3))
        assert (apart > best + 1e-3).all(), "truncating both is no best approximation"


def test_work_by_hand():
    assert score_work(3, 5, 4, 4) == 2 * 3 * 5 * 4
    by_hand = 2 * 3 * 4 * 2 + 2 * 5 * 4 * 2 / 2 + 2 * 4 * 4 + 2 * 3 * 4 + 2 * 3 * 5 * 2
    assert score_work(3, 5, 4, 2, shared=2) == by_hand
    assert svd_work(3, 4) == 2 * (2 * 3 * 16 + 9 * 64) + 4 * 64 + 9 * 64


# --- the environment ------------------------------------------------------------------------------

SMALL = (2, 4, 6, 8)


def environment(E=3, T=3, segment=6, **options):
    L = T * segment
    fade = 0.6 ** torch.arange(D)  # spectra that fall, by episode at another pace
    q = normal(E, H, L, D) * fade ** torch.arange(1.0, E + 1)[:, None, None, None]
    parts = normal(E, L, 5, seed=1), q, normal(E, G, L, D, seed=2), normal(E, G, L, 7, seed=3)
    stats = normal(E, 9, seed=4)
    options = dict(segment=segment, ranks=SMALL, tolerance=0.3) | options
    return RankEnv(*(p.float() for p in (*parts, stats)), **options), parts


def test_tables_against_loops():
    env, (_, q, k, v) = environment()
    full = attention(q, k, v, causal=True)
    for e, t, a in itertools.product(range(3), range(3), range(4)):
        rows, seen = slice(6 * t, 6 * t + 6), slice(0, 6 * t + 6)
        here = (q[e : e + 1, :, rows], k[e : e + 1, :, seen])
        factors = truncate_qk(*here, SMALL[a])
        out = low_rank_attention(factors, v[e : e + 1, :, seen], causal=True, scale=D**-0.5)
        cosine = F.cosine_similarity(out, full[e : e + 1, :, rows], dim=-1).mean()
        assert env.fidelity[e, t, a].item() == pytest.approx(cosine.item(), abs=1e-4)
        A = here[0] @ grouped(here[1]).mT
        for b in range(4):
            low = [factored_scores(truncate_scores(*here, SMALL[i])) for i in (a, b)]
            change = (low[0] - low[1]).norm() / A.norm()
            assert env.change[e, t, a, b].item() == pytest.approx(change.item(), abs=1e-3)
    assert (env.change.diagonal(0, -2, -1) == 0).all()


def test_probing_every_third_query_from_the_last():
    env, (_, q, k, v) = environment(E=1, T=1, probe=3)
    asked = torch.tensor([2, 5])
    full = attention(q, k, v, causal=True)[:, :, asked]
    for a, rank in enumerate(SMALL):
        out = low_rank_attention(truncate_qk(q, k, rank), v, causal=True, scale=D**-0.5)
        wanted = F.cosine_similarity(out[:, :, asked], full, dim=-1).mean()
        assert env.fidelity[0, 0, a].item() == pytest.approx(wanted.item(), abs=1e-4)


def test_every_rank_owes_the_svd():
    env, _ = environment()
    seen = 18
    exact = 2 * 6 * seen * (D + 7)
    for a, rank in enumerate(SMALL):
        owed = score_work(6, seen, D, rank, shared=2) + 2 * 6 * seen * 7 + svd_work(6, D, shared=2)
        assert env.work[2, a].item() == pytest.approx(owed / exact)
    assert env.work[2, 3].item() == pytest.approx(1 + env.svd[2].item())
    assert (env.work[2, :3].diff() > 0).all() and (env.svd.diff() < 0).all()


def test_outcomes_by_hand():
    env, _ = environment()
    actions = random_ranks(env, seed=1)
    total = dict.fromkeys(("reward", "fidelity", "work", "change", "rank"), 0.0)
    for e in range(3):
        last = 3
        for t, a in enumerate(actions[e].tolist()):
            assert env.allowed[e, t, last, a], "a random choice is an allowed one"
            parts = env.fidelity[e, t, a], env.work[t, a], env.change[e, t, last, a]
            total["reward"] += parts[0] - 0.05 * parts[1] - 0.1 * parts[2]
            for name, part in zip(("fidelity", "work", "change"), parts):
                total[name] += part
            total["rank"] += SMALL[a]
            last = a
    got = env.outcome(actions)
    for name, value in total.items():
        assert getattr(got, name) == pytest.approx(float(value) / 9, rel=1e-5)
    assert got.unsafe == 0
    strict, _ = environment(tolerance=0.01)
    assert strict.outcome(fixed_ranks(strict, 2)).unsafe > 0


def any_tables(seed):
    """An environment whose tables are numbers at random, so that looking ahead pays."""
    env, _ = environment(tolerance=0.6, weights=(1.0, 0.5, 1.0))
    generator = torch.Generator().manual_seed(seed)
    for name in ("fidelity", "work", "change"):
        table = torch.rand(getattr(env, name).shape, generator=generator)
        setattr(env, name, table)
    env.change *= 1 - torch.eye(4)
    return env


@pytest.mark.parametrize("seed", [None, 1, 2])
def test_the_oracle_is_the_best_of_all_allowed_sequences(seed):
    env = environment()[0] if seed is None else any_tables(seed)
    best = torch.full((3,), -torch.inf)
    for sequence in itertools.product(range(4), repeat=3):
        actions = torch.tensor(sequence).expand(3, 3)
        total = env.follow(env.rewards, actions).sum(1)
        fine = env.follow(env.allowed, actions).all(1)
        best = torch.where(fine, torch.maximum(best, total), best)
    chosen = oracle(env)
    assert env.follow(env.allowed, chosen).all()
    torch.testing.assert_close(env.follow(env.rewards, chosen).sum(1), best)


def test_energy_ranks_are_the_smallest_that_keep_the_share():
    env, (_, q, k, _) = environment()
    chosen = energy_ranks(env, 0.8)
    for e, t in itertools.product(range(3), range(3)):
        kept = []
        for x in (q[e, :, 6 * t : 6 * t + 6], k[e, :, : 6 * t + 6]):
            energy = torch.linalg.svdvals(x).square()
            energy = torch.nn.functional.pad(energy, (0, D - energy.shape[1]))
            kept.append((energy / energy.sum(1, keepdim=True)).mean(0).cumsum(0))
        wanted = next(i for i, r in enumerate(SMALL) if all(s[r - 1] >= 0.8 for s in kept))
        assert chosen[e, t] == wanted
    assert (energy_ranks(env, 1.0) == 3).all()


# --- the policy -----------------------------------------------------------------------------------


@pytest.mark.parametrize("explore", [0.0, 0.3, 1.0])
def test_masked_ranks_have_probability_zero(explore):
    logits = 50 * normal(6, 4)
    allowed = torch.tensor([[True, False, False, True]]).repeat(6, 1)
    law = rank_law(logits, allowed, explore)
    assert (law[:, 1:3] == 0).all(), "exactly"
    torch.testing.assert_close(law.sum(1), torch.ones(6, dtype=torch.float64))
    greedy = logits[:, [0, 3]].softmax(1)
    wanted = (1 - explore) * greedy + explore / 2
    torch.testing.assert_close(law[:, [0, 3]], wanted, **EXACT)


def test_masked_logits_get_no_gradient():
    logits = normal(1, 4).requires_grad_()
    allowed = torch.tensor([[True, False, True, True]])
    rank_law(logits, allowed, 0.1)[0, 0].log().backward()
    assert logits.grad[0, 1] == 0 and logits.grad[0].abs().sum() > 0


def test_the_policy_keeps_its_mask_and_sees_all_three():
    torch.manual_seed(0)
    env, _ = environment()
    policy = RankPolicy(5, 4)
    actions = choose(policy, env)
    assert env.follow(env.allowed, actions).all()
    seen = policy.encode(env.inputs[:, 0])
    last = torch.tensor([0, 1, 2])
    logits = policy(seen, env.stats, last)
    moved = policy(seen + 1, env.stats, last), policy(seen, env.stats + 1, last)
    for other in (*moved, policy(seen, env.stats, last + 1)):
        assert not torch.allclose(other, logits)
    x = env.inputs[0, 0]
    padded = F.pad(x, (0, 0, 1, 1)).unfold(0, 3, 1)  # (L, C, 3)
    by_hand = torch.einsum("lcw,ocw->lo", padded, policy.conv.weight) + policy.conv.bias
    torch.testing.assert_close(seen[0], by_hand.relu().mean(0), atol=1e-5, rtol=1e-5)


def test_seven_ranks():
    assert RANKS == (16, 24, 32, 40, 48, 56, 64)
    assert RankPolicy(8)(torch.zeros(2, 64), torch.zeros(2, 9), torch.tensor([0, 6])).shape == (
        2,
        7,
    )
    W = normal(3, 4)
    wanted = torch.stack([W.mean(), W.var(), W.norm()] * 3)
    torch.testing.assert_close(weight_stats(W, W, W), wanted)


def test_learning_moves_to_what_pays():
    env, _ = environment(E=4, T=2, tolerance=1.0, weights=(0.0, 1.0, 0.0))  # cheap is all
    torch.manual_seed(0)
    policy = RankPolicy(5, 4)
    before = env.outcome(choose(policy, env)).reward
    curve = reinforce(policy, env, steps=40, rollouts=8, lr=3e-3)
    best = env.outcome(oracle(env)).reward
    assert env.outcome(choose(policy, env)).reward == pytest.approx(best) and len(curve) == 40
    assert best >= before and sum(curve[-5:]) > sum(curve[:5])


def test_learning_is_repeatable_and_starts_from_what_it_is_given():
    env, _ = environment(T=2)
    curves = []
    for _ in range(2):
        torch.manual_seed(0)
        curves.append(reinforce(RankPolicy(5, 4), env, steps=2, episodes=2, rollouts=2))
    assert curves[0] == curves[1]


# --- what can go wrong ----------------------------------------------------------------------------


def test_example_runs():
    assert not doctest.testmod(dr_rl).failed
    q, k = example()["q"], example()["k"]
    torch.testing.assert_close(
        factored_scores(truncate_qk(q, k, 3)), q @ k.mT, atol=1e-5, rtol=1e-4
    )


@pytest.mark.no_shape_checks
def test_bad_input_is_named():
    q, k = queries_and_keys()
    with pytest.raises(ValueError, match="k: expected the width of q"):
        truncate_qk(q, k[..., :4], 2)
    with pytest.raises(ValueError, match="k: expected a number of heads"):
        truncate_qk(q[:, :3], k, 2)
    with pytest.raises(TypeError, match="k: expected the dtype"):
        truncate_scores(q, k.float(), 2)
    with pytest.raises(ValueError, match="q, k: expected"):
        truncate_qk(q[0], k[0], 2)
    with pytest.raises(ValueError, match="r, r2: expected"):
        rank_change_norm(torch.ones(3), -1, 2)
    with pytest.raises(ValueError, match="rank: expected at least 1"):
        score_error_bound(torch.ones(3), torch.ones(3), 0)
    with pytest.raises(ValueError, match="allowed: expected"):
        rank_law(torch.zeros(1, 2), torch.zeros(1, 2).bool())
    with pytest.raises(ValueError, match="explore: expected"):
        rank_law(torch.zeros(1, 2), torch.ones(1, 2).bool(), 1.5)
    for wrong, name in (
        (dict(ranks=(2, 4)), "ranks"),
        (dict(ranks=(4, 2, 8)), "ranks"), (dict(tolerance=-1.0), "tolerance"),
        (dict(probe=0), "probe"), (dict(probe=7), "probe"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=f"{name}: expected"):
            environment(**wrong)
    env, parts = environment(T=1)
    with pytest.raises(ValueError, match="segment: expected"):
        RankEnv(*parts, normal(3, 9), segment=4, ranks=SMALL)
    with pytest.raises(ValueError, match="rank: expected one of"):
        fixed_ranks(env, 3)
    with pytest.raises(ValueError, match="steps, episodes, rollouts: expected"):
        reinforce(RankPolicy(5, 4), env, steps=1, rollouts=1)
