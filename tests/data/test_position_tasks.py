"""Position identification and even token prediction, by hand."""

from __future__ import annotations

import pytest
import torch

from corelib.data.position_tasks import even_token_prediction, position_identification


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def test_position_identification():
    ids, targets = position_identification(3, 5, vocab=7, generator=seeded())
    assert ids.shape == targets.shape == (3, 5) and ids.dtype == torch.int64
    assert 0 <= ids.min() and ids.max() < 7 and len(ids.unique()) > 3
    assert targets.tolist() == [[0, 1, 2, 3, 4]] * 3
    again, _ = position_identification(3, 5, vocab=7, generator=seeded())
    assert torch.equal(ids, again)
    assert (position_identification(2, 9, vocab=1, generator=seeded()).ids == 0).all()


@pytest.mark.parametrize("length", [1, 2, 6, 7])
def test_even_token_prediction(length):
    ids, targets = even_token_prediction(4, length, vocab=9, generator=seeded())
    for row, wanted in zip(ids.tolist(), targets.tolist(), strict=True):
        half = [row[2 * i + 1] for i in range(length // 2)]
        assert wanted == half + [9] * (length - length // 2)


@pytest.mark.no_shape_checks
def test_bad_input_is_named():
    with pytest.raises(ValueError, match="filler: expected an id outside 0 .. 4, got 3"):
        even_token_prediction(1, 4, vocab=5, generator=seeded(), filler=3)
    for name in ("batch", "length", "vocab"):
        sizes = dict(batch=2, length=3, vocab=4) | {name: 0}
        with pytest.raises(ValueError, match=f"{name}: expected a whole number"):
            position_identification(**sizes, generator=seeded())
