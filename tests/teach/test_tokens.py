"""Tokens with their intervals."""

from __future__ import annotations

import pytest

from corelib.teach.figures import token_intervals
from corelib.teach.style import missing_labels

LABELS = dict(title="room", ylabel="ratio")


def test_a_bar_for_every_word_from_low_to_high():
    figure = token_intervals(
        ["+7", "21"], [1.0, -1.0], [0.8, 0.6], [1.4, 1.2], usual=(0.8, 1.2), **LABELS
    )
    axes, _ = figure.axes
    bars = [(b.get_y(), b.get_y() + b.get_height()) for b in axes.patches]
    assert bars == [pytest.approx((0.8, 1.4)), pytest.approx((0.6, 1.2))]
    warm, cold = (b.get_facecolor() for b in axes.patches)
    assert warm[0] > warm[2] and cold[0] < cold[2]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["+7", "21"]
    assert sorted(line.get_ydata()[0] for line in axes.lines) == [0.8, 1.2]
    assert not missing_labels(figure)


@pytest.mark.parametrize(
    ("words", "values", "message"),
    [([], [], "words: expected 1 to 48, got 0"), (["a"], [0, 1], "values: expected one for each")],
)
def test_bad_input_is_named(words, values, message):
    with pytest.raises(ValueError, match=message):
        token_intervals(words, values, [0.0], [1.0], **LABELS)
