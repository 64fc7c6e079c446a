"""Set disjointness: what the rows promise, read off the ids."""

from __future__ import annotations

import pytest
import torch

from corelib.data import IGNORE, set_disjointness


def gen(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("first, second", [(1, 1), (3, 8), (8, 3), (1, 16), (16, 1), (10, 11)])
def test_exactly_one_id_is_shared_and_it_is_the_target(first, second):
    ids, targets = set_disjointness(40, first=first, second=second, vocab=24, generator=gen())
    assert ids.shape == targets.shape == (40, first + second + 3)
    assert (targets[:, :-1] == IGNORE).all()
    for row, target in zip(ids.tolist(), targets[:, -1].tolist(), strict=True):
        a, b = row[1 : 1 + first], row[2 + first : -1]
        assert [row[0], row[1 + first], row[-1]] == [1, 2, 3]
        assert len(set(a)) == first and len(set(b)) == second
        assert set(a) & set(b) == {target}
        assert all(4 <= i < 24 for i in a + b)


def test_the_shared_id_may_stand_anywhere_and_be_anything():
    ids, targets = set_disjointness(2000, first=4, second=3, vocab=12, generator=gen(1))
    wanted = targets[:, -1:]
    for part, size in ((ids[:, 1:5], 4), (ids[:, 6:9], 3)):
        places = (part == wanted).float().mean(0)
        torch.testing.assert_close(places, torch.full((size,), 1 / size), atol=0.05, rtol=0)
    share = torch.bincount(wanted.flatten(), minlength=12)[4:] / 2000
    torch.testing.assert_close(share, torch.full((8,), 1 / 8), atol=0.04, rtol=0)


def test_an_id_does_not_tell_its_set():
    ids, _ = set_disjointness(2000, first=5, second=5, vocab=20, generator=gen(2))
    in_a = torch.bincount(ids[:, 1:6].flatten(), minlength=20)[4:] / 2000
    torch.testing.assert_close(in_a, torch.full((16,), 5 / 16), atol=0.05, rtol=0)


def test_a_seed_names_the_data():
    sizes = dict(first=3, second=4, vocab=30)
    one, same, other = (set_disjointness(5, **sizes, generator=gen(s)).ids for s in (1, 1, 2))
    assert torch.equal(one, same) and not torch.equal(one, other)


@pytest.mark.no_shape_checks
@pytest.mark.parametrize(
    "change, message",
    [
        (dict(first=0), "first: expected at least 1, got 0"),
        (dict(second=0), "second: expected at least 1, got 0"),
        (dict(vocab=9), "vocab: expected at least 10 for these sets, got 9"),
    ],
)
def test_bad_sizes_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        set_disjointness(2, **(dict(first=3, second=4, vocab=10) | change), generator=gen())
