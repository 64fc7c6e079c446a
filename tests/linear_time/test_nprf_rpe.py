"""Kernelised attention with a relative bias: FFT, square and loop, the recurrence, the features."""

from __future__ import annotations

import doctest

import pytest
import torch
import torch.nn.functional as F

from corelib.linear_time import nprf_rpe
from corelib.linear_time.nprf_layers import CausalNPRFAttention, NPRFAttention
from corelib.linear_time.nprf_rpe import (
    decayed_attention,
    example,
    kernel_attention_rpe,
    kernel_attention_rpe_dense,
    kernel_attention_rpe_reference,
    nprf,
    prf,
)
from corelib.measure import fit_exponent, peak_memory
from corelib.primitives import linear_recurrence, toeplitz_bank
from corelib.primitives.random_features import gaussian_directions, orthogonal_directions
from corelib.primitives.toeplitz import toeplitz
from corelib.testing import conformance

EXACT = dict(atol=1e-12, rtol=1e-12)
FORMS = [kernel_attention_rpe, kernel_attention_rpe_dense]


def inputs(L, S=None, H=4, G=2, m=3, V=2, B=2, spare=0, seed=0):
    generator = torch.Generator().manual_seed(seed + L)
    S = S or L
    draw = dict(generator=generator, dtype=torch.float64)
    phi_q, phi_k = torch.rand(B, H, L, m, **draw), torch.rand(B, G, S, m, **draw)
    bias = torch.randn(H, 2 * (S + spare) - 1, **draw)
    return phi_q, phi_k, torch.randn(B, G, S, V, **draw), bias


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("L", [1, 2, 7])
def test_forms_equal_the_loop(form, L, causal):
    for given in (inputs(L), inputs(L, G=4, spare=3), inputs(L, H=3, G=1)):
        wanted = kernel_attention_rpe_reference(*given, causal=causal)
        torch.testing.assert_close(form(*given, causal=causal), wanted, **EXACT)


@pytest.mark.parametrize("causal", [False, True])
def test_queries_align_with_the_last_keys(causal):
    phi_q, phi_k, v, bias = inputs(9)
    wanted = kernel_attention_rpe_dense(phi_q, phi_k, v, bias, causal=causal)[:, :, 6:]
    for form in (kernel_attention_rpe_dense, kernel_attention_rpe_reference):
        got = form(phi_q[:, :, 6:], phi_k, v, bias, causal=causal)
        torch.testing.assert_close(got, wanted, **EXACT)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("slab", [1, 200, 1 << 19])
def test_fft_equals_the_square_with_its_gradients(slab, causal, monkeypatch):
    monkeypatch.setattr(toeplitz_bank, "SLAB", slab)
    results = []
    for form in FORMS:
        leaves = [x.requires_grad_() for x in inputs(33, spare=2)]
        out = form(*leaves, causal=causal)
        results.append([out, *torch.autograd.grad(out.cos().sum(), leaves)])
    for got, wanted in zip(*results):
        torch.testing.assert_close(got, wanted, atol=1e-11, rtol=1e-11)


@pytest.mark.parametrize("causal", [False, True])
def test_gradcheck(causal):
    leaves = [x.requires_grad_() for x in inputs(3, H=2, G=1, m=2, B=1)]
    assert torch.autograd.gradcheck(lambda *x: kernel_attention_rpe(*x, causal=causal), leaves)


def test_scipy_multiplies_by_the_same_matrix():
    linalg = pytest.importorskip("scipy.linalg")
    phi_q, phi_k, v, bias = inputs(20, H=1, G=1, B=1)
    c = bias[0].exp().numpy()
    values = torch.cat([v, torch.ones_like(v[..., :1])], -1)[0, 0]
    sums = torch.zeros_like(values)
    for f in range(phi_q.shape[-1]):
        one = (phi_k[0, 0, :, f, None] * values).numpy()
        moved = linalg.matmul_toeplitz((c[19::-1], c[19:]), one)
        sums += phi_q[0, 0, :, f, None] * torch.from_numpy(moved)
    got = kernel_attention_rpe(phi_q, phi_k, v, bias, causal=False)[0, 0]
    torch.testing.assert_close(got, sums[:, :-1] / sums[:, -1:], **EXACT)


@pytest.mark.parametrize("form", FORMS)
def test_without_a_bias_it_is_the_performer(form):
    phi_q, phi_k, v, bias = inputs(40, G=4)
    bias = torch.full_like(bias, 3.0)  # a constant leaves the quotient
    state, norm = phi_k.mT @ v, phi_k.sum(2)
    wanted = (phi_q @ state) / (phi_q @ norm[..., None])
    torch.testing.assert_close(form(phi_q, phi_k, v, bias, causal=False), wanted, **EXACT)
    causal, _ = decayed_attention(phi_q, phi_k, v, torch.zeros(4, dtype=torch.float64))
    torch.testing.assert_close(form(phi_q, phi_k, v, bias, causal=True), causal, **EXACT)


SLOPES = torch.tensor([0.5, 0.03, 2.0, 0.0], dtype=torch.float64)


def test_a_straight_line_as_bias_is_a_linear_recurrence():
    """exp(-s (i - j)) is a decay; a column of ones sums up the denominators."""
    phi_q, phi_k, v, _ = inputs(50)
    bias = SLOPES[:, None] * (torch.arange(99) - 49)  # the distance j - i is negative
    keys, values = (x.repeat_interleave(2, 1) for x in (phi_k, v))
    log_decay = -SLOPES[:, None].expand(2, 4, 50)
    values = torch.cat([values, torch.ones_like(values[..., :1])], -1)
    options = dict(log_decay=log_decay, scale=1.0, form="reference")
    sums = linear_recurrence(phi_q, keys, values, **options)
    wanted = sums[..., :-1] / sums[..., -1:]
    for form in FORMS:
        got = form(phi_q, phi_k, v, bias, causal=True)
        torch.testing.assert_close(got, wanted, atol=1e-11, rtol=1e-11)
    torch.testing.assert_close(decayed_attention(phi_q, phi_k, v, SLOPES)[0], wanted, **EXACT)


def test_and_its_state_carries_on_without_growing():
    phi_q, phi_k, v, _ = inputs(30)
    whole, last = decayed_attention(phi_q, phi_k, v, SLOPES)
    outs, state = [], None
    for t in range(30):
        now = (x[:, :, t : t + 1] for x in (phi_q, phi_k, v))
        out, state = decayed_attention(*now, SLOPES, state)
        outs.append(out)
        assert state.shape == (2, 4, 3, 3)
    torch.testing.assert_close(torch.cat(outs, 2), whole, **EXACT)
    torch.testing.assert_close(state, last, **EXACT)


def test_many_features_become_softmax_of_unit_vectors():
    generator = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, 1, 1, 12, 4, generator=generator, dtype=torch.float64)
    bias = torch.randn(1, 23, generator=generator, dtype=torch.float64)
    scores = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).mT + toeplitz(bias)
    wanted = scores.softmax(-1) @ v
    sizes, errors = [16, 64, 256, 1024, 4096], []
    for m in sizes:
        squares = []
        for _ in range(12):
            w = gaussian_directions(m, 4, generator=generator).double()
            got = kernel_attention_rpe_dense(nprf(q, w), nprf(k, w), v, bias, causal=False)
            squares.append((got - wanted).square().mean())
        errors.append(torch.stack(squares).mean().sqrt().item())
    assert errors[-1] < 0.02
    assert abs(fit_exponent(sizes, errors).value + 0.5) < 0.1


def test_normalised_features_do_not_care_how_long_vectors_are():
    generator = torch.Generator().manual_seed(1)
    q, k = torch.randn(2, 200, 8, generator=generator, dtype=torch.float64)
    w = orthogonal_directions(32, 8, generator=generator).double()

    def error(features, s):
        x = features(s * q, w), features(s * k, w)
        exact = (s * q * s * k).sum(-1) * 8**-0.5
        exact = exact if features is prf else F.cosine_similarity(q, k)
        return ((x[0] * x[1]).sum(-1) / exact.exp() - 1).abs().mean()

    torch.testing.assert_close(nprf(5 * q, w), nprf(q, w))
    assert error(nprf, 4.0) < 0.5 < error(prf, 1.0) and error(prf, 4.0) > 0.9


def test_hidden_distances_and_empty_rows():
    phi_q, phi_k, v, _ = (x.requires_grad_() for x in inputs(6, H=2, G=2))
    bias = torch.full((2, 11), -torch.inf, dtype=torch.float64)
    bias[:, 3] = 0.7  # each query sees the key two before it: the first two see nothing
    for form in FORMS:
        for causal in (False, True):
            out = form(phi_q, phi_k, v, bias, causal=causal)
            assert (out[:, :, :2] == 0).all()
            torch.testing.assert_close(out[:, :, 2:], v[:, :, :4], atol=1e-10, rtol=1e-10)
            grads = torch.autograd.grad(out.sum(), (phi_q, phi_k, v))
            assert all(g.isfinite().all() for g in grads)
    bias[0] = -torch.inf
    assert (kernel_attention_rpe(phi_q, phi_k, v, bias, causal=True)[:, 0] == 0).all()


def test_what_is_ahead_does_not_spoil_the_scale():
    phi_q, phi_k, v, bias = inputs(8)
    ahead = bias.clone()
    ahead[:, 8:] += 900.0
    for form in FORMS:
        got = form(phi_q, phi_k, v, ahead, causal=True)
        torch.testing.assert_close(got, form(phi_q, phi_k, v, bias, causal=True), **EXACT)


def test_memory_grows_with_a_slab_and_not_with_all_products(monkeypatch):
    L, m, V = 512, 64, 15
    monkeypatch.setattr(toeplitz_bank, "SLAB", 16 * L)  # one feature
    leaves = [x.requires_grad_() for x in inputs(L, H=1, G=1, m=m, V=V, B=1)]

    def both():
        out = kernel_attention_rpe(*leaves, causal=False)
        torch.autograd.grad(out.sum(), leaves)

    products = m * (V + 1) * L * 8
    slab, given = (V + 1) * L * 8, sum(x.nbytes for x in leaves)
    peak = peak_memory(both)
    assert peak < 5 * given + 14 * slab < 2 * products


def test_nothing_and_half_precision():
    phi_q, phi_k, v, bias = inputs(5)
    for form in FORMS:
        assert form(phi_q[:0], phi_k[:0], v[:0], bias, causal=True).shape == (0, 4, 5, 2)
    narrow = [x.bfloat16() for x in (phi_q, phi_k, v, bias)]
    wanted = kernel_attention_rpe(*(x.double() for x in narrow), causal=False)
    for form in FORMS:
        out = form(*narrow, causal=False)
        assert out.dtype == torch.bfloat16
        torch.testing.assert_close(out.double(), wanted, atol=5e-3, rtol=5e-3)


def test_the_causal_layer_is_a_sequence_mixer():
    torch.manual_seed(0)
    layer = CausalNPRFAttention(12, heads=3, max_len=16, features=5).double()
    torch.nn.init.normal_(layer.bias)
    conformance(layer, torch.randn(2, 11, 12, dtype=torch.float64), leak=1e-9)
    y, state = layer(torch.randn(2, 16, 12, dtype=torch.float64))
    assert state.phi_k.shape == (2, 3, 16, 5) and state.v.shape == (2, 3, 16, 4)


def test_the_layers_by_hand():
    torch.manual_seed(1)
    both = NPRFAttention(6, heads=2, max_len=7).double()
    causal = CausalNPRFAttention(6, heads=2, max_len=7).double()
    torch.nn.init.normal_(both.bias)
    causal.load_state_dict(both.state_dict())
    x = torch.randn(1, 5, 6, dtype=torch.float64)
    q, k, v = ((x @ w.weight.T).view(1, 5, 2, 3).transpose(1, 2) for w in (both.q, both.k, both.v))
    scores = [nprf(y, both.directions) for y in (q, k)]
    weights = scores[0] @ scores[1].mT * both.bias[:, 2:11].exp()[:, LAGS]
    for layer, wanted in ((both, weights), (causal, weights.tril())):
        mixed = (wanted / wanted.sum(-1, keepdim=True)) @ v
        wanted = mixed.transpose(1, 2).reshape(1, 5, 6) @ layer.out.weight.T
        got = layer(x)
        torch.testing.assert_close(got[0] if layer is causal else got, wanted, **EXACT)


LAGS = torch.arange(5) - torch.arange(5)[:, None] + 4


def test_example_runs():
    assert not doctest.testmod(nprf_rpe).failed
    wanted = kernel_attention_rpe_reference(**example(), causal=False)
    torch.testing.assert_close(kernel_attention_rpe(**example(), causal=False), wanted)


BAD = {
    "axes": (lambda a: a | dict(v=a["v"][0]), "phi_q, phi_k, v: expected"),
    "length": (lambda a: a | dict(v=a["v"][:, :, :4]), "phi_q, phi_k, v: expected"),
    "width": (lambda a: a | dict(phi_k=a["phi_k"][..., :2]), "k: expected the width"),
    "queries": (lambda a: a | dict(phi_k=a["phi_k"][:, :, 1:], v=a["v"][:, :, 1:]), "no more"),
    "bias": (lambda a: a | dict(bias=a["bias"][:1]), r"bias: expected shape \(2, 2 n - 1\)"),
    "table": (lambda a: a | dict(bias=a["bias"][:, 2:-2]), "lags: expected distances for 9"),
}


@pytest.mark.no_shape_checks
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_named(case, form):
    change, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        form(**change(example()), causal=False)


@pytest.mark.no_shape_checks
def test_other_mistakes_are_named():
    phi_q, phi_k, v, bias = inputs(6)
    with pytest.raises(ValueError, match="phi_q: expected as many queries as keys, 6, got 2"):
        kernel_attention_rpe(phi_q[:, :, 4:], phi_k, v, bias, causal=True)
    with pytest.raises(TypeError, match="bias: expected the dtype of phi_q"):
        kernel_attention_rpe(phi_q, phi_k, v, bias.float(), causal=True)
    with pytest.raises(ValueError, match="heads: expected a divisor of C = 10"):
        NPRFAttention(10, heads=3, max_len=4)
    with pytest.raises(ValueError, match="max_len: expected at least 1"):
        NPRFAttention(10, heads=2, max_len=0)
