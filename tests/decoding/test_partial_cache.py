"""Caches that hold less than they count: what they hold, and that models attend to just that."""

from __future__ import annotations

import pytest
import torch

from corelib.contracts import KVCache
from corelib.decoding.partial_cache import (
    PartialCache,
    RetrievalKVCache,
    SinkCache,
    choose_chunks,
)
from corelib.primitives import attention

pytestmark = pytest.mark.method("triforce")
B, H, G, D = 2, 4, 2, 8


def some(heads, n, seed=0, batch=B):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, heads, n, D, generator=generator, dtype=torch.float64)


def full_cache(n, layers=2, seed=0):
    """A prompt of ``n`` positions, read; and its queries, keys and values of each layer."""
    cache, tensors = PartialCache(), []
    for layer in range(layers):
        q, k, v = (some(h, n, 10 * seed + 3 * layer + i) for i, h in enumerate((H, G, G)))
        cache.append(layer, k, v)
        cache.attend(layer, q)
        tensors.append((q, k, v))
    return cache, tensors


def seen_by(q, k, v, positions):
    """Attention over these positions, each key head its own ``(B, G, m)``, one head at a time."""
    out = torch.empty_like(q)
    for b in range(B):
        for h in range(H):
            g = h * G // H
            at = positions[b, g]
            weights = (q[b, h] @ k[b, g, at].T * D**-0.5).softmax(-1)
            out[b, h] = weights @ v[b, g, at]
    return out


# --- everything held ------------------------------------------------------------------------------


def test_a_full_cache_is_causal_attention_in_pieces():
    q, k, v = (some(h, 11, i) for i, h in enumerate((H, G, G)))
    cache, pieces = PartialCache(), []
    for first, last in ((0, 6), (6, 7), (7, 11)):
        cache.append(0, k[:, :, first:last], v[:, :, first:last])
        pieces.append(cache.attend(0, q[:, :, first:last]))
    torch.testing.assert_close(torch.cat(pieces, 2), attention(q, k, v, causal=True))
    torch.testing.assert_close(cache.queries[0], q[:, :, -1:])
    assert isinstance(cache, KVCache) and len(cache) == cache.held == 11
    assert cache.bytes() == k.nbytes + v.nbytes and cache.bytes("host") == 0
    assert cache.read == 2 * (6 + 7 + 11) * B * G * D * 8
    cache.crop(4)
    assert len(cache) == 4 and cache.layers[0][0].equal(k[:, :, :4])
    cache.gather_rows(torch.tensor([1, 1, 0]))
    assert cache.layers[0][1].equal(v[[1, 1, 0], :, :4]) and cache.queries[0].shape[0] == 3
    cache.realign(torch.tensor([3, 3, 3]))
    assert len(cache) == 3


# --- sinks ----------------------------------------------------------------------------------------


def test_sink_cache_sees_the_first_and_the_last():
    q, k, v = (some(h, 13, i) for i, h in enumerate((H, G, G)))
    cache = SinkCache(sinks=2, recent=4)
    cache.append(0, k[:, :, :12], v[:, :, :12])
    assert len(cache) == cache.held == 12  # nothing is dropped before trim
    cache.trim()
    assert len(cache) == 12 and cache.held == 6
    cache.append(0, k[:, :, 12:], v[:, :, 12:])
    seen = torch.tensor([0, 1, 8, 9, 10, 11, 12]).expand(B, G, -1)
    torch.testing.assert_close(cache.attend(0, q[:, :, 12:]), seen_by(q[:, :, 12:], k, v, seen))
    cache.crop(11)  # takes back two
    assert len(cache) == 11 and cache.held == 5
    cache.trim()
    assert cache.held == 5
    with pytest.raises(ValueError, match="length: expected 8 to 11 .*, got 7"):
        cache.crop(7)


def test_sink_cache_that_is_not_full_is_whole():
    cache = SinkCache(sinks=2, recent=4)
    cache.append(0, some(G, 6), some(G, 6))
    cache.trim()
    cache.crop(0)
    assert len(cache) == cache.skipped == 0


# --- retrieval ------------------------------------------------------------------------------------


def chosen_by_hand(q, k, chunk, count):
    """Chunk 0, then by the sum over a group's heads of last query times mean key."""
    ids = []
    for b in range(B):
        for g in range(G):
            heads = range(g * H // G, (g + 1) * H // G)
            means = [k[b, g, at : at + chunk].mean(0) for at in range(0, k.shape[2], chunk)]
            scores = [sum(float(q[b, h, -1] @ mean) for h in heads) for mean in means]
            best = sorted(range(1, len(means)), key=lambda i, s=scores: -s[i])
            ids.append([0, *best][:count])
    return torch.tensor(ids).view(B, G, -1)


@pytest.mark.parametrize("count", [1, 3, 7, 9])
def test_chunks_are_the_first_and_the_best(count):
    q, k = some(H, 5, 0), some(G, 28, 1)
    assert choose_chunks(q[:, :, -1:], k, 4, count).equal(chosen_by_hand(q, k, 4, count))


def test_retrieval_holds_the_chosen_chunks_and_the_rest():
    """Also a prompt that does not fill its last chunk, and two layers that choose apart."""
    full, tensors = full_cache(23)
    cache = RetrievalKVCache(budget=15, chunk=3)
    cache.build(full)
    assert len(cache) == 23 and cache.held == 15
    for layer, (q, k, v) in enumerate(tensors):
        ids = chosen_by_hand(q, k[:, :, :21], 3, 5)
        assert cache.chunks[layer].equal(ids)
        seen = (ids[..., None] * 3 + torch.arange(3)).flatten(2)[..., :13]  # two new ones push out
        seen = torch.cat([seen, torch.tensor([21, 22]).expand(B, G, 2)], 2)
        new = [some(h, 1, 50 + h) for h in (H, G, G)]
        cache.append(layer, new[1], new[2])
        k, v = (torch.cat(pair, 2) for pair in ((k, new[1]), (v, new[2])))
        seen = torch.cat([seen, torch.full((B, G, 1), 23)], 2)
        torch.testing.assert_close(cache.attend(layer, new[0]), seen_by(new[0], k, v, seen))
    assert len(cache) == 24
    cache.crop(23)
    assert len(cache) == 23
    with pytest.raises(ValueError, match="length: expected 21 to 23"):
        cache.crop(20)


def test_refresh_follows_and_newer_text_pushes_the_lowest_out():
    full, _ = full_cache(20, layers=1)
    cache = RetrievalKVCache(budget=8, chunk=4)
    cache.build(full)
    chosen = cache.layers[0][0].clone()
    for new, kept in ((3, 5), (2, 4), (4, 4)):  # chunk 0 stays, over the budget if it must
        full.append(0, *(2 * [some(G, new, 7)]))
        cache.refresh(full)
        tail = full.layers[0][0][:, :, 20:]
        assert cache.layers[0][0].equal(torch.cat([chosen[:, :, :kept], tail], 2))
        assert len(cache) == len(full)
    full.crop(21)
    cache.refresh(full)
    assert len(cache) == 21 and cache.held == 8


def test_a_budget_for_everything_is_full_attention():
    full, [(q, k, v)] = full_cache(19, layers=1)
    cache = RetrievalKVCache(budget=40, chunk=4)
    cache.build(full)
    assert cache.skipped == 0
    torch.testing.assert_close(
        cache.attend(0, q[:, :, -2:]), attention(q, k, v, causal=True)[:, :, -2:]
    )


def test_a_prompt_below_one_chunk_is_kept():
    full, [(q, k, v)] = full_cache(3, layers=1)
    cache = RetrievalKVCache(budget=8, chunk=4)
    cache.build(full)
    assert cache.built and len(cache) == cache.held == 3 and cache.layers[0][0].equal(k)


def test_what_is_not_chosen_is_never_read():
    full, [(q, k, v)] = full_cache(24, layers=1)
    ids = choose_chunks(q[:, :, -1:], k, 4, 3)
    poisoned = v.clone().unflatten(2, (-1, 4))
    others = torch.ones(B, G, 6, dtype=torch.bool).scatter(2, ids, False)
    poisoned[others] = torch.nan
    full.layers[0] = (k, poisoned.flatten(2, 3))
    cache = RetrievalKVCache(budget=12, chunk=4)
    cache.build(full)
    assert cache.attend(0, q[:, :, -1:]).isfinite().all()


# --- errors ---------------------------------------------------------------------------------------


@pytest.mark.no_shape_checks
def test_bad_arguments():
    with pytest.raises(ValueError, match="sinks: expected at least 0, got -1"):
        SinkCache(sinks=-1)
    with pytest.raises(ValueError, match="recent: expected at least 1, got 0"):
        SinkCache(recent=0)
    with pytest.raises(ValueError, match="chunk: expected at least 1, got 0"):
        RetrievalKVCache(chunk=0)
    with pytest.raises(ValueError, match="budget: expected a positive multiple of chunk, 8, got 9"):
        RetrievalKVCache(9)
    with pytest.raises(ValueError, match="k: expected whole chunks of 4, got 9"):
        choose_chunks(some(H, 1), some(G, 9), 4, 1)
    with pytest.raises(ValueError, match="count: expected at least 1, got 0"):
        choose_chunks(some(H, 1), some(G, 8), 4, 0)
    with pytest.raises(ValueError, match="full: expected a cache that holds a whole prompt"):
        RetrievalKVCache().build(PartialCache())
    with pytest.raises(ValueError, match="full: expected a prompt of 0 that was built"):
        RetrievalKVCache().refresh(PartialCache())
    cache = PartialCache()
    with pytest.raises(ValueError, match="layer: nothing held for layer 0"):
        cache.attend(0, some(H, 1))
    cache.append(0, some(G, 2), some(G, 2))
    with pytest.raises(ValueError, match="k: layer 0 holds"):
        cache.append(0, some(1, 2), some(1, 2))
    with pytest.raises(ValueError, match="tier: expected 'device' or 'host', got 'disk'"):
        cache.bytes("disk")
    with pytest.raises(ValueError, match="lengths: expected equal ones"):
        cache.realign(torch.tensor([1, 2]))
