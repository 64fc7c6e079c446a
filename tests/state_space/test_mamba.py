"""Mamba and Mamba-2 blocks: the contract, and transformers' mixers with the same weights."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from corelib.state_space import mamba, mamba2
from corelib.state_space.mamba import MambaBlock, initial_dt_bias
from corelib.state_space.mamba2 import GatedRMSNorm, Mamba2Block
from corelib.testing import conformance

WIDTH = 12


def tokens(L, batch=2):
    g = torch.Generator().manual_seed(L)
    return torch.randn(batch, L, WIDTH, generator=g, dtype=torch.float64)


@pytest.mark.parametrize("module", [mamba, mamba2])
def test_they_keep_the_contract(module):
    given = module.example()
    conformance(given["mixer"], torch.cat([given["x"], given["x"].flip(1)], 1))


def test_groups_share_keys_and_keep_the_contract():
    torch.manual_seed(0)
    conformance(Mamba2Block(WIDTH, state=5, head_width=6, groups=2, chunk=3).double(), tokens(7))


def mamba_pair():
    transformers = pytest.importorskip("transformers")
    from transformers.models.mamba.modeling_mamba import MambaMixer

    torch.manual_seed(0)
    config = transformers.MambaConfig(hidden_size=WIDTH, state_size=5, conv_kernel=4)
    ours, theirs = MambaBlock(WIDTH, state=5).double(), MambaMixer(config, 0).double()
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


def mamba2_pair():
    transformers = pytest.importorskip("transformers")
    from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer

    torch.manual_seed(0)
    config = transformers.Mamba2Config(
        hidden_size=WIDTH, state_size=5, num_heads=4, head_dim=6, n_groups=2, chunk_size=8
    )
    ours = Mamba2Block(WIDTH, state=5, head_width=6, groups=2, chunk=8).double()
    theirs = Mamba2Mixer(config, 0).double()
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


PAIRS = [(mamba_pair, "slow_forward"), (mamba2_pair, "torch_forward")]


@pytest.mark.parametrize("pair, run", PAIRS)
@pytest.mark.parametrize("L", [1, 17])
def test_transformers_mixers_give_the_same(pair, run, L):
    ours, theirs = pair()
    x = tokens(L)
    # transformers computes parts of both in float32 whatever it is given
    torch.testing.assert_close(ours(x)[0], getattr(theirs, run)(x), atol=1e-6, rtol=1e-5)


def test_steps_start_log_uniform():
    torch.manual_seed(0)
    dt = F.softplus(initial_dt_bias(4000).double())
    assert 0.99e-3 < float(dt.min()) and float(dt.max()) < 0.101
    shares = torch.histc(dt.log10(), 4, -3, -1) / 4000
    assert float((shares - 0.25).abs().max()) < 0.03


def test_gated_norm():
    norm = GatedRMSNorm(4).double()
    x, z = torch.randn(2, 3, 5, 4, dtype=torch.float64)
    gated = x * z * torch.sigmoid(z)
    wanted = gated / (gated.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    torch.testing.assert_close(norm(x, z), wanted)


@pytest.mark.no_shape_checks
def test_heads_must_divide():
    with pytest.raises(ValueError, match="head_width, groups: expected a width that divides 24"):
        Mamba2Block(12, head_width=7)
    with pytest.raises(ValueError, match="into heads that 3 groups divide"):
        Mamba2Block(12, head_width=6, groups=3)
