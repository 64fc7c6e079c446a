"""ShadowKV: full attention in the limit, the paper's loop everywhere, and the bytes it promises."""

from __future__ import annotations

import dataclasses
import doctest

import pytest
import torch

from corelib.contracts import KVCache
from corelib.models.cache import DenseCache
from corelib.models.decoder import Decoder, DecoderConfig, generate
from corelib.primitives import attention_reference, rope_frequencies, rope_half_split
from corelib.serving import shadowkv
from corelib.serving.shadowkv import (
    KeyFactors,
    ShadowKVCache,
    example,
    factor_keys,
    held_bytes,
    landmarks_and_outliers,
    rebuild_keys,
    shadowkv_reference,
    step_bytes,
)
from corelib.serving.shared import TierMeter

EXACT = dict(atol=1e-10, rtol=1e-10)
FULL = dict(rank=10_000, budget=80_000)


def random_inputs(S, B=2, H=4, G=2, D=8, V=None, L=1, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = (B, H, L, D), (B, G, S, D), (B, G, S, V or D)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]


def filled(k, v, prompt, heads, scale=None, **options):
    """A cache that has read the first ``prompt`` tokens."""
    cache = ShadowKVCache(rope_frequencies(k.shape[3]), **options)
    cache.append(0, k[:, :, :prompt], v[:, :, :prompt])
    q = torch.randn(k.shape[0], heads, prompt, k.shape[3], dtype=k.dtype)
    out = cache.attend(0, q, scale=scale)
    wanted = attention_reference(q, k[:, :, :prompt], v[:, :, :prompt], causal=True, scale=scale)
    torch.testing.assert_close(out, wanted, **EXACT)  # prefill is full attention
    return cache


def decode(cache, k, v, prompt, L=1, seed=0, scale=None):
    """Steps of ``L`` tokens to the end of ``k``; yields what each saw, its query and its output."""
    for at in range(prompt, k.shape[2], L):
        stop = min(at + L, k.shape[2])
        cache.append(0, k[:, :, at:stop], v[:, :, at:stop])
        generator = torch.Generator().manual_seed(1000 * seed + at)
        shape = (cache.layers[0].k.shape[0], 4, stop - at, k.shape[3])
        q = 3 * torch.randn(shape, generator=generator, dtype=torch.float64)
        yield stop, q, cache.attend(0, q, scale=scale)


# --- the limit, and the loop ----------------------------------------------------------------------


@pytest.mark.parametrize("prompt", [1, 7, 33, 64, 71])
@pytest.mark.parametrize("G", [1, 2, 4])
def test_full_rank_and_budget_is_full_attention(prompt, G):
    _, k, v = random_inputs(prompt + 5, G=G, V=6)
    cache = filled(k, v, prompt, 4, **FULL, outliers=1, local=1, chunk=8)
    for stop, q, out in decode(cache, k, v, prompt, L=2):
        wanted = attention_reference(q, k[:, :, :stop], v[:, :, :stop], causal=True)
        torch.testing.assert_close(out, wanted, **EXACT)


def test_the_rank_of_the_unrotated_keys_is_enough():
    """Keys of rank 3 over two heads of width 8: three numbers a token are all of them."""
    _, _, v = random_inputs(66)
    left, right = random_inputs(66, D=3)[1][:, :1], torch.randn(2, 1, 3, 16, dtype=torch.float64)
    keys = (left @ right).unflatten(3, (2, 8))[:, 0].transpose(1, 2)
    k = rope_half_split(keys, torch.arange(66), rope_frequencies(8))
    for rank, same in ((3, True), (2, False)):
        cache = filled(k, v, 65, 4, rank=rank, budget=80, outliers=1, local=1)
        ((_, q, out),) = decode(cache, k, v, 65)
        wanted = attention_reference(q, k, v, causal=True)
        assert torch.allclose(out, wanted, **EXACT) == same


CASES = {
    "the settings of the example": dict(rank=8, budget=12, chunk=4, outliers=2, local=2),
    "chunks of one token": dict(rank=5, budget=7, chunk=1, outliers=0, local=1),
    "nothing selected": dict(rank=5, budget=0, chunk=4, outliers=3, local=1),
    "no outliers, no end": dict(rank=6, budget=16, chunk=8, outliers=0, local=0),
    "all are outliers": dict(rank=5, budget=8, chunk=8, outliers=99, local=1),
    "own scale": dict(rank=9, budget=24, chunk=4, outliers=1, local=3, scale=0.9),
}


@pytest.mark.parametrize("L", [1, 3])
@pytest.mark.parametrize("case", CASES)
def test_every_step_is_the_papers_loop(case, L):
    """With what stayed on the device from the steps before, also several queries at once."""
    options, prompt = CASES[case], 57
    _, k, v = random_inputs(prompt + 7, V=5)
    cache = filled(k, v, prompt, 4, **options)
    for stop, q, out in decode(cache, k, v, prompt, L, scale=options.get("scale")):
        seen = k[:, :, :stop], v[:, :, :stop]
        wanted = shadowkv_reference(q, *seen, rope_frequencies(8), prompt=prompt, **options)
        torch.testing.assert_close(out, wanted, **EXACT)


def test_a_head_of_a_group_decides_for_the_group():
    """One query head wants one chunk, the other all a little: the first one gets its chunk."""
    _, k, v = random_inputs(72, B=1, H=2, G=1)
    cache = filled(k, v, 71, 2, rank=8, budget=8, outliers=0, local=1)
    landmark = k[0, 0, 24:32].mean(0)
    q = torch.stack([20 * landmark, torch.zeros(8)]).view(1, 2, 1, 8).double()
    cache.append(0, k[:, :, 71:], v[:, :, 71:])
    cache.attend(0, q)
    assert cache.selected(0).tolist() == [[[3]]]


# --- its parts ------------------------------------------------------------------------------------


def test_rope_raises_the_rank():
    """The card's numbers: unrotated keys of rank 4 come out with all 32 directions."""
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randn(n, 4, generator=generator).double() for n in (256, 32))
    keys = (left @ right.T).view(1, 1, 256, 32)
    rotated = rope_half_split(keys, torch.arange(256), rope_frequencies(32))
    assert torch.linalg.matrix_rank(keys[0, 0]) == 4
    assert torch.linalg.matrix_rank(rotated[0, 0]) == 32


def test_factors_are_the_best_of_their_rank_and_shared_by_heads():
    _, k, _ = random_inputs(40)
    left, right = factor_keys(k, 5)
    assert left.shape == (2, 40, 5) and right.shape == (2, 2, 5, 8)
    rest = k - left[:, None] @ right
    tail = torch.linalg.svdvals(k.transpose(1, 2).flatten(2))[:, 5:]
    torch.testing.assert_close(rest.square().sum((1, 2, 3)), tail.square().sum(1))
    half = factor_keys(k.half(), 5)
    assert half.left.dtype == torch.float16
    assert factor_keys(k[:, :, :3], 99).left.shape == (2, 3, 3)


def test_rebuilt_keys_are_rotated_to_where_they_stood():
    _, k, _ = random_inputs(40)
    frequencies = rope_frequencies(8)
    rotated = rope_half_split(k, torch.arange(40), frequencies)
    positions = torch.tensor([[[7, -1, 0], [39, 3, -1]], [[1, 1, 2], [-1, -1, -1]]])
    got = rebuild_keys(factor_keys(k, 16), positions, frequencies)
    for b in range(2):
        for g in range(2):
            for j, place in enumerate(positions[b, g].tolist()):
                wanted = torch.zeros(8).double() if place < 0 else rotated[b, g, place]
                torch.testing.assert_close(got[b, g, j], wanted, **EXACT)
    factors = KeyFactors(*factor_keys(k, 4))
    assert rebuild_keys(factors, positions[..., :0], frequencies).shape == (2, 2, 0, 8)


def test_a_chunk_of_identical_keys_is_scored_exactly_and_no_outlier():
    q, k, _ = random_inputs(48)
    k[:, :, 16:24] = k[:, :, 16:17]
    landmarks, outliers = landmarks_and_outliers(k, 8, 5)
    torch.testing.assert_close(landmarks[:, :, 2], k[:, :, 16], **EXACT)
    assert (outliers != 2).all()
    worst = torch.cosine_similarity(k.unflatten(2, (6, 8)), landmarks[:, :, :, None], -1).amin(-1)
    assert torch.equal(outliers.sort().values, worst.argsort(-1)[..., :5].sort().values)


# --- bytes ----------------------------------------------------------------------------------------


def test_bytes_that_cross_do_not_grow_with_the_length():
    moved = {}
    for prompt in (160, 320):
        _, k, v = random_inputs(prompt + 4, B=1)
        cache = filled(k, v, prompt, 4, rank=8, budget=32, outliers=2, local=2)
        chunked = (prompt // 8 - 2) * 8
        assert cache.meter.to_host == 2 * chunked * 8 * 8 == cache.bytes("host")
        steps, before = [], 0
        for _ in decode(cache, k, v, prompt):
            steps.append(cache.meter.to_device - before)
            before = cache.meter.to_device
        moved[prompt] = steps
    most = 2 * 32 * 8 * 8  # heads, tokens, channels, bytes of a number
    assert {steps[0] for steps in moved.values()} == {most}
    assert all(0 < step <= most for steps in moved.values() for step in steps)


def test_what_the_last_step_selected_is_not_moved_again():
    _, k, v = random_inputs(163)
    cache = filled(k, v, 160, 4, rank=8, budget=40, outliers=2, local=2)
    meter, page = cache.meter, 8 * 8 * 8  # tokens, channels, bytes of a number
    held, before = [set() for _ in range(4)], TierMeter()
    for _, q, _ in decode(cache, k, v, 160):
        chosen = [set(head.tolist()) for head in cache.selected(0).flatten(0, 1)]
        new = sum(len(now - then) for now, then in zip(chosen, held, strict=True))
        assert meter.to_device - before.to_device == new * page and 0 < new <= 20
        assert (meter.hits - before.hits, meter.misses - before.misses) == (20 - new, new)
        held, before, last = chosen, dataclasses.replace(meter), q
    cache.attend(0, last)  # the same query again: nothing is new
    assert meter.to_device == before.to_device and meter.hits == before.hits + 20


def test_device_bytes_are_the_factors_and_what_is_kept():
    """Per token ``R + G D / chunk`` numbers and the numbers of the chunks, and a constant."""
    held = {}
    for prompt in (160, 320):
        _, k, v = random_inputs(prompt, B=1)
        cache = filled(k, v, prompt, 4, rank=4, budget=32, outliers=2, local=2)
        held[prompt] = cache.bytes()
    assert held[320] - held[160] == 160 * (4 + 2 * 8 / 8 + 2 / 8) * 8
    assert held[320] < 0.4 * 320 * 2 * 2 * 8 * 8


@pytest.mark.parametrize("prompt", [57, 160])
def test_bytes_in_closed_form(prompt):
    _, k, v = random_inputs(prompt + 1, B=1)
    settings = dict(rank=4, budget=32, chunk=4, outliers=2, local=2)
    cache = filled(k, v, prompt, 4, **settings)
    device, host = held_bytes(prompt, G=2, D=8, **settings, itemsize=8)
    assert (cache.bytes(), cache.bytes("host")) == (device, host)
    _ = list(decode(cache, k, v, prompt))
    assert step_bytes(prompt, G=2, D=8, **settings, itemsize=8)[1] == cache.meter.to_device
    all_hits = step_bytes(prompt, G=2, D=8, **settings, itemsize=8, hit_rate=1.0)
    assert (
        all_hits[1] == 0 and all_hits[0] < step_bytes(prompt, G=2, D=8, **settings, itemsize=8)[0]
    )


# --- the contract ---------------------------------------------------------------------------------


def small_model():
    config = DecoderConfig(vocab=60, width=32, layers=2, head_width=8, hidden=48)
    model = Decoder(config, seed=3).double()
    ids = torch.randint(60, (2, 45), generator=torch.Generator().manual_seed(0))
    return model, ids


def test_a_model_generates_as_with_the_plain_cache():
    model, ids = small_model()
    options = dict(**FULL, outliers=1, local=1)
    cache = ShadowKVCache(model.frequencies, **options)
    assert isinstance(cache, KVCache)
    assert torch.equal(
        generate(model, ids, 5, cache=cache), generate(model, ids, 5, cache=DenseCache())
    )
    assert cache.bytes("host") > 0 and len(cache) == 49


def test_crop_rows_and_ragged_rows_as_in_the_plain_cache():
    model, ids = small_model()
    caches = ShadowKVCache(model.frequencies, **FULL, outliers=1, local=1), DenseCache()

    def same(ids, **change):
        for name, argument in change.items():
            for cache in caches:
                getattr(cache, name)(argument)
        with torch.no_grad():
            torch.testing.assert_close(*(model(ids, cache) for cache in caches), **EXACT)

    same(ids[:, :40])
    same(ids[:, 40:42])
    same(ids[:, 40:43], crop=41)
    same(ids[:, 43:44].repeat(2, 1)[:3], gather_rows=torch.tensor([1, 0, 1]))
    same(ids[:1, :2].expand(3, -1), realign=torch.tensor([45, 43, 44]))
    assert caches[0].bytes("host") > 0
    same(ids[:1, :2].expand(3, -1), realign=torch.tensor([45, 20, 46]))
    assert caches[0].bytes("host") == 0  # cut into the prompt: unpacked
    caches = ShadowKVCache(model.frequencies, **FULL, outliers=1, local=1), DenseCache()
    same(ids[:, :40])
    same(ids[:, 20:24], crop=20)
    assert caches[0].bytes("host") > 0  # and packed again
    same(ids[:, :1])


def test_cutting_into_a_prompt_keeps_what_is_still_known():
    """Outliers, the end and all values exactly; the other keys at their rank."""
    _, k, v = random_inputs(70)
    cache = filled(k, v, 70, 4, rank=3, budget=16, outliers=2, local=2)
    outliers = cache.layers[0].prompt.outliers
    cache.crop(69)
    held = cache.layers[0]
    assert torch.equal(held.v, v[:, :, :69]) and torch.equal(held.k[:, :, 48:], k[:, :, 48:69])
    for b in range(2):
        for g in range(2):
            for chunk in outliers[b, g].tolist():
                at = slice(8 * chunk, 8 * chunk + 8)
                assert torch.equal(held.k[b, g, at], k[b, g, at])
    assert not torch.allclose(held.k, k[:, :, :69])


def test_example():
    assert doctest.testmod(shadowkv).failed == 0
    e = example()
    assert e["q"].shape == (1, 4, 1, 16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lower_precision(dtype):
    _, k, v = random_inputs(60)
    cache = ShadowKVCache(rope_frequencies(8), **FULL, outliers=1, local=1)
    k, v = k.to(dtype), v.to(dtype)
    cache.append(0, k[:, :, :59], v[:, :, :59])
    cache.attend(0, torch.randn(2, 4, 59, 8).to(dtype))
    cache.append(0, k[:, :, 59:], v[:, :, 59:])
    q = torch.randn(2, 4, 1, 8).to(dtype)
    out = cache.attend(0, q)
    wanted = attention_reference(q.double(), k.double(), v.double(), causal=True)
    assert out.dtype == dtype
    tolerance = 16 * torch.finfo(dtype).eps
    torch.testing.assert_close(out.double(), wanted, atol=tolerance, rtol=tolerance)


BAD = {
    "rank": (dict(rank=0), "rank: expected at least 1, got 0"),
    "budget": (dict(budget=-8), "budget: expected at least 0, got -8"),
    "multiple": (dict(budget=20), "budget: expected a multiple of chunk, 8, got 20"),
    "chunk": (dict(chunk=0), "chunk: expected at least 1, got 0"),
    "outliers": (dict(outliers=-1), "outliers: expected at least 0, got -1"),
}


@pytest.mark.no_shape_checks
def test_bad_input_is_named():
    for options, message in BAD.values():
        with pytest.raises(ValueError, match=message):
            ShadowKVCache(rope_frequencies(8), **options)
    cache = ShadowKVCache(rope_frequencies(6))
    q, k, v = random_inputs(60)
    cache.append(0, k, v)
    with pytest.raises(ValueError, match="frequencies: expected 4 for keys 8 wide, got 3"):
        cache.attend(0, q)
    with pytest.raises(ValueError, match="layer: expected one with a packed prompt, got 0"):
        cache.selected(0)
    with pytest.raises(ValueError, match="keys: expected whole chunks of 8, got 60 tokens"):
        landmarks_and_outliers(k, 8, 1)
    with pytest.raises(ValueError, match="rank: expected at least 1, got 0"):
        factor_keys(k, 0)
