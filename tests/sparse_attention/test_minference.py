"""MInference: full budgets are dense, planted patterns are found, costs are the kernel's."""

from __future__ import annotations

import doctest

import pytest
import torch
import torch.nn.functional as F

from corelib.measure.races import minference as raced
from corelib.models.cache import DenseCache
from corelib.models.decoder import Decoder, DecoderConfig
from corelib.primitives import attention, attention_reference, visible_keys
from corelib.primitives.block_scores import attention_recall, pooled_block_scores
from corelib.primitives.block_sparse import block_sparse_attention_reference
from corelib.primitives.vertical_slash import vertical_slash_attention_reference
from corelib.sparse_attention import minference
from corelib.sparse_attention.minference import (
    Pattern,
    a_shape,
    block_sparse,
    choose_blocks,
    choose_lines,
    estimate_vertical_slash,
    example,
    minference_attention,
    vertical_slash,
)
from corelib.sparse_attention.minference_search import (
    SparsePrefill,
    at_cost,
    computed_scores,
    output_gap,
    scaled,
    search_head_patterns,
)
from corelib.sparse_attention.shared import planted_heads

EXACT = dict(atol=1e-10, rtol=1e-10)


def random_inputs(B, H, G, L, S, D=8, V=6, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = (B, H, L, D), (B, G, S, D), (B, G, S, V)
    return [torch.randn(x, generator=generator, dtype=torch.float64) for x in shapes]


FULL = {
    "a_shape": a_shape(0, 10**6),
    "columns": vertical_slash(10**6, 0),
    "slashes": vertical_slash(0, 10**6),
    "block_sparse": block_sparse(10**6),
}


@pytest.mark.parametrize("L", [1, 7, 16, 53])
@pytest.mark.parametrize("pattern", FULL.values(), ids=FULL)
def test_a_full_budget_is_dense(pattern, L):
    q, k, v = random_inputs(2, 4, 2, L, L)
    out, lse = minference_attention(q, k, v, pattern, block=16, return_lse=True)
    wanted = attention_reference(q, k, v, causal=True, return_lse=True)
    torch.testing.assert_close(out, wanted[0], **EXACT)
    torch.testing.assert_close(lse, wanted[1], **EXACT)
    by_torch = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    torch.testing.assert_close(out, by_torch, **EXACT)


@pytest.mark.parametrize(("L", "S"), [(20, 50), (50, 20)])
@pytest.mark.parametrize("pattern", FULL.values(), ids=FULL)
def test_a_full_budget_is_dense_with_other_lengths(pattern, L, S):
    q, k, v = random_inputs(1, 2, 1, L, S)
    got = minference_attention(q, k, v, pattern, block=16, last=8)
    torch.testing.assert_close(got, attention_reference(q, k, v, causal=True), **EXACT)


def by_masks(q, k, v, pattern, block, last):
    """The same choice, attended densely under its mask."""
    if pattern.kind == "a_shape":
        return attention_reference(q, k, v, causal=True, window=pattern.second, sinks=pattern.first)
    if pattern.kind == "block_sparse":
        lists = choose_blocks(q, k, pattern.first, block=block)
        return block_sparse_attention_reference(q, k, v, lists, causal=True)
    lines = choose_lines(*estimate_vertical_slash(q, k, last=last), *pattern[1:])
    return vertical_slash_attention_reference(q, k, v, *lines, block=block)


MIXED = [a_shape(2, 9), vertical_slash(5, 7), block_sparse(2), vertical_slash(5, 7)]


def test_every_head_keeps_to_its_own_pattern():
    q, k, v = random_inputs(2, 4, 2, 70, 70)
    got = minference_attention(q, k, v, MIXED, block=16, last=12)
    for h, pattern in enumerate(MIXED):
        one = q[:, h : h + 1], k[:, h // 2 : h // 2 + 1], v[:, h // 2 : h // 2 + 1]
        torch.testing.assert_close(got[:, h : h + 1], by_masks(*one, pattern, 16, 12), **EXACT)


def test_gradients_flow_through_every_pattern():
    qkv = [x.requires_grad_() for x in random_inputs(1, 4, 2, 40, 40)]
    out = minference_attention(*qkv, MIXED, block=16, last=12)
    parts = [
        by_masks(qkv[0][:, h : h + 1], *(x[:, h // 2 : h // 2 + 1] for x in qkv[1:]), p, 16, 12)
        for h, p in enumerate(MIXED)
    ]
    weights = torch.randn(out.shape, dtype=out.dtype, generator=torch.Generator().manual_seed(1))
    got = torch.autograd.grad((out * weights).sum(), qkv)
    wanted = torch.autograd.grad((torch.cat(parts, 1) * weights).sum(), qkv)
    for x, y in zip(got, wanted, strict=True):
        torch.testing.assert_close(x, y, **EXACT)


def test_the_estimate_sums_the_last_rows():
    q, k, _ = random_inputs(1, 4, 2, 30, 30)
    vertical, slash = estimate_vertical_slash(q, k, last=5)
    scores = q @ k.repeat_interleave(2, 1).transpose(2, 3) * 8**-0.5
    hidden = ~visible_keys(30, 30, causal=True)
    rows = scores.masked_fill(hidden, -torch.inf).softmax(-1)[:, :, -5:]
    torch.testing.assert_close(vertical, rows.sum(2))
    for o in range(30):
        wanted = sum(rows[:, :, i, 25 + i - o] for i in range(5) if 25 + i >= o)
        torch.testing.assert_close(slash[:, :, o], wanted + torch.zeros(1, 4, dtype=q.dtype))


def test_planted_lines_are_recovered_exactly():
    """Above the forced ends: exactly the planted columns and distances come next."""
    heads = planted_heads(["vertical_slash"], 1024, columns=4, distances=3, seed=12)
    vertical, slash = estimate_vertical_slash(heads.q, heads.k, scale=1.0)
    far = [o for o in heads.distances[0] if o >= 100]
    late = [j for j in heads.columns[0] if j >= 30]
    assert len(far) >= 2 and len(late) >= 3
    columns, distances = choose_lines(vertical, slash, 30 + len(late), 100 + len(far))
    assert columns[0, 0].nonzero().flatten().tolist() == [*range(30), *sorted(late)]
    assert distances[0, 0].nonzero().flatten().tolist() == [*range(100), *sorted(far)]


def test_the_ends_come_before_others():
    sums = torch.rand(1, 2, 200, generator=torch.Generator().manual_seed(0))
    columns, distances = choose_lines(sums, sums, 30, 100)
    assert columns[..., :30].all() and not columns[..., 30:].any()
    assert distances[..., :100].all() and not distances[..., 100:].any()
    columns, distances = choose_lines(sums, sums, 5, 4, forced=(2, 3))
    assert columns[..., :2].all() and distances[..., :3].all()
    for kept, n, ends in ((columns, 5, 2), (distances, 4, 3)):
        best = sums[..., ends:].topk(n - ends).indices.sort().values + ends
        assert torch.equal(kept[..., ends:].nonzero()[:, 2] + ends, best.flatten())


def test_blocks_are_the_best_pooled_ones_and_the_own():
    q, k, _ = random_inputs(1, 2, 1, 64, 64)
    chosen = choose_blocks(q, k, 2, block=16).mask()
    scores = pooled_block_scores(q, k, 16, causal=True)
    for h in range(2):
        for a in range(4):
            best = scores[0, h, a].topk(min(2, a + 1)).indices.tolist()
            assert chosen[0, h, a].nonzero().flatten().tolist() == sorted({*best, a})


def test_the_prompt_decides_where_not_the_sample():
    """Lines found in one prompt miss those of another; an estimate of the prompt finds them."""
    heads = [planted_heads(["vertical_slash"], 1024, seed=seed) for seed in (0, 1)]
    found = [estimate_vertical_slash(x.q, x.k, scale=1.0) for x in heads]
    dense = attention(*heads[1][:3], causal=True, scale=1.0, return_lse=True)[1]
    recall = []
    for estimate in found:
        lines = choose_lines(*estimate, 40, 110)
        lse = vertical_slash_attention_reference(*heads[1][:3], *lines, scale=1.0, return_lse=True)
        recall.append(float(attention_recall(lse[1], dense)[..., 512:].mean()))
    assert recall[1] > 0.9 and recall[1] > recall[0] + 0.2


def test_the_raced_sizes_hold_the_raced_heads():
    """Beyond the short prompts of ``--quick``, which hold in heads whose lines thin out."""
    q, k, v = planted_heads(raced.KINDS, 2048, **raced.PLANTED)[:3]
    out = minference_attention(q, k, v, raced.PATTERNS, **raced.OPTIONS)
    raced.close(out, F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=1.0))


def test_costs_count_what_the_kernel_computes():
    q, k, _ = random_inputs(1, 2, 1, 50, 50)
    options = dict(block=16, last=8)
    visible = visible_keys(50, 50, causal=True, window=9, sinks=2)
    assert computed_scores(q, k, a_shape(2, 9), **options).tolist() == [[visible.sum()] * 2]
    blocks = choose_blocks(q, k, 2, block=16).counts.sum(-1) * 256
    assert torch.equal(computed_scores(q, k, block_sparse(2), **options), blocks)
    columns, lines = choose_lines(*estimate_vertical_slash(q, k, last=8), 3, 2)
    for h in range(2):
        tiles = 0
        for first in range(0, 50, 16):
            offsets = {0, *lines[0, h].nonzero().flatten().tolist()}
            kept = {key for o in offsets for key in range(first - o, first - o + 16)}
            kept |= {*columns[0, h].nonzero().flatten().tolist()}
            tiles += 16 * len(kept & {*range(min(first + 16, 50))})
        assert int(computed_scores(q, k, vertical_slash(3, 2), **options)[0, h]) == tiles


@pytest.mark.parametrize("L, S", [(1, 1), (20, 20), (7, 30), (9, 5)])
def test_the_cost_of_an_a_shape_is_what_it_sees(L, S):
    q, k, _ = random_inputs(1, 2, 1, L, S)
    for sinks, window in ((1, 1), (3, 4), (2, 50), (50, 2), (0, 6)):
        visible = visible_keys(L, S, causal=True, window=window, sinks=sinks)
        found = computed_scores(q, k, a_shape(sinks, window))
        assert found.tolist() == [[visible.sum()] * 2], (sinks, window)


def test_a_lone_slash_costs_a_tile_and_a_column_a_key():
    heads = planted_heads(["vertical_slash"], 512, seed=1)
    pair = heads.q, heads.k
    base = computed_scores(*pair, vertical_slash(30, 100), scale=1.0)
    column = computed_scores(*pair, vertical_slash(31, 100), scale=1.0) - base
    slash = computed_scores(*pair, vertical_slash(30, 101), scale=1.0) - base
    assert 0 < int(column) <= 512 < int(slash) <= 64 * 512


def test_scaling_to_a_cost():
    assert scaled(vertical_slash(100, 10), 0.05) == vertical_slash(5, 1)
    assert scaled(block_sparse(10), 0.5) == block_sparse(5)
    found = at_cost(a_shape(10, 100), 500, lambda p: p.first + p.second)
    assert 480 <= found.first + found.second <= 500
    assert at_cost(a_shape(10, 100), 0, lambda p: 9) == a_shape(1, 1)


def test_the_search_finds_the_planted_shape():
    kinds = "a_shape", "vertical_slash", "block"
    heads = planted_heads(kinds, 1024, distances=2, strength=12.0, seed=6)
    options = dict(scale=1.0, forced=(2, 8))
    found, gaps = search_head_patterns(*heads[:3], budget=0.3, **options)
    assert [pattern.kind for pattern in found] == ["a_shape", "vertical_slash", "block_sparse"]
    assert gaps.shape == (6, 3) and (gaps >= 0).all()
    allowed = 0.3 * 1024 * 1025 / 2
    for h, pattern in enumerate(found):
        one = heads.q[:, h : h + 1], heads.k[:, h : h + 1]
        assert int(computed_scores(*one, pattern, **options)) <= allowed


def test_the_gap_counts_outputs_that_are_off():
    dense = torch.zeros(1, 2, 3, 4)
    out = dense.clone()
    out[0, 1, 0] = torch.tensor([0.0, 0.004, 0.006, -0.1])
    assert output_gap(out, dense).tolist() == [0, 2]


SMALL = DecoderConfig(vocab=50, width=32, layers=2, heads=4, kv_heads=2, head_width=8, hidden=32)


def test_a_model_prefills_with_patterns_and_decodes_densely():
    model = Decoder(SMALL).double().eval()
    ids = torch.randint(0, 50, (2, 45), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        full = SparsePrefill(DenseCache(), [[block_sparse(99)] * 4, vertical_slash(99, 0)], block=8)
        logits = torch.cat([model(ids[:, :40], full), model(ids[:, 40:], full)], 1)
        torch.testing.assert_close(logits, model(ids), **EXACT)
        assert len(full) == 45 and full.bytes() > 0
        few = SparsePrefill(DenseCache(), [a_shape(1, 4)] * 2, block=8)
        got = model(ids[:, :40], few)
        assert not torch.allclose(got, model(ids[:, :40]))
        full.crop(0)
        torch.testing.assert_close(model(ids[:, :9], full), model(ids[:, :9]), **EXACT)


def test_a_used_or_padded_cache_stays_dense():
    model = Decoder(SMALL).double().eval()
    ids = torch.randint(0, 50, (1, 30), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        used = DenseCache()
        model(ids[:, :10], used)
        wrapped = SparsePrefill(used, [a_shape(0, 1)] * 2)
        torch.testing.assert_close(model(ids[:, 10:], wrapped), model(ids)[:, 10:], **EXACT)


def test_example():
    assert minference_attention(**example()).shape == (1, 3, 256, 16)
    assert doctest.testmod(minference).failed == 0


BAD = {
    "causal": (dict(causal=False), ValueError, "causal: expected True"),
    "number": (dict(patterns=[a_shape()]), ValueError, "patterns: expected one for each of 2"),
    "type": (dict(patterns=[1, 2]), TypeError, "patterns: expected Pattern, got int"),
    "kind": (dict(patterns=Pattern("spiral", 1)), ValueError, "patterns: expected a kind of"),
    "size": (dict(patterns=a_shape(0, 0)), ValueError, "patterns: expected sizes of at least 0"),
    "block": (dict(block=0), ValueError, "block: expected at least 1"),
}


@pytest.mark.no_shape_checks
@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_named(case):
    change, error, message = BAD[case]
    q, k, v = random_inputs(1, 2, 1, 8, 8)
    options = dict(patterns=block_sparse(1)) | change
    with pytest.raises(error, match=message):
        minference_attention(q, k, v, **options)


@pytest.mark.no_shape_checks
def test_a_bad_budget_is_named():
    with pytest.raises(ValueError, match="budget: expected a share above 0"):
        search_head_patterns(*random_inputs(1, 2, 1, 8, 8), budget=0.0)
