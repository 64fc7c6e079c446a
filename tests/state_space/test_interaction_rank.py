"""Interaction rank: how many different blocks a layer has, and how many heads that takes."""

from __future__ import annotations

import doctest
import math

import pytest
import torch

from corelib.primitives import attention
from corelib.state_space import hydra, interaction_rank
from corelib.state_space.interaction_rank import (
    LagAttention,
    decay_per_step,
    example,
    fitting_key,
    gradient_vs_distance,
    heads_from_ssm,
    interaction_operator,
    lag_attention,
    lag_attention_reference,
    lag_operators,
    least_error,
    operator_of_lags,
)
from corelib.testing import assert_same

rank = interaction_rank.interaction_rank


def draw(*shape, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=g, dtype=torch.float64)


def ssm(N=5, d=3, p=2, seed=0):
    """Distinct real poles, written in coordinates that hide it."""
    T = draw(N, N, seed=seed + 1)
    poles = torch.linspace(0.3, 0.95, N, dtype=torch.float64)
    A = T @ torch.diag(poles) @ torch.linalg.inv(T)
    return A, draw(N, d, seed=seed + 2), draw(p, N, seed=seed + 3)


def run(A, B, C, x):
    """The recurrence, one position after the other."""
    state, ys = torch.zeros(x.shape[0], len(A), dtype=x.dtype), []
    for t in range(x.shape[1]):
        state = state @ A.T + x[:, t] @ B.T
        ys.append(state @ C.T)
    return torch.stack(ys, 1)


def test_doctest():
    failures, tests = doctest.testmod(interaction_rank)
    assert tests and not failures


# --- operators and their span


def test_the_operator_of_an_ssm_is_its_powers():
    A, B, C = ssm()
    W = interaction_operator(lambda x: run(A, B, C, x), 7, 3)
    assert_same(W, operator_of_lags(lag_operators(A, B, C, 7)))
    assert_same(W[5, 2], C @ torch.linalg.matrix_power(A, 3) @ B)
    assert not W[2, 5].any()


def turning(angle):
    c, s = math.cos(angle), math.sin(angle)
    return torch.tensor([[c, -s], [s, c]], dtype=torch.float64)


def square(A):
    eye = torch.eye(len(A), dtype=torch.float64)
    return A, eye, eye


PADDED = torch.block_diag(turning(0.7), torch.zeros(1, 1, dtype=torch.float64))
JORDAN = torch.tensor([[0.5, 1, 0], [0, 0.5, 1], [0, 0, 0.5]], dtype=torch.float64)
RANKS = {
    "five poles": (square(torch.diag(torch.linspace(0.1, 0.9, 5, dtype=torch.float64))), 9, 5),
    "one pole": (square(0.7 * torch.eye(4, dtype=torch.float64)), 9, 1),
    "a rotation": (square(turning(0.7)), 9, 2),
    "a rotation and a zero": (square(PADDED), 9, 3),
    "a Jordan block": (square(JORDAN), 9, 3),
    "five poles, three positions": (ssm(), 3, 3),
    "five poles, one number in and out": (ssm(d=1, p=1), 9, 1),
    "five poles, 2 by 2": (ssm(d=2, p=2), 9, 4),
}


@pytest.mark.parametrize("name", RANKS)
def test_ranks(name):
    numpy = pytest.importorskip("numpy")
    (A, B, C), n, wanted = RANKS[name]
    lags = lag_operators(A, B, C, n)
    assert rank(lags) == wanted == rank(operator_of_lags(lags))
    assert numpy.linalg.matrix_rank(lags.flatten(1).numpy(), rtol=1e-9) == wanted


def softmax_layer(x, heads, seed=0):
    """Causal softmax attention at the content ``x (n, d)``, as a map of values."""
    d = x.shape[-1]
    q, k = (draw(heads, d, 4, seed=seed + i) for i in (1, 2))
    V = draw(heads, d, d, seed=seed + 3)

    def mix(v):
        seen = (x @ q)[None].expand(len(v), -1, -1, -1), (x @ k)[None].expand(len(v), -1, -1, -1)
        return attention(*seen, v[:, None] @ V, causal=True).sum(1)

    return mix


@pytest.mark.parametrize("heads", [1, 2, 3])
def test_heads_span_as_many_dimensions(heads):
    """Softmax attention; SSD and Hydra, whose coefficients are scalars a head too."""
    x = draw(6, 3, seed=9)
    W = interaction_operator(softmax_layer(x, heads), 6, 3)
    assert rank(W) == heads
    sides = [
        hydra.Scan(
            draw(1, heads, 6, seed=s).exp(),
            -torch.ones(heads).double(),
            *draw(2, 1, heads, 6, 2, seed=s),
        )
        for s in (1, 2)
    ]
    M = hydra.quasiseparable_matrix(*sides, draw(1, heads, 6))[0]
    maps = draw(heads, 2, 3)
    W = interaction_operator(lambda v: torch.einsum("hij,hpd,bjd->bip", M, maps, v), 6, 3)
    assert rank(W) == heads


def test_no_operators_have_no_rank():
    assert rank(torch.zeros(4, 4, 2, 2, dtype=torch.float64)) == 0


# --- heads


@pytest.mark.parametrize("n", [1, 6, 31])
@pytest.mark.parametrize("system", [example, lambda: dict(zip("ABC", ssm()))])
def test_as_many_heads_as_the_rank_are_the_ssm(system, n):
    given = {name: system()[name] for name in "ABC"}
    heads = heads_from_ssm(**given, n=n)
    lags = lag_operators(**given, n=n)
    assert len(heads.value_maps) == rank(lags)
    x = draw(2, n, given["B"].shape[1])
    assert_same(lag_attention(x, *heads), run(**given, x=x), tolerance=1e-12)
    assert_same(lag_attention_reference(x, *heads), run(**given, x=x), tolerance=1e-12)
    W = interaction_operator(lambda v: lag_attention(v, *heads), n, x.shape[2])
    assert_same(W, operator_of_lags(lags), tolerance=1e-12)


def test_fewer_heads_err_by_the_singular_values_left_over():
    A, B, C = ssm(N=6, d=3, p=3)
    lags = lag_operators(A, B, C, 12)
    weighed = torch.arange(12.0, 0, -1).double().sqrt()[:, None] * lags.flatten(1)
    sigma = torch.linalg.svdvals(weighed)
    for H in range(1, 7):
        got = interaction_operator(
            lambda v, H=H: lag_attention(v, *heads_from_ssm(A, B, C, 12, H)), 12, 3
        )
        error = (got - operator_of_lags(lags)).square().sum()
        torch.testing.assert_close(error, sigma[H:].square().sum(), atol=1e-16, rtol=1e-9)
        torch.testing.assert_close(error, least_error(lags)[H], atol=1e-16, rtol=1e-9)
    assert least_error(lags)[6] < 1e-20 < least_error(lags)[5]


def test_that_error_is_expected_of_white_inputs():
    A, B, C = ssm()
    heads, x = heads_from_ssm(A, B, C, 8, 2), draw(20_000, 8, 3)
    error = (lag_attention(x, *heads) - run(A, B, C, x)).square().sum((1, 2)).mean()
    assert abs(error / least_error(lag_operators(A, B, C, 8))[2] - 1) < 0.05


def test_no_coefficients_do_better():
    """Best coefficients for any other two value maps, free for every pair of positions."""
    A, B, C = ssm()
    W = operator_of_lags(lag_operators(A, B, C, 6)).flatten(0, 1).flatten(1)
    bound = least_error(lag_operators(A, B, C, 6))[2]
    for seed in range(5):
        best = heads_from_ssm(A, B, C, 6, 2).value_maps.flatten(1)
        maps = best + 0.1 * draw(*best.shape, seed=seed)
        left = W - W @ torch.linalg.pinv(maps) @ maps
        assert left.square().sum() > bound


@pytest.mark.parametrize("n", [1, 5])
def test_lag_attention_and_its_gradients(n):
    leaves = [draw(2, n, 3), draw(4, n), draw(4, 2, 3)]
    leaves = [leaf.requires_grad_() for leaf in leaves]
    weight = torch.linspace(-1, 1, 2 * n * 2, dtype=torch.float64)
    results = []
    for form in (lag_attention, lag_attention_reference):
        y = form(*leaves)
        results.append((y, *torch.autograd.grad(y.flatten() @ weight, leaves)))
    assert_same(*results)


def test_lags_follow_their_device():
    lags, heads = torch.zeros(5, 2, 3, device="meta"), torch.zeros(4, 2, 3, device="meta")
    assert interaction_rank.operator_of_lags(lags).device.type == "meta"
    x, coefficients = (torch.zeros(size, device="meta") for size in ((2, 5, 3), (4, 5)))
    out = interaction_rank.lag_attention_reference(x, coefficients, heads)
    assert out.device.type == "meta"


def test_the_trainable_one():
    torch.manual_seed(0)
    layer = LagAttention(2, 5, 3, 4).double()
    x = draw(2, 5, 3)
    wanted = lag_attention_reference(x, layer.coefficients, layer.value_maps)
    assert_same(layer(x), wanted)


def test_softmax_is_not_in_the_class():
    """An SSM of rank 1 that changes its sign: one free head is it, one softmax head cannot be."""
    one = torch.ones(1, 1, dtype=torch.float64)
    lags = lag_operators(-0.9 * one, one, one, 6)
    assert rank(lags) == 1
    heads = heads_from_ssm(-0.9 * one, one, one, 6)
    signs = (heads.coefficients[0] * heads.value_maps[0, 0, 0]).sign()
    assert signs.tolist() == [1, -1, 1, -1, 1, -1]
    W = interaction_operator(softmax_layer(draw(6, 1), 1), 6, 1)
    seen = W[..., 0, 0][torch.ones(6, 6).tril().bool()]
    assert (seen > 0).all() or (seen < 0).all()  # one sign, that of the value map


# --- gradients


def test_an_ssms_gradient_is_its_operator_and_decays():
    A, B, C = ssm()
    norms = gradient_vs_distance(lambda x: run(A, B, C, x), draw(60, 3))
    wanted = torch.linalg.matrix_norm(lag_operators(A, B, C, 60), 2)
    assert_same(norms, wanted)
    powers = [torch.linalg.matrix_norm(torch.linalg.matrix_power(A, t), 2) for t in range(60)]
    bound = torch.stack(powers) * torch.linalg.matrix_norm(B, 2) * torch.linalg.matrix_norm(C, 2)
    assert (norms <= bound * (1 + 1e-12)).all()
    assert abs(decay_per_step(norms[30:]) - 0.95) < 0.01  # the spectral radius, in the end


def test_attention_has_inputs_without_decay():
    norms = [gradient_vs_distance(*fitting_key(60, far))[far].item() for far in (1, 10, 59)]
    assert max(norms) / min(norms) < 1 + 1e-6 and min(norms) > 0.99


def test_coefficients_count_in_the_gradient():
    """The derivative is of the whole layer, not of the frozen operator."""
    layer, x = fitting_key(6, 3, strength=1.0)
    assert gradient_vs_distance(layer, x).shape == (6,)
    J = torch.autograd.functional.jacobian(lambda x: layer(x[None])[0, -1], x)
    assert_same(gradient_vs_distance(layer, x)[2], J[:, 3].norm())
    assert J[0, 3, 1].abs() > 1e-3


BAD = {
    "mix: expected a layer that is linear": lambda: interaction_operator(lambda v: v * v, 3, 2),
    "mix: expected .*, got": lambda: interaction_operator(lambda v: v[:, :1], 3, 2),
    "n: expected at least 1": lambda: interaction_operator(lambda v: v, 0, 2),
    "heads: expected 1 to 6": lambda: heads_from_ssm(*ssm(), 4, 7),
    "coefficients: expected": lambda: lag_attention(draw(1, 4, 2), draw(1, 3), draw(1, 2, 2)),
    "W: expected operators": lambda: rank(draw(3, 3)),
    "x: expected 2 axes": lambda: gradient_vs_distance(lambda x: x, draw(1, 3, 3)),
    "far: expected 1 to 4, got 5": lambda: fitting_key(5, 5),
    "norms: expected two or more": lambda: decay_per_step(torch.zeros(3)),
}


@pytest.mark.no_shape_checks
@pytest.mark.parametrize("message", BAD)
def test_bad_input_is_named(message):
    with pytest.raises(ValueError, match=message):
        BAD[message]()
