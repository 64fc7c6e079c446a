"""A cache that packs its prompt: with an exact packing it is the plain cache, call by call."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from corelib.contracts import KVCache
from corelib.models.cache import DenseCache
from corelib.models.decoder import Decoder, DecoderConfig, generate
from corelib.primitives import attention
from corelib.serving.prompt_cache import PromptCache

EXACT = dict(atol=1e-10, rtol=1e-10)


@dataclasses.dataclass
class WholePrompt:
    """The packing that loses nothing, on the host."""

    k: Tensor
    v: Tensor

    @property
    def length(self):
        return self.k.shape[2]

    def attend(self, q, scale):
        return attention(q, self.k, self.v, causal=False, scale=scale, return_lse=True)

    def unpack(self):
        return self.k, self.v

    def rows(self, rows):
        return WholePrompt(self.k[rows], self.v[rows])

    def bytes(self, tier):
        return self.k.nbytes + self.v.nbytes if tier == "host" else 0


class WholeCache(PromptCache):
    packed = 0

    def pack(self, k, v, q):
        assert q.shape[2] <= k.shape[2] and q.shape[1] == 4
        self.packed += 1
        return WholePrompt(k.clone(), v.clone()) if k.shape[2] > 1 else None


def both():
    return WholeCache(), DenseCache()


def tokens(n, B=3, seed=0):
    generator = torch.Generator().manual_seed(seed + 100 * n)
    shapes = (B, 4, n, 8), (B, 2, n, 8), (B, 2, n, 8)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]


def step(caches, n, B=3, layers=(0, 2), seed=0, **options):
    """Append and attend in both, and hold them to each other."""
    for layer in layers:
        q, k, v = tokens(n, B, seed + layer)
        outs = []
        for cache in caches:
            cache.append(layer, k, v)
            outs.append(cache.attend(layer, q, **options))
        torch.testing.assert_close(*outs, **EXACT)
    assert len(caches[0]) == len(caches[1])


def test_prefill_then_tokens_and_bytes():
    caches = ours, dense = both()
    assert isinstance(ours, KVCache) and len(ours) == ours.bytes() == 0
    step(caches, 9, scale=0.3)
    assert ours.packed == 2 and ours.bytes("host") == dense.bytes() and ours.bytes() == 0
    for seed, n in enumerate((1, 1, 3)):
        step(caches, n, seed=seed)
    assert ours.packed == 2 and ours.bytes() + ours.bytes("host") == dense.bytes()


def test_a_short_prompt_stays_as_it_is():
    caches = both()
    for seed in range(4):
        step(caches, 1, seed=seed)
    assert caches[0].packed == 2 and caches[0].bytes("host") == 0


@pytest.mark.parametrize("length", [12, 10, 9, 6, 0])
def test_crop_behind_and_into_the_prompt(length):
    caches = ours, dense = both()
    step(caches, 9)
    step(caches, 3)
    for cache in caches:
        cache.crop(length)
    assert (ours.bytes("host") > 0) == (length >= 9)
    step(caches, 2, seed=7)
    assert ours.packed == (2 if length >= 9 else 4)
    step(caches, 1, seed=8)


def test_gather_rows():
    caches = both()
    step(caches, 9)
    step(caches, 2)
    for cache in caches:
        cache.gather_rows(torch.tensor([2, 0, 0, 1]))
    step(caches, 1, B=4)


@pytest.mark.parametrize("lengths", [[12, 9, 11], [10, 10, 10], [12, 4, 9], [9, 9, 9], [3, 0, 1]])
def test_realign_behind_and_into_the_prompt(lengths):
    caches = ours, dense = both()
    step(caches, 9)
    step(caches, 3)
    for cache in caches:
        cache.realign(torch.tensor(lengths))
    assert (ours.bytes("host") > 0) == (min(lengths) >= 9)
    step(caches, 2, seed=5)
    kept = [n + 2 - (b == 1) for b, n in enumerate(lengths)]
    for cache in caches:
        cache.realign(torch.tensor(kept))
    step(caches, 1, seed=6)
    for cache in caches:
        cache.gather_rows(torch.tensor([1, 2, 0]))
    step(caches, 1, seed=7)
    for cache in caches:
        cache.crop(len(cache) - 1)
    step(caches, 1, seed=9)


def test_cutting_rows_of_unequal_length_into_the_prompt():
    caches = ours, dense = both()
    step(caches, 9)
    step(caches, 3)
    for cache in caches:
        cache.realign(torch.tensor([12, 10, 9]))
    for cache in caches:
        cache.crop(10)  # the shortest row now ends inside the prompt
    assert ours.bytes("host") == 0
    step(caches, 2)


def test_a_model_generates_the_same():
    config = DecoderConfig(vocab=50, width=32, layers=2, head_width=8, hidden=48)
    model = Decoder(config).double()
    ids = torch.randint(50, (3, 7), generator=torch.Generator().manual_seed(0))
    assert torch.equal(
        generate(model, ids, 6, cache=WholeCache()), generate(model, ids, 6, cache=DenseCache())
    )


@pytest.mark.no_shape_checks
def test_bad_calls_are_named():
    cache = WholeCache()
    q, k, v = tokens(4)
    with pytest.raises(ValueError, match="layer: nothing held for layer 1"):
        cache.attend(1, q)
    with pytest.raises(NotImplementedError):
        PromptCache().pack(k, v, q)
    cache.append(0, k, v)
    cache.attend(0, q)
    with pytest.raises(ValueError, match="q: expected at most the 0 tokens after the packed"):
        cache.attend(0, q)
    with pytest.raises(ValueError, match="k: layer 0 holds"):
        cache.append(0, k[:2], v[:2])
    with pytest.raises(ValueError, match="length: expected 0 to 4, got 5"):
        cache.crop(5)
    with pytest.raises(ValueError, match="lengths: expected 0 to 4"):
        cache.realign(torch.tensor([5, 1, 1]))
    with pytest.raises(ValueError, match="tier: expected 'device' or 'host', got 'disk'"):
        cache.bytes("disk")
