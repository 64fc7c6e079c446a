"""ListOps: labels against an independent evaluator, the grammar against its definition."""

import re

import numpy as np
import pytest
import torch

from corelib.data.listops import OPERATORS, TOKENS, listops, longest, to_text


def gen(seed=0):
    return torch.Generator().manual_seed(seed)


def by_rewriting(text):
    """Replace innermost lists by their values until one number is left."""
    rules = {
        "MIN": lambda v: v.min(),
        "MAX": lambda v: v.max(),
        "MED": lambda v: int(np.median(v)),
        "SM": lambda v: v.sum() % 10,
    }

    def value(match):
        return str(int(rules[match[1]](np.array(match[2].split(), dtype=int))))

    while "[" in text:
        text = re.sub(r"\[(MIN|MAX|MED|SM) ((?:\d+ )+)\]", value, text)
    return int(text)


@pytest.mark.parametrize("low, high, depth, args", [(4, 64, 10, 10), (20, 40, 4, 3), (4, 4, 2, 2)])
def test_labels_are_the_values(low, high, depth, args):
    batch = listops(100, min_length=low, max_length=high, generator=gen(), depth=depth, args=args)
    assert batch.ids.shape == (100, high)
    assert batch.lengths.min() >= low and batch.lengths.max() <= high
    for ids, n, label in zip(batch.ids.tolist(), batch.lengths.tolist(), batch.labels.tolist()):
        text = to_text(ids)
        assert len(text.split()) == n and ids[n:] == [0] * (high - n)
        assert by_rewriting(text) == label


def test_depth_and_arguments_are_bounded():
    batch = listops(300, min_length=10, max_length=80, generator=gen(1), depth=3, args=4)
    deepest = 0
    for ids in batch.ids.tolist():
        level, counts = 1, [0]
        for word in to_text(ids).split():
            if word == "]":
                assert 2 <= counts.pop() <= 4
                level -= 1
                continue
            counts[-1] += 1
            if word.startswith("["):
                counts.append(0)
                level += 1
            deepest = max(deepest, level)
    assert deepest == 3  # digits of the innermost lists count as a level


def test_operators_and_digits_come_as_often_as_they_should():
    """Below the root, where rejection by length bends the law least."""
    batch = listops(3000, min_length=4, max_length=2000, generator=gen(2), depth=3)
    inner = batch.ids[:, 1:][batch.ids[:, 1:] > 0]
    counts = inner.bincount(minlength=len(TOKENS)).double()
    digits, operators = counts[1:11], counts[11:15]
    assert (digits / digits.sum() - 0.1).abs().max() < 0.01
    assert (operators / operators.sum() - 0.25).abs().max() < 0.03
    second = batch.ids[:, 1]  # an argument at the second level: an operator one time in four
    assert abs(float((second > 10).float().mean()) - 0.25) < 0.03


def test_median_rounds_down_and_sum_is_modular():
    assert OPERATORS["[MED"]([3, 4]) == 3 and OPERATORS["[MED"]([9, 1, 5]) == 5
    assert OPERATORS["[SM"]([9, 9, 5]) == 3


def test_a_seed_names_the_data():
    first, again, other = (
        listops(20, min_length=4, max_length=50, generator=gen(s)) for s in (1, 1, 2)
    )
    assert torch.equal(first.ids, again.ids) and not torch.equal(first.ids, other.ids)


def test_longest():
    assert [longest(depth, 2) for depth in (1, 2, 3)] == [1, 4, 10]


@pytest.mark.no_shape_checks
def test_errors_name_the_argument():
    with pytest.raises(ValueError, match="4 <= min_length <= max_length, got 9 and 8"):
        listops(1, min_length=9, max_length=8, generator=gen())
    with pytest.raises(ValueError, match="depth, args: expected at least 2, got 1 and 10"):
        listops(1, min_length=4, max_length=8, generator=gen(), depth=1)
    with pytest.raises(ValueError, match="at most 4 tokens, got 5"):
        listops(1, min_length=5, max_length=8, generator=gen(), depth=2, args=2)
