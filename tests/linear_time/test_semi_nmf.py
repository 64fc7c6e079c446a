"""Semi-NMF beside scikit-learn's NMF, on what NMF may take."""

from __future__ import annotations

import pytest
import torch

from corelib.linear_time.greenformers import snmf_factor

decomposition = pytest.importorskip("sklearn.decomposition")
pytestmark = pytest.mark.method("greenformers")


def test_a_free_left_factor_is_no_worse():
    generator = torch.Generator().manual_seed(0)
    parts = (torch.rand(shape, generator=generator).double() for shape in ((12, 3), (3, 10)))
    W = torch.mm(*parts) + 0.1 * torch.rand(12, 10, generator=generator).double()
    nmf = decomposition.NMF(3, init="nndsvda", max_iter=500)
    left = nmf.fit_transform(W.numpy())
    theirs = (W - torch.from_numpy(left @ nmf.components_)).norm()
    assert (W - torch.mm(*snmf_factor(W, 3, steps=300))).norm() <= 1.02 * theirs
