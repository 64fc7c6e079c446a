"""Pictures in rows."""

from __future__ import annotations

import numpy as np
import pytest
import torch

pytest.importorskip("matplotlib")
from matplotlib.colors import to_hex

from corelib.teach.figures.strips import picture_strips
from corelib.teach.style import VERMILLION, missing_labels


def test_every_picture_lies_in_its_row_and_column():
    strips = {"real": torch.rand(3, 4, 6), "made": torch.rand(2, 4, 6)}
    figure = picture_strips(strips, title="Clips", ylabel="clip", marked={"made": [1]})
    assert not missing_labels(figure)
    ax = figure.axes[0]
    sheet = ax.images[0].get_array()
    assert [t.get_text() for t in ax.get_yticklabels()] == ["real", "made"]
    assert [t.get_text() for t in ax.get_xticklabels()] == ["1", "2", "3"]
    outlines = iter(ax.patches)
    for name, pictures in strips.items():
        for i, picture in enumerate(pictures):
            box = next(outlines)
            x, y = int(box.get_x() + 0.5), int(box.get_y() + 0.5)
            assert (sheet[y : y + 4, x : x + 6] == picture.double().numpy()).all()
            assert (to_hex(box.get_edgecolor()) == VERMILLION) == ((name, i) == ("made", 1))
    assert next(outlines, None) is None
    assert np.ma.getmaskarray(sheet).sum() == sheet.size - 5 * 24


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
