"""Masks: each against its definition, dense against blocks, and inside flex attention."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention.flex_attention import create_block_mask, create_mask, flex_attention

from corelib.primitives import Mask, masked_attention_reference, masks, visible_keys

IDS = torch.tensor([3, 3, 3, 5, 5, 9, 9, 9, 9, 9, 10])

DEFINITIONS = {
    "causal": (masks.causal(), lambda i, j: j <= i),
    "window": (masks.sliding_window(3), lambda i, j: abs(i - j) < 3),
    "sinks": (masks.sinks(2), lambda i, j: j < 2),
    "prefix": (masks.prefix(4), lambda i, j: j < 4 or j <= i),
    "block_causal": (masks.block_causal(3), lambda i, j: j // 3 <= i // 3),
    "strided": (masks.strided(3), lambda i, j: (i - j) % 3 == 0),
    "global": (masks.global_tokens([0, 7]), lambda i, j: i in (0, 7) or j in (0, 7)),
    "no_globals": (masks.global_tokens([]), lambda i, j: False),
    "document": (masks.document(IDS), lambda i, j: i >= 0 and bool(IDS[i] == IDS[j])),
    "not": (~masks.causal(), lambda i, j: j > i),
    "dilated": (
        masks.strided(2) & masks.sliding_window(5),
        lambda i, j: (i - j) % 2 == 0 and abs(i - j) < 5,
    ),
    "longformer": (
        masks.sliding_window(2) | masks.global_tokens([1]),
        lambda i, j: abs(i - j) < 2 or 1 in (i, j),
    ),
    "packed": (
        masks.causal() & masks.document(IDS),
        lambda i, j: i >= 0 and bool(IDS[i] == IDS[j]) and j <= i,
    ),
    "own": (Mask(lambda b, h, i, j: (i * j) % 3 == 1), lambda i, j: (i * j) % 3 == 1),
}


@pytest.mark.parametrize("name", DEFINITIONS)
@pytest.mark.parametrize("L, S", [(11, 11), (4, 11), (11, 6), (1, 1)])
def test_dense_is_the_definition(name, L, S):
    mask, definition = DEFINITIONS[name]
    expected = torch.tensor([[definition(r + S - L, j) for j in range(S)] for r in range(L)])
    assert torch.equal(mask.dense(L, S), expected)


def states_of(dense, block):
    """Block states by looking at every block."""
    rows = [
        [int(piece.any()) + int(piece.all()) for piece in strip.split(block, dim=-1)]
        for strip in dense.split(block, dim=-2)
    ]
    return torch.tensor(rows, dtype=torch.int8)


@pytest.mark.parametrize("name", DEFINITIONS)
@pytest.mark.parametrize("L, S", [(11, 11), (4, 11), (11, 6), (1, 1)])
@pytest.mark.parametrize("block", [1, 2, 3, 4, 16])
def test_blocks_are_those_of_the_dense_mask(name, L, S, block):
    mask = DEFINITIONS[name][0]
    assert torch.equal(mask.blocks(L, S, block=block), states_of(mask.dense(L, S), block))


numbers = st.integers(1, 9)
leaves = st.tuples(
    st.sampled_from(["sliding_window", "sinks", "prefix", "block_causal", "strided"]), numbers
) | st.tuples(st.just("global_tokens"), st.lists(st.integers(0, 12), max_size=3))
trees = st.recursive(
    leaves,
    lambda tree: st.tuples(st.just("~"), tree) | st.tuples(st.sampled_from("&|"), tree, tree),
    max_leaves=4,
)


def grown(tree):
    """The mask of a drawn tree, such as ``("&", ("sinks", 2), ("~", ("strided", 3)))``."""
    symbol, *rest = tree
    if symbol == "~":
        return ~grown(rest[0])
    if symbol == "&":
        return grown(rest[0]) & grown(rest[1])
    if symbol == "|":
        return grown(rest[0]) | grown(rest[1])
    return getattr(masks, symbol)(rest[0])


@settings(max_examples=100, deadline=None)
@given(trees, st.integers(1, 13), st.integers(1, 13), st.integers(1, 6))
def test_blocks_of_any_composition(tree, L, S, block):
    mask = grown(tree)
    assert torch.equal(mask.blocks(L, S, block=block), states_of(mask.dense(L, S), block))


def test_structured_blocks_never_look_at_elements():
    def refuse(b, h, i, j):
        raise AssertionError("looked")

    for mask in (
        masks.causal(), masks.sliding_window(5), masks.block_causal(7), masks.strided(3),
        masks.global_tokens([4]), masks.document(IDS.repeat_interleave(4)),
        masks.attention_mask(causal=True, window=None),
    ):  # fmt: skip
        blind = Mask(refuse, mask.name, mask.corners)
        assert torch.equal(blind.blocks(44, block=8), states_of(mask.dense(44), 8))


def test_per_head_and_per_batch():
    heads = masks.per_head([masks.causal(), masks.sliding_window(2), masks.sinks(1)])
    dense = heads.dense(5)
    assert dense.shape == (1, 3, 5, 5)
    assert torch.equal(dense[0, 1], masks.sliding_window(2).dense(5))
    rows = torch.stack([IDS, torch.zeros_like(IDS)])
    both = masks.document(rows) & heads
    dense, blocks = both.dense(11), both.blocks(11, block=4)
    assert dense.shape == (2, 3, 11, 11) and blocks.shape == (2, 3, 3, 3)
    for b in range(2):
        for h, mask in enumerate((masks.causal(), masks.sliding_window(2), masks.sinks(1))):
            expected = mask.dense(11) & (rows[b][:, None] == rows[b][None, :])
            assert torch.equal(dense[b, h], expected)
            assert torch.equal(blocks[b, h], states_of(expected, 4))


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("window, sinks", [(None, 0), (3, 0), (2, 3)])
@pytest.mark.parametrize("L, S", [(6, 6), (3, 8), (8, 3)])
def test_attention_mask_keeps_the_contract(causal, window, sinks, L, S):
    mask = masks.attention_mask(causal=causal, window=window, sinks=sinks)
    expected = visible_keys(L, S, causal=causal, window=window, sinks=sinks)
    assert torch.equal(mask.dense(L, S), expected)


@pytest.mark.parametrize("name", [n for n in DEFINITIONS if n != "no_globals"])
def test_is_a_mask_mod_of_flex_attention(name):
    mask = DEFINITIONS[name][0]
    theirs = create_mask(mask, 1, 1, 11, 11, device="cpu")[0, 0]
    assert torch.equal(theirs, mask.dense(11))


@pytest.mark.slow  # importing the tracer takes seconds
@pytest.mark.no_shape_checks  # flex traces the mask, and the shape checker cannot be traced
def test_flex_attention_computes_the_same():
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 2, 24, 8) for _ in range(3))
    mask = masks.per_head([masks.causal(), masks.causal() & masks.sliding_window(5)])
    block_mask = create_block_mask(mask, 1, 2, 24, 24, device="cpu", BLOCK_SIZE=8)
    theirs = flex_attention(q, k, v, block_mask=block_mask)
    torch.testing.assert_close(masked_attention_reference(q, k, v, mask.dense(24)), theirs)


def test_call_and_name():
    mask = masks.causal() & ~masks.sinks(2)
    assert repr(mask) == "(causal & ~sinks(2))"
    assert mask(0, 0, 5, 3).item() is True and mask(0, 0, 5, 1).item() is False


@pytest.mark.no_shape_checks
def test_errors():
    for make, message in (
        (lambda: masks.sliding_window(0), "window: expected at least 1, got 0"),
        (lambda: masks.block_causal(0), "size: expected at least 1"),
        (lambda: masks.strided(-1), "stride: expected at least 1"),
        (lambda: masks.sinks(-1), "sinks: expected at least 0"),
        (lambda: masks.document(torch.tensor([0, 1, 0])), "ids: expected numbers that never fall"),
        (lambda: masks.document(torch.zeros(2, 2, 2).long()), "ids: expected integers"),
        (lambda: masks.per_head([]), "masks: expected at least one mask"),
        (lambda: masks.causal().blocks(4, block=0), "block: expected at least 1"),
        (
            lambda: masks.per_head([masks.causal()] * 2) & masks.per_head([masks.causal()] * 3),
            "expected one size of heads",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            make()
    with pytest.raises(TypeError, match="window: expected an int"):
        masks.sliding_window(2.5)
    with pytest.raises(TypeError, match="unsupported operand"):
        masks.causal() & True
