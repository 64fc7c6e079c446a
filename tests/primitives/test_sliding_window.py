"""Sliding-window attention in blocks, and the ring cache of decoding."""

from __future__ import annotations

import pytest
import torch

from corelib.measure.work import count_work
from corelib.primitives import attention, masked_attention_reference, masks
from corelib.primitives.sliding_window import RingCache, sliding_window_attention

EXACT = dict(atol=1e-12, rtol=1e-11)


def qkv(L, H=2, G=2, D=4, V=4, B=2):
    torch.manual_seed(0)
    shapes = (B, H, L, D), (B, G, L, D), (B, G, L, V)
    return [torch.randn(shape, dtype=torch.float64) for shape in shapes]


def by_mask(q, k, v, window, sinks):
    visible = masks.attention_mask(causal=True, window=window, sinks=sinks)
    return masked_attention_reference(q, k, v, visible.dense(q.shape[2], k.shape[2]))


@pytest.mark.parametrize("L", [1, 33, 97])
@pytest.mark.parametrize("window", [1, 7, 33, 500])
def test_equals_the_mask(L, window):
    q, k, v = qkv(L)
    for sinks in (0, 5, 40, 200):
        got = sliding_window_attention(q, k, v, window=window, sinks=sinks)
        torch.testing.assert_close(got, by_mask(q, k, v, window, sinks), **EXACT)


def test_grouped_heads_and_unequal_widths():
    q, k, v = qkv(75, H=6, G=2, D=4, V=3)
    got = sliding_window_attention(q, k, v, window=9, sinks=3)
    torch.testing.assert_close(got, by_mask(q, k, v, 9, 3), **EXACT)


@pytest.mark.parametrize(("window", "sinks"), [(5, 3), (33, 50)])
def test_gradients(window, sinks):
    results = []
    for form in (sliding_window_attention, attention):
        leaves = [x.requires_grad_() for x in qkv(101, H=4)]
        options = {} if form is sliding_window_attention else {"causal": True}
        out = form(*leaves, window=window, sinks=sinks, scale=0.3, **options)
        results.append([out, *torch.autograd.grad(out.cos().sum(), leaves)])
    for got, wanted in zip(*results):
        torch.testing.assert_close(got, wanted, **EXACT)


def test_a_window_as_long_as_the_text_hides_nothing():
    q, k, v = qkv(70)
    dense = attention(q, k, v, causal=True)
    for window in (70, 71, 10_000):
        got = sliding_window_attention(q, k, v, window=window)
        torch.testing.assert_close(got, dense, **EXACT)


def test_a_window_of_one_returns_the_values():
    q, k, v = qkv(50)
    torch.testing.assert_close(sliding_window_attention(q, k, v, window=1), v, **EXACT)


def test_no_queries():
    q, k, v = qkv(0)
    assert sliding_window_attention(q, k, v, window=4, sinks=2).shape == v.shape


def test_work_grows_with_the_length():
    def work(L):
        q, k, v = qkv(L, B=1)
        return count_work(lambda: sliding_window_attention(q, k, v, window=32, sinks=2))

    one, two, four = (work(n) for n in (256, 512, 1024))
    assert four - two == 2 * (two - one)  # a straight line


def test_half_precision():
    q, k, v = (x.bfloat16() for x in qkv(90))
    got = sliding_window_attention(q, k, v, window=20, sinks=1)
    assert got.dtype == torch.bfloat16
    wanted = by_mask(*(x.double() for x in (q, k, v)), 20, 1)
    torch.testing.assert_close(got.double(), wanted, atol=2e-2, rtol=2e-2)


# --- the ring -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("window", "sinks"), [(1, 2), (4, 0), (4, 3), (50, 4)])
def test_steps_equal_the_mask(window, sinks):
    q, k, v = qkv(23, H=4)
    cache = RingCache(window, sinks)
    steps = [cache.step(*(x[:, :, t : t + 1] for x in (q, k, v))) for t in range(23)]
    torch.testing.assert_close(torch.cat(steps, 2), by_mask(q, k, v, window, sinks), **EXACT)
    assert (len(cache), cache.seen) == (min(23, window + sinks), 23)


@pytest.mark.parametrize("cut", [2, 5, 22])
@pytest.mark.parametrize(("window", "sinks"), [(1, 0), (4, 3), (50, 4)])
def test_stretches_then_steps(window, sinks, cut):
    q, k, v = qkv(23, H=4)
    wanted = by_mask(q, k, v, window, sinks)
    cache = RingCache(window, sinks)
    cache.extend(k[:, :, :cut], v[:, :, :cut])
    kept = cache.ordered()
    longer = [torch.cat([old, x[:, :, cut:]], 2) for old, x in zip(kept, (k, v))]
    rest = attention(q[:, :, cut:], *longer, causal=True, window=window, sinks=sinks)
    torch.testing.assert_close(rest, wanted[:, :, cut:], **EXACT)
    for t in range(cut, 23):
        out = cache.step(*(x[:, :, t : t + 1] for x in (q, k, v)))
        torch.testing.assert_close(out, wanted[:, :, t : t + 1], **EXACT)


def test_slots_never_filled_are_never_read(monkeypatch):
    empty = torch.Tensor.new_empty
    poisoned = lambda x, *shape: empty(x, *shape).fill_(torch.nan)  # noqa: E731
    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned)
    q, k, v = qkv(6)
    cache = RingCache(4, 3)
    for t in range(6):
        assert cache.step(*(x[:, :, t : t + 1] for x in (q, k, v))).isfinite().all()
        assert all(x.isfinite().all() for x in cache.ordered())


def test_the_ring_does_not_grow():
    cache, sizes = RingCache(5, 2), set()
    _, k, v = qkv(60)
    for start in range(0, 60, 6):
        cache.extend(k[:, :, start : start + 6], v[:, :, start : start + 6])
        sizes.add(cache.bytes())
    assert sizes == {2 * 2 * 2 * (5 + 2) * 4 * 8}  # k and v, rows, groups, slots, width, bytes
    assert RingCache(5, 2).bytes() == 0 and len(RingCache(5)) == 0


def test_a_copy_lives_its_own_life():
    q, k, v = qkv(12)
    cache = RingCache(3, 1)
    assert cache.copy().ordered() is None
    cache.extend(k[:, :, :8], v[:, :, :8])
    twin = cache.copy()
    cache.extend(k[:, :, 8:11], v[:, :, 8:11])
    kept = torch.tensor([0, 5, 6, 7])
    torch.testing.assert_close(twin.ordered()[0], k[:, :, kept], **EXACT)
    torch.testing.assert_close(cache.ordered()[0], k[:, :, [0, 8, 9, 10]], **EXACT)


@pytest.mark.no_shape_checks
@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (dict(window=0), ValueError, "window: expected at least 1"),
        (dict(window=2.0), TypeError, "window: expected an int"),
        (dict(window=None), TypeError, "window: expected an int"),
        (dict(window=2, sinks=-1), ValueError, "sinks: expected at least 0"),
    ],
)
def test_bad_options_are_named(options, error, message):
    with pytest.raises(error, match=message):
        sliding_window_attention(*qkv(4), **options)
    with pytest.raises(error, match=message):
        RingCache(**options)


@pytest.mark.no_shape_checks
def test_bad_shapes_are_named():
    q, k, v = qkv(8)
    with pytest.raises(ValueError, match="k: expected the length of q, 4, got 8"):
        sliding_window_attention(q[:, :, :4], k, v, window=2)
    cache = RingCache(4)
    with pytest.raises(ValueError, match="attend: expected a cache"):
        cache.attend(q[:, :, :1])
    with pytest.raises(ValueError, match="v: expected shape"):
        cache.extend(k, v[:, :, :3])
    cache.extend(k, v)
    with pytest.raises(ValueError, match="k: expected shape"):
        cache.extend(k[:, :1], v)
