"""Planted heads have the attention maps they promise."""

from __future__ import annotations

import pytest
import torch

from corelib.measure.races.minference import KINDS as RACED
from corelib.measure.races.minference import PLANTED
from corelib.primitives import visible_keys
from corelib.sparse_attention.shared import KINDS, planted_heads


def weights(heads):
    scores = heads.q @ heads.k.transpose(2, 3)
    hidden = ~visible_keys(*scores.shape[2:], causal=True)
    return scores.masked_fill(hidden, -torch.inf).softmax(-1)[0]


def test_lines_hold_the_attention():
    heads = planted_heads(["vertical_slash"], 512, columns=3, distances=2)
    i, j = torch.arange(512)[:, None], torch.arange(512)
    kept = (j == i) | torch.isin(j, torch.tensor(heads.columns[0]))
    kept = kept | torch.isin(i - j, torch.tensor(heads.distances[0]))
    assert len(heads.columns[0]) == 3 and len(heads.distances[0]) == 2
    assert (weights(heads)[0] * kept).sum(-1)[256:].mean() > 0.9
    assert kept[256:].float().mean() < 0.02


@pytest.mark.parametrize(("options", "least", "most"), [(PLANTED, 0.85, 1.0), ({}, 0.0, 0.7)])
def test_lines_hold_long_prompts_only_where_they_are_pure(options, least, most):
    """The race's heads do; the defaults are for about a thousand positions."""
    L = 16384
    heads = planted_heads(RACED, L, **options)
    i, j = torch.arange(L // 2, L, 200)[:, None], torch.arange(L)
    for h in (n for n, kind in enumerate(RACED) if kind == "vertical_slash"):
        scores = (heads.q[0, h, i[:, 0]] @ heads.k[0, h].T).masked_fill(j > i, -torch.inf)
        kept = torch.isin(j, torch.tensor(heads.columns[h]))
        kept = kept | torch.isin(i - j, torch.tensor([0, *heads.distances[h]]))
        assert least < (scores.softmax(-1) * kept).sum(-1).mean() < most


def test_sinks_and_neighbours_hold_the_attention():
    map_ = weights(planted_heads(["a_shape"], 512))[0]
    near = visible_keys(512, 512, causal=True, window=32, sinks=16)
    assert (map_ * near).sum(-1).mean() > 0.9


def test_topics_look_at_themselves():
    heads = planted_heads(["block"], 512, stretch=32)
    same = heads.topics[0][:, None] == heads.topics[0]
    assert heads.topics.shape == (1, 512) and (heads.topics[0].unfold(0, 32, 32).diff() == 0).all()
    assert (weights(heads)[0] * same).sum(-1).mean() > 0.9


def test_a_dense_head_has_no_pattern():
    map_ = weights(planted_heads(["dense"], 512))[0]
    assert map_[-1].max() < 0.1


def test_a_seed_names_the_heads():
    a, b = (planted_heads(KINDS, 64, D=16, seed=3) for _ in range(2))
    assert torch.equal(a.q, b.q) and torch.equal(a.v, b.v) and a.columns == b.columns
    assert not torch.equal(a.q, planted_heads(KINDS, 64, D=16, seed=4).q)
    assert planted_heads(KINDS, 1, D=8).q.shape == (1, 4, 1, 8)


@pytest.mark.no_shape_checks
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((["spiral"], 8), "kinds: expected some of"),
        ((["dense"], 0), "L: expected at least 1"),
        ((["dense"], 8, 6), "D: expected a multiple of 8"),
    ],
)
def test_bad_input_is_named(arguments, message):
    kinds, L, *width = arguments
    with pytest.raises(ValueError, match=message):
        planted_heads(kinds, L, D=width[0] if width else 16)
