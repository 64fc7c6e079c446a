"""Block-sparse attention: the CPU form against the masked reference and PyTorch's attention."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from corelib.primitives import attention, masks
from corelib.primitives.block_scores import reachable_blocks
from corelib.primitives.block_sparse import (
    BlockLists,
    block_sparse_attention,
    block_sparse_attention_reference,
    sort_lists,
)

EXACT = dict(atol=1e-11, rtol=1e-11)


def random_case(B, H, G, L, S, D, V, block, density=0.5, dtype=torch.float64, seed=0):
    """``(q, k, v), lists``: every block is listed with probability ``density``."""
    generator = torch.Generator().manual_seed(seed)
    shapes = (B, H, L, D), (B, G, S, D), (B, G, S, V)
    qkv = tuple(torch.randn(x, generator=generator, dtype=torch.float64).to(dtype) for x in shapes)
    chosen = torch.rand(B, H, -(-L // block), -(-S // block), generator=generator) < density
    return qkv, BlockLists.from_mask(chosen, block)


def gradients(function, qkv, *args, seed=1, **options):
    """Output, lse and the gradients of a random function of both; empty rows pass nothing on."""
    qkv = [x.detach().requires_grad_() for x in qkv]
    out, lse = function(*qkv, *args, **options, return_lse=True)
    generator = torch.Generator().manual_seed(seed)
    d_out = torch.randn(out.shape, generator=generator, dtype=out.dtype)
    d_lse = torch.randn(lse.shape, generator=generator, dtype=lse.dtype)
    seen = lse > -torch.inf
    total = (out * d_out).sum() + (lse[seen] * d_lse[seen]).sum()
    return [x.detach() for x in (out, lse, *torch.autograd.grad(total, qkv))]


CASES = {
    "one token": ((1, 1, 1, 1, 1, 4, 4, 16), True),
    "causal": ((1, 2, 2, 64, 64, 8, 8, 16), True),
    "grouped, odd length, unequal widths": ((2, 4, 2, 57, 57, 8, 5, 16), True),
    "more keys than queries": ((1, 2, 1, 30, 75, 8, 8, 16), True),
    "more keys, aligned blocks": ((1, 2, 1, 32, 96, 8, 12, 16), True),
    "short last blocks, an unaligned diagonal": ((2, 4, 2, 45, 101, 8, 8, 16), True),
    "empty rows": ((1, 2, 1, 75, 30, 8, 8, 16), True),
    "not causal": ((2, 2, 1, 45, 77, 8, 8, 16), False),
    "blocks longer than everything": ((1, 1, 1, 9, 9, 4, 4, 64), True),
}


@pytest.mark.parametrize("density", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("case", CASES)
def test_equals_reference_with_gradients(case, density):
    sizes, causal = CASES[case]
    qkv, lists = random_case(*sizes, density=density)
    got = gradients(block_sparse_attention, qkv, lists, causal=causal)
    wanted = gradients(block_sparse_attention_reference, qkv, lists, causal=causal)
    for x, y in zip(got, wanted, strict=True):
        torch.testing.assert_close(x, y, **EXACT)


@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_equals_reference_at_any_size(data):
    B, G, repeat = (data.draw(st.integers(1, 2)) for _ in range(3))
    L, S = data.draw(st.integers(1, 40)), data.draw(st.integers(1, 40))
    block = data.draw(st.sampled_from([1, 3, 8, 16]))
    seed = data.draw(st.integers(0, 99))
    qkv, lists = random_case(B, G * repeat, G, L, S, 4, 4, block, 0.4, seed=seed)
    causal = data.draw(st.booleans())
    got = block_sparse_attention(*qkv, lists, causal=causal, return_lse=True)
    wanted = block_sparse_attention_reference(*qkv, lists, causal=causal, return_lse=True)
    for x, y in zip(got, wanted, strict=True):
        torch.testing.assert_close(x, y, **EXACT)


def test_a_short_last_block_does_not_cut_the_others():
    """Two rows at one distance from the diagonal run together; the first one's keys end early."""
    qkv, _ = random_case(1, 2, 2, 45, 101, 8, 8, 16)
    table = torch.zeros(1, 2, 3, 7, dtype=torch.bool)
    table[0, 0, 2, 6] = table[0, 1, 1, 5] = True
    lists = BlockLists.from_mask(table, 16)
    got = block_sparse_attention(*qkv, lists, causal=True)
    wanted = block_sparse_attention_reference(*qkv, lists, causal=True)
    torch.testing.assert_close(got, wanted, **EXACT)


def test_all_blocks_are_dense_attention():
    qkv, lists = random_case(1, 4, 2, 50, 50, 8, 8, 16, density=1.1)
    got = block_sparse_attention(*qkv, lists, causal=True)
    wanted = F.scaled_dot_product_attention(*qkv, is_causal=True, enable_gqa=True)
    torch.testing.assert_close(got, wanted, **EXACT)


def test_a_masks_blocks_give_attention_under_it():
    """A window, by its block table: PyTorch's attention under the same boolean mask."""
    qkv, _ = random_case(1, 2, 2, 80, 80, 8, 8, 16)
    table = (masks.sliding_window(20).blocks(80, 80, block=16) != masks.EMPTY).expand(1, 2, -1, -1)
    lists = BlockLists.from_mask(table, 16)
    wide = table.repeat_interleave(16, 2).repeat_interleave(16, 3).tril()
    got = block_sparse_attention(*qkv, lists, causal=True, scale=0.7)
    wanted = F.scaled_dot_product_attention(*qkv, attn_mask=wide, scale=0.7)
    torch.testing.assert_close(got, wanted, **EXACT)


@pytest.mark.parametrize("causal", [True, False])
def test_what_is_not_listed_is_never_read(causal):
    """NaN in every key block of a head that no query block of it lists."""
    qkv, lists = random_case(1, 2, 2, 64, 64, 8, 8, 8, density=0.05)
    used = sort_lists(lists, 64, 64, causal=causal)
    read = torch.zeros(2, 8, dtype=torch.bool)
    rows = torch.arange(16).repeat_interleave(used.offsets.diff())
    read[rows // 8, used.blocks.long()] = True
    assert not read.all()
    poison = (~read).repeat_interleave(8, 1)[None, :, :, None]
    k, v = (x.masked_fill(poison, torch.nan) for x in qkv[1:])
    got = block_sparse_attention(qkv[0], k, v, lists, causal=causal)
    torch.testing.assert_close(
        got, block_sparse_attention_reference(*qkv, lists, causal=causal), **EXACT
    )


def permuted_case(L, S, block, segment, seed=0):
    """Keys shuffled within segments, and where each came from."""
    qkv, lists = random_case(2, 4, 2, L, S, 8, 8, block, density=0.6, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    order = torch.rand(2, 2, S, generator=generator) + (torch.arange(S) // segment)
    return qkv, lists, order.argsort(-1)


@pytest.mark.parametrize(("L", "S"), [(48, 48), (21, 50)])
def test_moved_keys_are_causal_by_where_they_belong(L, S):
    qkv, lists, positions = permuted_case(L, S, 8, 16)
    options = dict(causal=True, key_positions=positions)
    got = gradients(block_sparse_attention, qkv, lists, **options)
    wanted = gradients(block_sparse_attention_reference, qkv, lists, **options)
    for x, y in zip(got, wanted, strict=True):
        torch.testing.assert_close(x, y, **EXACT)


def test_attention_does_not_mind_moved_keys():
    (q, k, v), _, positions = permuted_case(48, 48, 8, 16)
    every = BlockLists.from_mask(torch.ones(2, 4, 6, 6, dtype=torch.bool), 8)
    k_moved, v_moved = (x.gather(2, positions[..., None].expand_as(x)) for x in (k, v))
    options = dict(causal=True, key_positions=positions)
    got = block_sparse_attention(q, k_moved, v_moved, every, **options)
    torch.testing.assert_close(got, attention(q, k, v, causal=True), **EXACT)


def test_half_precision_accumulates_wide():
    qkv, lists = random_case(1, 2, 1, 100, 100, 16, 16, 16, dtype=torch.bfloat16)
    out, lse = block_sparse_attention(*qkv, lists, causal=True, return_lse=True)
    wanted = block_sparse_attention_reference(
        *(x.double() for x in qkv), lists, causal=True, return_lse=True
    )
    assert out.dtype == torch.bfloat16 and lse.dtype == torch.float32
    torch.testing.assert_close(out.double(), wanted[0], atol=2e-2, rtol=2e-2)
    torch.testing.assert_close(lse.double(), wanted[1], atol=1e-3, rtol=1e-3)


def test_lists_and_masks_are_one():
    mask = torch.rand(2, 3, 5, 7, generator=torch.Generator().manual_seed(0)) < 0.4
    lists = BlockLists.from_mask(mask, 16)
    assert torch.equal(lists.mask(), mask)
    assert torch.equal(lists.counts, mask.sum(-1).int())
    row = (1 * 3 + 2) * 5 + 4
    listed = lists.blocks[lists.offsets[row] : lists.offsets[row + 1]]
    assert listed.tolist() == mask[1, 2, 4].nonzero().flatten().tolist()


def test_sorted_lists_keep_the_masked_ones_last_and_drop_the_hidden():
    """Four blocks of 8, two keys more than queries: the diagonal crosses two blocks of each row."""
    every = BlockLists.from_mask(torch.ones(1, 1, 4, 5, dtype=torch.bool), 8)
    offsets, middles, blocks = sort_lists(every, 32, 34, causal=True)
    assert blocks.tolist() == [0, 1, 0, 1, 2, 0, 1, 2, 3, 0, 1, 2, 3, 4]
    assert offsets.tolist() == [0, 2, 5, 9, 14] and middles.tolist() == [0, 3, 7, 12]
    assert reachable_blocks(32, 34, 8, causal=True).sum() == 14
    _, middles, blocks = sort_lists(every, 32, 34, causal=False)
    assert middles.tolist() == [4, 9, 14, 19] and len(blocks) == 20  # the last block is short


BAD = {
    "lists": (dict(lists=None), TypeError, "lists: expected BlockLists, got NoneType"),
    "another length": (dict(length=40), ValueError, r"lists: expected blocks .* \(1, 2, 3, 3\)"),
    "positions": (
        dict(key_positions=torch.zeros(1, 2, 31)), ValueError, "key_positions: expected shape",
    ),
    "scale": (dict(scale="x"), TypeError, "scale: expected a number"),
}  # fmt: skip


@pytest.mark.no_shape_checks
@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_named(case):
    change, error, message = BAD[case]
    change = dict(change)
    length = change.pop("length", 32)
    qkv, lists = random_case(1, 2, 2, 32, 32, 4, 4, 16)
    qkv = [torch.randn(1, 2, length, 4, dtype=torch.float64) for _ in qkv]
    lists = change.pop("lists", lists)
    with pytest.raises(error, match=message):
        block_sparse_attention(*qkv, lists, causal=True, **change)


@pytest.mark.no_shape_checks
def test_bad_blocks_are_named():
    mask = torch.ones(1, 1, 2, 2, dtype=torch.bool)
    with pytest.raises(ValueError, match="block: expected at least 1, got 0"):
        BlockLists.from_mask(mask, 0)
    with pytest.raises(TypeError, match="block: expected an int"):
        BlockLists.from_mask(mask, 2.0)
    with pytest.raises(TypeError, match="mask: expected booleans"):
        BlockLists.from_mask(mask.float(), 2)
