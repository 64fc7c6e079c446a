"""Images from scikit-learn: splits that share nothing, and what to do where it is missing."""

import sys

import pytest
import torch

from corelib.data import digits, photograph, upsample
from corelib.data.images import DIGIT_SPLITS


def test_digit_splits_share_no_row():
    bounds = sorted(DIGIT_SPLITS.values())
    assert bounds[0][0] == 0 and bounds[-1][1] == 1797
    assert all(a[1] == b[0] for a, b in zip(bounds, bounds[1:]))
    seen = [digits(split) for split in DIGIT_SPLITS]
    assert [len(images) for images, _ in seen] == [1200, 200, 397]
    assert torch.equal(torch.cat([y for _, y in seen]).bincount().sort()[0][[0, -1]], _extremes())


def _extremes():
    from sklearn.datasets import load_digits

    return torch.from_numpy(load_digits().target).bincount().sort()[0][[0, -1]]


def test_digits_look_like_digits():
    images, labels = digits("train")
    assert images.shape == (1200, 8, 8) and 0 == images.min() and images.max() == 1
    zero, one = (images[labels == digit].mean(0) for digit in (0, 1))
    assert zero[3:5, 3:5].mean() < 0.2 < 0.6 < one[3:5, 3:5].mean()  # a hole, and a stroke


def test_photographs():
    assert photograph("china").shape == photograph("flower").shape == (427, 640, 3)
    assert photograph("flower").dtype == torch.uint8
    sky = photograph("china")[:20].float().mean((0, 1))
    assert sky[2] > sky[0]  # more blue than red


def test_upsampling_keeps_the_mean_and_flat_images():
    images = torch.rand(3, 8, 8)
    large = upsample(images, 32)
    assert large.shape == (3, 32, 32)
    assert torch.allclose(upsample(torch.ones(1, 8, 8), 32), torch.ones(1, 32, 32))
    inner = large[:, 4:-4, 4:-4]
    assert large.min() >= images.min() and inner.std() < images.std()


@pytest.mark.no_shape_checks
def test_errors_name_what_is_wrong(monkeypatch):
    with pytest.raises(ValueError, match="split: expected one of .*train"):
        digits("all")
    with pytest.raises(ValueError, match="name: expected one of .*china"):
        photograph("paris")
    with pytest.raises(ValueError, match="side: expected at least 1, got 0"):
        upsample(torch.zeros(1, 8, 8), 0)
    monkeypatch.setitem(sys.modules, "sklearn", None)
    with pytest.raises(ModuleNotFoundError, match="pip install scikit-learn"):
        photograph("china")
