"""Pathfinder: the label is what a search over the drawing finds; nothing else gives it away."""

from collections import deque

import pytest
import torch

from corelib.data.pathfinder import DISC, REACH, disc_distance, pathfinder


def gen(seed=0):
    return torch.Generator().manual_seed(seed)


def connected(picture):
    """Breadth-first search over drawn pixels, by coordinates."""
    ink = {tuple(at) for at in (picture > 0).nonzero().tolist()}
    discs = {tuple(at) for at in (picture == DISC).nonzero().tolist()}
    start = min(discs)
    seen, queue = {start}, deque([start])
    steps = [(y, x) for y in range(-REACH, REACH + 1) for x in range(-REACH, REACH + 1)]
    while queue:
        y, x = queue.popleft()
        for dy, dx in steps:
            at = (y + dy, x + dx)
            if at in ink and at not in seen:
                seen.add(at)
                queue.append(at)
    return discs <= seen


@pytest.mark.parametrize("side, n, options", [(16, 60, {}), (32, 60, {}), (48, 6, {"length": 40})])
def test_labels_are_what_a_search_finds(side, n, options):
    batch = pathfinder(n, side, generator=gen(), **options)
    assert batch.ids.shape == (n, side * side) and set(batch.ids.unique().tolist()) == {0, 1, 2}
    assert (batch.lengths == side * side).all()
    assert int(batch.labels.sum()) == n // 2
    for ids, label in zip(batch.ids, batch.labels.tolist()):
        assert connected(ids.view(side, side)) == bool(label)


def test_two_discs_of_nine_pixels():
    batch = pathfinder(100, 32, generator=gen(3))
    assert ((batch.ids == DISC).sum(1) == 18).all()


def test_nothing_but_the_curves_tells():
    batch = pathfinder(1000, 16, generator=gen(4))
    joined = batch.labels == 1
    ink = (batch.ids > 0).sum(1).float()
    assert abs(ink[joined].mean() - ink[~joined].mean()) < 0.03 * ink.mean()
    discs = (batch.ids == DISC).view(-1, 16, 16).nonzero().float()
    spread = torch.stack([discs[discs[:, 0] == b, 1:].std(0).norm() for b in range(1000)])
    cut = spread[joined].median()
    rule = ((spread < cut) == joined).float().mean()
    assert max(rule, 1 - rule) < 2 / 3  # how far apart the discs are: a weak hint at most


def test_a_seed_names_the_data():
    first, again, other = (pathfinder(5, 16, generator=gen(s)) for s in (1, 1, 2))
    assert torch.equal(first.ids, again.ids) and not torch.equal(first.ids, other.ids)


def test_distance():
    assert disc_distance(torch.tensor([[0, 0], [3, 4]])) == 5


@pytest.mark.no_shape_checks
def test_errors_name_the_argument():
    with pytest.raises(ValueError, match="expected side >= 16.* got 8, 4 and -1"):
        pathfinder(1, 8, generator=gen())
    with pytest.raises(ValueError, match="side: too little room for 6 curves of 16 steps, got 16"):
        pathfinder(1, 16, generator=gen(), length=16, distractors=4)
