"""Merging: pairs that are most alike, nothing lost in the sum, sizes that count in attention."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from corelib.primitives import attention
from corelib.vision_language.token_merging import (
    merge_to,
    merge_to_ratio,
    proportional_attention,
    tome_merge,
)

EXACT = dict(atol=1e-12, rtol=1e-12)


def tokens(B=2, N=11, C=5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(B, N, C, generator=generator, dtype=torch.float64)


def one_pass_by_hand(x, m):
    """Groups of places, by loops over one row."""
    N = len(x)
    pairs = []
    for a in range(0, N if m else 0, 2):
        likeness = {b: float(F.cosine_similarity(x[a], x[b], dim=0)) for b in range(1, N, 2)}
        b = max(likeness, key=likeness.get)
        pairs.append((likeness[b], a, b))
    group = {n: [n] for n in range(N)}
    for _, a, b in sorted(pairs, reverse=True)[:m]:
        group[b] = sorted([*group[b], *group.pop(a)])
    return group


@pytest.mark.parametrize(("N", "m"), [(11, 4), (10, 5), (2, 1), (1, 0), (7, 0)])
def test_one_pass_is_that_of_loops(N, m):
    x = tokens(N=N)
    got = tome_merge(x, m)
    assert got.x.shape == (2, N - m, 5) and got.place.shape == got.size.shape == (2, N - m)
    for b in range(2):
        groups = one_pass_by_hand(x[b], m)
        assert got.place[b].tolist() == sorted(groups)
        for n, place in enumerate(sorted(groups)):
            members = groups[place]
            assert (got.source[b] == n).nonzero().flatten().tolist() == members
            assert got.size[b, n] == len(members)
            torch.testing.assert_close(got.x[b, n], x[b, members].mean(0), **EXACT)


@pytest.mark.parametrize("n", [1, 2, 3, 7, 11])
def test_weighted_sums_are_kept_over_any_number_of_passes(n):
    x = tokens()
    size = torch.rand(2, 11, generator=torch.Generator().manual_seed(1)).double() + 0.5
    got = merge_to(x, n, size)
    assert got.x.shape == (2, n, 5)
    torch.testing.assert_close(
        (got.size[..., None] * got.x).sum(1), (size[..., None] * x).sum(1), **EXACT
    )
    torch.testing.assert_close(got.size.sum(1), size.sum(1), **EXACT)
    for b in range(2):
        for token in range(n):
            members = got.source[b] == token
            mean = (size[b, members, None] * x[b, members]).sum(0) / size[b, members].sum()
            torch.testing.assert_close(got.x[b, token], mean, **EXACT)
            assert bool(members[got.place[b, token]])


def test_a_ratio_of_one_changes_nothing_and_a_quarter_takes_two_passes():
    x = tokens(N=12)
    same = merge_to_ratio(x, 1.0)
    assert torch.equal(same.x, x) and same.place.tolist() == [list(range(12))] * 2
    half = tome_merge(x, 6)
    quarter = tome_merge(half.x, 3, half.size)
    torch.testing.assert_close(merge_to_ratio(x, 0.25).x, quarter.x, **EXACT)


def test_small_passes_spare_what_is_like_no_other():
    """A pass of half merges nearly all of set A; smaller ones merge copies first."""
    x = torch.eye(8).double()[[0, 0, 1, 0, 2, 0, 0, 0, 3, 0, 0, 0]][None]
    alone = [2, 4, 8]  # on the side of A
    coarse, fine = merge_to(x, 7), merge_to(x, 7, most=0.1)
    for found, spared in ((coarse, 1), (fine, 3)):
        single = found.size.gather(1, found.source)[0] == 1
        assert int(single[alone].sum()) == spared
        torch.testing.assert_close((found.size[..., None] * found.x).sum(1), x.sum(1), **EXACT)


def test_gradients_are_those_of_means():
    x = tokens(1, 4, 3).requires_grad_()
    torch.autograd.gradcheck(lambda x: merge_to(x, 2).x, (x,))


def test_merged_duplicates_with_their_size_are_what_they_were():
    """A text query sees no difference; without the size it does."""
    generator = torch.Generator().manual_seed(2)
    base = torch.randn(1, 3, 8, generator=generator).double()
    x = base[:, [0, 0, 1, 1, 2, 2, 0, 0]]
    got = merge_to(x, 5)
    assert torch.cdist(got.x[0], base[0]).amin(1).max() < 1e-12  # equal ones went together
    q = torch.randn(1, 4, 2, 8, generator=generator).double()
    weight = torch.randn(2, 8, 16, generator=generator).double()
    before, after = (
        [(t @ w).unflatten(2, (2, 8)).transpose(1, 2) for w in weight] for t in (x, got.x)
    )
    wanted = attention(q, *before, causal=False)
    sized = proportional_attention(q, *after, got.size, causal=False)
    torch.testing.assert_close(sized, wanted, **EXACT)
    assert not torch.allclose(attention(q, *after, causal=False), wanted)


@pytest.mark.parametrize("causal", [False, True])
def test_proportional_attention_of_ones_is_attention(causal):
    generator = torch.Generator().manual_seed(3)
    q, k, v = (torch.randn(2, h, 9, 6, generator=generator).double() for h in (4, 2, 2))
    got = proportional_attention(q, k, v, torch.ones(2, 9), causal=causal, scale=0.3)
    torch.testing.assert_close(got, attention(q, k, v, causal=causal, scale=0.3), **EXACT)


@pytest.mark.no_shape_checks
def test_bad_input_is_named():
    x = tokens()
    with pytest.raises(ValueError, match="m: expected 0 to 5 pairs of 11 tokens, got 6"):
        tome_merge(x, 6)
    with pytest.raises(ValueError, match="n: expected 1 to 11 tokens, got 0"):
        merge_to(x, 0)
    with pytest.raises(ValueError, match="most: expected more than 0 and at most 0.5, got 0.6"):
        merge_to(x, 3, most=0.6)
    with pytest.raises(ValueError, match="ratio: expected more than 0"):
        merge_to_ratio(x, 0.0)
    q = torch.zeros(1, 1, 2, 4)
    with pytest.raises(ValueError, match=r"size: expected positive numbers \(1, 2\), got"):
        proportional_attention(q, q, q, torch.zeros(1, 2), causal=False)
