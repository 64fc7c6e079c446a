"""Lightning Attention-2: four forms of one function, and its layer."""

from __future__ import annotations

import doctest

import pytest
import torch

from corelib.linear_time import lightning2
from corelib.linear_time.lightning2 import (
    NormLinearAttention,
    block_flops,
    decay_slopes,
    example,
    lightning_attn,
    lightning_block,
    lightning_naive,
    lightning_recurrent,
)
from corelib.testing import conformance

EXACT = dict(atol=1e-11, rtol=1e-10)
FORMS = [lightning_naive, lightning_recurrent, lightning_block, lightning_attn]


def random_inputs(L, H=3, K=4, V=6, B=2, slopes=(0.5, 0.03, 2.0)):
    torch.manual_seed(0)
    q, k, v = (torch.randn(B, H, L, n, dtype=torch.float64) for n in (K, K, V))
    return q, k, v, torch.tensor(slopes, dtype=torch.float64), torch.randn(B, H, K, V).double()


def by_sum(q, k, v, slopes, state):
    """The first equation, with nothing but sums; the state stands one step before the first."""
    out = torch.zeros_like(v)
    for t in range(q.shape[2]):
        decay = torch.exp(-slopes * (t + 1))[:, None]
        out[:, :, t] = decay * torch.einsum("bhk,bhkv->bhv", q[:, :, t], state)
        for j in range(t + 1):
            weight = torch.exp(-slopes * (t - j)) * (q[:, :, t] * k[:, :, j]).sum(-1)
            out[:, :, t] += weight[..., None] * v[:, :, j]
    return out


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("L", [1, 2, 13])
def test_forms_equal_the_sum(form, L):
    inputs = random_inputs(L)
    torch.testing.assert_close(form(*inputs)[0], by_sum(*inputs), **EXACT)


@pytest.mark.parametrize("L", [64, 97])
@pytest.mark.parametrize("block", [1, 2, 7, 64, 200])
def test_any_block_and_ragged_lengths(L, block):
    inputs = random_inputs(L)
    for got, wanted in zip(lightning_block(*inputs, block=block), lightning_recurrent(*inputs)):
        torch.testing.assert_close(got, wanted, **EXACT)


def test_fast_form_equals_block_with_its_gradients():
    results = []
    for form in (lightning_block, lightning_attn):
        q, k, v, slopes, state = random_inputs(130)
        leaves = [x.requires_grad_() for x in (q, k, v, slopes, state)]
        out, last = form(*leaves)
        results.append([out, last, *torch.autograd.grad(out.cos().sum() + last.sum(), leaves)])
    for got, wanted in zip(*results):
        torch.testing.assert_close(got, wanted, **EXACT)


@pytest.mark.parametrize("form", FORMS)
def test_gradcheck(form):
    q, k, v, slopes, state = random_inputs(4, H=1, K=2, V=2, B=1, slopes=(0.4,))
    leaves = [x.requires_grad_() for x in (q, k, v, slopes, state)]
    assert torch.autograd.gradcheck(form, leaves)


@pytest.mark.parametrize("form", FORMS)
def test_without_decay_it_is_cumulative_linear_attention(form):
    q, k, v, _, _ = random_inputs(40)
    sums = torch.einsum("bhlk,bhlv->bhlkv", k, v).cumsum(2)
    out, state = form(q, k, v, torch.zeros(3, dtype=torch.float64))
    torch.testing.assert_close(out, torch.einsum("bhlk,bhlkv->bhlv", q, sums), **EXACT)
    torch.testing.assert_close(state, sums[:, :, -1], **EXACT)


@pytest.mark.parametrize("form", FORMS)
def test_two_calls_with_the_state_are_one(form):
    q, k, v, slopes, state = random_inputs(80)
    whole, last = form(q, k, v, slopes, state)
    first, carried = form(q[:, :, :31], k[:, :, :31], v[:, :, :31], slopes, state)
    second, end = form(q[:, :, 31:], k[:, :, 31:], v[:, :, 31:], slopes, carried)
    torch.testing.assert_close(torch.cat([first, second], 2), whole, **EXACT)
    torch.testing.assert_close(end, last, **EXACT)


@pytest.mark.parametrize("form", FORMS)
def test_no_tokens_leave_the_state(form):
    q, k, v, slopes, state = random_inputs(0)
    out, last = form(q, k, v, slopes, state)
    assert out.shape == v.shape
    torch.testing.assert_close(last, state)


def test_the_state_does_not_grow():
    sizes = {lightning_attn(*random_inputs(n))[1].nbytes for n in (1, 10, 200)}
    assert sizes == {2 * 3 * 4 * 6 * 8}


def test_half_precision_sums_in_float32():
    q, k, v, slopes, state = random_inputs(100)
    out, last = lightning_attn(*(x.bfloat16() for x in (q, k, v)), slopes, state.float())
    assert out.dtype == torch.bfloat16 and last.dtype == torch.float32
    wanted = lightning_recurrent(*(x.bfloat16().double() for x in (q, k, v)), slopes, state)[0]
    torch.testing.assert_close(out.double(), wanted, atol=3e-2, rtol=1e-2)


def test_slopes():
    first = decay_slopes(8, layer=0, layers=5)
    torch.testing.assert_close(first, 2.0 ** -torch.arange(1, 9) * (1 + 1e-5))
    torch.testing.assert_close(decay_slopes(8, 2, 5), first / (1 + 1e-5) * (0.5 + 1e-5))
    torch.testing.assert_close(decay_slopes(8, 4, 5), first / (1 + 1e-5) * 1e-5)
    twelve = decay_slopes(12, 0, 5) / (1 + 1e-5)
    torch.testing.assert_close(twelve[8:], 2.0 ** -torch.tensor([0.5, 1.5, 2.5, 3.5]))
    with pytest.raises(ValueError, match="layer: expected"):
        decay_slopes(8, 5, 5)


def test_operations_by_hand():
    assert block_flops(K=2, V=3, block=4) == (2 * 4 * 5, 4 * 2 * 3)


def test_the_layer_is_a_sequence_mixer():
    torch.manual_seed(0)
    layer = NormLinearAttention(12, heads=3, layer=1, layers=4).double()
    conformance(layer, torch.randn(2, 11, 12, dtype=torch.float64))


def test_the_layer_by_hand():
    torch.manual_seed(1)
    layer = NormLinearAttention(6, heads=2).double()
    x = torch.randn(1, 5, 6, dtype=torch.float64)
    q, k, v = (
        torch.nn.functional.silu(x @ w.weight.T).view(1, 5, 2, 3).transpose(1, 2)
        for w in (layer.q, layer.k, layer.v)
    )
    mixed = lightning_recurrent(q, k, v, layer.slopes)[0].transpose(1, 2).reshape(1, 5, 6)
    mixed = mixed / mixed.square().mean(-1, keepdim=True).add(torch.finfo(x.dtype).eps).sqrt()
    gate = torch.sigmoid(x @ layer.gate[0].weight.T @ layer.gate[1].weight.T)
    torch.testing.assert_close(layer(x)[0], (gate * mixed) @ layer.out.weight.T, **EXACT)


def test_example_runs():
    assert not doctest.testmod(lightning2).failed
    for got in (form(**example())[0] for form in FORMS):
        torch.testing.assert_close(got, lightning_naive(**example())[0], atol=1e-5, rtol=1e-5)


BAD = {
    "k": (lambda a: a | dict(k=a["k"][:, :, :3]), "q, k, v: expected"),
    "slopes": (lambda a: a | dict(slopes=a["slopes"][:1]), r"slopes: expected shape \(2,\)"),
    "growth": (lambda a: a | dict(slopes=-a["slopes"]), "slopes: expected finite numbers"),
    "state": (lambda a: a | dict(state=torch.zeros(1, 2, 3, 4)), "state: expected shape"),
}


@pytest.mark.no_shape_checks
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_named(case, form):
    change, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        form(**change(example()))


@pytest.mark.no_shape_checks
def test_bad_sizes_are_named():
    with pytest.raises(ValueError, match="block: expected"):
        lightning_block(**example(), block=0)
    with pytest.raises(ValueError, match="heads: expected a divisor"):
        NormLinearAttention(10, heads=3)
