"""attention against its dense reference, brute force and PyTorch, with gradients and limits."""

import itertools
import math
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from corelib.primitives import (
    attention,
    attention_reference,
    masked_attention_reference,
    merge_partials,
    visible_keys,
)
from corelib.primitives._cpu_plan import plan

F64 = torch.float64


def inputs(B=1, H=2, G=2, L=7, S=7, D=4, V=4, dtype=F64, seed=0):
    torch.manual_seed(seed)
    shapes = ((B, H, L, D), (B, G, S, D), (B, G, S, V))
    return [torch.randn(*shape, dtype=dtype).requires_grad_() for shape in shapes]


def results_and_gradients(f, tensors, **options):
    """``out``, ``lse`` and the gradients of a random functional of both."""
    out, lse = f(*tensors, return_lse=True, **options)
    torch.manual_seed(1)
    weights = torch.randn(out.shape, dtype=out.dtype)
    lse_weights = torch.randn(lse.shape, dtype=lse.dtype)
    value = (out * weights).sum() + (lse.masked_fill(lse == -torch.inf, 0) * lse_weights).sum()
    return out, lse, *torch.autograd.grad(value, tensors)


def assert_same(ours, theirs, **tolerance):
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, **tolerance)


# ---------------------------------------------------------------- the reference itself


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("window, sinks", [(None, 0), (1, 0), (3, 0), (2, 2)])
@pytest.mark.parametrize("L, S", [(4, 4), (2, 5), (5, 2)])
def test_reference_is_the_definition(causal, window, sinks, L, S):
    """Three loops over heads, queries and keys in plain Python."""
    q, k, v = (x.detach() for x in inputs(H=2, G=1, L=L, S=S, D=3, V=2))
    out, lse = attention_reference(
        q, k, v, causal=causal, window=window, sinks=sinks, return_lse=True
    )
    for h, i in itertools.product(range(2), range(L)):
        p = i + S - L
        total, mean = 0.0, torch.zeros(2, dtype=F64)
        for j in range(S):
            near = window is None or (0 <= p - j < window if causal else abs(p - j) < window)
            if (near or j < sinks) and (j <= p or not causal):
                weight = math.exp(float(q[0, h, i] @ k[0, 0, j]) / math.sqrt(3))
                total, mean = total + weight, mean + weight * v[0, 0, j]
        if total == 0.0:
            assert lse[0, h, i] == -math.inf and (out[0, h, i] == 0).all()
        else:
            assert lse[0, h, i].item() == pytest.approx(math.log(total), abs=1e-12)
            torch.testing.assert_close(out[0, h, i], mean / total)


def test_reference_equals_pytorch_with_a_mask():
    q, k, v = inputs(B=2, H=6, G=2, L=5, S=9)
    visible = visible_keys(5, 9, causal=True, window=4, sinks=2)
    theirs = F.scaled_dot_product_attention(q, k, v, attn_mask=visible, enable_gqa=True)
    ours = attention_reference(q, k, v, causal=True, window=4, sinks=2)
    torch.testing.assert_close(ours, theirs)


def test_masked_reference_takes_masks_per_batch_and_head():
    q, k, v = inputs(B=2, H=2, G=1, L=3, S=4)
    visible = torch.rand(2, 2, 3, 4) < 0.6
    visible[1, 0, 2] = False
    out, lse = masked_attention_reference(q, k, v, visible, return_lse=True)
    theirs = F.scaled_dot_product_attention(q, k, v, attn_mask=visible, enable_gqa=True)
    keep = visible.any(-1)
    torch.testing.assert_close(out[keep], theirs[keep])
    assert (out[1, 0, 2] == 0).all() and lse[1, 0, 2] == -math.inf
    for gradient in torch.autograd.grad(out.sum(), (q, k, v)):
        assert torch.isfinite(gradient).all()


# ---------------------------------------------------------------- equal to the reference

PATTERNS = [
    dict(causal=causal, window=window, sinks=sinks)
    for causal in (True, False)
    for window, sinks in ((None, 0), (1, 0), (5, 0), (5, 3), (40, 2), (1000, 1), (2, 70))
]


@pytest.mark.parametrize("options", PATTERNS, ids=lambda o: "-".join(map(str, o.values())))
@pytest.mark.parametrize("L, S", [(1, 1), (1, 63), (63, 63), (100, 37), (37, 100)])
@pytest.mark.parametrize("small_mask", [1 << 18, 0], ids=["masked", "merged"])
def test_equals_reference(options, L, S, small_mask, monkeypatch):
    monkeypatch.setattr("corelib.primitives._cpu_plan.SMALL_MASK", small_mask)
    plan.cache_clear()
    tensors = inputs(B=2, H=4, G=2, L=L, S=S, D=4, V=6)
    ours = results_and_gradients(attention, tensors, **options)
    assert_same(ours, results_and_gradients(attention_reference, tensors, **options))


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("window", [17, 130])
def test_windows_over_many_tiles(causal, window):
    """Whole tiles, a rest, and key gradients added from several overlapping tiles."""
    tensors = inputs(H=2, G=1, L=611, S=611, D=4, V=4)
    options = dict(causal=causal, window=window, sinks=3)
    ours = results_and_gradients(attention, tensors, **options)
    assert_same(ours, results_and_gradients(attention_reference, tensors, **options))


def test_many_calls_when_gradients_are_bounded(monkeypatch):
    monkeypatch.setattr("corelib.primitives._cpu_tiles.GRADIENT_NUMBERS", 1)
    tensors = inputs(H=2, G=1, L=200, S=230)
    ours = results_and_gradients(attention, tensors, causal=True, window=9)
    assert_same(ours, results_and_gradients(attention_reference, tensors, causal=True, window=9))


@pytest.mark.parametrize("H, G", [(1, 1), (6, 1), (6, 2), (6, 6)])
@pytest.mark.parametrize("L", [1, 8])
@pytest.mark.parametrize("D, V", [(4, 4), (3, 5), (5, 3)])
def test_grouped_heads_and_widths(H, G, L, D, V):
    tensors = inputs(B=2, H=H, G=G, L=L, S=9, D=D, V=V)
    for options in (dict(causal=True), dict(causal=False, scale=0.3), dict(causal=True, window=4)):
        ours = results_and_gradients(attention, tensors, **options)
        assert_same(ours, results_and_gradients(attention_reference, tensors, **options))


def test_any_memory_layout():
    """``(B, L, H, D)`` projections transposed, and strided slices."""
    torch.manual_seed(0)
    tensors = [torch.randn(2, 40, h, 8, dtype=F64).transpose(1, 2)[..., ::2] for h in (4, 2, 2)]
    tensors = [x.requires_grad_() for x in tensors]
    for options in (dict(causal=True), dict(causal=False, window=7), dict(causal=True, window=7)):
        ours = results_and_gradients(attention, tensors, **options)
        assert_same(ours, results_and_gradients(attention_reference, tensors, **options))


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("L, S", [(0, 3), (3, 0), (0, 0)])
def test_nothing_to_attend(causal, L, S):
    tensors = inputs(L=L, S=S)
    out, lse, *gradients = results_and_gradients(attention, tensors, causal=causal)
    assert out.shape == (1, 2, L, 4) and (out == 0).all() and (lse == -math.inf).all()
    assert all((g == 0).all() and g.shape == x.shape for g, x in zip(gradients, tensors))


def test_empty_rows_have_zero_gradients():
    tensors = inputs(L=6, S=2)
    out, lse, dq, dk, dv = results_and_gradients(attention, tensors, causal=True)
    assert (out[:, :, :4] == 0).all() and (lse[:, :, :4] == -math.inf).all()
    assert (dq[:, :, :4] == 0).all() and torch.isfinite(lse[:, :, 4:]).all()
    assert torch.isfinite(dk).all() and torch.isfinite(dv).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("window, sinks", [(None, 0), (9, 2)])
def test_precisions(dtype, window, sinks):
    exact = inputs(H=4, G=2, L=70, S=90, D=8, V=8)
    with torch.no_grad():
        exact = [x.to(dtype).to(F64).requires_grad_() for x in exact]
    rounded = [x.detach().to(dtype).requires_grad_() for x in exact]
    options = dict(causal=True, window=window, sinks=sinks)
    ours = results_and_gradients(attention, rounded, **options)
    assert ours[0].dtype == dtype and ours[1].dtype == torch.float32
    out, lse = attention_reference(*exact, return_lse=True, **options)
    torch.manual_seed(1)  # the functional of results_and_gradients, in the rounded weights
    weights = torch.randn(out.shape, dtype=dtype)
    lse_weights = torch.randn(lse.shape, dtype=torch.float32)
    value = (out * weights.to(F64)).sum() + (lse * lse_weights).sum()
    theirs = (out, lse, *torch.autograd.grad(value, exact))
    tolerance = {torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 4e-2}[dtype]
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=tolerance, atol=tolerance)


def test_lse_gradient_of_half_precision_is_not_rounded():
    """Two keys of equal weight, dv_1 = -10 and dlse = 9.99: rounded to bfloat16 they cancel."""
    q, k = torch.ones(1, 1, 1, 1), torch.zeros(1, 1, 2, 1)
    v = torch.tensor([10.0, -10.0]).reshape(1, 1, 2, 1)
    q, k, v = (x.to(torch.bfloat16).requires_grad_() for x in (q, k, v))
    out, lse = attention(q, k, v, causal=False, return_lse=True)
    (dk,) = torch.autograd.grad(out.sum() + 9.99 * lse.sum(), k)
    assert dk[0, 0, 1, 0].item() == pytest.approx(0.5 * (9.99 - 10), rel=0.05)


# ---------------------------------------------------------------- gradients


@pytest.mark.parametrize("options", [dict(causal=True), dict(causal=False, window=3, sinks=1)])
def test_gradcheck(options):
    tensors = inputs(H=2, G=1, L=4, S=6, D=3, V=2)

    def f(q, k, v):
        return attention(q, k, v, return_lse=True, **options)

    assert torch.autograd.gradcheck(f, tensors)


@pytest.mark.parametrize("use", ["out", "lse", "neither"])
def test_gradient_through_one_result_only(use):
    tensors = inputs(L=9, S=9)

    def value(f):
        out, lse = f(*tensors, causal=True, return_lse=True)
        return {"out": out, "lse": lse, "neither": out * 0}[use].sum()

    ours = torch.autograd.grad(value(attention), tensors, allow_unused=True)
    theirs = torch.autograd.grad(value(attention_reference), tensors, allow_unused=True)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, torch.zeros_like(a) if b is None else b)


def test_partials_merge_under_autograd():
    """Ring attention: three stretches of keys, merged, give the gradients of the whole."""
    tensors = inputs(H=4, G=2, L=12, S=12)

    def in_parts(q, k, v, *, return_lse):
        merged = None
        for start, stop in ((0, 5), (5, 6), (6, 12)):
            # A stretch of keys that ends at `stop` is causal for the queries from `start` on.
            part_out, part_lse = attention(
                q[:, :, start:stop],
                k[:, :, start:stop],
                v[:, :, start:stop],
                causal=True,
                return_lse=True,
            )
            later = attention(
                q[:, :, stop:],
                k[:, :, start:stop],
                v[:, :, start:stop],
                causal=False,
                return_lse=True,
            )
            empty = (
                torch.zeros_like(q[:, :, :start]),
                q.new_full(q.shape[:2] + (start,), -math.inf),
            )
            out = torch.cat([empty[0], part_out, later[0]], dim=2)
            lse = torch.cat([empty[1], part_lse, later[1]], dim=2)
            merged = (out, lse) if merged is None else merge_partials(*merged, out, lse)
        return merged

    ours = results_and_gradients(in_parts, tensors)
    assert_same(ours, results_and_gradients(attention_reference, tensors, causal=True))


def test_uninitialised_memory_is_never_read():
    """torch.empty gives NaN here: an element that is read before it is written shows."""
    tensors = inputs(H=2, G=1, L=150, S=150)
    options = dict(causal=True, window=20, sinks=2)
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(3).isnan().all()
        ours = results_and_gradients(attention, tensors, **options)
    finally:
        torch.use_deterministic_algorithms(False)
    assert_same(ours, results_and_gradients(attention_reference, tensors, **options))


# ---------------------------------------------------------------- cost


class Watch(TorchDispatchMode):
    """The largest tensor made, and the query-key pairs that the flash kernel is given."""

    def __init__(self):
        super().__init__()
        self.largest, self.pairs = 0, 0

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        result = op(*args, **(kwargs or {}))
        for x in result if isinstance(result, tuple | list) else (result,):
            if isinstance(x, torch.Tensor):
                self.largest = max(self.largest, x.untyped_storage().nbytes() // x.element_size())
        if "flash_attention_for_cpu" in op.name():
            q, k = args[1:3] if "backward" in op.name() else args[:2]
            self.pairs += q.shape[0] * q.shape[1] * q.shape[2] * k.shape[2]
        return result


@pytest.mark.parametrize("window", [None, 100, 3000])
@pytest.mark.parametrize("causal", [True, False])
def test_memory_is_linear_in_length(window, causal):
    L, D = 4096, 8
    tensors = inputs(H=1, G=1, L=L, S=L + 100, D=D, V=D, dtype=torch.float32)
    with Watch() as watch:
        attention(*tensors, causal=causal, window=window).sum().backward()
    assert watch.pairs > 0 and watch.largest <= max(256 * (L + 100), 1 << 20)


@pytest.mark.parametrize("causal, seen", [(True, 512), (False, 1023)])
def test_a_window_costs_length_times_window(causal, seen):
    L = 8192
    tensors = inputs(H=1, G=1, L=L, S=L, D=1, V=1, dtype=torch.float32)
    with Watch() as forward:
        out = attention(*tensors, causal=causal, window=512)
    with Watch() as backward:
        out.sum().backward()
    assert forward.pairs <= 1.15 * L * seen and backward.pairs <= 1.5 * L * seen


# ---------------------------------------------------------------- what callers get wrong


@pytest.mark.no_shape_checks
@pytest.mark.parametrize("f", [attention, attention_reference])
def test_errors(f):
    q, k, v = (x.detach() for x in inputs(B=2, H=4, G=2))
    cases = [
        (ValueError, "q: expected 4 axes", (q[0], k, v), {}),
        (ValueError, "one batch size", (q[:1], k, v), {}),
        (ValueError, "k: expected a number of heads that divides q's 3", (q[:, :3], k, v), {}),
        (ValueError, "v: expected the heads of k, 2, got 1", (q, k, v[:, :1]), {}),
        (ValueError, "v: expected the length of k, 7, got 6", (q, k, v[:, :, :6]), {}),
        (ValueError, "k: expected the width of q, 4, got 3", (q, k[..., :3], v), {}),
        (TypeError, "k: expected the dtype of q", (q, k.float(), v), {}),
        (TypeError, "v: expected a floating-point dtype", (q, k, v.long()), {}),
        (TypeError, "q: expected a tensor, got list", (q.tolist(), k, v), {}),
        (ValueError, "window: expected at least 1", (q, k, v), dict(window=-1)),
        (TypeError, "window: expected an int", (q, k, v), dict(window=2.0)),
        (ValueError, "sinks: expected at least 0", (q, k, v), dict(sinks=-1)),
        (TypeError, "scale: expected a number", (q, k, v), dict(scale="1")),
    ]
    for error, message, tensors, options in cases:
        with pytest.raises(error, match=message):
            f(*tensors, causal=True, **options)


def test_cpu_tensors_never_import_triton():
    code = (
        "import sys, torch, corelib.primitives as p; x = torch.ones(1, 1, 4, 2);"
        "p.attention(x, x, x, causal=True); assert 'triton' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
