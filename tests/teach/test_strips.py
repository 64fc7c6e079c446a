"""Pictures in rows."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("matplotlib")
from corelib.teach.figures.strips import picture_strips
from corelib.teach.style import VERMILLION, missing_labels


def test_rows_of_different_lengths():
    strips = {"real": torch.rand(3, 4, 5), "made": torch.rand(2, 4, 5)}
    figure = picture_strips(strips, title="Clips", marked={"made": [1]})
    assert not missing_labels(figure)
    shown = [ax for ax in figure.axes if ax.get_visible()]
    assert len(shown) == 5
    assert [ax.get_ylabel() for ax in shown][::3] == ["real", "made"]
    colours = [ax.spines["left"].get_edgecolor() for ax in shown]
    assert colours.count(colours[0]) == 4 and colours[4] != colours[0]
    assert VERMILLION


def test_paper_and_ink_are_fixed():
    figure = picture_strips({"one": torch.full((1, 2, 2), 0.5)}, title="Half", lowest=-1.0)
    assert figure.axes[0].images[0].get_clim() == (-1.0, 1.0)


@pytest.mark.parametrize(
    "strips, options, message",
    [
        ({}, {}, "at least one row"),
        ({"a": torch.rand(3, 4)}, {}, "a: expected pictures"),
        ({"a": torch.rand(1, 3, 4)}, {"marked": {"b": [0]}}, "marked must be for"),
    ],
)
def test_bad_input_is_named(strips, options, message):
    with pytest.raises(ValueError, match=message):
        picture_strips(strips, title="x", **options)
