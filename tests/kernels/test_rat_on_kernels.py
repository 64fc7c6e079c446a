"""RAT as a GPU runs it: its averages in one kernel, the ends in another, with gradients."""

from __future__ import annotations

import pytest
import torch

from corelib.kernels.gates.interpreter import kernel_runner
from corelib.linear_time import gated_average, rat
from corelib.testing import assert_same


def differentiated(q, k, v, g, chunk):
    """Output, state and gradients of all inputs."""
    leaves = [x.detach().requires_grad_() for x in (q, k, v, g)]
    out, state = rat.rat_attention(*leaves, chunk)
    total = out.cos().sum() + sum(x.sin().sum() for x in state[:4])
    return [out.detach(), *torch.autograd.grad(total, leaves)]


def by_kernels(q, k, v, g, chunk):
    """In the worker: what the two primitives take for CUDA tensors, taken here as well."""
    from corelib.kernels.diagonal_scan import diagonal_scan
    from corelib.kernels.flash_attention import flash_attention

    took = []

    def attend(q, k, v, **options):
        took.append((tuple(q.shape), tuple(k.shape)))
        return flash_attention(q, k, v, **options)

    plain = rat.attention, gated_average.diagonal_scan
    rat.attention, gated_average.diagonal_scan = attend, diagonal_scan
    try:
        return differentiated(q, k, v, g, chunk), took
    finally:
        rat.attention, gated_average.diagonal_scan = plain


@pytest.mark.method("rat")
def test_the_kernels_compute_rat():
    torch.manual_seed(0)
    q, v, g = torch.randn(3, 1, 10, 2, 16).transpose(2, 3)
    k, g = torch.randn(1, 1, 10, 16), g.sigmoid()
    got, took = kernel_runner().call(f"{__file__}:by_kernels", q, k, v, g, 4)
    assert took == [((2, 4, 3, 16), (2, 1, 2, 16))]  # places as heads, no mask, one call
    wanted = differentiated(*(x.double() for x in (q, k, v, g)), 4)
    assert_same(got, [x.float() for x in wanted], tolerance=1e-5)
