"""The adapters against transformers' own attention: padded, cached, cropped, reordered.

The oracle is their `sdpa`: their `eager` takes its softmax in float32 even in a float64 model.
"""

import functools

import pytest
import torch

pytest.importorskip("transformers")

from corelib import hf  # noqa: E402
from corelib.hf.attention import left_pads  # noqa: E402
from corelib.models.cache import DenseCache  # noqa: E402
from corelib.models.decoder import generate  # noqa: E402
from corelib.primitives import attention  # noqa: E402
from corelib.sparse_attention.minference import (  # noqa: E402
    a_shape,
    block_sparse,
    minference_attention,
    vertical_slash,
)


def ids(B, L, seed=0):
    return torch.randint(1, 60, (B, L), generator=torch.Generator().manual_seed(seed))


PADS = torch.tensor([0, 3, 6])


def padded(L=9):
    mask = torch.arange(L)[None] >= PADS[:, None]
    return ids(3, L) * mask, mask


@pytest.fixture(params=["Llama", "Qwen2"])
def model(request, random_model):
    return random_model(request.param)


@torch.no_grad()
def test_exact_attention_gives_their_logits(model):
    x = ids(2, 13)
    expected = model(x).logits
    model.set_attn_implementation(hf.register("exact", attention))
    torch.testing.assert_close(model(x).logits, expected, rtol=1e-9, atol=1e-9)


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_batches_equal_theirs(model, side):
    x, mask = padded()
    if side == "right":
        x, mask = x.flip(-1), mask.flip(-1)
    expected = model(x, attention_mask=mask.long()).logits
    model.set_attn_implementation(hf.register("exact", attention))
    got = model(x, attention_mask=mask.long()).logits
    torch.testing.assert_close(got[mask], expected[mask], rtol=1e-9, atol=1e-9)
    unmasked = model(x).logits
    assert side == "right" or float((unmasked - expected)[mask].abs().max()) > 1e-3


@torch.no_grad()
@pytest.mark.method("minference")
@pytest.mark.parametrize("full", [a_shape(1, 99), vertical_slash(99, 99), block_sparse(99)])
def test_minference_with_a_full_budget_equals_theirs(model, full):
    x, mask = padded()
    options = dict(attention_mask=mask.long(), max_new_tokens=4, do_sample=False)
    expected = model.generate(x, **options)
    logits = model(x, attention_mask=mask.long()).logits
    sparse = functools.partial(minference_attention, patterns=full, block=4, last=3)
    model.set_attn_implementation(hf.register("minference", sparse))
    got = model(x, attention_mask=mask.long()).logits
    torch.testing.assert_close(got[mask], logits[mask], rtol=1e-9, atol=1e-9)
    assert torch.equal(model.generate(x, **options), expected)
    few = functools.partial(minference_attention, patterns=a_shape(0, 1))
    model.set_attn_implementation(hf.register("minference", few))
    model.set_attn_implementation("corelib:minference")
    assert float((model(x, attention_mask=mask.long()).logits - logits)[mask].abs().max()) > 1e-3


@torch.no_grad()
@pytest.mark.parametrize("cached", ["theirs", "ours"])
def test_generation_from_padded_prompts_equals_theirs(model, cached):
    x, mask = padded()
    options = dict(attention_mask=mask.long(), max_new_tokens=6, do_sample=False)
    expected = model.generate(x, **options)
    model.set_attn_implementation(hf.register("exact", attention))
    if cached == "ours":
        options["past_key_values"] = hf.ModelCache(DenseCache(), model)
    assert torch.equal(model.generate(x, **options), expected)


@torch.no_grad()
def test_beams_reorder_our_cache(model):
    x = ids(2, 5)
    options = dict(max_new_tokens=5, num_beams=3, do_sample=False)
    options |= dict(attention_mask=torch.ones_like(x))
    expected = model.generate(x, **options)
    model.set_attn_implementation(hf.register("exact", attention))
    cache = hf.ModelCache(DenseCache(), model)
    assert torch.equal(model.generate(x, past_key_values=cache, **options), expected)


@torch.no_grad()
@pytest.mark.parametrize("pieces", [[11], [4, 1, 6], [1] * 11])
def test_language_model_keeps_the_contract(model, pieces):
    x = ids(2, 11)
    expected = model(x).logits
    lm, cache = hf.LanguageModel(model), DenseCache()
    got = torch.cat([lm(part, cache) for part in x.split(pieces, 1)], 1)
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(lm(x), expected, rtol=1e-9, atol=1e-9)
    cache.crop(7)
    torch.testing.assert_close(lm(x[:, 7:], cache), expected[:, 7:], rtol=1e-9, atol=1e-9)


@torch.no_grad()
def test_realigned_rows_go_on_as_if_alone(model):
    x, new, lengths = ids(3, 8), ids(3, 2, seed=1), torch.tensor([8, 2, 5])
    lm, cache = hf.LanguageModel(model), DenseCache()
    lm(x, cache)
    cache.realign(lengths)
    got = lm(new, cache)
    for b, n in enumerate(lengths.tolist()):
        alone = lm(torch.cat([x[b : b + 1, :n], new[b : b + 1]], 1))[:, -2:]
        torch.testing.assert_close(got[b : b + 1], alone, rtol=1e-9, atol=1e-9)


@torch.no_grad()
def test_our_generate_runs_their_model(model):
    x = ids(2, 6)
    kwargs = dict(attention_mask=torch.ones_like(x), max_new_tokens=5, do_sample=False)
    expected = model.generate(x, **kwargs)
    assert torch.equal(generate(hf.LanguageModel(model), x, 5), expected)


@torch.no_grad()
def test_sliding_window_models_reach_a_method_that_takes_a_window(random_model):
    model = random_model("Mistral", sliding_window=4)
    x = ids(2, 12)
    expected = model(x).logits
    model.set_attn_implementation(hf.register("exact", attention))
    torch.testing.assert_close(model(x).logits, expected, rtol=1e-9, atol=1e-9)

    def without(q, k, v, *, causal, scale=None):
        return attention(q, k, v, causal=causal, scale=scale)

    model.set_attn_implementation(hf.register("without", without))
    with pytest.raises(ValueError, match="sliding_window"):
        model(x)


@torch.no_grad()
def test_a_method_may_ask_for_its_layer(model):
    seen = []

    def noting(q, k, v, *, causal, layer, scale=None):
        seen.append(layer)
        return attention(q, k, v, causal=causal, scale=scale)

    model.set_attn_implementation(hf.register("noting", noting))
    model(ids(1, 3))
    assert seen == [0, 1]


@pytest.mark.no_shape_checks
class TestErrors:
    def test_other_attention_with_our_cache(self, model):
        with pytest.raises(ValueError, match="would read the new keys alone"):
            model(ids(1, 3), past_key_values=hf.ModelCache(DenseCache(), model))

    def test_masks(self):
        assert left_pads(torch.ones(2, 4), 4) is None
        assert left_pads(torch.tensor([[0, 1, 1], [1, 1, 1]]), 1).tolist() == [1, 0]
        with pytest.raises(ValueError, match="gaps"):
            left_pads(torch.tensor([[1, 0, 1]]), 3)
        with pytest.raises(ValueError, match="padding on the left"):
            left_pads(torch.tensor([[1, 1, 0]]), 1)
        with pytest.raises(ValueError, match="expected \\(B, S\\)"):
            left_pads(torch.ones(1, 1, 3, 3), 3)

    def test_names_and_shapes(self, model):
        with pytest.raises(ValueError, match="name: expected a word"):
            hf.register("a/b", attention)
        with pytest.raises(ValueError, match="ids: expected"):
            hf.LanguageModel(model)(torch.ones(3, dtype=torch.long))

    def test_padding_that_a_cache_cannot_hold(self, model):
        class Bare(DenseCache):
            def __getattribute__(self, name):
                if name == "pads":
                    raise AttributeError(name)
                return super().__getattribute__(name)

        cache = hf.ModelCache(Bare(), model)
        with pytest.raises(ValueError, match="holds no padded rows"):
            cache.set_pads(torch.tensor([1]))
