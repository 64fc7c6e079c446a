"""Greenformers: factors that are as near as can be, in any model, and what they cost."""

from __future__ import annotations

import copy
import doctest

import pytest
import torch
from torch import nn

from corelib.linear_time import greenformers
from corelib.linear_time.greenformers import (
    CED,
    LED,
    LinformerAttention,
    SelfAttention,
    TransformerLayer,
    auto_fact,
    crossover,
    energy_estimate,
    example,
    flops_params_memory,
    layer_macs,
    limit_rank,
    linformer_attention,
    measured_crossover,
    random_factor,
    snmf_factor,
    svd_factor,
)
from corelib.models import zoo
from corelib.primitives import attention

EXACT = dict(atol=1e-10, rtol=1e-9)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).double()


def tokens(*shape):
    return torch.randint(0, 2048, shape, generator=torch.Generator().manual_seed(0))


# --- factors --------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(12, 7), (7, 12), (9, 9)])
@pytest.mark.parametrize("rank", [1, 3, 6])
def test_the_error_is_the_tail_of_the_spectrum(shape, rank):
    W = normal(*shape)
    U, V = svd_factor(W, rank)
    tail = torch.linalg.svdvals(W)[rank:].square().sum()
    torch.testing.assert_close((W - U @ V).square().sum(), tail, **EXACT)


def test_semi_nmf_has_no_negative_part_and_gets_no_worse():
    W = normal(10, 14)
    errors = []
    for steps in (0, 1, 2, 5, 20, 100):
        U, V = snmf_factor(W, 4, steps=steps)
        assert (V >= 0).all() and (U < 0).any()
        errors.append((W - U @ V).norm())
    assert all(b <= a + 1e-12 for a, b in zip(errors, errors[1:])) and errors[-1] < 0.95 * errors[0]
    assert errors[-1] >= (W - torch.mm(*svd_factor(W, 4))).norm()


def test_random_factors_are_as_large_as_a_linear_layer():
    torch.manual_seed(0)
    product = torch.mm(*random_factor(torch.zeros(300, 200), 50))
    usual = nn.Linear(200, 300).weight
    assert product.std().item() == pytest.approx(usual.std().item(), rel=0.05)


# --- units ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [True, False])
def test_led_is_two_linears_with_the_bias_on_the_second(bias):
    linear = nn.Linear(9, 12, bias=bias).double()
    led = auto_fact(linear, 3)
    assert isinstance(led, LED) and led.first.bias is None
    assert sum(p.numel() for p in led.parameters()) == 3 * (9 + 12) + 12 * bias
    x = normal(2, 5, 9)
    U, V = svd_factor(linear.weight.detach(), 3)
    wanted = x @ (U @ V).mT + (linear.bias if bias else 0)
    torch.testing.assert_close(led(x), wanted, **EXACT)
    torch.testing.assert_close(nn.functional.linear(x, led.weight, led.bias), wanted, **EXACT)
    assert (led.in_features, led.out_features) == (9, 12)


CONVOLUTIONS = {
    "1": (nn.Conv1d(4, 8, 3, padding=2, stride=2), (2, 4, 11)),
    "1 circular": (nn.Conv1d(4, 8, 3, padding=1, padding_mode="circular"), (2, 4, 9)),
    "2": (nn.Conv2d(3, 6, (3, 2), dilation=2, bias=False), (2, 3, 9, 8)),
    "3": (nn.Conv3d(2, 6, 2), (1, 2, 4, 3, 5)),
}


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_ced_at_full_rank_is_the_convolution(name):
    convolution, shape = CONVOLUTIONS[name]
    convolution = copy.deepcopy(convolution).double()
    unit = auto_fact(convolution, 99, even_if_larger=True)
    assert isinstance(unit, CED)
    x = normal(*shape)
    torch.testing.assert_close(unit(x), convolution(x), **EXACT)


def test_ced_below_it_is_the_convolution_of_the_product():
    convolution, shape = CONVOLUTIONS["1"]
    convolution = copy.deepcopy(convolution).double()
    unit, x = auto_fact(convolution, 2), normal(*shape)
    assert sum(p.numel() for p in unit.parameters()) == 2 * (8 + 12) + 8
    U, V = svd_factor(convolution.weight.detach().flatten(1), 2)
    with torch.no_grad():
        convolution.weight.copy_((U @ V).view_as(convolution.weight))
    torch.testing.assert_close(unit(x), convolution(x), **EXACT)


@pytest.mark.parametrize("solver", [svd_factor, snmf_factor, random_factor])
def test_gradients_reach_both_factors(solver):
    led = auto_fact(nn.Linear(6, 5).double(), 2, solver)
    led(normal(3, 6)).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in led.parameters())


# --- whole models ---------------------------------------------------------------------------------


def test_which_layers_are_swapped():
    model = nn.ModuleDict(
        {
            "wide": nn.Linear(20, 20),
            "thin": nn.Linear(20, 2),
            "inside": nn.Sequential(nn.Linear(20, 30), nn.Conv1d(4, 4, 3, groups=4)),
            "attention": nn.MultiheadAttention(20, 2),
        }
    )
    small = auto_fact(model, 8)  # 2 * 20 / 22 < 8
    units = {name for name, layer in small.named_modules() if isinstance(layer, LED | CED)}
    assert units == {"wide", "inside.0"}
    assert type(model["wide"]) is nn.Linear, "the given model is left as it is"
    for submodules in (["inside"], [model["inside"]], [model["inside"][0]]):
        part = auto_fact(model, 8, submodules=submodules)
        assert {n for n, layer in part.named_modules() if isinstance(layer, LED)} == {"inside.0"}
    again = auto_fact(small, 2)
    assert [n for n, _ in again.named_modules()] == [n for n, _ in small.named_modules()]


def test_ranks_as_shares():
    assert limit_rank(20, 20) == 10 and limit_rank(20, 30) == 12 and limit_rank(704, 256) == 188
    for rank, kept in ((0.5, 5), (0.99, 9), (9, 9)):
        assert auto_fact(nn.Linear(20, 20), rank).first.out_features == kept
    for rank in (0.05, 10, 11):
        assert type(auto_fact(nn.Linear(20, 20), rank)) is nn.Linear
    assert auto_fact(nn.Linear(20, 20), 99, even_if_larger=True).first.out_features == 20


def test_shared_weights_stay_and_shared_layers_stay_shared():
    model = nn.ModuleDict({"embed": nn.Embedding(40, 20), "head": nn.Linear(20, 40, bias=False)})
    model["head"].weight = model["embed"].weight
    assert auto_fact(model, 4)["head"].weight.shape == (40, 20)
    layer = nn.Linear(20, 20)
    twice = auto_fact(nn.Sequential(layer, nn.ReLU(), layer), 4)
    assert isinstance(twice[0], LED) and twice[0] is twice[2]


@pytest.mark.parametrize("name", ["text_lm", "encoder"])
def test_a_trained_model_at_full_rank_says_the_same(name):
    model = zoo.load(name, dtype=torch.float64)
    whole = auto_fact(model, 10**6, even_if_larger=True)
    assert sum(isinstance(layer, LED) for layer in whole.modules()) == 7 * len(model.layers)
    ids = tokens(1, 8)
    with torch.no_grad():
        torch.testing.assert_close(whole(ids), model(ids), **EXACT)


def test_a_trained_model_at_a_lower_rank():
    model = zoo.load("draft_lm")
    less = auto_fact(model, 0.3)
    with torch.no_grad():
        off = (less(tokens(1, 8)) - model(tokens(1, 8))).abs().max()
    assert 0.1 < off < torch.inf and less.n_parameters < 0.8 * model.n_parameters
    assert not less.training and not any(p.requires_grad for p in less.parameters())


class Conv1D(nn.Module):
    """As GPT-2's in Hugging Face's transformers: a linear layer whose weight lies the other way."""

    def __init__(self, nf, nx):
        super().__init__()
        self.nf, self.weight = nf, nn.Parameter(normal(nx, nf))
        self.bias = nn.Parameter(normal(nf))

    def forward(self, x):
        return x @ self.weight + self.bias


def test_a_transposed_linear_layer():
    model, x = nn.Sequential(Conv1D(12, 9)), normal(2, 9)
    whole = auto_fact(model, 9, even_if_larger=True)
    assert isinstance(whole[0], LED) and auto_fact(model, 2)[0].first.out_features == 2
    torch.testing.assert_close(whole(x), model(x), **EXACT)


def test_pytorchs_encoder_layer_reads_the_weight_and_still_works():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True).double().eval()
    whole = auto_fact(layer, 99, even_if_larger=True)
    assert isinstance(whole.linear1, LED)
    x = normal(2, 5, 16)
    with torch.no_grad():
        torch.testing.assert_close(whole(x), layer(x), **EXACT)


# --- Linformer ------------------------------------------------------------------------------------


def test_linformer_with_the_identity_is_attention():
    q, k, v = normal(2, 4, 9, 6), normal(2, 2, 9, 6, seed=1), normal(2, 2, 9, 5, seed=2)
    one = torch.eye(9, dtype=torch.float64)
    wanted = attention(q, k, v, causal=False)
    torch.testing.assert_close(linformer_attention(q, k, v, one, one), wanted, **EXACT)


def test_linformer_by_hand_with_gradients():
    q, k, v = (normal(1, 2, 5, 3, seed=s).requires_grad_() for s in range(3))
    E, F = (normal(2, 5, seed=s).requires_grad_() for s in (3, 4))
    weights = (q @ (E @ k).mT * 3**-0.5).softmax(-1)
    out = linformer_attention(q, k, v, E, F)
    torch.testing.assert_close(out, weights @ (F @ v), **EXACT)
    assert torch.autograd.gradcheck(linformer_attention, (q, k, v, E, F))


def test_linformer_layer_on_shorter_and_longer_texts():
    torch.manual_seed(0)
    layer = LinformerAttention(8, 2, length=12, rank=12).double()
    full = SelfAttention(8, 2).double()
    full.load_state_dict(layer.state_dict(), strict=False)
    with torch.no_grad():
        layer.E.copy_(torch.eye(12)), layer.F.copy_(torch.eye(12))
    x = normal(2, 12, 8)
    torch.testing.assert_close(layer(x), full(x), **EXACT)
    assert layer(x[:, :1]).shape == (2, 1, 8)
    with pytest.raises(ValueError, match="x: expected at most 12"):
        layer(normal(1, 13, 8))


# --- the bill -------------------------------------------------------------------------------------

C, RANK, KEYS = 32, 8, 16


def counted(kind, n):
    mixer = LinformerAttention(C, 2, length=n, rank=KEYS) if kind == "linformer" else None
    layer = TransformerLayer(mixer or SelfAttention(C, 2), C)
    layer = auto_fact(layer, RANK, random_factor) if kind == "lrt" else layer
    return flops_params_memory(layer, torch.randn(1, n, C))


def test_counted_operations_follow_the_formulas():
    for kind, options in (("full", {}), ("lrt", {"rank": RANK}), ("linformer", {"keys": KEYS})):
        near, far = (counted(kind, n).operations / n for n in (64, 128))
        slope = layer_macs(128, C, **options) - layer_macs(64, C, **options)
        assert far - near == pytest.approx(2 * slope, rel=0.02, abs=0.002 * near)
        assert near == pytest.approx(2 * layer_macs(64, C, **options), rel=0.05)


def test_counted_curves_cross_where_the_formula_says():
    meeting = crossover(C, RANK, KEYS)  # 6 * 32 + 2 * 16 - 9 * 8
    assert meeting == 152
    assert crossover(768, 256, 256) == 2816
    for n, lrt_is_cheaper in ((meeting - 10, True), (meeting + 10, False)):
        lrt, linformer = (counted(kind, n).operations for kind in ("lrt", "linformer"))
        assert (lrt < linformer) is lrt_is_cheaper


def test_measured_curves_cross():
    lengths = [64, 128, 256, 512, 1024]
    level, rising = [300.0] * 5, [float(n) for n in lengths]
    assert measured_crossover(lengths, rising, level) == pytest.approx(300)
    assert measured_crossover(lengths, level, rising) is None
    assert measured_crossover(lengths, [2.0] * 5, [1.0] * 5) == 64
    noisy = [50.0, 200.0, 250.0, 600.0, 900.0]  # above the level once too early
    assert 256 < measured_crossover(lengths, noisy, [150.0, 150.0, *level[2:]]) < 512
    with pytest.raises(ValueError, match="lengths, first, second"):
        measured_crossover(lengths, level, rising[1:])


def test_parameters_and_bytes():
    full, lrt, linformer = (counted(kind, 40) for kind in ("full", "lrt", "linformer"))
    extra = 9 * C + 4 * C  # biases and two norms
    assert full.parameters == 12 * C * C + extra and lrt.parameters == 18 * C * RANK + extra
    assert linformer.parameters == full.parameters + 2 * KEYS * 40
    assert lrt.weight_bytes == 4 * lrt.parameters
    assert full.peak_bytes >= 4 * 40 * 4 * C  # the feed-forward's hidden layer


def test_energy_is_an_estimate_by_hand():
    found = energy_estimate(7.2e15, operations_per_second=1e12, watts=500)
    assert found.seconds == 7200 and found.kwh == pytest.approx(1.58)
    assert found.grams_co2 == pytest.approx(1.58 * 433)


# --- what can go wrong ----------------------------------------------------------------------------


def test_example_runs():
    assert not doctest.testmod(greenformers).failed
    W = example()["W"]
    sigma = torch.linalg.svdvals(W)
    torch.testing.assert_close(sigma, torch.tensor([1.0, 0.5, 0.25, 0.125]))


@pytest.mark.no_shape_checks
def test_bad_input_is_named():
    layer = nn.Linear(4, 4)
    for rank, error in ((0, ValueError), (1.5, ValueError), ("2", TypeError), (True, TypeError)):
        with pytest.raises(error, match="rank: expected"):
            auto_fact(layer, rank)
    for submodules in (["nowhere"], [nn.Linear(2, 2)]):
        with pytest.raises(ValueError, match="submodules: expected"):
            auto_fact(nn.Sequential(layer), 2, submodules=submodules)
    with pytest.raises(ValueError, match="heads: expected"):
        SelfAttention(10, 3)
    q = torch.randn(1, 1, 5, 2)
    with pytest.raises(ValueError, match="E, F: expected"):
        linformer_attention(q, q, q, torch.randn(2, 4), torch.randn(2, 4))
    with pytest.raises(ValueError, match="watts: expected"):
        energy_estimate(1.0, operations_per_second=1.0, watts=0)
