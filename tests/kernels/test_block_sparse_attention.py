"""Block-sparse attention's kernels, interpreted, against the masked reference in float64."""

from __future__ import annotations

import pathlib

import pytest
import torch

from corelib.kernels.gates.interpreter import load_file
from corelib.primitives.block_sparse import BlockLists, block_sparse_attention_reference

shared = load_file(str(pathlib.Path(__file__).with_name("shared.py")))
SPARSE = "corelib.kernels.block_sparse_attention:block_sparse_attention"
RUN = "corelib.kernels.gates.cases:forward_backward"
NAMES = ("out", "lse", "dq", "dk", "dv")


def random_case(
    B, H, G, L, S, D, V, block, *, density=0.5, moved=False, dtype=torch.float32, seed=0
):
    """``(q, k, v), lists, (d_out, d_lse), key_positions``"""
    generator = torch.Generator().manual_seed(seed)
    shapes = (B, H, L, D), (B, G, S, D), (B, G, S, V), (B, H, L, V)
    *qkv, d_out = (torch.randn(x, generator=generator).to(dtype) for x in shapes)
    d_lse = torch.randn(B, H, L, generator=generator)
    chosen = torch.rand(B, H, -(-L // block), -(-S // block), generator=generator) < density
    positions = None
    if moved:
        positions = torch.rand(B, G, S, generator=generator) + torch.arange(S) // (2 * block)
        positions = positions.argsort(-1)
    return qkv, BlockLists.from_mask(chosen, block), (d_out, d_lse), positions


def expected(qkv, lists, grads, **options):
    reference = block_sparse_attention_reference
    return shared.attention_with_gradients(reference, qkv, grads, lists, **options)


def assert_all_close(got, wanted, tolerance=5e-6):
    names = NAMES[: len(got)]
    shared.assert_close(names, got, wanted[: len(got)], tolerance)


CASES = {
    "one token": ((1, 2, 1, 1, 1, 16, 16, 16), dict(causal=True)),
    "grouped, odd length, unequal widths": ((1, 4, 2, 63, 63, 20, 12, 16), dict(causal=True)),
    "blocks of two tiles": ((2, 2, 1, 70, 70, 16, 16, 32), dict(causal=True)),
    "more keys than queries": ((1, 2, 1, 40, 100, 16, 16, 16), dict(causal=True, scale=0.5)),
    "empty rows": ((1, 1, 1, 60, 40, 16, 16, 16), dict(causal=True)),
    "not causal": ((1, 2, 2, 40, 55, 16, 24, 16), dict(causal=False)),
}


@pytest.mark.parametrize("case", CASES)
def test_equals_reference(interpreter, case):
    sizes, options = CASES[case]
    qkv, lists, grads, _ = random_case(*sizes)
    wanted = expected(qkv, lists, grads, **options)
    grads = shared.with_nan_for_empty_rows(grads, wanted[1])
    got = interpreter.call(RUN, SPARSE, (*qkv, lists), dict(**options, return_lse=True), grads)
    assert_all_close([*got[0], *got[1]], wanted)


@pytest.mark.parametrize("density", [0.0, 1.1])
def test_nothing_and_everything_listed(interpreter, density):
    qkv, lists, grads, _ = random_case(1, 1, 1, 33, 33, 16, 16, 16, density=density)
    wanted = expected(qkv, lists, grads, causal=True)
    grads = shared.with_nan_for_empty_rows(grads, wanted[1])
    options = dict(causal=True, return_lse=True)
    got = interpreter.call(RUN, SPARSE, (*qkv, lists), options, grads)
    assert_all_close([*got[0], *got[1]], wanted)


@pytest.mark.parametrize("causal", [True, False])
def test_moved_keys(interpreter, causal):
    qkv, lists, grads, positions = random_case(2, 2, 1, 35, 60, 16, 16, 16, moved=True)
    options = dict(causal=causal, key_positions=positions)
    wanted = expected(qkv, lists, grads, **options)
    grads = shared.with_nan_for_empty_rows(grads, wanted[1])
    got = interpreter.call(RUN, SPARSE, (*qkv, lists), dict(**options, return_lse=True), grads)
    assert_all_close([*got[0], *got[1]], wanted)


def test_half_precision(interpreter):
    qkv, lists, grads, _ = random_case(1, 2, 1, 50, 50, 24, 24, 16, dtype=torch.float16)
    got = interpreter.call(RUN, SPARSE, (*qkv, lists), dict(causal=True, return_lse=True), grads)
    assert [x.dtype for x in (*got[0], *got[1])] == [
        torch.float16, torch.float32, *[torch.float16] * 3
    ]  # fmt: skip
    assert_all_close([*got[0], *got[1]], expected(qkv, lists, grads, causal=True), tolerance=8e-3)


def test_any_layout(interpreter):
    """Tokens before heads, and heads that are slices of one projection."""
    qkv, lists, grads, _ = random_case(1, 2, 2, 20, 20, 16, 16, 16, density=1.1)
    packed = torch.cat(qkv, -1).transpose(1, 2).contiguous().transpose(1, 2)
    views = packed.split(16, -1)
    options = dict(causal=True, return_lse=True)
    got = interpreter.call(RUN, SPARSE, (*views, lists), options, grads)
    assert_all_close([*got[0], *got[1]], expected(qkv, lists, grads, causal=True))


def test_large_scores_do_not_overflow(interpreter):
    (q, k, v), lists, _, _ = random_case(1, 1, 1, 40, 40, 16, 16, 16)
    q, k = 30 * q, 30 * k
    got = interpreter.call(SPARSE, q, k, v, lists, causal=True, return_lse=True)
    wanted = block_sparse_attention_reference(
        q.double(), k.double(), v.double(), lists, causal=True, return_lse=True
    )
    for x, y in zip(got, wanted, strict=True):
        torch.testing.assert_close(x.double(), y, atol=1e-2, rtol=1e-4)


@pytest.mark.counted
def test_reads_only_what_is_listed(interpreter):
    """Bytes moved: those of the listed blocks, and 1 % of lists."""
    pytest.importorskip("triton")
    from corelib.kernels.block_sparse_attention import block_sparse_bytes
    from corelib.measure import count_io

    qkv, lists, _, _ = random_case(1, 2, 2, 96, 96, 32, 32, 32, density=0.4)
    count = count_io(SPARSE, *qkv, lists, causal=False)
    least = block_sparse_bytes(len(lists.blocks), 1, 2, 96, 32, 32, block=32)
    assert least <= count.bytes_moved <= 1.01 * least


def test_what_lies_behind_the_last_list_reads_nothing():
    """On a GPU hidden blocks are sorted to the end, not cut off: turned round, nobody has them."""
    pytest.importorskip("triton")
    from corelib.kernels.block_sparse_attention_backward import transposed_lists
    from corelib.primitives.block_sparse import sort_lists

    _, lists, _, _ = random_case(1, 4, 2, 96, 96, 16, 16, 16, density=0.6)
    offsets, middles, blocks = sort_lists(lists, 96, 96, causal=True)
    hidden = len(lists.blocks) - len(blocks)
    assert hidden > 0
    tail = torch.cat([blocks, torch.full((hidden,), 5, dtype=blocks.dtype)])
    wanted = transposed_lists((offsets, middles, blocks), lists.shape, 2)
    got = transposed_lists((offsets, middles, tail), lists.shape, 2)
    assert torch.equal(got[0], wanted[0]) and torch.equal(got[1], wanted[1])
    assert torch.equal(got[2][: len(blocks)], wanted[2])
    assert int(wanted[0][-1]) == len(blocks)


def test_the_launcher_uses_declared_tiles():
    from corelib.kernels.block_sparse_attention import SHIPPED, SPECIALISATIONS, tile_for

    for row, (dtype, width, block, _) in zip(SPECIALISATIONS, SHIPPED, strict=True):
        for target in ("sm_80", "gfx942"):
            tile, declared = tile_for("forward", target, dtype, width, block), row.on(target)
            assert declared.constexprs["BLOCK_M"] == tile.block_m
            assert declared.constexprs["BLOCK_N"] == tile.block_n
            assert block % tile.block_m == 0 and block % tile.block_n == 0


BAD = {
    "device": (dict(), ValueError, "expected CUDA tensors"),
    "block": (dict(block=24), ValueError, "lists: expected a block of 16 or more, a power of two"),
    "width": (dict(D=100), ValueError, "expected a width up to 64"),
    "lists": (dict(S=33, other=20), ValueError, "lists: expected blocks"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_named(case):
    change, error, message = BAD[case]
    sizes = dict(B=1, H=2, G=1, L=8, S=8, D=16, V=16, block=16) | change
    other = sizes.pop("other", None)
    qkv, lists, _, _ = random_case(**sizes)
    if other:
        qkv = [x[:, :, :other] for x in qkv]
        lists = random_case(**sizes | dict(S=other + 30))[1]
    shared.assert_refused(SPARSE, (*qkv, lists), error, message, causal=True)


def check_forward():
    """What the mutants of the forward kernel have to get past."""
    from corelib.kernels.block_sparse_attention import block_sparse_attention
    from corelib.kernels.gates.cases import poisoned

    for sizes, options in (
        ((2, 4, 2, 40, 50, 12, 10, 32), dict(causal=True)),
        ((1, 2, 1, 20, 35, 16, 20, 16), dict(causal=False)),
        ((2, 4, 2, 20, 40, 16, 16, 16), dict(causal=True, moved=True)),
        ((1, 1, 1, 16, 40, 16, 16, 16), dict(causal=False, moved=True)),
    ):
        moved = options.pop("moved", False)
        qkv, lists, grads, options["key_positions"] = random_case(*sizes, moved=moved)
        with poisoned():
            got = block_sparse_attention(*qkv, lists, **options, return_lse=True)
        assert_all_close(got, expected(qkv, lists, grads, **options))


def check_backward():
    """What the mutants of the backward kernels have to get past."""
    from corelib.kernels.gates.cases import forward_backward

    for sizes, options in (
        ((2, 4, 2, 40, 50, 12, 10, 32), dict(causal=True)),
        ((2, 2, 1, 20, 35, 16, 20, 16), dict(causal=False)),
        ((2, 4, 2, 20, 40, 16, 16, 16), dict(causal=True, moved=True)),
    ):
        moved = options.pop("moved", False)
        qkv, lists, grads, options["key_positions"] = random_case(*sizes, moved=moved)
        wanted = expected(qkv, lists, grads, **options)
        grads = shared.with_nan_for_empty_rows(grads, wanted[1])
        got = forward_backward(SPARSE, (*qkv, lists), dict(**options, return_lse=True), grads)
        assert_all_close([*got[0], *got[1]], wanted)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("module", "check", "limit"),
    [
        ("block_sparse_attention", "check_forward", 6),
        ("block_sparse_attention_backward", "check_backward", 5),
    ],
)
def test_mutants_are_caught(module, check, limit):
    """A sample, spread over the source; ``limit=None`` runs them all in some minutes."""
    assert shared.survivors(module, f"{__file__}:{check}", limit=limit) == []
