"""The vertical-slash kernel, interpreted, against the masked reference in float64."""

from __future__ import annotations

import pathlib

import pytest
import torch

from corelib.kernels.gates.interpreter import load_file
from corelib.primitives.vertical_slash import kept_keys, vertical_slash_attention_reference

shared = load_file(str(pathlib.Path(__file__).with_name("shared.py")))
VERTICAL_SLASH = "corelib.kernels.vertical_slash_attention:vertical_slash_attention"
RUN = "corelib.kernels.gates.cases:forward_backward"


def random_case(B, H, G, L, S, D, V, *, share=0.1, dtype=torch.float32, seed=0):
    """``q, k, v, columns, distances``"""
    generator = torch.Generator().manual_seed(seed)
    shapes = (B, H, L, D), (B, G, S, D), (B, G, S, V)
    qkv = [torch.randn(x, generator=generator).to(dtype) for x in shapes]
    return *qkv, *(torch.rand(B, H, S, generator=generator) < share for _ in range(2))


def expected(case, **options):
    wide = [x.double() for x in case[:3]]
    return vertical_slash_attention_reference(*wide, *case[3:], **options, return_lse=True)


def assert_all_close(got, wanted, tolerance=3e-6):
    shared.assert_close(("out", "lse"), got, wanted, tolerance)


CASES = {
    "one token": ((1, 2, 1, 1, 1, 16, 16), dict(block=16)),
    "grouped, odd length, unequal widths": ((1, 4, 2, 63, 63, 20, 12), dict(block=16)),
    "blocks of two tiles": ((2, 2, 1, 70, 70, 16, 16), dict(block=32)),
    "default block, own scale": ((1, 1, 1, 100, 100, 16, 16), dict(scale=0.7)),
    "more keys than queries": ((1, 2, 1, 30, 80, 16, 16), dict(block=16)),
    "empty rows": ((1, 1, 1, 50, 30, 16, 16), dict(block=16)),
}


@pytest.mark.parametrize("case", CASES)
def test_equals_reference(interpreter, case):
    sizes, options = CASES[case]
    case = random_case(*sizes)
    got, _ = interpreter.call(RUN, VERTICAL_SLASH, case, dict(**options, return_lse=True))
    assert_all_close(got, expected(case, **options))


@pytest.mark.parametrize("share", [0.0, 1.1])
def test_nothing_and_everything_kept(interpreter, share):
    case = random_case(1, 1, 1, 40, 40, 16, 16, share=share)
    got, _ = interpreter.call(RUN, VERTICAL_SLASH, case, dict(block=16, return_lse=True))
    assert_all_close(got, expected(case, block=16))


def test_half_precision(interpreter):
    case = random_case(1, 2, 1, 50, 50, 24, 24, dtype=torch.float16)
    got, _ = interpreter.call(RUN, VERTICAL_SLASH, case, dict(block=16, return_lse=True))
    assert [x.dtype for x in got] == [torch.float16, torch.float32]
    assert_all_close(got, expected(case, block=16), tolerance=4e-3)


def test_what_is_not_kept_is_never_read(interpreter):
    """Only the last 16 queries; NaN in every key that their block does not keep."""
    q, k, v, columns, distances = random_case(1, 1, 1, 16, 90, 16, 16, share=0.04)
    kept = kept_keys(columns[0], distances[0], 16, 16)
    unread = ~(kept[0] | kept[1])[0, 0]
    assert unread.sum() > 20
    wanted = expected((q, k, v, columns, distances), block=16)
    k, v = (x.masked_fill(unread[None, None, :, None], torch.nan) for x in (k, v))
    case = q, k, v, columns, distances
    got, _ = interpreter.call(RUN, VERTICAL_SLASH, case, dict(block=16, return_lse=True))
    assert_all_close(got, wanted)


@pytest.mark.counted
def test_moves_no_more_than_it_has_to(interpreter):
    """Columns only, of 32 queries more than keys before them: the counted bytes are the bound's."""
    from corelib.kernels.vertical_slash_attention import vertical_slash_bytes
    from corelib.measure import count_io
    from corelib.primitives.vertical_slash import slash_lists

    case = random_case(1, 2, 2, 64, 128, 32, 32, share=0.05)
    lists = slash_lists(case[3], case[4], 64, 16)
    kept = int((lists.stops - lists.starts).sum()) + len(lists.keys)
    least = vertical_slash_bytes(kept, 1, 2, 64, 32, 32, block=16)
    count = count_io(VERTICAL_SLASH, *case, block=16)
    assert least <= count.bytes_moved <= 1.02 * least


def test_the_launcher_uses_declared_tiles():
    from corelib.kernels.vertical_slash_attention import SHIPPED, SPECIALISATIONS, tile_for

    for row, shipped in zip(SPECIALISATIONS, SHIPPED, strict=True):
        for target in ("sm_80", "sm_100", "gfx942"):
            tile, declared = tile_for(target, *shipped), row.on(target)
            assert declared.constexprs["BLOCK_M"] == tile.block_m
            assert declared.constexprs["BLOCK_N"] == tile.block_n


BAD = {
    "device": (lambda x: x, dict(), "expected CUDA tensors"),
    "block": (lambda x: x, dict(block=24), "block: expected 16 or more, a power of two"),
    "gradients": (lambda x: [x[0].requires_grad_(), *x[1:]], dict(), "no backward pass"),
    "columns": (lambda x: [*x[:3], x[3][..., 1:], x[4]], dict(), "columns: expected shape"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_named(case):
    change, options, message = BAD[case]
    args = change(random_case(1, 2, 1, 8, 8, 16, 16))
    shared.assert_refused(VERTICAL_SLASH, args, ValueError, message, **options)


def check():
    """What the mutants of the kernel have to get past."""
    from corelib.kernels.gates.cases import poisoned
    from corelib.kernels.vertical_slash_attention import vertical_slash_attention

    for sizes, options in (
        ((2, 4, 2, 36, 45, 12, 10), dict(block=32)),
        ((1, 1, 1, 20, 18, 16, 16), dict(block=16)),
        ((1, 2, 1, 33, 90, 16, 16), dict(block=16, share=0.3)),
        ((1, 2, 1, 32, 200, 16, 16), dict(block=16, share=0.03)),  # ranges that end inside a tile
    ):
        case = random_case(*sizes, share=options.pop("share", 0.1))
        nan = [torch.full_like(x[..., :1], torch.nan) for x in case[:3]]  # behind every row
        views = [torch.cat([x, y], -1)[..., :-1] for x, y in zip(case[:3], nan, strict=True)]
        with poisoned():
            got = vertical_slash_attention(*views, *case[3:], **options, return_lse=True)
        assert_all_close(got, expected(case, **options))


@pytest.mark.slow
def test_mutants_are_caught():
    """A sample; of all, one lives: ``<`` for the columns, which lie before their block anyway."""
    assert shared.survivors("vertical_slash_attention", f"{__file__}:check", limit=6) == []
