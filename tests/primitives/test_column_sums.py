"""Column sums of attention: equal to the map's, however it is cut; nothing is held or lost."""

from __future__ import annotations

import math

import pytest
import torch

from corelib.primitives import attention, attention_reference, column_sums, visible_keys
from corelib.primitives.column_sums import (
    attention_column_sums,
    attention_column_sums_reference,
)

EXACT = dict(atol=1e-12, rtol=1e-12)


def inputs(B, H, G, L, S, D, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = (B, H, L, D), (B, G, S, D), (B, H, L)
    return [torch.randn(x, generator=generator, dtype=torch.float64).to(dtype) for x in shapes]


def by_softmax(q, k, causal, scale=None):
    """The map from torch alone: attention to values that name the keys."""
    S, H = k.shape[2], q.shape[1]
    names = torch.eye(S, dtype=q.dtype).expand(q.shape[0], H, S, S)
    keys = k.repeat_interleave(H // k.shape[1], 1)
    mask = visible_keys(q.shape[2], S, causal=causal)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        out = torch.nn.functional.scaled_dot_product_attention(
            q, keys, names, attn_mask=mask, scale=scale
        )
    return out.nan_to_num(0.0).masked_fill(~mask.any(-1)[:, None], 0.0)


SIZES = [(1, 1, 1, 1, 1, 4), (2, 4, 2, 37, 37, 8), (1, 2, 1, 5, 50, 8), (1, 3, 3, 50, 21, 6)]


@pytest.mark.parametrize("workspace", [1, 600, 1 << 20])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("sizes", SIZES)
def test_equals_the_map(sizes, causal, workspace, monkeypatch):
    monkeypatch.setattr(column_sums, "WORKSPACE", workspace)
    q, k, w = inputs(*sizes)
    shares = by_softmax(q, k, causal)
    got = attention_column_sums(q, k, causal=causal)
    torch.testing.assert_close(got, shares.sum(2), **EXACT)
    got = attention_column_sums(q, k, causal=causal, weights=w, scale=0.3)
    wanted = (by_softmax(q, k, causal, 0.3) * w[..., None]).sum(2)
    torch.testing.assert_close(got, wanted, **EXACT)
    reference = attention_column_sums_reference(q, k, causal=causal, weights=w, scale=0.3)
    torch.testing.assert_close(reference, wanted, **EXACT)


@pytest.mark.parametrize("f", [attention_column_sums, attention_column_sums_reference])
def test_given_row_sums_are_used(f):
    q, k, w = inputs(2, 4, 2, 20, 33, 8)
    lse = attention_reference(q, k, k, causal=True, return_lse=True)[1]
    plain = f(q, k, causal=True, weights=w)
    torch.testing.assert_close(f(q, k, causal=True, weights=w, lse=lse), plain, **EXACT)
    halved = f(q, k, causal=True, weights=w, lse=lse + math.log(2))
    torch.testing.assert_close(halved, plain / 2, **EXACT)


def test_every_row_that_sees_something_gives_one():
    q, k, _ = inputs(2, 4, 2, 20, 12, 8)
    sums = attention_column_sums(q, k, causal=True)
    torch.testing.assert_close(sums.sum(-1), torch.full((2, 4), 12.0).double(), **EXACT)


def test_weights_of_one_row_pick_it_and_broadcast():
    q, k, _ = inputs(2, 4, 2, 20, 20, 8)
    last = torch.zeros(1, 1, 20).double()
    last[..., -1] = 1.0
    got = attention_column_sums(q, k, causal=True, weights=last)
    torch.testing.assert_close(got, by_softmax(q, k, True)[:, :, -1], **EXACT)


@pytest.mark.parametrize("sizes", [(1, 2, 1, 0, 5, 4), (1, 2, 1, 5, 0, 4), (0, 2, 1, 5, 5, 4)])
def test_nothing_to_do(sizes):
    q, k, _ = inputs(*sizes)
    got = attention_column_sums(q, k, causal=True)
    assert torch.equal(got, torch.zeros(sizes[0], 2, sizes[4]).double())


def test_half_precision_is_added_up_in_float32():
    q, k, _ = inputs(1, 2, 1, 400, 3, 8, dtype=torch.bfloat16)
    got = attention_column_sums(q, k, causal=False)
    assert got.dtype == torch.float32
    wanted = by_softmax(q.double(), k.double(), False).sum(2)
    torch.testing.assert_close(got.double(), wanted, atol=1e-3, rtol=1e-5)


def test_the_map_is_never_held():
    from corelib.measure import peak_memory

    q, k, _ = inputs(1, 1, 1, 4096, 4096, 8, dtype=torch.float32)
    attention(q, k, k, causal=True)
    peak = peak_memory(lambda: attention_column_sums(q, k, causal=False))
    assert peak < 4 * 4096**2 / 4


def test_gradients_flow_through_the_reference():
    q, k, w = inputs(1, 2, 1, 5, 7, 4)
    q.requires_grad_(), k.requires_grad_()
    torch.autograd.gradcheck(
        lambda q, k: attention_column_sums_reference(q, k, causal=True, weights=w), (q, k)
    )
    assert not attention_column_sums(q, k, causal=True).requires_grad


BAD = {
    "heads": (dict(k=torch.zeros(1, 3, 5, 4)), ValueError, "k: expected a number of heads"),
    "lse": (dict(lse=torch.zeros(1, 2, 4)), ValueError, "lse: expected shape"),
    "weights": (dict(weights=torch.zeros(1, 3, 5)), ValueError, "weights: expected a shape"),
    "scale": (dict(scale="1"), TypeError, "scale: expected a number"),
}


@pytest.mark.no_shape_checks
@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_named(case):
    change, error, message = BAD[case]
    arguments = dict(q=torch.zeros(1, 2, 5, 4), k=torch.zeros(1, 1, 5, 4), causal=True) | change
    with pytest.raises(error, match=message):
        attention_column_sums(**arguments)
