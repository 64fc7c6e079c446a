"""Blocks' gradients add up to those of dense attention."""

from __future__ import annotations

import pytest
import torch

from corelib.primitives import attention_reference
from corelib.primitives.partial_gradients import partial_gradients


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("sizes", [(4, 2, 5, 3), (3, 3, 4, 4), (2, 1, 3, 6)])
def test_blocks_add_up_to_the_dense_gradients(causal, sizes):
    H, G, D, V = sizes
    generator = torch.Generator().manual_seed(0)
    shapes = (2, H, 7, D), (2, G, 7, D), (2, G, 7, V), (2, H, 7, V), (2, H, 7)
    *qkv, d_out, d_lse = (
        torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes
    )
    leaves = [x.clone().requires_grad_() for x in qkv]
    out, lse = attention_reference(*leaves, causal=causal, scale=0.4, return_lse=True)
    wanted = torch.autograd.grad([out, lse], leaves, [d_out, d_lse])
    delta = (d_out * out.detach()).sum(-1) - d_lse
    got = [torch.zeros_like(x) for x in qkv]
    stretches = [slice(0, 3), slice(3, 3), slice(3, 7)]
    for rows in stretches:
        for keys in stretches:
            if causal and keys.start > rows.start:
                continue
            blocks = qkv[0][:, :, rows], *(x[:, :, keys] for x in qkv[1:])
            context = (x[:, :, rows] for x in (d_out, delta, lse.detach()))
            diagonal = causal and rows == keys
            shares = partial_gradients(*blocks, *context, causal=diagonal, scale=0.4)
            for total, share, where in zip(got, shares, (rows, keys, keys), strict=True):
                total[:, :, where] += share
    torch.testing.assert_close(got, list(wanted), atol=1e-10, rtol=1e-10)


@pytest.mark.no_shape_checks
def test_bad_input():
    x = torch.zeros(1, 2, 3, 4)
    with pytest.raises(ValueError, match="k: expected the width of q, 4, got 3"):
        partial_gradients(x, x[..., :3], x, x, x[..., 0], x[..., 0], causal=True)
