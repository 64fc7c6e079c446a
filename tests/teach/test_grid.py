"""`count_grid` writes the numbers where they belong."""

import pytest

from corelib.teach import figures


def test_numbers_stand_in_their_squares_and_zeros_are_left_out():
    figure = figures.count_grid(
        [[3, 0], [0, 12]], rows=["a", "b"], columns=["x", "y"], title="t", xlabel="x", ylabel="y"
    )
    ax = figure.axes[0]
    assert {(t.get_position(), t.get_text()) for t in ax.texts} == {((0, 0), "3"), ((1, 1), "12")}
    assert [t.get_text() for t in ax.get_yticklabels()] == ["a", "b"]


def test_a_grid_that_does_not_fit_its_names_is_a_clear_error():
    with pytest.raises(ValueError, match=r"counts must be \(1, 2\), got \(2, 2\)"):
        figures.count_grid(
            [[1, 2], [3, 4]], rows=["a"], columns=["x", "y"], title="t", xlabel="x", ylabel="y"
        )


def test_several_grids_share_a_scale():
    look = dict(rows=["a"], columns=["x", "y"], title="t", xlabel="x", ylabel="y")
    grids = [figures.count_grid([[1, 1]], **look, largest=n) for n in (1, 4)]
    assert [grid.axes[0].images[0].get_clim()[1] for grid in grids] == [1, 4]
