"""Split-KV decode kernels, interpreted, against dense attention in float64, request by request."""

from __future__ import annotations

import pathlib

import pytest
import torch

from corelib.foundations.lean_attention import fixed_split_schedule, stream_k_schedule
from corelib.kernels.gates.interpreter import load_file
from corelib.primitives import attention_reference

shared = load_file(str(pathlib.Path(__file__).with_name("shared.py")))
SPLIT = "corelib.kernels.split_kv_decode:split_kv_decode"
STREAM = "corelib.kernels.split_kv_decode:stream_k_decode"
RUN = "corelib.kernels.gates.cases:forward_backward"


def random_inputs(lengths, H, G, L, S, D, V, dtype=torch.float32, seed=0):
    """``q, k, v, lengths``; the caches hold NaN behind each request's length."""
    generator = torch.Generator().manual_seed(seed)
    B = len(lengths)
    q, k, v = (
        torch.randn(shape, generator=generator).to(dtype)
        for shape in [(B, H, L, D), (B, G, S, D), (B, G, S, V)]
    )
    for b, n in enumerate(lengths):
        k[b, :, n:], v[b, :, n:] = torch.nan, torch.nan
    return q, k, v, torch.tensor(lengths, dtype=torch.int64)


def expected(q, k, v, lengths, scale=None):
    """The newest queries of each request over the keys it holds."""
    parts = []
    for b, n in enumerate(lengths.tolist()):
        kept = (q[b : b + 1], k[b : b + 1, :, :n], v[b : b + 1, :, :n])
        kept = (x.double() for x in kept)
        parts.append(attention_reference(*kept, causal=True, scale=scale, return_lse=True))
    return [torch.cat(part) for part in zip(*parts, strict=True)]


def assert_decodes(interpreter, target, inputs, tolerance=3e-6, **options):
    """With NaN in every buffer that the function allocates, and every access checked."""
    (out, lse), _ = interpreter.call(RUN, target, inputs, dict(**options, return_lse=True))
    assert out.dtype == inputs[0].dtype and lse.dtype == torch.float32
    wanted = expected(*inputs, scale=options.get("scale"))
    shared.assert_close(("out", "lse"), (out, lse), wanted, tolerance)


CASES = {
    "one key": (([1], 1, 1, 1, 1, 16, 16), dict(splits=1)),
    "more splits than tiles": (([5, 9], 2, 1, 1, 9, 16, 16), dict(splits=4, tile=4)),
    "odd lengths, grouped, unequal widths": (
        ([63, 1, 100], 4, 2, 1, 100, 20, 36), dict(splits=3, tile=16),
    ),
    "several queries": (([40, 7], 4, 2, 3, 40, 16, 16), dict(splits=3, tile=8)),
    "empty rows and an empty request": (([2, 0, 30], 2, 1, 4, 30, 8, 8), dict(splits=2, tile=5)),
    "own scale": (([33], 2, 2, 1, 33, 16, 16), dict(splits=2, tile=16, scale=0.7)),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_fixed_splits_equal_attention(interpreter, case):
    sizes, options = CASES[case]
    assert_decodes(interpreter, SPLIT, random_inputs(*sizes), **options)


@pytest.mark.parametrize("programs", range(1, 8))
def test_stream_k_equals_attention_for_every_number_of_programs(interpreter, programs):
    """Five tiles: shares that cross requests, that split one, and programs without a tile."""
    inputs = random_inputs([5, 0, 8], 2, 1, 1, 8, 8, 8)
    assert_decodes(interpreter, STREAM, inputs, programs=programs, tile=3)


STREAM_CASES = {
    "tile that divides nothing": (([100, 3, 63], 4, 2, 1, 100, 16, 24), dict(programs=5, tile=7)),
    "tile of many steps": (([100, 63], 2, 1, 1, 100, 64, 64), dict(programs=2, tile=50)),
    "defaults": (([70], 2, 2, 2, 70, 16, 16), {}),
    "many partials of one output": (([36], 1, 1, 1, 36, 8, 8), dict(programs=18, tile=2)),
    "several queries, an empty row": (([11, 1], 4, 2, 2, 11, 16, 16), dict(programs=3, tile=4)),
    "more rows than a tile holds": (([20, 9], 34, 1, 1, 20, 16, 16), dict(programs=3, tile=8)),
    "wide float32, in slices": (([21], 2, 1, 1, 21, 200, 70), dict(programs=2, tile=8)),
}


@pytest.mark.parametrize("case", STREAM_CASES)
def test_stream_k_equals_attention(interpreter, case):
    sizes, options = STREAM_CASES[case]
    assert_decodes(interpreter, STREAM, random_inputs(*sizes), **options)


@pytest.mark.parametrize(("target", "options"), [(SPLIT, {"splits": 2}), (STREAM, {"programs": 3})])
def test_half_precision(interpreter, target, options):
    inputs = random_inputs([50, 21], 4, 2, 1, 50, 24, 16, dtype=torch.float16)
    assert_decodes(interpreter, target, inputs, tolerance=4e-3, tile=16, **options)


def test_any_layout_of_the_cache(interpreter):
    """Tokens before heads, keys and values side by side, and room for more tokens."""
    q, k, v, lengths = random_inputs([20, 13], 4, 2, 1, 20, 16, 16)
    cache = torch.cat([k, v], -1).transpose(1, 2).contiguous()
    cache = torch.cat([cache, torch.full_like(cache, torch.nan)], 1).transpose(1, 2)
    k, v = cache[..., :16], cache[..., 16:]
    assert not k.is_contiguous() and k.shape[2] == 40
    assert_decodes(interpreter, STREAM, (q, k, v, lengths), programs=3, tile=8)


def test_lengths_are_clamped_and_default_to_all(interpreter):
    q, k, v, _ = random_inputs([6, 6], 1, 1, 1, 6, 8, 8)
    wild = torch.tensor([99, -3], dtype=torch.int32)
    clamped, every = (expected(q, k, v, n)[:1] for n in (wild.clamp(0, 6), torch.tensor([6, 6])))
    for target, options in ((SPLIT, dict(splits=2)), (STREAM, dict(programs=2))):
        got = interpreter.call(target, q, k, v, wild, **options, tile=4)
        shared.assert_close(("clamped",), [got], clamped, 3e-6)
        got = interpreter.call(target, q, k, v, **options, tile=4)
        shared.assert_close(("all",), [got], every, 3e-6)


@pytest.mark.parametrize("empty", [dict(lengths=[]), dict(L=0), dict(S=0, lengths=[0])])
def test_nothing_to_do(interpreter, empty):
    sizes = dict(lengths=[3], H=2, G=1, L=1, S=3, D=8, V=4) | empty
    inputs = random_inputs(**sizes)
    out, lse = interpreter.call(STREAM, *inputs, return_lse=True)
    assert out.shape == (*inputs[0].shape[:3], 4) and lse.shape == inputs[0].shape[:3]
    assert not out.any() and (lse == -torch.inf).all()


def large_scores(q, k, v):
    from corelib.kernels.split_kv_decode import stream_k_decode

    return stream_k_decode(40 * q, 40 * k, v, programs=3, tile=8, return_lse=True)


def test_large_scores_do_not_overflow(interpreter):
    q, k, v, lengths = random_inputs([40], 1, 1, 1, 40, 16, 16)
    got = interpreter.call(f"{__file__}:large_scores", q, k, v)
    wanted = expected(40 * q, 40 * k, v, lengths)
    shared.assert_close(("out", "lse"), got, wanted, 1e-2, relative=1e-4)


@pytest.mark.counted
@pytest.mark.parametrize(
    ("target", "options", "schedule"),
    [
        (SPLIT, {"splits": 2}, fixed_split_schedule),
        (STREAM, {"programs": 5}, stream_k_schedule),
        (STREAM, {"programs": 7}, stream_k_schedule),
    ],
)
def test_moves_no_more_than_it_has_to(interpreter, target, options, schedule):
    """Every key once per group of heads, and as many partials as the schedule says."""
    from corelib.kernels.split_kv_decode import decode_bytes
    from corelib.measure import count_io

    inputs = random_inputs([64, 96], 8, 2, 1, 96, 16, 24)
    count = count_io(target, *inputs, **options, tile=16)
    partials = sum(map(len, schedule([64, 96], heads=2, tile=16, **options)))
    least = decode_bytes([64, 96], 8, 2, 1, 16, 24, partials=partials, itemsize=4)
    assert least <= count.bytes_moved <= 1.05 * least


def test_launcher_uses_declared_tiles():
    from corelib.kernels import _decode_launch as launch
    from corelib.kernels.split_kv_decode import SPECIALISATIONS

    declared = {
        (x.signature["q"], x.constexprs["BLOCK_M"], x.constexprs["BLOCK_N"], x.num_warps)
        for x in SPECIALISATIONS
        if x.kernel == "_stream_k_kernel"
    }
    kinds = {torch.float16: "*bf16", torch.bfloat16: "*bf16", torch.float32: "*fp32"}
    for dtype, kind in kinds.items():
        for rows in (1, 8, 16, 17, 33, 100):
            for width in (1, 40, 64, 80, 128, 200, 256):
                blocks = launch.blocks_for(rows, width, dtype)
                assert (kind, blocks.block_m, blocks.block_n, blocks.num_warps) in declared


BAD = {
    "splits": (lambda x: x, dict(splits=0), ValueError, "splits: expected at least 1, got 0"),
    "kind of splits": (lambda x: x, dict(splits=2.0), TypeError, "splits: expected an int"),
    "tile": (lambda x: x, dict(splits=1, tile=0), ValueError, "tile: expected at least 1"),
    "heads": (
        lambda x: (x[0][:, :3], *x[1:]), dict(splits=1), ValueError, "heads that divide q's 3",
    ),
    "floating lengths": (
        lambda x: (*x[:3], x[3].float()), dict(splits=1), TypeError, "lengths: .*int32 or int64",
    ),
    "too many lengths": (
        lambda x: (*x[:3], x[3].repeat(2)), dict(splits=1), ValueError, r"lengths: expected .*\(2,",
    ),
    "gradients": (
        lambda x: (x[0].requires_grad_(), *x[1:]), dict(splits=1), ValueError, "no backward",
    ),
    "device": (lambda x: x, dict(splits=1), ValueError, "expected CUDA tensors"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_named(case):
    change, options, error, message = BAD[case]
    inputs = change(random_inputs([3, 2], 4, 2, 1, 3, 8, 8))
    shared.assert_refused(SPLIT, inputs, error, message, **options)


def check():
    """What every mutant of the kernels has to get past."""
    from corelib.kernels.gates.cases import poisoned
    from corelib.kernels.split_kv_decode import split_kv_decode, stream_k_decode

    for sizes, decode, options in (
        (([70, 0, 5], 2, 2, 2, 72, 12, 10), stream_k_decode, dict(programs=4, tile=40)),
        (([40, 1], 4, 2, 2, 41, 12, 10), split_kv_decode, dict(splits=4, tile=15)),
        (([18], 17, 1, 1, 18, 8, 70), stream_k_decode, dict(programs=35, tile=1)),
        (([1, 3], 1, 1, 1, 3, 8, 8), stream_k_decode, dict(programs=6, tile=1)),
    ):
        inputs = random_inputs(*sizes)
        with poisoned():
            got = decode(*inputs, **options, scale=1.5, return_lse=True)
        shared.assert_close(("out", "lse"), got, expected(*inputs, scale=1.5), 1e-5)


_PADDING = "the workspace's padding rows are never read"
EQUIVALENT = {
    "_attend_output: row + lanes < rows -> (row + lanes) <= (rows)": _PADDING,
    "_attend_output: real -> ((real) == (real))": _PADDING,
    "_fixed_split_kernel: split < sharing -> (split) <= (sharing)": (
        "one more program, without keys, whose partial no output counts as its own"
    ),
    "_merge_kernel: columns < V -> (columns) <= (V)": "column V is read in vain, never written",
}


@pytest.mark.slow
def test_mutants_are_caught():
    """A sample; ``limit=None`` runs all of them in some minutes."""
    check = f"{__file__}:check"
    assert shared.survivors("split_kv_decode", check, limit=8, equivalent=EQUIVALENT) == []
