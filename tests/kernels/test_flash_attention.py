"""Flash attention, interpreted, against the dense reference in float64."""

from __future__ import annotations

import itertools
import pathlib

import pytest
import torch

from corelib.kernels.gates.interpreter import load_file
from corelib.primitives import attention_reference
from corelib.primitives.attention import visible_keys

shared = load_file(str(pathlib.Path(__file__).with_name("shared.py")))
FLASH = "corelib.kernels.flash_attention:flash_attention"
VARLEN = "corelib.kernels.flash_attention:flash_attention_varlen"
RUN = "corelib.kernels.gates.cases:forward_backward"


def random_inputs(B, H, G, L, S, D, V, dtype=torch.float32, seed=0):
    """``(q, k, v), (d_out, d_lse)``"""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(B, H, L, D), (B, G, S, D), (B, G, S, V), (B, H, L, V), (B, H, L)]
    q, k, v, d_out, d_lse = (torch.randn(shape, generator=generator) for shape in shapes)
    return (q.to(dtype), k.to(dtype), v.to(dtype)), (d_out.to(dtype), d_lse)


def expected(qkv, grads, **options):
    return shared.attention_with_gradients(attention_reference, qkv, grads, **options)


def assert_all_close(got, wanted, tolerance=3e-6, names=("out", "lse", "dq", "dk", "dv")):
    shared.assert_close(names, got, wanted, tolerance)


CASES = {
    "one token": ((1, 2, 1, 1, 1, 16, 16), dict(causal=True)),
    "below one block": ((1, 1, 1, 7, 5, 8, 3), dict(causal=True)),
    "causal, grouped, unequal widths": ((1, 4, 2, 33, 33, 20, 36), dict(causal=True)),
    "not causal": ((1, 1, 1, 100, 63, 16, 32), dict(causal=False)),
    "more keys than queries": ((1, 2, 1, 40, 100, 16, 16), dict(causal=True, scale=0.5)),
    "empty rows": ((1, 1, 1, 100, 63, 16, 16), dict(causal=True)),
    "no keys": ((1, 1, 1, 3, 0, 16, 16), dict(causal=False)),
    "window": ((1, 1, 1, 63, 63, 16, 16), dict(causal=True, window=7)),
    "wide window": ((1, 1, 1, 100, 100, 16, 16), dict(causal=True, window=70)),
    "window and sinks": ((1, 1, 1, 100, 100, 16, 16), dict(causal=True, window=9, sinks=19)),
    "two-sided window": ((1, 1, 1, 100, 100, 16, 16), dict(causal=False, window=40)),
    "two-sided, sinks": ((1, 1, 1, 63, 100, 16, 16), dict(causal=False, window=5, sinks=70)),
    "two-sided, empty rows": ((1, 1, 1, 100, 33, 16, 16), dict(causal=False, window=9)),
    "wide float32, in slices": ((1, 2, 1, 33, 40, 100, 70), dict(causal=True)),
}


@pytest.mark.parametrize("case", CASES)
def test_equals_reference(interpreter, case):
    sizes, options = CASES[case]
    qkv, grads = random_inputs(*sizes)
    wanted = expected(qkv, grads, **options)
    grads = shared.with_nan_for_empty_rows(grads, wanted[1])
    got = interpreter.call(RUN, FLASH, qkv, dict(**options, return_lse=True), grads)
    assert_all_close([*got[0], *got[1]], wanted)


def test_half_precision(interpreter):
    qkv, grads = random_inputs(1, 2, 1, 63, 63, 24, 24, dtype=torch.float16)
    got = interpreter.call(RUN, FLASH, qkv, dict(causal=True, return_lse=True), grads)
    assert [x.dtype for x in (*got[0], *got[1])] == [
        torch.float16, torch.float32, *[torch.float16] * 3
    ]  # fmt: skip
    assert_all_close([*got[0], *got[1]], expected(qkv, grads, causal=True), tolerance=6e-3)


def test_any_layout(interpreter):
    """Tokens before heads, and heads that are slices of one projection."""
    (q, k, v), grads = random_inputs(1, 2, 2, 20, 20, 16, 16)
    packed = torch.cat([q, k, v], -1).transpose(1, 2).contiguous().transpose(1, 2)
    views = packed.split(16, -1)
    assert not any(x.is_contiguous() for x in views)
    got = interpreter.call(RUN, FLASH, views, dict(causal=True, return_lse=True), grads)
    assert_all_close([*got[0], *got[1]], expected((q, k, v), grads, causal=True))


def large_scores(q, k, v):
    """Out and lse with scores whose exponentials overflow float32."""
    from corelib.kernels.flash_attention import flash_attention

    return flash_attention(40 * q, 40 * k, v, causal=True, return_lse=True)


def test_large_scores_do_not_overflow(interpreter):
    (q, k, v), _ = random_inputs(1, 1, 1, 40, 40, 16, 16)
    got = interpreter.call(f"{__file__}:large_scores", q, k, v)
    q, k, v = q.double(), k.double(), v.double()
    wanted = attention_reference(40 * q, 40 * k, v, causal=True, return_lse=True)
    shared.assert_close(("out", "lse"), got, wanted, 1e-2, relative=1e-4)


LENGTHS = (5, 0, 40, 1), (7, 4, 40, 0)


def packed_case(**options):
    """Arguments, gradients, and what they give sequence by sequence, tokens first."""
    (q, k, v), (d_out, d_lse) = random_inputs(1, 2, 1, sum(LENGTHS[0]), sum(LENGTHS[1]), 16, 20)
    starts = [torch.tensor([0, *itertools.accumulate(x)]) for x in LENGTHS]
    pieces = []
    for n in range(len(LENGTHS[0])):
        rows, columns = (slice(int(x[n]), int(x[n + 1])) for x in starts)
        qkv = q[:, :, rows], k[:, :, columns], v[:, :, columns]
        pieces.append(expected(qkv, (d_out[:, :, rows], d_lse[:, :, rows]), **options))
    wanted = [torch.cat(x, dim=2)[0].transpose(0, 1) for x in zip(*pieces, strict=True)]
    first = [x[0].transpose(0, 1).contiguous() for x in (q, k, v, d_out, d_lse)]
    return (*first[:3], *starts), first[3:], wanted


@pytest.mark.parametrize("options", [dict(causal=True), dict(causal=False, window=6, sinks=3)])
def test_packed_sequences_equal_each_alone(interpreter, options):
    arguments, grads, wanted = packed_case(**options)
    got = interpreter.call(RUN, VARLEN, arguments, dict(**options, return_lse=True), grads)
    assert_all_close([*got[0], *got[1]], wanted)


def in_pieces(q, k, v, d_out, d_lse, starts, order, backward=True, **options):
    """Carry the state over blocks of keys; then their gradients, block by block."""
    from corelib.kernels.flash_attention import flash_attention_carry, flash_attention_finish
    from corelib.kernels.flash_attention_backward import flash_attention_backward
    from corelib.kernels.gates.cases import poisoned

    state, q_start = None, k.shape[2] - q.shape[2]
    dq, parts = torch.zeros_like(q), {}
    with poisoned():
        for n in order:
            keys = slice(starts[n], starts[n + 1])
            place = dict(q_start=q_start, key_start=starts[n], **options)
            state = flash_attention_carry(q, k[:, :, keys], v[:, :, keys], state, **place)
        out, lse = flash_attention_finish(state)
        for n in order if backward else ():
            keys = slice(starts[n], starts[n + 1])
            place = dict(q_start=q_start, key_start=starts[n], **options)
            dq_n, *parts[n] = flash_attention_backward(
                d_out, d_lse, q, k[:, :, keys], v[:, :, keys], out, lse, **place
            )
            dq += dq_n
    if not backward:
        return out, lse
    dk, dv = (torch.cat([parts[n][i] for n in sorted(parts)], 2) for i in (0, 1))
    return out, lse, dq, dk, dv


@pytest.mark.parametrize(
    ("order", "options"),
    [
        ((0, 1, 2), dict(causal=True)),
        ((2, 0, 1), dict(causal=True, window=30, sinks=18)),
        ((1, 2, 0), dict(causal=False, window=25, sinks=30)),
    ],
)
def test_carried_state_in_pieces_equals_whole(interpreter, order, options):
    qkv, grads = random_inputs(1, 2, 1, 20, 64, 16, 20)
    pieces = f"{__file__}:in_pieces"
    got = interpreter.call(pieces, *qkv, *grads, (0, 17, 50, 64), order, **options)
    assert_all_close(got, expected(qkv, grads, **options))


@pytest.mark.counted
@pytest.mark.parametrize(
    ("L", "options"), [(128, dict(causal=True)), (160, dict(causal=True, window=17, sinks=16))]
)
def test_traffic_is_near_its_bound(interpreter, L, options):
    interpreter.call(f"{__file__}:traffic_is_near_its_bound", L, options)


def traffic_is_near_its_bound(L, options):
    """Lengths and windows end with blocks here: elsewhere, blocks stick out on either side."""
    from corelib.kernels.flash_attention import flash_attention, forward_bytes
    from corelib.measure.io_meter import io_meter

    qkv, _ = random_inputs(1, 1, 1, L, L, 16, 16)
    with io_meter() as count:
        flash_attention(*qkv, **options)
    bound = forward_bytes(1, 1, L, L, 16, 16, **options)
    assert bound <= count.bytes_moved <= 1.15 * bound


def test_bytes_of_small_cases_by_hand():
    from corelib.kernels.flash_attention import forward_bytes

    def keys_read(L, S, **options):
        rows = L * (1 + 1) + L  # queries and outputs one number wide, and the log-sum-exp
        return forward_bytes(1, 1, L, S, 1, 1, block_m=2, itemsize=4, **options) // 4 / 2 - rows / 2

    assert keys_read(4, 4, causal=False) == 4 + 4
    assert keys_read(4, 4, causal=True) == 2 + 4
    assert keys_read(2, 6, causal=True) == 6
    assert keys_read(6, 2, causal=True) == 0 + 0 + 2
    assert keys_read(6, 6, causal=True, window=1) == 2 + 2 + 2
    assert keys_read(6, 6, causal=True, window=1, sinks=1) == 2 + 3 + 3
    assert keys_read(6, 6, causal=False, window=2) == 3 + 4 + 3
    assert keys_read(6, 6, causal=False, window=1, sinks=4) == 4 + 4 + 6


def test_every_launch_is_a_declared_specialisation():
    from corelib.kernels import _flash_launch as launch
    from corelib.kernels import flash_attention, flash_attention_backward

    declared = {
        (spec.kernel, target, on.constexprs["BLOCK_M"], on.constexprs["BLOCK_N"], on.num_warps)
        for spec in flash_attention.SPECIALISATIONS + flash_attention_backward.SPECIALISATIONS
        for target in ("sm_80", "sm_90", "sm_100", "gfx942")
        for on in [spec.on(target)]
    }
    kernels = {"forward": "flash_forward", "dq": "flash_backward_dq", "dkdv": "flash_backward_dkdv"}
    for which, target, dtype, width in itertools.product(
        kernels, ("sm_80", "sm_90", "sm_100", "gfx942"),
        (torch.float16, torch.bfloat16, torch.float32), (1, 20, 64, 65, 128, 200, 256),
    ):  # fmt: skip
        tiles = launch.candidates_for(which, target, dtype, width, 16)
        if which == "dkdv":
            tiles = flash_attention_backward.tiles_for_dkdv(target, dtype, width, 16)
        for blocks in tiles:
            chosen = (blocks.block_m, blocks.block_n, blocks.num_warps)
            assert (kernels[which], target, *chosen) in declared


BAD = {
    "rank": (lambda q, k, v: (q[0], k, v), ValueError, r"q: expected \(batch, heads"),
    "dtype": (lambda q, k, v: (q, k.half(), v), TypeError, "k: expected the dtype of q"),
    "double": (lambda q, k, v: (q.double(), k, v), TypeError, "q: expected float16"),
    "width": (lambda q, k, v: (q, k[..., :8], v), ValueError, "k: expected q's batch and width"),
    "wide": (lambda q, k, v: (q, k, v.repeat(1, 1, 1, 17)), ValueError, "v: expected a width"),
    "length": (lambda q, k, v: (q, k, v[:, :, 1:]), ValueError, "v: expected k's shape"),
    "heads": (lambda q, k, v: (q, k[:, [0, 0, 0]], v[:, [0, 0, 0]]), ValueError, "heads that div"),
    "device": (lambda q, k, v: (q, k, v), ValueError, "expected CUDA tensors"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_named(case):
    change, error, message = BAD[case]
    qkv, _ = random_inputs(1, 4, 2, 3, 3, 16, 16)
    shared.assert_refused(FLASH, change(*qkv), error, message, causal=True)


@pytest.mark.parametrize(
    ("options", "message"),
    [(dict(window=0), "window: expected at least 1"), (dict(sinks=-1), "sinks: expected at least")],
)
def test_bad_options_are_named(options, message):
    from corelib.kernels.flash_attention import flash_attention

    qkv, _ = random_inputs(1, 1, 1, 2, 2, 16, 16)
    with pytest.raises(ValueError, match=message):
        flash_attention(*qkv, causal=True, **options)


@pytest.mark.parametrize("starts", [[0, 2], [1, 3], [0, 2, 1, 3], [0.0, 3.0]])
def test_bad_starts_are_named(starts):
    from corelib.kernels.flash_attention import flash_attention_varlen

    x = torch.randn(3, 1, 16)
    good = torch.tensor([0, 3])
    with pytest.raises(ValueError, match="cu_seqlens_k: expected"):
        flash_attention_varlen(x, x, x, good, torch.tensor(starts), causal=True)


def test_a_carried_state_takes_no_gradient():
    from corelib.kernels.flash_attention import flash_attention_carry

    (q, k, v), _ = random_inputs(1, 1, 1, 2, 2, 16, 16)
    with pytest.raises(ValueError, match="expected no gradient"):
        flash_attention_carry(q.requires_grad_(), k, v, causal=True, q_start=0, key_start=0)


@pytest.mark.counted
def test_bfloat16_is_refused_by_the_interpreter(interpreter):
    from corelib.kernels.gates.interpreter import KernelError

    qkv, _ = random_inputs(1, 1, 1, 2, 2, 16, 16, dtype=torch.bfloat16)
    with pytest.raises(KernelError, match="cannot compute in bfloat16"):
        interpreter.call(FLASH, *qkv, causal=True)


def check_forward():
    """What the mutants of the forward kernel have to get past."""
    from corelib.kernels.flash_attention import flash_attention, flash_attention_varlen
    from corelib.kernels.gates.cases import poisoned

    for sizes, options in (
        ((1, 4, 2, 40, 33, 12, 10), dict(causal=True)),
        ((2, 1, 1, 20, 37, 16, 16), dict(causal=False, window=20, sinks=35)),
    ):
        qkv, grads = random_inputs(*sizes)
        with poisoned():
            got = flash_attention(*qkv, **options, return_lse=True)
        assert_all_close(got, expected(qkv, grads, **options)[:2], names=("out", "lse"))
    arguments, _, wanted = packed_case(causal=True)
    with poisoned():
        got = flash_attention_varlen(*arguments, causal=True, return_lse=True)
    assert_all_close(got, wanted[:2], names=("out", "lse"))
    qkv, grads = random_inputs(2, 2, 1, 33, 40, 16, 20)
    got = in_pieces(*qkv, *grads, (0, 17, 40), (1, 0), backward=False, causal=True)
    assert_all_close(got, expected(qkv, grads, causal=True)[:2], names=("out", "lse"))


def check_backward():
    """What the mutants of the backward kernels have to get past."""
    from corelib.kernels.gates.cases import forward_backward

    for sizes, options in (
        ((1, 4, 2, 37, 20, 12, 10), dict(causal=True)),
        ((2, 1, 1, 20, 50, 16, 16), dict(causal=False, window=20, sinks=19)),
    ):
        qkv, grads = random_inputs(*sizes)
        wanted = expected(qkv, grads, **options)
        grads = shared.with_nan_for_empty_rows(grads, wanted[1])
        got = forward_backward(FLASH, qkv, dict(**options, return_lse=True), grads)
        assert_all_close([*got[0], *got[1]], wanted)
    arguments, grads, wanted = packed_case(causal=True)
    got = forward_backward(VARLEN, arguments, dict(causal=True, return_lse=True), grads)
    assert_all_close([*got[0], *got[1]], wanted)


def check_blocks():
    """What the mutants of the shared tiles and block ranges have to get past."""
    from corelib.kernels.gates.cases import forward_backward
    from corelib.measure.io_meter import io_meter

    for (L, S, D, V), options in (
        ((80, 80, 16, 16), dict(causal=True, window=9, sinks=19)),
        ((128, 128, 16, 16), dict(causal=False, window=9, sinks=64)),
        ((112, 112, 16, 16), dict(causal=False, window=40, sinks=63)),
        ((96, 96, 16, 16), dict(causal=True, window=60, sinks=15)),
        ((40, 33, 16, 16), dict(causal=True)),
        ((32, 32, 12, 10), dict(causal=False)),
        ((17, 20, 70, 20), dict(causal=False)),
    ):
        qkv, grads = random_inputs(1, 1, 1, L, S, D, V)
        with io_meter() as count:
            got = forward_backward(FLASH, qkv, dict(**options, return_lse=True), grads)
        assert_all_close([*got[0], *got[1]], expected(qkv, grads, **options))
        if D <= 64:  # else each dot is taken in slices
            assert count.dots == 9 * tiles_with_something_visible(L, S, options)


def tiles_with_something_visible(L, S, options, rows=32, columns=16):
    """Counted on the dense mask. Forward takes 2 dots a tile, dq 3, dk and dv 4."""
    seen = torch.zeros(-(-L // rows) * rows, -(-S // columns) * columns, dtype=torch.bool)
    seen[:L, :S] = visible_keys(L, S, **options)
    tiles = seen.unflatten(0, (-1, rows)).unflatten(2, (-1, columns))
    return int(tiles.any(3).any(1).sum())


@pytest.mark.counted
def test_blocks_that_cannot_be_seen_are_never_read(interpreter):
    interpreter.call(f"{__file__}:check_blocks")


MASKED_FOR_NOTHING = "blocks that need no mask get one: slower, nothing else"
EQUIVALENT = {
    "flash_attention": {
        "flash_forward: first >= L -> (first) > (L)": "a program without rows writes nothing",
    },
    "flash_attention_backward": {
        "flash_backward_dq: first >= L -> (first) > (L)": "a program without rows writes nothing",
        "flash_backward_dkdv: start >= S -> (start) > (S)": "a program without keys writes nothing",
    },
    "_shared": {
        "query_blocks: last < sinks -> ((last < sinks) != (last < sinks))": MASKED_FOR_NOTHING,
        "query_blocks: full_hi >= L -> ((full_hi >= L) != (full_hi >= L))": MASKED_FOR_NOTHING,
        "query_blocks: full_hi >= L -> (full_hi) > (L)": MASKED_FOR_NOTHING,
        "query_blocks: tl.cdiv(L, BLOCK) -> ((L) // (BLOCK))": MASKED_FOR_NOTHING,
    },
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("module", "check", "limit"),
    [
        ("flash_attention", "check_forward", 4),
        ("flash_attention_backward", "check_backward", 3),
        ("_shared", "check_blocks", 2),
    ],
)
def test_mutants_are_caught(module, check, limit):
    """A sample, spread over the source; ``limit=None`` runs them all in some minutes."""
    options = dict(limit=limit, equivalent=EQUIVALENT[module])
    assert shared.survivors(module, f"{__file__}:{check}", **options) == []
