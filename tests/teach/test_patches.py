"""Patches over an image: what is gone is covered, what is marked is framed."""

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure

from corelib.teach import figures
from corelib.teach.figures.patches import GONE

IMAGE = torch.linspace(0, 1, 16 * 24).view(16, 24)


def layers(figure):
    return [image.get_array() for image in figure.axes[0].images]


def test_it_draws_the_image_and_its_grid():
    figure = figures.patch_grid(IMAGE, title="t", patch=8)
    assert isinstance(figure, Figure) and len(layers(figure)) == 1
    assert np.allclose(layers(figure)[0], IMAGE.numpy())
    ax = figure.axes[0]
    assert [len(ax.get_xticks()), len(ax.get_yticks())] == [3, 2]
    assert ax.get_xlabel() == "column" and ax.get_ylabel() == "row"


def test_what_is_gone_is_covered_and_what_matters_is_washed():
    kept = torch.tensor([True, False, True, True, True, False])
    shade = torch.tensor([[0.0, 1.0, 2.0], [4.0, 0.0, 0.0]])
    figure = figures.patch_grid(IMAGE, title="t", patch=8, kept=kept, shade=shade)
    _, wash, cover = layers(figure)
    assert np.allclose(cover[..., 3], GONE * ~kept.view(2, 3).numpy())
    assert np.allclose(wash[..., 3], 0.75 * shade.numpy() / 4)


def test_marked_patches_have_a_frame():
    figure = figures.patch_grid(IMAGE, title="t", patch=8, marked=[0, 5])
    assert [frame.get_xy() for frame in figure.axes[0].patches] == [(0.5, 0.5), (2.5, 1.5)]


def test_it_draws_into_axes():
    figure, ax = figures.canvas()
    assert figures.patch_grid(IMAGE, title="t", patch=8, ax=ax) is figure


def test_errors_name_what_is_wrong():
    with pytest.raises(ValueError, match="image must hold whole patches of 7"):
        figures.patch_grid(IMAGE, title="t", patch=7)
    with pytest.raises(ValueError, match="kept must have 2 x 3 entries"):
        figures.patch_grid(IMAGE, title="t", patch=8, kept=torch.ones(5))
