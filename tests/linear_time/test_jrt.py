"""Just Read Twice: prefix linear attention in three forms, its layer, prompt and loss."""

from __future__ import annotations

import doctest

import pytest
import torch
import torch.nn.functional as F

from corelib.linear_time import jrt
from corelib.linear_time.jrt import (
    PrefixLinearAttention,
    based_attention,
    based_step,
    example,
    jrt_loss,
    jrt_prompt,
    mask_prefix,
    prefix_linear_attention,
    prefix_linear_naive,
    prefix_linear_recurrent,
    prefix_state,
)
from corelib.primitives import taylor_features
from corelib.testing import conformance

EXACT = dict(atol=1e-11, rtol=1e-10)
FORMS = [prefix_linear_naive, prefix_linear_recurrent, prefix_linear_attention]


def random_inputs(L, P=5, H=2, K=4, V=3, B=2):
    torch.manual_seed(0)
    shapes = (L, K), (L, K), (L, V), (P, K), (P, V)
    return [torch.randn(B, H, *shape, dtype=torch.float64) for shape in shapes]


def by_sum(q, k, v, k_enc, v_enc, M):
    """The definition, one pair at a time."""
    out = torch.zeros_like(v)
    for i in range(q.shape[2]):
        seen = [(k[:, :, j], v[:, :, j]) for j in range(i + 1)]
        seen += [(k_enc[:, :, j], v_enc[:, :, j]) for j in range(M)]
        total = torch.zeros_like(v[:, :, 0, :1])
        for key, value in seen:
            s = (q[:, :, i] * key).sum(-1, keepdim=True) / q.shape[-1] ** 0.5
            w = 1 + s + s * s / 2
            out[:, :, i] += w * value
            total += w
        out[:, :, i] /= total
    return out


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("L, M", [(1, 0), (1, 5), (2, 1), (13, 4), (13, 0)])
def test_forms_equal_the_sum(form, L, M):
    inputs = random_inputs(L)
    torch.testing.assert_close(form(*inputs, M)[0], by_sum(*inputs, M), **EXACT)


@pytest.mark.parametrize("M", [0, 3, 70])
@pytest.mark.parametrize("L", [64, 131])
def test_forms_agree_with_states_and_gradients(L, M):
    results = []
    for form in FORMS:
        leaves = [x.requires_grad_() for x in random_inputs(L, P=70, B=1)]
        out, state = form(*leaves, M)
        loss = out.cos().sum() + state.sin().sum()
        grads = torch.autograd.grad(loss, leaves, materialize_grads=True)
        results.append([out, state, *grads])
    for other in results[1:]:
        for got, wanted in zip(other, results[0], strict=True):
            torch.testing.assert_close(got, wanted, **EXACT)


@pytest.mark.parametrize("form", FORMS)
def test_gradcheck(form):
    leaves = [x.requires_grad_() for x in random_inputs(3, P=2, H=1, K=2, V=2, B=1)]
    assert torch.autograd.gradcheck(lambda *x: form(*x, 2), leaves)


@pytest.mark.parametrize("form", FORMS)
def test_without_prefix_it_is_causal_based_attention(form):
    q, k, v, k_enc, v_enc = random_inputs(40)
    scores = taylor_features(q) @ taylor_features(k).mT
    weights = scores.tril() / scores.tril().sum(-1, keepdim=True)
    out, state = form(q, k, v, k_enc, v_enc, 0)
    torch.testing.assert_close(out, weights @ v, **EXACT)
    torch.testing.assert_close(out, based_attention(q, k, v)[0], **EXACT)
    torch.testing.assert_close(state, based_attention(q, k, v)[1], **EXACT)
    empty = form(q, k, v, k_enc[:, :, :0], v_enc[:, :, :0])[0]
    torch.testing.assert_close(empty, out, **EXACT)


def test_flas_naive_based_agrees(fla_naive):
    q, k, v, _, _ = random_inputs(32, K=8)
    out, _ = based_attention(q, k, v)
    wanted = fla_naive("based", "naive_parallel_based")(q.clone(), k, v)
    torch.testing.assert_close(out, wanted, atol=1e-5, rtol=1e-5)  # they add 1e-6 below the line


def test_a_prefix_through_encoder_keys_equal_to_the_keys_counts_twice():
    q, k, v, _, _ = random_inputs(6)
    got, _ = prefix_linear_attention(q, k, v, k, v)
    s = q @ k.mT / 2
    w = (1 + s + s * s / 2) * (1 + torch.ones(6, 6).tril())
    torch.testing.assert_close(got, w @ v / w.sum(-1, keepdim=True), **EXACT)


@pytest.mark.parametrize("form", FORMS)
def test_keys_behind_the_prefix_do_not_count(form):
    q, k, v, k_enc, v_enc = random_inputs(9)
    out, state = form(q, k, v, k_enc, v_enc, 3)
    k_enc, v_enc = k_enc.clone(), v_enc.clone()
    k_enc[:, :, 3:], v_enc[:, :, 3:] = torch.nan, torch.nan
    for got, wanted in zip(form(q, k, v, k_enc, v_enc, 3), (out, state), strict=True):
        torch.testing.assert_close(got, wanted, atol=0, rtol=0)


def test_parallel_prefill_then_decoding_equals_one_pass():
    q, k, v, k_enc, v_enc = random_inputs(60)
    whole, last = prefix_linear_naive(q, k, v, k_enc, v_enc)
    out, state = prefix_linear_attention(*(x[:, :, :41] for x in (q, k, v)), k_enc, v_enc)
    outs = [out]
    for t in range(41, 60):
        y, state = based_step(q[:, :, t], k[:, :, t], v[:, :, t], state)
        outs.append(y[:, :, None])
    torch.testing.assert_close(torch.cat(outs, 2), whole, **EXACT)
    torch.testing.assert_close(state, last, **EXACT)


def test_the_decoding_state_does_not_depend_on_the_prefix_length():
    q, k, v, k_enc, v_enc = random_inputs(4, P=300)
    sizes = {prefix_linear_attention(q, k, v, k_enc, v_enc, M)[1].nbytes for M in (0, 1, 300)}
    assert sizes == {2 * 2 * (1 + 4 + 10) * (3 + 1) * 8}


def test_a_prefix_may_be_read_in_pieces_and_in_any_order():
    _, _, _, k_enc, v_enc = random_inputs(4, P=7)
    order = torch.tensor([3, 0, 6, 1, 5, 2, 4])
    pieces = [prefix_state(k_enc[:, :, p], v_enc[:, :, p]) for p in order.split(3)]
    torch.testing.assert_close(sum(pieces), prefix_state(k_enc, v_enc), **EXACT)


def test_half_precision_sums_in_float32():
    inputs = [x.bfloat16() for x in random_inputs(100, P=20)]
    wanted, wanted_state = prefix_linear_naive(*(x.double() for x in inputs))
    for form in FORMS:
        out, state = form(*inputs)
        assert out.dtype == torch.bfloat16 and state.dtype == torch.float32
        torch.testing.assert_close(out.double(), wanted, atol=1e-2, rtol=1e-2)
        torch.testing.assert_close(state.double(), wanted_state, atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize("form", FORMS)
def test_no_tokens_leave_the_prefix(form):
    q, k, v, k_enc, v_enc = random_inputs(0)
    out, state = form(q, k, v, k_enc, v_enc)
    assert out.shape == v.shape
    torch.testing.assert_close(state, prefix_state(k_enc, v_enc), **EXACT)


def layer_and_input(L=11, C=12, heads=3):
    torch.manual_seed(0)
    layer = PrefixLinearAttention(C, heads=heads, features=4).double()
    return layer, torch.randn(2, L, C, dtype=torch.float64)


def test_the_layer_is_a_sequence_mixer():
    layer, x = layer_and_input()
    for encoder in (layer.k_enc, layer.v_enc):  # no prefix, no gradient: see the next test
        encoder.requires_grad_(False)
    conformance(layer, x)


def test_every_weight_learns_from_a_prefix():
    layer, x = layer_and_input()
    layer(x, prefix=4)[0].cos().sum().backward()
    assert all(p.grad is not None and p.grad.abs().min() > 0 for p in layer.parameters())


def test_the_layer_by_hand():
    layer, x = layer_and_input(C=6, heads=2)
    q, k, v, k_enc, v_enc = (
        (x @ getattr(layer, name).weight.T).view(2, 11, 2, -1).transpose(1, 2)
        for name in ("q", "k", "v", "k_enc", "v_enc")
    )
    mixed = by_sum(q, k, v, k_enc, v_enc, 4).transpose(1, 2).reshape(2, 11, 6)
    torch.testing.assert_close(layer(x, prefix=4)[0], mixed @ layer.out.weight.T, **EXACT)


def test_a_prefix_then_steps_equals_one_pass():
    layer, x = layer_and_input()
    whole, last = layer(x, prefix=4)
    y, state = layer(x[:, :6], prefix=4)
    outs = [y]
    for t in range(6, 11):
        y, state = layer.step(x[:, t], state)
        outs.append(y[:, None])
    torch.testing.assert_close(torch.cat(outs, 1), whole, **EXACT)
    torch.testing.assert_close(state, last, **EXACT)


def test_the_prefix_is_seen_from_everywhere_and_the_rest_is_causal():
    layer, x = layer_and_input()
    M = 4
    x = x[:1].requires_grad_()
    y, _ = layer(x, prefix=M)
    for i in range(11):
        grad = torch.autograd.grad(y[0, i].cos().sum(), x, retain_graph=True)[0][0]
        seen = grad.abs().amax(-1) > 0
        assert seen.tolist() == [j < max(i + 1, M) for j in range(11)]


def test_prompt_is_text_and_question_again():
    text, question = torch.tensor([[5, 6, 7], [8, 9, 10]]), torch.tensor([[1], [2]])
    once = [[5, 6, 7, 1], [8, 9, 10, 2]]
    assert jrt_prompt(text, question, times=1).tolist() == once
    assert jrt_prompt(text, question).tolist() == [row + row for row in once]
    assert jrt_prompt(text, question, times=3).tolist() == [3 * row for row in once]


def test_masking_hides_its_share_of_the_prefix_only():
    ids = torch.randint(5, 50, (40, 300), generator=torch.Generator().manual_seed(1))
    masked, hidden = mask_prefix(ids, 200, 0, generator=torch.Generator().manual_seed(2))
    assert torch.equal(masked[:, 200:], ids[:, 200:])
    drawn = hidden != -100
    assert torch.equal(masked[:, :200] == 0, drawn)
    assert torch.equal(hidden[drawn], ids[:, :200][drawn])
    assert 0.13 < drawn.float().mean() < 0.17
    none, hidden = mask_prefix(ids, 200, 0, generator=torch.Generator(), share=0.0)
    assert torch.equal(none, ids) and (hidden < 0).all()


def test_loss_by_hand():
    torch.manual_seed(0)
    logits = torch.randn(2, 5, 7, dtype=torch.float64)
    targets = torch.tensor([[9, 9, 1, 2, -100], [9, 9, 0, 6, 3]]) % 7
    targets[0, 4] = -100
    hidden = torch.tensor([[-100, 4], [-100, -100]])
    logp = logits.log_softmax(-1)
    after = [(0, 2), (0, 3), (1, 2), (1, 3), (1, 4)]
    nexts = -sum(logp[b, t, targets[b, t]] for b, t in after) / 5
    wanted = nexts - 0.25 * logp[0, 1, 4]
    torch.testing.assert_close(jrt_loss(logits, targets, hidden), wanted)
    torch.testing.assert_close(jrt_loss(logits, targets, hidden, weight=0.0), nexts)
    flat = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
    torch.testing.assert_close(jrt_loss(logits, targets, hidden[:, :0]), flat)
    nothing = jrt_loss(logits, torch.full_like(targets, -100), hidden.clamp_max(-100))
    assert nothing.item() == 0


def test_example_runs():
    assert not doctest.testmod(jrt).failed
    wanted = prefix_linear_naive(**example())
    for form in FORMS:
        for got, want in zip(form(**example()), wanted, strict=True):
            torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)


BAD = {
    "k": (dict(k=torch.zeros(1, 2, 3, 4)), ValueError, "q, k, v: expected"),
    "k_enc": (dict(k_enc=torch.zeros(1, 2, 11, 5)), ValueError, r"k_enc: expected shape \(1, 2"),
    "v_enc": (dict(v_enc=torch.zeros(1, 2, 3, 3)), ValueError, "v_enc: expected the length"),
    "kind": (dict(v_enc=torch.zeros(1, 2, 11, 3).double()), TypeError, "v_enc: expected the dt"),
    "M": (dict(M=12), ValueError, "M: expected None or 0 to 11, got 12"),
    "bool": (dict(M=True), ValueError, "M: expected None or 0 to 11, got True"),
}


@pytest.mark.no_shape_checks
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_named(case, form):
    change, error, message = BAD[case]
    with pytest.raises(error, match=message):
        form(**(example() | change))


@pytest.mark.no_shape_checks
def test_bad_options_are_named():
    ids = torch.zeros(2, 5, dtype=torch.int64)
    layer, x = layer_and_input()
    calls = {
        "times: expected": lambda: jrt_prompt(ids, ids, times=0),
        "M: expected 0 to 5": lambda: mask_prefix(ids, 6, 0, generator=torch.Generator()),
        "share: expected": lambda: mask_prefix(ids, 2, 0, generator=torch.Generator(), share=2.0),
        "logits, targets, hidden": lambda: jrt_loss(torch.zeros(2, 4, 7), ids, ids),
        "heads: expected a divisor": lambda: PrefixLinearAttention(10, heads=3),
        "features: expected": lambda: PrefixLinearAttention(12, heads=3, features=0),
        "prefix: expected 0 to 11": lambda: layer(x, prefix=12),
    }
    for message, call in calls.items():
        with pytest.raises(ValueError, match=message):
            call()
