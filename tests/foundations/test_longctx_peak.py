"""The four bills of a long context: the paper's figures, by hand, and from a real cache."""

from __future__ import annotations

import doctest
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from corelib.catalog import find
from corelib.foundations import longctx_peak
from corelib.foundations.longctx_peak import (
    DIMENSIONS,
    TAXONOMY,
    Entry,
    FourMetrics,
    Sessions,
    Shrink,
    Span,
    compare,
    concurrency,
    decode_seconds,
    example,
    four_metrics,
    kv_bytes,
    prefill_flops,
    session_sim,
    switch_seconds,
)
from corelib.foundations.model_shapes import MODELS, ModelSpec, Server
from corelib.models.cache import DenseCache
from corelib.models.decoder import Decoder, DecoderConfig

YI = MODELS["yi-34b-200k"]
A100 = example()["server"]
BILLS = FourMetrics._fields


def test_doctest():
    assert doctest.testmod(longctx_peak).failed == 0


# --- the paper's running case ---------------------------------------------------------------------


def test_bytes_of_a_token():
    assert kv_bytes(YI, 1) == 2 * 60 * 8 * 128 * 2 == 245_760
    assert kv_bytes(YI, 100_000) == 24_576_000_000  # 22.9 GiB; the paper has 22.8
    assert kv_bytes(YI, 100_000) / 2**30 == pytest.approx(22.8, rel=0.01)


def test_users_of_one_a100():
    assert concurrency(YI, A100, 4096) == 17 and concurrency(YI, A100, 50_000) == 1
    assert concurrency(YI, A100, 100_000) == 0
    assert concurrency(YI, replace(A100, memory=YI.parameters), 1) == 0  # not even the weights


def test_prefill_of_4k_is_0_89_s_without_attention():
    weights = dict(n=4096, attended=float("inf"))
    assert prefill_flops(YI, **weights) / A100.flops == pytest.approx(0.89, rel=0.02)
    assert prefill_flops(YI, 50_000, float("inf")) / A100.flops == pytest.approx(11.0, rel=0.01)
    assert prefill_flops(YI, 50_000) / A100.flops == pytest.approx(17.9, rel=0.01)


def test_attention_operations_are_half_of_the_square():
    """Each pair of a query and a key before it: a product for the score, one for the value."""
    n, each = 200, 4 * YI.heads * YI.head_width
    pairs = sum(i + 0.5 for i in range(n)) * YI.layers
    assert prefill_flops(YI, n) == 2 * n * YI.parameters + each * pairs


def test_an_answer_of_250_tokens():
    assert decode_seconds(YI, A100, 4000) == pytest.approx(8.6, rel=0.02)
    assert decode_seconds(YI, A100, 50_000) == pytest.approx(10.0, rel=0.02)
    step = (2 * YI.parameters + kv_bytes(YI, 4000)) / A100.bandwidth
    assert decode_seconds(YI, A100, 4000) == pytest.approx(250 * step)


def test_weights_are_read_once_for_all_users():
    alone, both = (decode_seconds(YI, A100, 4000, users=users) for users in (1, 2))
    assert both - alone == pytest.approx(250 * kv_bytes(YI, 4000) / A100.bandwidth)
    mixtral = MODELS["mixtral-8x7b"]
    step = mixtral.active_parameters * 2 + kv_bytes(mixtral, 1)
    assert decode_seconds(mixtral, A100, 1, 1) == pytest.approx(step / A100.bandwidth)
    step = mixtral.parameters * 2 + 2 * kv_bytes(mixtral, 1)
    assert decode_seconds(mixtral, A100, 1, 1, users=2) == pytest.approx(step / A100.bandwidth)


def test_a_context_switch():
    assert switch_seconds(YI, A100, 50_000) == pytest.approx(1.2288)


def test_four_metrics_are_the_four():
    metrics = four_metrics(YI, A100, 50_000, 100)
    assert metrics == FourMetrics(
        1,
        prefill_flops(YI, 50_000) / A100.flops,
        decode_seconds(YI, A100, 50_000, 100),
        switch_seconds(YI, A100, 50_000),
    )


# --- against a model that runs --------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 7, 20])
def test_bytes_of_a_real_cache(n):
    config = DecoderConfig(vocab=64, width=24, layers=3, heads=4, kv_heads=2, head_width=6)
    cache = DenseCache()
    with torch.no_grad():
        Decoder(config)(torch.zeros(1, n, dtype=torch.long), cache)
    spec = ModelSpec.of(config, "tiny", tied=True, kv_itemsize=4)
    assert kv_bytes(spec, n) == cache.bytes()


# --- compression ----------------------------------------------------------------------------------

ratios = st.integers(1, 64)


@settings(deadline=None, max_examples=40)
@given(ratio=ratios, n=st.integers(1, 200_000))
def test_a_smaller_cache(ratio, n):
    entry = Entry("all but attention", "hidden", ("concurrency", "decode", "switch"), "")
    before, after = (four_metrics(YI, A100, n, shrink=entry.shrink(r)) for r in (1, ratio))
    assert after.switch == pytest.approx(before.switch / ratio)
    assert after.prefill == before.prefill
    weights = 250 * 2 * YI.parameters / A100.bandwidth
    assert after.decode - weights == pytest.approx((before.decode - weights) / ratio, abs=1e-9)
    room = (A100.memory - 2 * YI.parameters) / kv_bytes(YI, n)
    assert ratio * before.concurrency <= after.concurrency <= ratio * (before.concurrency + 1)
    assert after.concurrency == pytest.approx(ratio * room, abs=1)


def test_half_of_the_kv_heads_halves_the_cache_but_not_the_attention():
    half = replace(YI, kv_heads=4)
    assert 2 * kv_bytes(half, 1000) == kv_bytes(YI, 1000)
    fewer = YI.parameters - half.parameters  # the projections of keys and values
    assert prefill_flops(YI, 1000) - prefill_flops(half, 1000) == 2 * 1000 * fewer


@pytest.mark.parametrize("bill", BILLS)
def test_each_bill_is_moved_alone(bill):
    shrunk = four_metrics(YI, A100, 50_000, shrink=Entry("", "token", (bill,), "").shrink(8))
    full = four_metrics(YI, A100, 50_000)
    moved = {name for name in BILLS if getattr(shrunk, name) != getattr(full, name)}
    assert moved == {bill}
    assert (shrunk.concurrency > full.concurrency) == (bill == "concurrency")


def test_taxonomy_is_well_formed_and_leads_to_papers():
    assert {entry.dimension for entry in TAXONOMY} == set(DIMENSIONS)
    assert len({entry.name for entry in TAXONOMY}) == len(TAXONOMY)
    for entry in TAXONOMY:
        assert entry.moves and list(entry.moves) == sorted(entry.moves, key=BILLS.index), entry.name
        assert bool(entry.slug) != bool(entry.arxiv), entry.name
        if entry.slug:
            assert entry.slug == find(entry.slug).slug and entry.name in _names(find(entry.slug))


def _names(row):
    """A title has the method's name in it, or the slug has."""
    return row.title + {
        "longgen": "LongGen", "tokenselect": "TokenSelect", "mikv": "MiKV",
        "recycled_attention": "Recycled Attention", "infllm": "InfLLM",
    }.get(row.slug, "")  # fmt: skip


def test_compare_runs_every_method():
    bills = compare(YI, A100, 50_000, 4)
    assert list(bills) == [entry.name for entry in TAXONOMY]
    full = four_metrics(YI, A100, 50_000)
    for entry in TAXONOMY:
        moved = {name for name in BILLS if getattr(bills[entry.name], name) != getattr(full, name)}
        assert moved == set(entry.moves), entry.name
    assert bills["KIVI"].switch == pytest.approx(full.switch / 4)


# --- sessions -------------------------------------------------------------------------------------

#: One token of cache is 8 bytes; prefilling n tokens takes about 3 s, an answer 2 s, a swap 4 s.
TOY = ModelSpec("toy", 1, 2, 1, 1, 1, 1, 1)


def toy_server(room: int, n: int = 100) -> Server:
    cache, weights = kv_bytes(TOY, n), 2 * TOY.parameters
    return Server(
        "toy", memory=weights + room * cache, bandwidth=weights + cache,
        flops=prefill_flops(TOY, n) / 3, host_link=cache / 2,
    )  # fmt: skip


def test_one_user_waits_for_nobody():
    spans, seconds, switches = session_sim(TOY, toy_server(1), 100, 1, rounds=2, tokens=2, think=10)
    assert switches == 0 and seconds == pytest.approx(3 + 2 + 10 + 2)
    assert [span.kind for span in spans] == ["prefill", "answer", "answer"]
    assert spans[2] == Span(0, "answer", pytest.approx(15), pytest.approx(17))


def test_two_users_in_room_for_one_are_swapped():
    """By hand: 1 is evicted for 0 and back; the first to be evicted goes out without a return."""
    spans, seconds, switches = session_sim(TOY, toy_server(1), 100, 2, rounds=2, tokens=2, think=9)
    by_hand = [
        (0, "prefill", 0, 3), (0, "answer", 3, 5),
        (1, "switch", 5, 7), (1, "prefill", 7, 10), (1, "answer", 10, 12),
        (0, "switch", 14, 18), (0, "answer", 18, 20),  # 1 out, 0 in; then 0 is done
        (1, "switch", 21, 23), (1, "answer", 23, 25),  # into free room: 1 in
    ]  # fmt: skip
    assert [(s.user, s.kind) for s in spans] == [step[:2] for step in by_hand]
    assert [s.start for s in spans] == pytest.approx([step[2] for step in by_hand])
    assert [s.stop for s in spans] == pytest.approx([step[3] for step in by_hand])
    assert switches == 3 and seconds == pytest.approx(25)


def test_the_least_recently_used_goes():
    """Room for two of three: everybody comes in turn, so that each return needs a swap."""
    run = session_sim(TOY, toy_server(2), 100, 3, rounds=2, tokens=2, think=100)
    assert [s.user for s in run.spans if s.kind == "switch"] == [2, 0, 1]


@settings(deadline=None, max_examples=40)
@given(
    room=st.integers(1, 4),
    users=st.integers(1, 7),
    rounds=st.integers(1, 4),
    think=st.floats(0, 50),
)
def test_sessions_are_complete_and_one_at_a_time(room, users, rounds, think):
    run = session_sim(TOY, toy_server(room), 100, users, rounds=rounds, tokens=2, think=think)
    assert isinstance(run, Sessions) and run.spans[-1].stop == run.seconds
    for before, after in zip(run.spans, run.spans[1:], strict=False):
        assert before.start < before.stop <= after.start
    kinds = [span.kind for span in run.spans]
    assert kinds.count("prefill") == users and kinds.count("answer") == users * rounds
    assert run.switches == kinds.count("switch")
    assert run.switches == 0 or users > room
    if users > room and rounds > 1:
        assert run.switches > 0
    for user in range(users):
        ends = [span for span in run.spans if span.user == user and span.kind != "prefill"]
        answers = [span for span in ends if span.kind == "answer"]
        starts = [
            min(s.start for s in ends if before.stop <= s.start <= after.start)
            for before, after in zip(answers, answers[1:], strict=False)
        ]
        assert all(
            start - before.stop > think - 1e-9
            for start, before in zip(starts, answers, strict=False)
        )


def test_a_smaller_cache_ends_the_swapping():
    smaller = Shrink(stored=2, read=2, moved=2)
    options = dict(n=100, users=2, tokens=2, think=9)
    full = session_sim(TOY, toy_server(1), **options)
    half = session_sim(TOY, toy_server(1), **options, shrink=smaller)
    assert half.switches == 0 < full.switches and half.seconds < full.seconds


# --- bad input ------------------------------------------------------------------------------------


@pytest.mark.no_shape_checks
@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: kv_bytes(YI, 0), ValueError, "n: expected at least 1, got 0"),
        (lambda: kv_bytes(YI, 4e3), TypeError, "n: expected an int, got float"),
        (lambda: decode_seconds(YI, A100, 1, 0), ValueError, "tokens: expected at least 1"),
        (lambda: decode_seconds(YI, A100, 1, users=0), ValueError, "users: expected at least 1"),
        (
            lambda: four_metrics(YI, A100, 1, shrink=Shrink(read=0)),
            ValueError, "read: expected a positive number, got 0",
        ),
        (
            lambda: session_sim(YI, A100, 100_000, 1),
            ValueError, "n: expected a context that fits beside the weights, got 100000",
        ),
        (lambda: session_sim(YI, A100, 1, 1, rounds=0), ValueError, "rounds: expected at least 1"),
        (
            lambda: session_sim(YI, A100, 1, 1, think=-1),
            ValueError, "think: expected seconds, got -1",
        ),
    ],
)  # fmt: skip
def test_bad_input_is_named(call, error, message):
    with pytest.raises(error, match=message):
        call()
