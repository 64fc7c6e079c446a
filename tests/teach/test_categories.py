"""Maps of kinds."""

from __future__ import annotations

import pytest

from corelib.teach.figures import category_map
from corelib.teach.style import missing_labels

LABELS = dict(title="kept", xlabel="chunk", ylabel="step")


def test_cells_rows_and_the_kinds_that_occur():
    figure = category_map([[0, -1, 2], [2, 2, -1]], ["a", "b", "c"], rows=["x", "y"], **LABELS)
    (axes,) = figure.axes
    assert axes.images[0].get_array().tolist() == [[0, -1, 2], [2, 2, -1]]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["x", "y"]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["a", "c"]
    assert not missing_labels(figure)


@pytest.mark.parametrize(
    ("values", "kinds", "rows", "message"),
    [
        ([[0, 3]], ["a"], None, "values: expected -1 to 0, got 0 to 3"),
        ([[0]], list("abcdefghi"), None, "kinds: expected 1 to 8, got 9"),
        ([[0]], ["a"], ["x", "y"], "rows: expected 1 names, got 2"),
    ],
)
def test_bad_input_is_named(values, kinds, rows, message):
    with pytest.raises(ValueError, match=message):
        category_map(values, kinds, rows=rows, **LABELS)
