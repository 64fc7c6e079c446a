"""Attention with a window as a layer: a sequence mixer that leaves a given state as it was."""

from __future__ import annotations

import pytest
import torch

from corelib.linear_time.local_attention import LocalAttention
from corelib.testing import conformance

pytestmark = pytest.mark.method("rat")


@pytest.mark.parametrize("sinks", [0, 2])
def test_it_is_a_sequence_mixer(sinks):
    torch.manual_seed(0)
    layer = LocalAttention(16, 4, window=3, sinks=sinks).double()
    conformance(layer, torch.randn(2, 11, 16, dtype=torch.float64))


def test_a_local_stretch_leaves_its_state_as_it_was():
    torch.manual_seed(0)
    layer, x = LocalAttention(8, 2, window=3), torch.randn(1, 9, 8)
    with torch.no_grad():
        _, state = layer(x[:, :5])
        once, twice = (layer(x[:, 5:], state)[0] for _ in range(2))
    assert torch.equal(once, twice) and state.seen == 5


@pytest.mark.no_shape_checks
def test_bad_sizes_are_named():
    with pytest.raises(ValueError, match="heads: expected C = 6"):
        LocalAttention(6, 2, window=2)
    with pytest.raises(ValueError, match="window: expected at least 1"):
        LocalAttention(8, 2, window=0)
