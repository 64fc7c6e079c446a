"""`matrix_gallery` draws every matrix with its own scale, name and note."""

import pytest
import torch

from corelib.teach import figures
from corelib.teach.figures.show import bundle


def test_every_matrix_has_its_panel_scale_and_note():
    matrices = {
        "small": torch.eye(3) / 100,
        "complex": torch.full((2, 2), 3 - 4j),
        "signed": [[0, -5], [1, 0]],
    }
    figure = figures.matrix_gallery(matrices, title="t", columns=2, notes={"signed": "rank 2"})
    shown = [ax for ax in figure.axes if ax.get_visible()]
    assert [ax.get_title("left") for ax in shown] == list(matrices)
    assert [ax.images[0].get_clim()[1] for ax in shown] == pytest.approx([0.01, 3.0, 5.0])
    assert shown[2].get_xlabel() == "rank 2" and shown[0].get_xlabel() == ""
    assert bundle(figure, "three matrices")["text/plain"] == "three matrices"


def test_errors_name_what_was_expected():
    with pytest.raises(ValueError, match="at least one matrix"):
        figures.matrix_gallery({}, title="t")
    with pytest.raises(ValueError, match=r"notes must be for \['a'\], got some for \['b'\]"):
        figures.matrix_gallery({"a": [[1]]}, title="t", notes={"b": "x"})
