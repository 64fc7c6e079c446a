"""Scoring key blocks, choosing among them, and the meters of the choice."""

from __future__ import annotations

import pytest
import torch

from corelib.primitives import attention_reference, visible_keys
from corelib.primitives.block_scores import (
    attention_recall,
    block_density,
    grouped_block_scores,
    keep_ends,
    mass_blocks,
    pool_blocks,
    pooled_block_scores,
    reachable_blocks,
    relative_error,
    top_blocks,
)
from corelib.primitives.block_sparse import BlockLists, block_sparse_attention


def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("L", [1, 15, 16, 37])
def test_pooling_is_the_mean_of_what_exists(L):
    x = randn(2, 3, L, 4)
    wanted = [x[:, :, a : a + 16].mean(2) for a in range(0, L, 16)]
    torch.testing.assert_close(pool_blocks(x, 16), torch.stack(wanted, 2))


def test_a_pooled_score_is_the_mean_of_the_scores():
    q, k = randn(1, 4, 20, 6), randn(1, 2, 28, 6, seed=1)
    scores = q @ k.repeat_interleave(2, 1).transpose(2, 3) * 0.3
    got = pooled_block_scores(q, k, 8, causal=False, scale=0.3)
    for a in range(3):
        for c in range(4):
            tile = scores[..., 8 * a : 8 * a + 8, 8 * c : 8 * c + 8]
            torch.testing.assert_close(got[..., a, c], tile.mean((-1, -2)))


@pytest.mark.parametrize("causal", [False, True])
def test_grouped_scores_add_up_the_heads_of_a_group(causal):
    q, k = randn(2, 6, 20, 4), randn(2, 2, 28, 4, seed=1)
    every = pooled_block_scores(q, k, 8, causal=causal)
    got = grouped_block_scores(q, k, 8, causal=causal)
    torch.testing.assert_close(got, every.unflatten(1, (2, 3)).sum(2))


@pytest.mark.parametrize(("L", "S"), [(20, 20), (7, 33), (33, 7), (16, 19)])
def test_reachable_blocks_hold_some_visible_pair(L, S):
    got = reachable_blocks(L, S, 8, causal=True)
    visible = visible_keys(L, S, causal=True)
    wanted = [
        [bool(visible[a : a + 8, c : c + 8].any()) for c in range(0, S, 8)] for a in range(0, L, 8)
    ]
    assert got.tolist() == wanted
    scores = pooled_block_scores(randn(1, 1, L, 4), randn(1, 1, S, 4), 8, causal=True)
    assert torch.equal(scores[0, 0] > -torch.inf, got)


def test_top_blocks_are_the_best_and_never_hidden():
    scores = torch.tensor([[3.0, 1.0, 2.0, -torch.inf], [0.0, -torch.inf, -torch.inf, -torch.inf]])
    got = top_blocks(scores[None, None], 2)[0, 0]
    assert got.tolist() == [[True, False, True, False], [True, False, False, False]]
    assert torch.equal(top_blocks(scores[None, None], 9)[0, 0], scores > -torch.inf)
    assert not top_blocks(scores[None, None], 0).any()


def test_mass_takes_the_fewest_that_reach_it():
    shares = randn(2, 3, 5, 9).softmax(-1)
    for mass in (0.0, 0.3, 0.9, 1.1):
        kept = mass_blocks(shares, mass)
        held = (shares * kept).sum(-1)
        fewer = held - torch.where(kept, shares, torch.inf).amin(-1)
        assert (held >= min(mass, 1 - 1e-9)).all()
        assert ((fewer < mass) | ~kept.any(-1)).all()
    assert mass_blocks(shares, 1.1).all()
    assert not mass_blocks(torch.full((1, 1, 1, 4), torch.nan), 0.9).any()


def test_mass_grows_with_the_threshold():
    shares = randn(1, 2, 4, 8).softmax(-1)
    kept = [mass_blocks(shares, mass) for mass in (0.2, 0.5, 0.8, 0.95)]
    assert all((a <= b).all() for a, b in zip(kept, kept[1:], strict=False))


def test_ends_are_kept_where_they_can_be_seen():
    reachable = reachable_blocks(32, 32, 8, causal=True)
    nothing = torch.zeros(1, 1, 4, 4, dtype=torch.bool)
    got = keep_ends(nothing, reachable, first=1, last=2)[0, 0].int()
    assert got.tolist() == [[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [1, 0, 1, 1]]


def test_density_counts_visible_blocks():
    reachable = reachable_blocks(32, 32, 8, causal=True)
    every = BlockLists.from_mask(torch.ones(1, 2, 4, 4, dtype=torch.bool), 8)
    diagonal = BlockLists.from_mask(torch.eye(4).bool().expand(1, 2, -1, -1), 8)
    assert block_density(every, 32, 32, causal=True) == 1.0
    assert block_density(diagonal, 32, 32, causal=True) == pytest.approx(4 / int(reachable.sum()))
    assert block_density(diagonal, 32, 32, causal=False) == pytest.approx(4 / 16)


def test_recall_is_the_kept_share_of_the_weights():
    q, k, v = randn(1, 1, 32, 4), randn(1, 1, 32, 4, seed=1), randn(1, 1, 32, 4, seed=2)
    chosen = reachable_blocks(32, 32, 8, causal=True) & (torch.rand(4, 4) < 0.5)
    lists = BlockLists.from_mask(chosen[None, None], 8)
    _, kept = block_sparse_attention(q, k, v, lists, causal=True, return_lse=True)
    _, every = attention_reference(q, k, v, causal=True, return_lse=True)
    hidden = ~visible_keys(32, 32, causal=True)
    weights = (q @ k.transpose(2, 3) / 2).masked_fill(hidden, -torch.inf).softmax(-1)
    wanted = (weights * lists.visible(32, 32, causal=True)).sum(-1)
    torch.testing.assert_close(attention_recall(kept, every), wanted)
    nothing = torch.tensor([-torch.inf])
    assert attention_recall(nothing, nothing).item() == 1.0


def test_relative_error():
    exact = torch.tensor([[3.0, 4.0]])
    assert relative_error(exact, exact) == 0
    assert relative_error(torch.zeros(1, 2), exact) == 1


@pytest.mark.no_shape_checks
def test_bad_input_is_named():
    q, k = randn(1, 3, 8, 4), randn(1, 2, 8, 4)
    with pytest.raises(ValueError, match="k: expected heads that divide 3"):
        pooled_block_scores(q, k, 4, causal=True)
    with pytest.raises(ValueError, match="k: expected at least 0, got -1"):
        top_blocks(randn(1, 1, 2, 2), -1)
    with pytest.raises(ValueError, match="mass: expected at least 0"):
        mass_blocks(randn(1, 1, 2, 2), -0.1)
