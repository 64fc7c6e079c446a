"""LeanAttention: exact for every schedule, and the schedule is what the paper says it is."""

from __future__ import annotations

import doctest

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from corelib.foundations import lean_attention
from corelib.foundations.lean_attention import (
    Partial,
    Piece,
    example,
    fa2_schedule,
    fixed_split_schedule,
    identity,
    lean_decode,
    lean_decode_reference,
    makespan,
    merge,
    modelled_decode_time,
    occupancy,
    stream_k_schedule,
    timeline,
)
from corelib.measure import peak_memory
from corelib.primitives import merge_partials

EXACT = dict(atol=1e-10, rtol=1e-10)
FORMS = [lean_decode, lean_decode_reference]


def random_inputs(lengths, H=4, G=2, L=1, S=None, D=8, V=6, dtype=torch.float64, seed=0):
    """Caches with NaN behind each request's length."""
    generator = torch.Generator().manual_seed(seed)
    B, S = len(lengths), max(lengths, default=0) if S is None else S
    q, k, v = (
        torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
        for shape in [(B, H, L, D), (B, G, S, D), (B, G, S, V)]
    )
    for b, n in enumerate(lengths):
        k[b, :, n:], v[b, :, n:] = torch.nan, torch.nan
    return q, k, v, torch.tensor(lengths, dtype=torch.int64)


def by_torch(q, k, v, lengths, scale=None):
    """PyTorch's attention, request by request, with the mask written out; empty rows are zeros."""
    L, parts = q.shape[2], []
    for b, n in enumerate(lengths.tolist()):
        mask = torch.arange(n)[None, :] <= torch.arange(n - L, n)[:, None]
        one = F.scaled_dot_product_attention(
            q[b : b + 1], k[b : b + 1, :, :n], v[b : b + 1, :, :n],
            attn_mask=mask, scale=scale, enable_gqa=True,
        )  # fmt: skip
        parts.append(one.masked_fill(~mask.any(-1)[:, None], 0.0))
    return torch.cat(parts)


def by_softmax(q, k, v, lengths):
    """The log-sum-exp, the long way."""
    L, heads = q.shape[2], q.shape[1] // k.shape[1]
    lse = torch.full(q.shape[:3], -torch.inf, dtype=q.dtype)
    for b, n in enumerate(lengths.tolist()):
        for i in range(max(0, L - n), L):
            seen = k[b, :, : n - L + i + 1].repeat_interleave(heads, 0)
            lse[b, :, i] = (seen @ q[b, :, i, :, None]).mul(q.shape[-1] ** -0.5).logsumexp((1, 2))
    return lse


# --- equal to full attention ----------------------------------------------------------------------


@pytest.mark.parametrize("tile", [1, 3, 4, 7, 64])
def test_equals_full_attention_for_every_number_of_programs(tile):
    inputs = random_inputs([5, 0, 1, 3])
    wanted = by_torch(*inputs), by_softmax(*inputs)
    tiles = sum(len(pieces) for pieces in stream_k_schedule([5, 0, 1, 3], 2, tile, 10_000))
    for programs in range(1, tiles + 3):
        for form in FORMS:
            got = form(*inputs, programs=programs, tile=tile, return_lse=True)
            torch.testing.assert_close(got, wanted, **EXACT)


CASES = {
    "one token": dict(lengths=[1]),
    "one head": dict(lengths=[63], H=1, G=1),
    "a group per head": dict(lengths=[9, 20], H=3, G=3),
    "one group": dict(lengths=[100, 100], H=4, G=1),
    "room for more": dict(lengths=[5, 5], S=12),
    "several queries": dict(lengths=[40, 17], L=3),
    "rows without a key": dict(lengths=[2, 30, 0], L=4),
    "as many queries as keys": dict(lengths=[5], L=5),
    "values wider than keys": dict(lengths=[33, 2], D=3, V=10),
    "equal widths": dict(lengths=[33, 2, 0], D=8, V=8),
}


@pytest.mark.parametrize("programs", [1, 3, 8])
@pytest.mark.parametrize("case", CASES)
def test_both_forms_equal_full_attention(case, programs):
    inputs = random_inputs(**CASES[case])
    wanted = by_torch(*inputs), by_softmax(*inputs)
    for form in FORMS:
        got = form(*inputs, programs=programs, tile=4, return_lse=True)
        torch.testing.assert_close(got, wanted, **EXACT)


def test_own_scale_and_all_keys_by_default():
    q, k, v, lengths = random_inputs([13, 13])
    for form in FORMS:
        torch.testing.assert_close(
            form(q, k, v, scale=0.3), by_torch(q, k, v, lengths, scale=0.3), **EXACT
        )


def test_example():
    arguments = example()
    torch.testing.assert_close(lean_decode(**arguments), lean_decode_reference(**arguments))
    assert doctest.testmod(lean_attention).failed == 0


@pytest.mark.parametrize("programs", [1, 4])
def test_layouts_that_cannot_be_folded(programs):
    """Tokens before heads, and the heads of one request apart from the next one's."""
    q, k, v, lengths = random_inputs([24, 24], V=8)
    wanted = lean_decode_reference(q, k, v, lengths)
    tokens_first = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (k, v)]
    apart = [torch.cat([x, x], 1)[:, :2] for x in (k, v)]
    for keys, values in (tokens_first, apart):
        assert not keys.is_contiguous()
        got = lean_decode(q, keys, values, lengths, programs=programs, tile=4)
        torch.testing.assert_close(got, wanted, **EXACT)


@pytest.mark.parametrize("lengths", [None, torch.tensor([4096, 900])])
@pytest.mark.parametrize("programs", [1, 8])
def test_no_key_is_copied(programs, lengths):
    q, k, v, _ = random_inputs([4096, 4096], V=8)
    apart = [torch.cat([x, x], 1)[:, :2] for x in (k, v)]  # heads of requests that cannot be folded
    for keys, values in ((k, v), apart):
        used = peak_memory(
            lambda keys=keys, values=values: lean_decode(
                q, keys, values, lengths, programs=programs, tile=64
            )
        )
        assert used < keys.nbytes / 8


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("programs", [1, 4])
def test_lower_precision(dtype, programs):
    q, k, v, lengths = random_inputs([50, 33], V=8, dtype=dtype)
    wanted = by_torch(q.double(), k.double(), v.double(), lengths)
    tolerance = 4 * torch.finfo(dtype).eps
    for form in FORMS:
        out, lse = form(q, k, v, lengths, programs=programs, tile=8, return_lse=True)
        assert out.dtype == dtype and lse.dtype == torch.float32
        torch.testing.assert_close(out.double(), wanted, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("sizes", [dict(lengths=[12, 5], L=2), dict(lengths=[16, 16], V=8)])
@pytest.mark.parametrize("programs", [1, 4])
def test_gradients(sizes, programs):
    *qkv, lengths = random_inputs(**sizes)
    qkv = [x.nan_to_num().requires_grad_() for x in qkv]
    grads = []
    for form in FORMS:
        out, lse = form(*qkv, lengths, programs=programs, tile=4, return_lse=True)
        total = out.square().sum() + lse.sin().sum()
        grads.append(torch.autograd.grad(total, qkv))
    torch.testing.assert_close(*grads, **EXACT)


@pytest.mark.parametrize(
    "sizes", [dict(lengths=[]), dict(lengths=[3, 2], L=0), dict(lengths=[0, 0]), dict(lengths=[0])]
)
def test_nothing_to_attend_to(sizes):
    inputs = random_inputs(**sizes)
    for form in FORMS:
        out, lse = form(*inputs, return_lse=True)
        assert out.shape == (*inputs[0].shape[:3], 6) and not out.any()
        assert lse.shape == out.shape[:3] and (lse == -torch.inf).all()


# --- merging --------------------------------------------------------------------------------------


def random_partials(count):
    """With one that saw no key, and peaks too far apart for exponentials."""
    generator = torch.Generator().manual_seed(0)
    for i in range(count):
        peak, total, weighted = (
            torch.randn(shape, generator=generator, dtype=torch.float64)
            for shape in [(3,), (3,), (3, 4)]
        )
        yield Partial(peak * 10.0 ** (i % 4), total.abs(), weighted)
    yield identity((3,), 4, like=weighted)


def test_merge_is_associative_commutative_and_has_an_identity():
    partials = list(random_partials(5))
    nothing = partials[-1]
    for a in partials:
        torch.testing.assert_close(merge(a, nothing), a, rtol=0, atol=0)
        torch.testing.assert_close(merge(nothing, a), a, rtol=0, atol=0)
        for b in partials:
            torch.testing.assert_close(merge(a, b), merge(b, a), **EXACT)
            for c in partials:
                torch.testing.assert_close(merge(merge(a, b), c), merge(a, merge(b, c)), **EXACT)


def test_merge_is_merge_partials_before_normalising():
    def normalised(partial):
        return partial.weighted / partial.total[..., None], partial.peak + partial.total.log()

    for a in list(random_partials(4))[:-1]:
        for b in list(random_partials(4))[:-1]:
            wanted = merge_partials(*normalised(a), *normalised(b))
            torch.testing.assert_close(normalised(merge(a, b)), wanted, **EXACT)


# --- the schedule ---------------------------------------------------------------------------------

workloads = st.fixed_dictionaries(
    dict(
        lengths=st.lists(st.integers(0, 40), min_size=1, max_size=5),
        heads=st.integers(1, 4),
        tile=st.integers(1, 9),
    )
)


def tiles_in_order(schedule):
    return [
        (request, head, tile)
        for pieces in schedule
        for request, head, first, stop in pieces
        for tile in range(first, stop)
    ]


@settings(deadline=None, max_examples=40)
@given(workloads, st.integers(1, 50))
def test_every_tile_once_in_equal_shares_with_few_partials(work, count):
    every = [
        (request, head, tile)
        for request, n in enumerate(work["lengths"])
        for head in range(work["heads"])
        for tile in range(-(-n // work["tile"]))
    ]
    for schedule in (
        stream_k_schedule(**work, programs=count),
        fixed_split_schedule(**work, splits=count),
        fa2_schedule(**work),
    ):
        assert tiles_in_order(schedule) == every
        assert all(piece.first < piece.stop for pieces in schedule for piece in pieces)
    schedule = stream_k_schedule(**work, programs=count)
    loads = [sum(piece.stop - piece.first for piece in pieces) for pieces in schedule]
    assert len(loads) == count and max(loads) - min(loads) <= 1
    outputs = len(work["lengths"]) * work["heads"]
    assert sum(map(len, schedule)) <= outputs + count - 1


@pytest.mark.parametrize("splits", [1, 2, 3, 6])
def test_equal_lengths_are_the_older_schedules(splits):
    work = dict(lengths=[12, 12, 12], heads=2, tile=2)  # 6 outputs of 6 tiles
    stream = stream_k_schedule(**work, programs=6 * splits)
    assert stream == fixed_split_schedule(**work, splits=splits)
    assert (stream == fa2_schedule(**work)) == (splits == 1)


def test_programs_cross_from_output_to_output():
    assert stream_k_schedule([5, 3], heads=1, tile=1, programs=3) == [
        [Piece(0, 0, 0, 2)],
        [Piece(0, 0, 2, 5)],
        [Piece(1, 0, 0, 3)],
    ]
    assert stream_k_schedule([5, 3], heads=1, tile=1, programs=2)[1] == [
        Piece(0, 0, 4, 5), Piece(1, 0, 0, 3),
    ]  # fmt: skip


def test_splits_beyond_the_tiles_have_nothing():
    assert fixed_split_schedule([2], 1, 1, 3) == [[Piece(0, 0, 0, 1)], [Piece(0, 0, 1, 2)], []]


@settings(deadline=None, max_examples=40)
@given(workloads, st.integers(1, 12), st.integers(1, 12))
def test_no_schedule_beats_stream_k(work, processors, splits):
    stream = stream_k_schedule(**work, programs=processors)
    tiles = len(tiles_in_order(stream))
    assert makespan(stream, processors) == -(-tiles // processors)
    assert makespan(stream, processors) <= makespan(fa2_schedule(**work), processors)
    assert makespan(stream, processors) <= makespan(
        fixed_split_schedule(**work, splits=splits), processors
    )
    if tiles:
        best = tiles / (processors * -(-tiles // processors))
        assert occupancy(stream, processors) == pytest.approx(best)


def test_makespan_of_a_wave_and_a_bit():
    """Five outputs of four tiles on four processors: the fifth starts when the rest are done."""
    work = dict(lengths=[8], heads=5, tile=2)
    assert makespan(fa2_schedule(**work), 4) == 8 and occupancy(fa2_schedule(**work), 4) == 5 / 8
    stream = stream_k_schedule(**work, programs=4)
    assert makespan(stream, 4) == 5 and occupancy(stream, 4) == 1
    # Four outputs are shared by two programs each: four merges of two partials, side by side.
    assert sum(map(len, stream)) == 8
    assert makespan(stream, 4, merge_cost=0.25) == 5.5
    assert occupancy(stream, 4, merge_cost=0.25) == 20 / (4 * 5.5)
    assert makespan(fa2_schedule(**work), 4, merge_cost=0.25) == 8  # nothing to merge
    slots = timeline(fa2_schedule(**work), 4)
    assert [(slot.processor, slot.start, slot.stop) for slot in slots] == [
        (0, 0, 4), (1, 0, 4), (2, 0, 4), (3, 0, 4), (0, 4, 8),
    ]  # fmt: skip


class Device:
    bandwidth, sms = 1000.0, 2


def test_modelled_time_is_bytes_over_bandwidth_when_all_are_busy():
    work = dict(lengths=[64], heads=4, tile=16)  # 16 tiles of 16 keys, 2 x 8 numbers of 2 bytes
    shape = dict(tile=16, rows=1, D=8, resident=2)
    full = modelled_decode_time(fa2_schedule(**work), Device(), **shape)
    assert full == pytest.approx(16 * 16 * 16 * 2 / 1000)
    halved = modelled_decode_time(fa2_schedule(**work | dict(heads=2)), Device(), **shape)
    assert halved == pytest.approx(full)  # half of the bytes, half of the processors
    stream = stream_k_schedule(**work | dict(heads=2), programs=4)
    merged = 2 * 8 * 10 / 1000 * 4  # each output has two partials of 8 + 2 float32, written, read
    lean = modelled_decode_time(stream, Device(), **shape)
    assert lean == pytest.approx(full / 2 + merged)


# --- bad input ------------------------------------------------------------------------------------

BAD = {
    "rank": (lambda a: a | dict(q=a["q"][0]), ValueError, "q: expected 4 axes"),
    "heads": (lambda a: a | dict(q=a["q"][:, :3]), ValueError, "divides q's 3 heads"),
    "widths": (lambda a: a | dict(k=a["k"][..., :5]), ValueError, "k: expected the width of q"),
    "dtype": (lambda a: a | dict(k=a["k"].double()), TypeError, "k: expected the dtype of q"),
    "programs": (lambda a: a | dict(programs=0), ValueError, "programs: expected at least 1"),
    "tile": (lambda a: a | dict(tile=2.5), TypeError, "tile: expected an int, got float"),
    "lengths' dtype": (
        lambda a: a | dict(lengths=a["lengths"].float()), TypeError, "lengths: .*int32 or int64",
    ),
    "lengths' shape": (
        lambda a: a | dict(lengths=a["lengths"][:2]), ValueError, r"lengths: expected shape \(3,\)",
    ),
    "too long": (
        lambda a: a | dict(lengths=a["lengths"] + 1), ValueError, "lengths: expected 0 to 20 keys",
    ),
}  # fmt: skip


@pytest.mark.no_shape_checks
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_named(case, form):
    change, error, message = BAD[case]
    with pytest.raises(error, match=message):
        form(**change(example()))


@pytest.mark.no_shape_checks
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(programs=0), "programs: expected at least 1, got 0"),
        (dict(heads=0), "heads: expected at least 1, got 0"),
        (dict(lengths=[3, -1]), "lengths: expected whole numbers of keys, got -1"),
    ],
)
def test_bad_schedules_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        stream_k_schedule(**(dict(lengths=[3], heads=1, tile=1, programs=1) | change))
