"""RAT: the dial between attention and an RNN, its ends, its layer and its hybrid."""

from __future__ import annotations

import doctest

import pytest
import torch
import torch.nn.functional as F

from corelib.linear_time import rat
from corelib.linear_time.local_attention import LocalAttention
from corelib.linear_time.rat import (
    RAT,
    RATState,
    chunk_scan,
    example,
    rat_attention,
    rat_reference,
    rat_step,
)
from corelib.linear_time.rat_hybrid import RATHybrid
from corelib.measure.work import count_work
from corelib.primitives import attention, rope_frequencies, rope_half_split
from corelib.testing import causality_probe, conformance

EXACT = dict(atol=1e-12, rtol=1e-11)
FORMS = [rat_attention, rat_reference]


def qkvg(L, H=4, G=2, D=6, B=2):
    torch.manual_seed(0)
    q, v, g = torch.randn(3, B, H, L, D, dtype=torch.float64)
    return q, torch.randn(B, G, L, D, dtype=torch.float64), v, g.sigmoid()


def weights_of_average(g, chunk):
    """``(B, H, L, L, D)``: how much of input j is in the average at t, product by product."""
    B, H, L, D = g.shape
    weights = torch.zeros(B, H, L, L, D, dtype=g.dtype)
    for t in range(L):
        for j in range(t // chunk * chunk, t + 1):
            weights[:, :, t, j] = (1 - g[:, :, j]) * g[:, :, j + 1 : t + 1].prod(2)
    return weights


def by_sums(q, k, v, g, chunk, frequencies=None):
    """The two equations with nothing but sums, one softmax row a token."""
    k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
    weights = weights_of_average(g, chunk)
    k, v = (torch.einsum("bhtjd,bhjd->bhtd", weights, x) for x in (k, v))
    if frequencies is not None:
        numbers = torch.arange(q.shape[2]) // chunk
        q, k = (rope_half_split(x, numbers, frequencies) for x in (q, k))
    rows = []
    for t in range(q.shape[2]):
        seen = [*range(chunk - 1, t // chunk * chunk, chunk), t]
        scores = torch.einsum("bhd,bhcd->bhc", q[:, :, t], k[:, :, seen]) / q.shape[-1] ** 0.5
        rows.append(torch.einsum("bhc,bhcd->bhd", scores.softmax(-1), v[:, :, seen]))
    return torch.stack(rows, 2)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("chunk", [1, 2, 5, 40])
def test_forms_equal_the_sums(form, chunk):
    for L in (1, 5, 13):
        for frequencies in (None, rope_frequencies(6)):
            out, state = form(*qkvg(L), chunk, frequencies=frequencies)
            wanted = by_sums(*qkvg(L), chunk, frequencies)
            torch.testing.assert_close(out, wanted, **EXACT)
            assert (state.position, state.ends_k.shape[2]) == (L, L // chunk)


@pytest.mark.parametrize("chunk", [1, 3, 16, 100])
def test_parallel_equals_steps_with_gradients(chunk):
    results = []
    for form in FORMS:
        leaves = [x.requires_grad_() for x in qkvg(25)]
        out, state = form(*leaves, chunk, frequencies=rope_frequencies(6), scale=0.7)
        total = out.cos().sum() + sum(x.sin().sum() for x in state[:4])
        results.append(
            [out, *state[:4], *torch.autograd.grad(total, leaves, materialize_grads=True)]
        )
    for got, wanted in zip(*results):
        torch.testing.assert_close(got, wanted, **EXACT)


def test_gradcheck():
    leaves = [x.requires_grad_() for x in qkvg(4, H=2, G=1, D=1, B=1)]
    assert torch.autograd.gradcheck(lambda *x: rat_attention(*x, 2)[0], leaves)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("chunk", [12, 1000])
def test_one_chunk_is_the_gated_average(form, chunk):
    q, k, v, g = qkvg(12)
    h, rows = torch.zeros_like(v[:, :, 0]), []
    for t in range(12):
        h = g[:, :, t] * h + (1 - g[:, :, t]) * v[:, :, t]
        rows.append(h)
    torch.testing.assert_close(form(q, k, v, g, chunk)[0], torch.stack(rows, 2), **EXACT)


@pytest.mark.parametrize("form", FORMS)
def test_chunks_of_one_without_a_gate_are_attention(form):
    q, k, v, g = qkvg(21)
    got = form(q, k, v, torch.zeros_like(g), 1, frequencies=rope_frequencies(6))[0]
    turned = [rope_half_split(x, torch.arange(21), rope_frequencies(6)) for x in (q, k)]
    turned[1] = turned[1].repeat_interleave(2, 1)
    wanted = F.scaled_dot_product_attention(*turned, v, is_causal=True)
    torch.testing.assert_close(got, wanted, **EXACT)


@pytest.mark.parametrize("form", FORMS)
def test_chunks_of_one_with_a_gate_weigh_keys_and_values(form):
    q, k, v, g = qkvg(21, G=4)
    got = form(q, k, v, g, 1)[0]
    wanted = attention(q, (1 - g) * k, (1 - g) * v, causal=True)
    torch.testing.assert_close(got, wanted, **EXACT)


@pytest.mark.parametrize("chunk", [1, 4, 7, 60])
@pytest.mark.parametrize("cut", [1, 4, 6, 15])
def test_two_calls_with_the_state_are_one(cut, chunk):
    inputs, options = qkvg(23), dict(frequencies=rope_frequencies(6))
    whole, last = rat_attention(*inputs, chunk, **options)
    first, carried = rat_attention(*(x[:, :, :cut] for x in inputs), chunk, **options)
    rest = (x[:, :, cut:] for x in inputs)
    second, end = rat_attention(*rest, chunk, state=carried, **options)
    torch.testing.assert_close(torch.cat([first, second], 2), whole, **EXACT)
    for got, wanted in zip(end, last):
        torch.testing.assert_close(got, wanted, **EXACT)


@pytest.mark.parametrize("form", FORMS)
def test_no_tokens_leave_the_state(form):
    _, state = rat_attention(*qkvg(7), 3)
    out, after = form(*qkvg(0), 3, state=state)
    assert out.shape == (2, 4, 0, 6) and after is state


def test_the_cache_grows_by_one_every_chunk():
    inputs, state, lengths, sizes = qkvg(20), None, [], []
    for t in range(20):
        row = [x[:, :, t : t + 1] for x in inputs]
        _, state = rat_attention(*row, 4, state=state)
        lengths.append(state.ends_k.shape[2])
        sizes.append(sum(x.nbytes for x in state[:4]))
    assert lengths == [t // 4 for t in range(1, 21)]
    one = 2 * 2 * 4 * 6 * 8  # k and v, rows, heads, width, bytes
    assert sizes == [one * (n + 1) for n in lengths]  # C ends and the running average


@pytest.mark.parametrize("chunk", [1, 4, 16])
def test_operations_grow_as_length_over_chunk(chunk):
    """4 H D / chunk for each pair of tokens, and nothing else that is quadratic."""

    def work(L):
        inputs = qkvg(L, H=2, G=2, D=8, B=1)
        with torch.no_grad():
            return count_work(lambda: rat_attention(*inputs, chunk))

    one, two, three = work(512), work(1024), work(1536)
    pairs = (three - 2 * two + one) / (2 * 512**2)
    assert pairs == pytest.approx(4 * 2 * 8 / chunk, rel=0.02)


def test_outputs_depend_on_their_past_and_on_all_of_it():
    q, _, v, g = qkvg(14, H=2, G=2, B=1)

    def run(x):
        heads = x.unflatten(2, (2, 6)).transpose(1, 2)
        return rat_attention(q, heads, heads, g, 4)[0].transpose(1, 2).flatten(2)

    influence = causality_probe(run, v.transpose(1, 2).flatten(2))
    assert (influence.triu(1) == 0).all() and (influence + torch.ones(14, 14).triu(1) > 0).all()


# --- the scan -------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk", [1, 3, 8, 50])
@pytest.mark.parametrize("start", [0, 2, 7])
def test_chunk_scan_by_hand(chunk, start):
    if start >= chunk:
        return
    torch.manual_seed(0)
    g, x = torch.rand(2, 2, 19, 5, dtype=torch.float64)
    h = torch.randn(2, 5, dtype=torch.float64)
    state, rows = h, []
    for t in range(19):
        h = h * ((t + start) % chunk != 0) * g[:, t] + (1 - g[:, t]) * x[:, t]
        rows.append(h)
    got = chunk_scan(g, x, chunk, state=state, start=start)
    torch.testing.assert_close(got, torch.stack(rows, 1), **EXACT)


def test_half_precision_averages_in_float32():
    inputs = [x.bfloat16() for x in qkvg(50)]
    out, state = rat_attention(*inputs, 8)
    assert (out.dtype, state.ends_v.dtype, state.v.dtype) == (torch.bfloat16,) * 2 + (
        torch.float32,
    )
    wanted = rat_reference(*(x.double() for x in inputs), 8)[0]
    torch.testing.assert_close(out.double(), wanted, atol=3e-2, rtol=2e-2)
    stepped = rat_reference(*inputs, 8)[0]
    torch.testing.assert_close(stepped.double(), wanted, atol=3e-2, rtol=2e-2)


# --- layers ---------------------------------------------------------------------------------------

LAYERS = {
    "rat": lambda: RAT(16, 4, chunk=3),
    "rat, chunks of 1": lambda: RAT(16, 4, chunk=1, groups=1),
    "rat, one chunk": lambda: RAT(16, 2, chunk=64),
    "hybrid": lambda: RATHybrid(16, 4, chunk=3, window=4, layers=3),
}


@pytest.mark.parametrize("name", LAYERS)
def test_layers_are_sequence_mixers(name):
    torch.manual_seed(0)
    conformance(LAYERS[name]().double(), torch.randn(2, 11, 16, dtype=torch.float64))


def test_the_layer_by_hand():
    torch.manual_seed(1)
    layer = RAT(16, 4, chunk=3).double()
    x = torch.randn(1, 8, 16, dtype=torch.float64)
    z, v, g, q, k = (x @ layer.enter.weight.T).split([16, 16, 16, 8, 8], -1)
    v, g = (y.unflatten(-1, (4, 4)).transpose(1, 2) for y in (v, g + layer.gate_bias))
    q, k = (y.unflatten(-1, (2, 4)).transpose(1, 2) for y in (q, k))
    mixed = by_sums(q.repeat_interleave(2, 1), k, v, g.sigmoid(), 3, rope_frequencies(4))
    wanted = (z.sigmoid() * mixed.transpose(1, 2).flatten(2)) @ layer.out.weight.T
    torch.testing.assert_close(layer(x)[0], wanted, **EXACT)


def test_shared_queries_and_keys_pay_for_the_gates():
    """With 8 heads in 2 groups: 3 C + C / 2 wide instead of q, k, v; and a bias."""
    C = 64
    count = sum(p.numel() for p in RAT(C, 8).parameters())
    assert count == C * (3 * C + C // 2) + C * C + C < 1.13 * 4 * C * C


def test_gates_start_with_memories_of_one_to_a_chunk():
    torch.manual_seed(0)
    bias = RAT(512, 4, chunk=16).gate_bias.detach()
    assert 0 <= bias.min() and bias.max() <= torch.tensor(15.0).log()
    assert bias.exp().mean().item() == pytest.approx(8, abs=0.6)  # uniform before the logarithm
    assert (RAT(16, 4, chunk=1).gate_bias == 0).all() and (RAT(16, 4, chunk=2).gate_bias == 0).all()


def test_the_hybrid_alternates_and_its_window_does_not_grow():
    hybrid = RATHybrid(16, 4, chunk=4, window=6, layers=4)
    assert [type(m) for m in hybrid.mixers] == [RAT, LocalAttention] * 2
    state = hybrid.init_state(1)
    with torch.no_grad():
        for _ in range(24):
            _, state = hybrid.step(torch.randn(1, 16), state)
    assert [len(s) if i % 2 else s.ends_k.shape[2] for i, s in enumerate(state)] == [6, 6, 6, 6]
    assert RATHybrid(16, 4).mixers[1].window == 1024


def test_example_runs():
    assert not doctest.testmod(rat).failed
    torch.testing.assert_close(*(form(**example())[0] for form in FORMS), atol=1e-6, rtol=1e-5)


BAD = {
    "v": (lambda a: a | dict(v=a["v"][:, :1]), ValueError, "q, v, g: expected one shape"),
    "k": (lambda a: a | dict(k=a["k"][:, :, :3]), ValueError, "k: expected"),
    "heads": (lambda a: a | dict(k=a["k"].repeat(1, 3, 1, 1)), ValueError, "a divisor of 2"),
    "chunk": (lambda a: a | dict(chunk=0), ValueError, "chunk: expected at least 1"),
    "kind": (lambda a: a | dict(chunk=4.0), TypeError, "chunk: expected an int"),
    "state": (
        lambda a: a | dict(state=RATState(*rat_attention(**a)[1][:4], 12)),
        ValueError,
        "state: expected shapes",
    ),
}


@pytest.mark.no_shape_checks
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_named(case, form):
    change, error, message = BAD[case]
    with pytest.raises(error, match=message):
        form(**change(example()))


@pytest.mark.no_shape_checks
def test_bad_sizes_are_named():
    x = torch.rand(1, 4, 2)
    with pytest.raises(ValueError, match="start: expected"):
        chunk_scan(x, x, 3, start=1)
    with pytest.raises(ValueError, match="g, x: expected one shape"):
        chunk_scan(x, x[:, :2], 3)
    with pytest.raises(ValueError, match="heads: expected C = 6"):
        RAT(6, 2)
    with pytest.raises(ValueError, match="groups: expected a divisor of 4"):
        RAT(16, 4, groups=3)
    with pytest.raises(ValueError, match="layers: expected at least 1"):
        RATHybrid(8, 2, layers=0)
    q, k, v, g = (x[:, :, 0] for x in qkvg(1))
    with pytest.raises(ValueError, match="q, v, g: expected"):
        rat_step(q, k, v[:, :1], g, RAT(24, 4).init_state(2))
