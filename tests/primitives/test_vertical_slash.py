"""Vertical-slash attention: the CPU form against lines drawn one by one."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from corelib.primitives import attention_reference
from corelib.primitives.vertical_slash import (
    kept_keys,
    slash_lists,
    vertical_slash_attention,
    vertical_slash_attention_reference,
)

EXACT = dict(atol=1e-11, rtol=1e-11)


def random_case(B, H, G, L, S, D, V, *, share=0.1, seed=0):
    """``q, k, v, columns, distances``"""
    generator = torch.Generator().manual_seed(seed)
    shapes = (B, H, L, D), (B, G, S, D), (B, G, S, V)
    qkv = [torch.randn(x, generator=generator, dtype=torch.float64) for x in shapes]
    return *qkv, *(torch.rand(B, H, S, generator=generator) < share for _ in range(2))


def gradients(function, case, **options):
    qkv = [x.detach().requires_grad_() for x in case[:3]]
    out, lse = function(*qkv, *case[3:], **options, return_lse=True)
    generator = torch.Generator().manual_seed(1)
    weights = [torch.randn(x.shape, generator=generator, dtype=x.dtype) for x in (out, lse)]
    seen = lse > -torch.inf
    total = (out * weights[0]).sum() + (lse[seen] * weights[1][seen]).sum()
    return [x.detach() for x in (out, lse, *torch.autograd.grad(total, qkv))]


CASES = {
    "one token": (1, 1, 1, 1, 1, 4, 4),
    "below one block": (1, 2, 1, 5, 5, 4, 4),
    "grouped, odd length, unequal widths": (2, 4, 2, 53, 53, 8, 5),
    "more keys than queries": (1, 2, 1, 21, 50, 8, 8),
    "empty rows": (1, 2, 2, 50, 21, 8, 8),
}


@pytest.mark.parametrize("share", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("case", CASES)
def test_equals_reference_with_gradients(case, share):
    case = random_case(*CASES[case], share=share)
    got = gradients(vertical_slash_attention, case, block=16)
    wanted = gradients(vertical_slash_attention_reference, case, block=16)
    for x, y in zip(got, wanted, strict=True):
        torch.testing.assert_close(x, y, **EXACT)


@pytest.mark.parametrize("what", ["columns", "distances"])
def test_all_columns_or_all_distances_are_dense(what):
    q, k, v, columns, distances = random_case(1, 4, 2, 40, 40, 8, 8, share=0.0)
    (columns if what == "columns" else distances).fill_(True)
    got = vertical_slash_attention(q, k, v, columns, distances, block=16)
    wanted = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    torch.testing.assert_close(got, wanted, **EXACT)


def test_a_key_under_a_column_and_a_slash_counts_once():
    q, k, v, columns, distances = random_case(1, 1, 1, 32, 32, 4, 4, share=0.0)
    distances[..., 16] = True  # for queries 16 .. 31 the keys 0 .. 15
    columns[..., 3] = True
    by_slash, by_column = kept_keys(columns[0], distances[0], 32, 16)
    assert not (by_slash & by_column).any()
    got = vertical_slash_attention(q, k, v, columns, distances, block=16)
    torch.testing.assert_close(got, attention_reference(q, k, v, causal=True), **EXACT)


def test_with_blocks_of_one_a_slash_is_its_line():
    *_, columns, distances = random_case(1, 1, 1, 12, 12, 4, 4, share=0.2, seed=3)
    by_slash, by_column = kept_keys(columns[0], distances[0], 12, 1)
    for i in range(12):
        for j in range(i + 1):
            o = i - j
            assert bool(by_slash[0, i, j]) == (o == 0 or bool(distances[0, 0, o]))
            assert bool(by_slash[0, i, j] | by_column[0, i, j]) == (
                o == 0 or bool(distances[0, 0, o] | columns[0, 0, j])
            )


@pytest.mark.parametrize(("L", "S"), [(40, 40), (20, 50), (50, 20), (1, 33)])
def test_lists_hold_every_visible_kept_key_once(L, S):
    *_, columns, distances = random_case(2, 2, 1, L, S, 4, 4, share=0.15)
    lists = slash_lists(columns, distances, L, 8)
    kept = kept_keys(columns.flatten(0, 1), distances.flatten(0, 1), L, 8)
    last = (torch.arange(0, L, 8) + 8).clamp(max=L) + S - L
    wanted = ((kept[0] | kept[1]) & (torch.arange(S) < last[:, None])).flatten(0, 1)
    for row in range(len(wanted)):
        a, b = lists.range_offsets[row : row + 2].tolist()
        c, d = lists.key_offsets[row : row + 2].tolist()
        keys = lists.keys[c:d].tolist()
        for start, stop in zip(lists.starts[a:b].tolist(), lists.stops[a:b].tolist(), strict=True):
            assert 0 < stop - start <= 8
            keys += range(start, stop)
        assert sorted(keys) == wanted[row].nonzero().flatten().tolist()


def test_what_is_not_kept_is_never_read():
    q, k, v, columns, distances = random_case(1, 1, 1, 64, 64, 8, 8, share=0.02)
    columns[..., 5:] = False
    distances[..., 4:] = False
    lists = slash_lists(columns, distances, 16, 8)  # the last 16 queries
    read = {*lists.keys.tolist()}
    for start, stop in zip(lists.starts.tolist(), lists.stops.tolist(), strict=True):
        read |= {*range(start, stop)}
    assert len(read) < 40
    wanted = vertical_slash_attention(q[:, :, -16:], k, v, columns, distances, block=8)
    for x in (k, v):
        x[:, :, [j for j in range(64) if j not in read]] = torch.nan
    got = vertical_slash_attention(q[:, :, -16:], k, v, columns, distances, block=8)
    torch.testing.assert_close(got, wanted)


BAD = {
    "columns": (dict(columns=torch.ones(1, 2, 8)), TypeError, "columns: expected a tensor of bool"),
    "distances": (
        dict(distances=torch.ones(1, 2, 9).bool()), ValueError, r"distances: expected shape",
    ),
    "block": (dict(block=0), ValueError, "block: expected at least 1"),
}  # fmt: skip


@pytest.mark.no_shape_checks
@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_named(case):
    change, error, message = BAD[case]
    q, k, v, columns, distances = random_case(1, 2, 1, 8, 8, 4, 4)
    options = dict(columns=columns, distances=distances) | change
    with pytest.raises(error, match=message):
        vertical_slash_attention(q, k, v, **options)
