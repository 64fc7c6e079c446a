"""URPE attention: against the loop and PyTorch, the theorem on equal tokens, the small encoder."""

from __future__ import annotations

import doctest

import pytest
import torch
import torch.nn.functional as F

from corelib.data.position_tasks import position_identification
from corelib.linear_time import urpe
from corelib.linear_time.urpe import (
    POSITIONS,
    URPEEncoder,
    example,
    spread,
    urpe_attention,
    urpe_attention_reference,
    urpe_weights,
)
from corelib.primitives.toeplitz import toeplitz

EXACT = dict(atol=1e-12, rtol=1e-12)


def inputs(L, S=None, H=4, G=2, D=3, V=2, B=2, seed=0):
    generator = torch.Generator().manual_seed(seed + L)
    S = S or L
    draw = dict(generator=generator, dtype=torch.float64)
    q, k = torch.randn(B, H, L, D, **draw), torch.randn(B, G, S, D, **draw)
    tables = torch.randn(2, H, 2 * S + 1, **draw)  # room for one position more
    return q, k, torch.randn(B, G, S, V, **draw), *tables


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("L", "S"), [(1, 1), (7, 7), (3, 8), (1, 4)])
def test_equals_the_loop(L, S, causal):
    for given in (inputs(L, S), inputs(L, S, H=3, G=1), inputs(L, S, H=2, G=2)):
        for scale in (None, 0.3):
            options = dict(causal=causal, scale=scale)
            wanted = urpe_attention_reference(*given, **options)
            torch.testing.assert_close(urpe_attention(*given, **options), wanted, **EXACT)


@pytest.mark.parametrize("causal", [False, True])
def test_gain_one_is_attention_with_a_relative_bias(causal):
    q, k, v, bias, gain = inputs(9, G=4)
    mask = toeplitz(bias, 9)
    mask = mask.masked_fill(torch.ones(9, 9).triu(1).bool() & causal, -torch.inf)
    wanted = F.scaled_dot_product_attention(q, k, v, attn_mask=mask.expand(2, 4, 9, 9))
    got = urpe_attention(q, k, v, bias, torch.ones_like(gain), causal=causal)
    torch.testing.assert_close(got, wanted, **EXACT)


def test_a_positive_gain_folds_into_the_bias():
    """out = attention(bias + log gain), times the ratio of the two normalisers."""
    q, k, v, bias, gain = inputs(8, G=4)
    scores = q @ k.mT * 3**-0.5 + toeplitz(bias, 8)
    folded = scores + toeplitz(gain.exp().log(), 8)
    share = (folded.logsumexp(-1) - scores.logsumexp(-1)).exp()
    wanted = share[..., None] * (folded.softmax(-1) @ v)
    got = urpe_attention(q, k, v, bias, gain.exp(), causal=False)
    torch.testing.assert_close(got, wanted, **EXACT)


def test_with_equal_scores_it_is_a_convolution():
    q, k, v, bias, gain = inputs(11, G=4)
    got = urpe_attention(0 * q, k, v, 0 * bias, gain, causal=False)
    wanted = torch.zeros_like(got)
    for i in range(11):
        for j in range(11):
            wanted[:, :, i] += gain[:, 11 + j - i, None] * v[:, :, j] / 11
    torch.testing.assert_close(got, wanted, **EXACT)


@pytest.mark.parametrize("causal", [False, True])
def test_gradients(causal):
    leaves = [x.requires_grad_() for x in inputs(3, H=2, G=1, B=1)]
    assert torch.autograd.gradcheck(lambda *x: urpe_attention(*x, causal=causal), leaves)


def test_rows_of_weights_sum_to_one_before_the_gain_only():
    q, k, _, bias, gain = inputs(6)
    plain = urpe_weights(q, k, bias, torch.ones_like(gain), causal=True)
    torch.testing.assert_close(plain.sum(-1), torch.ones(2, 4, 6, dtype=torch.float64))
    weights = urpe_weights(q, k, bias, gain, causal=True)
    torch.testing.assert_close(weights, plain * toeplitz(gain, 6), **EXACT)
    assert (weights.sum(-1) - 1).abs().min() > 1e-3


def test_hidden_distances_empty_rows_and_no_rows():
    q, k, v, bias, gain = inputs(5, G=4)
    q.requires_grad_()
    hidden = torch.full_like(bias, -torch.inf)
    hidden[:, 3] = 0.0  # the key two before: the first two queries see nothing
    out = urpe_attention(q, k, v, hidden, gain, causal=True)
    assert (out[:, :, :2] == 0).all()
    torch.testing.assert_close(out[:, :, 2:], gain[:, 3, None, None] * v[:, :, :3], **EXACT)
    assert torch.autograd.grad(out.sum(), q)[0].isfinite().all()
    assert urpe_attention(q[:, :, :0], k, v, bias, gain, causal=True).shape == (2, 4, 0, 2)


def encoder(position, layers=3, vocab=4, max_len=9, shared=True):
    torch.manual_seed(0)
    options = dict(C=8, heads=2, layers=layers, max_len=max_len, position=position, shared=shared)
    model = URPEEncoder(vocab, max_len, **options).double()
    for table in model.tables:  # as after training
        for parameter in (table.bias, table.gain):
            if parameter.requires_grad:
                torch.nn.init.normal_(parameter)
    return model


@pytest.mark.parametrize("layers", [1, 2, 6])
def test_equal_tokens_stay_equal_under_a_bias_and_not_under_a_gain(layers):
    ids = torch.full((2, 9), 3)
    for shared in (True, False):
        for position in ("none", "rpe"):
            states = encoder(position, layers, shared=shared).hidden(ids)
            assert len(states) == layers + 1
            assert max(map(spread, states)) < 1e-12
        states = encoder("urpe", layers, shared=shared).hidden(ids)
        assert spread(states[0]) == 0 and min(map(spread, states[1:])) > 1e-2
    assert spread(encoder("absolute", layers).hidden(ids)[-1]) > 1e-2


def test_random_tokens_do_leak_a_little_position_through_a_bias():
    """Near an end fewer keys compete: why the theorem is about equal tokens."""
    ids = torch.randint(0, 4, (1, 9), generator=torch.Generator().manual_seed(0))
    model = encoder("rpe", 1)
    turned = model(ids.roll(1, 1)).roll(-1, 1)
    assert (model(ids) - turned).abs().max() > 1e-3


def test_spread():
    x = torch.tensor([[[1.0, 2.0], [1.0, -4.0]], [[7.0, 0.0], [8.0, 0.0]]])
    assert spread(x) == 6 / 8


def test_parameters_added():
    def count(position, **options):
        model = encoder(position, **options)
        return sum(p.numel() for p in model.parameters() if p.requires_grad)

    plain, table = count("none"), 2 * (2 * 9 - 1)
    assert count("rpe") == plain + table
    assert count("urpe") == plain + 2 * table
    assert count("urpe", layers=5) - count("none", layers=5) == 2 * table
    assert count("urpe", shared=False) == plain + 3 * 2 * table
    assert count("absolute") == plain + 9 * 8


def test_starts_as_a_transformer_without_positions():
    torch.manual_seed(0)
    sizes = dict(C=8, heads=2, layers=2, max_len=9)
    models = [URPEEncoder(4, 5, **sizes, position=p) for p in ("none", "rpe", "urpe")]
    for model in models[1:]:
        model.load_state_dict(models[0].state_dict())
    ids = torch.randint(0, 4, (3, 7), generator=torch.Generator().manual_seed(1))
    assert torch.equal(models[0](ids), models[1](ids))
    assert torch.equal(models[0](ids), models[2](ids))
    assert models[0](ids).shape == (3, 7, 5)


@pytest.mark.parametrize("position", POSITIONS)
def test_every_trained_parameter_gets_a_gradient(position):
    model = encoder(position)
    ids, targets = position_identification(
        2, 9, vocab=4, generator=torch.Generator().manual_seed(0)
    )
    loss = F.cross_entropy(model(ids).flatten(0, 1), targets.flatten())
    named = {n: p for n, p in model.named_parameters() if p.requires_grad}
    for name, grad in zip(named, torch.autograd.grad(loss, named.values())):
        if "qkv.bias" not in name:  # a bias of keys moves no softmax
            assert grad.abs().max() > 0, name


def test_example_runs():
    assert not doctest.testmod(urpe).failed
    for causal in (False, True):
        got, wanted = (
            f(**example(), causal=causal) for f in (urpe_attention, urpe_attention_reference)
        )
        torch.testing.assert_close(got, wanted)


BAD = {
    "bias": (lambda a: a | dict(bias=a["bias"][:1]), r"bias: expected shape \(2, 2 n - 1\)"),
    "gain": (lambda a: a | dict(gain=a["gain"][0]), r"gain: expected shape \(2, 2 n - 1\)"),
    "short": (lambda a: a | dict(gain=a["gain"][:, 1:-1]), "lags: expected distances for 7"),
    "k": (lambda a: a | dict(k=a["k"][:, :, :3], v=a["v"][:, :, :3]), "q: expected at most k's 3"),
    "v": (lambda a: a | dict(v=a["v"][:, :, :3]), "v: expected the length of k"),
}


@pytest.mark.no_shape_checks
@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_named(case):
    change, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        urpe_attention(**change(example()), causal=False)


@pytest.mark.no_shape_checks
def test_other_mistakes_are_named():
    sizes = dict(C=8, heads=2, layers=1, max_len=4)
    with pytest.raises(ValueError, match="position: expected one of"):
        URPEEncoder(4, 4, **sizes, position="rope")
    with pytest.raises(ValueError, match="heads: expected a divisor of C = 9"):
        URPEEncoder(4, 4, **(sizes | dict(C=9)))
    with pytest.raises(TypeError, match="gain: expected the dtype of q"):
        urpe_attention(**(example() | dict(gain=example()["gain"].double())), causal=True)
