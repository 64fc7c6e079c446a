"""merge_partials: a commutative monoid, equal to attention over the union, differentiable."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from corelib.primitives import attention_reference, merge_partials

INF = float("inf")
scores = st.one_of(st.just(-INF), st.floats(-80, 80, allow_nan=False))


@st.composite
def partials(draw, count):
    """``count`` partial results of one row; a part with lse = -inf is the empty one, zeros."""
    result = []
    for _ in range(count):
        lse = torch.tensor([draw(scores)], dtype=torch.float64)
        values = draw(st.lists(st.floats(-5, 5, allow_nan=False), min_size=3, max_size=3))
        out = torch.tensor([values], dtype=torch.float64)
        result.append((out.masked_fill(lse[:, None] == -INF, 0.0), lse))
    return result


def same(a, b):
    for x, y in zip(a, b, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-12, atol=1e-12)


@settings(max_examples=100, deadline=None)
@given(partials(2))
def test_commutative(parts):
    a, b = parts
    ab, ba = merge_partials(*a, *b), merge_partials(*b, *a)
    same(ab, ba)


@settings(max_examples=100, deadline=None)
@given(partials(3))
def test_associative(parts):
    a, b, c = parts
    same(merge_partials(*merge_partials(*a, *b), *c), merge_partials(*a, *merge_partials(*b, *c)))


@settings(max_examples=50, deadline=None)
@given(partials(1))
def test_identity(parts):
    a = parts[0]
    nothing = (torch.zeros(1, 3, dtype=torch.float64), torch.full((1,), -INF, dtype=torch.float64))
    merged = merge_partials(*a, *nothing)
    assert torch.equal(merged[0], a[0]) and torch.equal(merged[1], a[1])


@pytest.mark.parametrize("cut", [0, 1, 4, 9])
def test_equals_attention_over_the_union(cut):
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 3, n, 4, dtype=torch.float64) for n in (5, 9, 9))
    whole = attention_reference(q, k, v, causal=False, return_lse=True)
    parts = [
        attention_reference(q, k[:, :, keys], v[:, :, keys], causal=False, return_lse=True)
        for keys in (slice(None, cut), slice(cut, None))
    ]
    same(merge_partials(*parts[0], *parts[1]), whole)


def test_no_overflow_for_large_scores():
    out = torch.tensor([[1.0], [3.0]])
    merged, lse = merge_partials(out[:1], torch.tensor([1e4]), out[1:], torch.tensor([1e4]))
    torch.testing.assert_close(merged, torch.tensor([[2.0]]))
    torch.testing.assert_close(lse, torch.tensor([1e4]) + torch.log(torch.tensor(2.0)))


def test_gradients():
    torch.manual_seed(0)
    args = [torch.randn(*s, dtype=torch.float64) for s in ((4, 3), (4,), (4, 3), (4,))]
    assert torch.autograd.gradcheck(merge_partials, [x.requires_grad_() for x in args])


@pytest.mark.parametrize("empty", ["a", "b", "both"])
def test_gradients_are_finite_where_parts_are_empty(empty):
    out_a, out_b = (torch.zeros(2, 3, requires_grad=True) for _ in range(2))
    lse_a = torch.tensor([-INF if empty in ("a", "both") else 1.0, 0.0], requires_grad=True)
    lse_b = torch.tensor([-INF if empty in ("b", "both") else 1.0, 0.5], requires_grad=True)
    out, lse = merge_partials(out_a, lse_a, out_b, lse_b)
    assert torch.isfinite(out).all()
    (out.sum() + lse[torch.isfinite(lse)].sum()).backward()
    for x in (out_a, lse_a, out_b, lse_b):
        assert torch.isfinite(x.grad).all()
    if empty == "both":
        assert lse[0] == -INF and (out[0] == 0).all() and lse_a.grad[0] == 0


def test_half_precision_keeps_its_dtype():
    out = torch.randn(4, 3, dtype=torch.bfloat16)
    lse = torch.randn(4)
    merged, merged_lse = merge_partials(out, lse, out, lse)
    assert merged.dtype == torch.bfloat16 and merged_lse.dtype == torch.float32
    torch.testing.assert_close(merged, out)


@pytest.mark.no_shape_checks
def test_errors():
    out, lse = torch.zeros(2, 3), torch.zeros(2)
    with pytest.raises(ValueError, match="out_a and out_b.*equal shapes"):
        merge_partials(out, lse, torch.zeros(2, 4), lse)
    with pytest.raises(ValueError, match="lse_b.*without its last axis"):
        merge_partials(out, lse, out, torch.zeros(3))
    with pytest.raises(TypeError, match="one dtype"):
        merge_partials(out, lse, out.double(), lse)
