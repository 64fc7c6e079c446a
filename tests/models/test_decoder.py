"""The decoder against transformers' LLaMA, and its cache against no cache."""

import dataclasses

import pytest
import torch

from corelib import hf
from corelib.models.cache import DenseCache
from corelib.models.decoder import Decoder, DecoderConfig, generate, greedy, sampler
from corelib.models.encoder import Encoder
from corelib.models.evaluate import AttentionRecorder

TINY = DecoderConfig(
    vocab=50, width=24, layers=2, heads=4, kv_heads=2, head_width=6, hidden=40, context=64
)


def tiny(kind=Decoder, config=TINY):
    """Weights of deviation 0.2, so that attention is far from uniform."""
    model = kind(config, seed=3).double()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(2.0 if p.dim() == 2 else 1.0).add_(
                0.05 * torch.sin(torch.arange(p.numel()).view_as(p).double())
            )
    return model


def ids(B, L, seed=0):
    return torch.randint(0, TINY.vocab, (B, L), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("family, qkv_bias", [("Llama", False), ("Qwen2", True)])
def test_equals_transformers_with_the_same_weights(family, qkv_bias):
    pytest.importorskip("transformers")
    ours = tiny(config=dataclasses.replace(TINY, qkv_bias=qkv_bias))
    oracle = hf.to_transformers(ours)
    assert type(oracle).__name__ == f"{family}ForCausalLM"
    x = ids(2, 17)
    with torch.no_grad():
        expected = oracle(x).logits
    # transformers computes the rotary angles and the norms' means in float32
    torch.testing.assert_close(ours(x), expected, rtol=1e-4, atol=1e-5)
    assert float(expected.std()) > 0.5


def test_biases_look_back():
    """Head h of the first layer looks most h + 1 tokens back, whatever the tokens are."""
    model = Decoder(dataclasses.replace(TINY, head_width=64, qkv_bias=True), seed=0).double()
    recorder = AttentionRecorder()
    with torch.no_grad():
        model.layers[0].self_attn.q_proj.weight.zero_()
        model(ids(1, 12), recorder)
    for h in range(4):
        assert (recorder.weights[0][0, h, 5:].argmax(-1) == torch.arange(5, 12) - h - 1).all()
    even = torch.ones(12, 12).tril() / torch.arange(1, 13)[:, None]
    assert float((recorder.weights[1] - even).abs().max()) < 0.3  # later layers: no preference


@pytest.mark.parametrize("pieces", [[11], [1] * 11, [3, 1, 5, 2], [10, 1]])
def test_cache_gives_what_no_cache_gives(pieces):
    model, x = tiny(), ids(2, 11)
    whole, cache, out = model(x), DenseCache(), []
    for part in x.split(pieces, 1):
        out.append(model(part, cache))
    torch.testing.assert_close(torch.cat(out, 1), whole, rtol=1e-12, atol=1e-12)
    assert len(cache) == 11
    per_position = 2 * 2 * 2 * 6 * 8  # layers, k and v, G, D, bytes
    assert cache.bytes() == 2 * 11 * per_position and cache.bytes("host") == 0


def test_crop_and_gather_rows():
    model, x = tiny(), ids(3, 9)
    cache = DenseCache()
    model(x, cache)
    cache.crop(5)
    rows = torch.tensor([2, 0, 2])
    cache.gather_rows(rows)
    after = torch.cat([x[rows, :5], ids(3, 3, seed=1)], 1)
    torch.testing.assert_close(
        model(after[:, 5:], cache), model(after)[:, 5:], rtol=1e-12, atol=1e-12
    )


def test_realign_lets_rows_differ_in_length():
    model, x, more = tiny(), ids(3, 9), ids(3, 4, seed=1)
    cache = DenseCache()
    model(x, cache)
    lengths = torch.tensor([9, 4, 0])
    cache.realign(lengths)
    cache.realign(torch.tensor([7, 4, 0]))
    for first in range(0, 4, 2):
        got = model(more[:, first : first + 2], cache)
        for row, n in enumerate([7, 4, 0]):
            whole = torch.cat([x[row : row + 1, :n], more[row : row + 1, : first + 2]], 1)
            torch.testing.assert_close(got[row], model(whole)[0, -2:], rtol=1e-12, atol=1e-12)
    cache.gather_rows(torch.tensor([1, 0]))
    cache.crop(8)
    got = model(more[:2, :1], cache)
    whole = torch.cat([x[1:2, :4], more[1:2, :1], more[:1, :1]], 1)
    torch.testing.assert_close(got[0], model(whole)[0, -1:], rtol=1e-12, atol=1e-12)


def test_causal_decoder_and_seeing_encoder():
    x = ids(1, 8)
    for kind, sees in ((Decoder, False), (Encoder, True)):
        model = tiny(kind)
        embedded = model.embed_tokens(x).detach().requires_grad_()
        model.embed_tokens.register_forward_hook(lambda m, i, o, e=embedded: e)
        model(x)[0, 3].square().sum().backward()
        later = float(embedded.grad[0, 4:].abs().max())
        assert (later > 1e-6) is sees


def test_generate_is_what_the_model_says_step_by_step():
    model, x = tiny(), ids(2, 5)
    got = generate(model, x, 6)
    expected = x
    for _ in range(6):
        expected = torch.cat([expected, model(expected)[:, -1:].argmax(-1)], 1)
    assert torch.equal(got, expected)
    one, same, other = (generate(model, x, 6, chooser=sampler(s)) for s in (0, 0, 1))
    assert torch.equal(one, same) and not torch.equal(one, other)
    assert int(greedy(torch.tensor([0.1, 0.7, 0.2]))) == 1


def test_a_seed_names_the_weights():
    a, b, c = (Decoder(TINY, seed=s).embed_tokens.weight for s in (0, 0, 1))
    assert torch.equal(a, b) and not torch.equal(a, c)


@pytest.mark.no_shape_checks
def test_errors_name_the_argument():
    with pytest.raises(ValueError, match="kv_heads: expected a divisor of heads"):
        dataclasses.replace(TINY, kv_heads=3)
    with pytest.raises(ValueError, match="head_width: expected an even number"):
        dataclasses.replace(TINY, head_width=5)
    with pytest.raises(ValueError, match=r"ids: expected \(B, L\)"):
        tiny()(torch.zeros(3, dtype=torch.int64))
    with pytest.raises(ValueError, match="temperature"):
        generate(tiny(), ids(1, 2), 1, temperature=0.0)
    with pytest.raises(ValueError, match="at least one token"):
        generate(tiny(), ids(1, 0), 1)
    with pytest.raises(ValueError, match="cache: an encoder"):
        tiny(Encoder)(ids(1, 4), DenseCache())
    cache = DenseCache()
    tiny()(ids(2, 4), cache)
    with pytest.raises(ValueError, match="length: expected 0 to 4, got 5"):
        cache.crop(5)
    with pytest.raises(ValueError, match="lengths: expected 0 to 4"):
        cache.realign(torch.tensor([5, 1]))
    with pytest.raises(ValueError, match="k: layer 0 holds"):
        tiny()(ids(3, 1), cache)
    with pytest.raises(ValueError, match="tier: expected"):
        cache.bytes("disk")
    with pytest.raises(ValueError, match="layer: nothing held"):
        cache.attend(7, torch.zeros(2, 4, 1, 6))
