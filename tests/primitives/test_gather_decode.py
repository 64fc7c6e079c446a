"""Decoding over a list of positions: equal to attention under the mask that the list says."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from corelib.primitives.gather_decode import (
    gather_decode,
    gather_decode_reference,
    take_rows,
)

FORMS = [gather_decode, gather_decode_reference]
EXACT = dict(atol=1e-10, rtol=1e-10)


def random_inputs(B=2, H=4, G=2, L=1, S=21, D=8, V=6, U=None, n=9, seed=0, dtype=torch.float64):
    """Lists of distinct positions with some padding; what no list names is NaN."""
    generator = torch.Generator().manual_seed(seed)
    U = G if U is None else U
    q, k, v = (
        torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
        for shape in [(B, H, L, D), (B, G, S, D), (B, G, S, V)]
    )
    indices = torch.stack(
        [torch.randperm(S, generator=generator)[:n] for _ in range(B * U)]
    ).reshape(B, U, min(n, S))
    indices = indices.masked_fill(torch.rand(indices.shape, generator=generator) < 0.2, -1)
    named = visible(indices, G, S, heads=G if U < H else H)
    unnamed = ~named.reshape(B, G, -1, S).any(2)
    k[unnamed], v[unnamed] = torch.nan, torch.nan
    return q, k, v, indices


def without_padding(U=None, S=21, n=9, **sizes):
    """As `random_inputs`, but every entry of the lists is a position."""
    q, k, v, indices = random_inputs(U=U, S=S, n=n, **sizes)
    generator = torch.Generator().manual_seed(1)
    full = [torch.randperm(S, generator=generator)[:n] for _ in range(indices[..., 0].numel())]
    return q, k.nan_to_num(0.5), v.nan_to_num(0.5), torch.stack(full).view_as(indices)


def visible(indices, G, S, heads):
    """``(B, heads, S)``: which positions a list names."""
    B, U, _ = indices.shape
    mask = torch.zeros(B, U, S + 1, dtype=torch.bool)
    mask.scatter_(2, indices.masked_fill(indices < 0, S), True)
    return mask[:, :, :S].repeat_interleave(heads // U, 1)


def by_torch(q, k, v, indices, scale=None):
    """PyTorch's attention under the list as a mask; rows without a key are zeros."""
    mask = visible(indices, k.shape[1], k.shape[2], q.shape[1])[:, :, None]
    k, v = k.nan_to_num(), v.nan_to_num()
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=True)
    return out.masked_fill(~mask.any(-1, keepdim=True), 0.0)


CASES = {
    "a list for each key head": {},
    "a list for each query head": dict(U=4),
    "one list for all": dict(U=1),
    "one key head": dict(H=3, G=1, U=3),
    "a key head for each query head": dict(H=3, G=3),
    "several queries": dict(L=3),
    "one key": dict(S=1, n=1),
    "all keys": dict(n=21),
    "odd sizes": dict(B=1, H=6, G=3, S=63, D=5, V=11, n=33),
}


@pytest.mark.parametrize("case", CASES)
def test_full_lists_take_the_short_way(case):
    """Without padding and log-sum-exp it is PyTorch's attention over the rows; gradients too."""
    q, k, v, indices = without_padding(**CASES[case])
    inputs = [x.requires_grad_() for x in (q, k, v)]
    for scale in (None, 0.3):
        out = gather_decode(*inputs, indices, scale=scale)
        long_way = gather_decode(*inputs, indices, scale=scale, return_lse=True)[0]
        torch.testing.assert_close(out, by_torch(*inputs, indices, scale), **EXACT)
        seed = torch.randn(out.shape, generator=torch.Generator().manual_seed(2), dtype=out.dtype)
        got, wanted = (torch.autograd.grad(x, inputs, seed) for x in (out, long_way))
        torch.testing.assert_close(got, wanted, **EXACT)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("case", CASES)
def test_equals_attention_under_the_mask(case, form):
    q, k, v, indices = random_inputs(**CASES[case])
    out, lse = form(q, k, v, indices, return_lse=True)
    torch.testing.assert_close(out, by_torch(q, k, v, indices), **EXACT)
    torch.testing.assert_close(form(q, k, v, indices.int(), scale=0.3),
                               by_torch(q, k, v, indices, scale=0.3), **EXACT)  # fmt: skip
    scores = q @ k.nan_to_num().repeat_interleave(q.shape[1] // k.shape[1], 1).mT
    scores = scores * q.shape[3] ** -0.5
    mask = visible(indices, k.shape[1], k.shape[2], q.shape[1])[:, :, None]
    wanted = scores.masked_fill(~mask, -torch.inf).logsumexp(-1)
    torch.testing.assert_close(lse, wanted, **EXACT)


@pytest.mark.parametrize("form", FORMS)
def test_empty_lists_give_zeros(form):
    q, k, v, indices = random_inputs()
    k[:, :, 0], v[:, :, 0] = torch.nan, torch.nan
    indices[0] = -1
    out, lse = form(q, k, v, indices.masked_fill(indices == 0, -1), return_lse=True)
    assert not out[0].any() and (lse[0] == -torch.inf).all() and out[1].isfinite().all()
    out, lse = form(q, k, v, indices[:, :, :0], return_lse=True)
    assert not out.any() and (lse == -torch.inf).all()
    out = form(q, k[:, :, :0], v[:, :, :0], torch.full((2, 1, 3), -1))
    assert not out.any()


@pytest.mark.parametrize("form", FORMS)
def test_a_key_listed_twice_counts_twice(form):
    q, k, v, _ = random_inputs(B=1, n=21)
    k, v = k.nan_to_num(), v.nan_to_num()
    twice = form(q, k, v, torch.tensor([[[3, 5, 5]]]))
    k2, v2 = (torch.cat([x[:, :, [3, 5]], x[:, :, [5]]], 2) for x in (k, v))
    wanted = F.scaled_dot_product_attention(q, k2, v2, enable_gqa=True)
    torch.testing.assert_close(twice, wanted, **EXACT)


@pytest.mark.parametrize("layout", ["tokens first", "room for more", "keys beside values", "odd"])
def test_any_layout_without_copying_the_cache(layout):
    q, k, v, indices = random_inputs(D=6)
    wanted = gather_decode_reference(q, k, v, indices)
    nothing = torch.full((2, 2, 9, 6), torch.nan, dtype=k.dtype)
    if layout == "tokens first":
        k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (k, v))
    elif layout == "room for more":
        k, v = (torch.cat([x, nothing], 2)[:, :, :21] for x in (k, v))
    elif layout == "keys beside values":
        both = torch.cat([k, v], -1)
        k, v = both[..., :6], both[..., 6:]
    else:  # no whole multiple of the width: the slow look-up
        k = torch.cat([k, k[..., :1]], -1)[..., :6]
    assert layout == "odd" or not k.is_contiguous()
    assert take_rows(k, indices.clamp(min=0)).shape == (2, 2, 9, 6)
    torch.testing.assert_close(gather_decode(q, k, v, indices), wanted, **EXACT)


def test_gradients():
    q, k, v, indices = random_inputs(L=2)
    grads = []
    for form in FORMS:
        leaves = [q.clone(), k.nan_to_num(), v.nan_to_num()]
        leaves = [x.requires_grad_() for x in leaves]
        out, lse = form(*leaves, indices, return_lse=True)
        grads.append(torch.autograd.grad(out.square().sum() + lse.sin().sum(), leaves))
    torch.testing.assert_close(*grads, **EXACT)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_lower_precision(dtype):
    q, k, v, indices = random_inputs(dtype=dtype)
    wanted = by_torch(q.double(), k.double(), v.double(), indices)
    for form in FORMS:
        out, lse = form(q, k, v, indices, return_lse=True)
        assert out.dtype == dtype and lse.dtype == torch.float32
        tolerance = 4 * torch.finfo(dtype).eps
        torch.testing.assert_close(out.double(), wanted, atol=tolerance, rtol=tolerance)


BAD = {
    "kind": (lambda i: i.float(), TypeError, "indices: expected a tensor of int32 or int64"),
    "lists": (lambda i: i[:, :0], ValueError, r"indices: expected \(batch 2, lists 1, 2 or 4"),
    "axes": (lambda i: i[0], ValueError, r"indices: expected \(batch 2"),
    "too far": (lambda i: i + 21, ValueError, "indices: expected -1 to 20, got values from"),
    "below": (lambda i: i - 3, ValueError, "indices: expected -1 to 20, got values from -4"),
}


@pytest.mark.no_shape_checks
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_named(case, form):
    change, error, message = BAD[case]
    q, k, v, indices = random_inputs()
    with pytest.raises(error, match=message):
        form(q, k, v, change(indices))
