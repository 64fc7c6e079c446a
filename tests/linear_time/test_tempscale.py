"""TempScale: the split, the bound, the temperature against models changed by hand."""

import math

import pytest
import torch

from corelib.linear_time import tempscale as ts
from corelib.models.decoder import DecoderConfig
from corelib.models.encoder import Encoder

double = torch.float64
WIDTHS = dict(vocab=40, width=16, layers=2, heads=2, kv_heads=1, head_width=8, hidden=24)


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=double)


def encoder(**options):
    model = Encoder(DecoderConfig(**WIDTHS, context=64, **options), seed=0).double().eval()
    for block in model.layers:  # scores of some size, so that a temperature matters
        block.self_attn.q_proj.weight.data.mul_(8)
    return model


IDS = torch.arange(26).view(2, 13) % 40


# --- the filter -----------------------------------------------------------------------------------


def test_the_split_is_a_projection():
    x = random(3, 7, 5)
    dc, ac = ts.dc_ac_split(x)
    centring = torch.eye(7, dtype=double) - torch.full((7, 7), 1 / 7, dtype=double)
    torch.testing.assert_close(ac, centring @ x, rtol=0, atol=1e-12)
    torch.testing.assert_close(dc + ac, x, rtol=0, atol=1e-12)
    assert (dc - dc[:, :1]).abs().max() == 0


def test_the_rate_is_the_largest_singular_value_of_the_centred_map():
    maps = random(2, 3, 9, 9).softmax(-1)
    centring = torch.eye(9, dtype=double) - torch.full((9, 9), 1 / 9, dtype=double)
    expected = torch.linalg.svdvals(centring @ maps)[..., 0]
    torch.testing.assert_close(ts.filter_rate(maps), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("temperature", [0.2, 1.0, 4.0])
def test_no_more_than_the_rate_survives(temperature):
    maps = (random(4, 11, 11) / temperature).softmax(-1)
    x = random(4, 11, 6, seed=1) + 3.0  # with a large constant part, which must not matter
    before = torch.linalg.matrix_norm(ts.dc_ac_split(x)[1])
    after = torch.linalg.matrix_norm(ts.dc_ac_split(maps @ x)[1])
    assert (after <= ts.filter_rate(maps) * before * (1 + 1e-12)).all() and (after > 0).all()
    # The bound is reached by the direction that is filtered least.
    _, s, vh = torch.linalg.svd(ts.dc_ac_split(maps)[1])
    least = vh[:, :1].mT
    reached = torch.linalg.matrix_norm(ts.dc_ac_split(maps @ least)[1])
    torch.testing.assert_close(reached, s[:, 0], rtol=0, atol=1e-12)


def test_flat_attention_leaves_the_mean_alone_and_sharp_attention_picks():
    scores = random(8, 8)
    flat = (scores / 1e9).softmax(-1)
    assert ts.filter_rate(flat) < 1e-8
    assert ts.dc_ac_split(flat @ random(8, 3))[1].abs().max() < 1e-8
    sharp = (scores / 1e-4).softmax(-1)
    torch.testing.assert_close(
        sharp, torch.nn.functional.one_hot(scores.argmax(-1), 8).double(), rtol=0, atol=1e-12
    )


def test_longer_is_flatter_and_cooler_is_sharper():
    def rate(length, temperature):
        maps = ts.random_attention(length, temperature, torch.Generator().manual_seed(0), 8)
        return ts.filter_rate(maps).mean().item()

    by_length = [rate(n, 1.0) for n in (32, 128, 512)]
    by_temperature = [rate(128, t) for t in (1.0, 0.9, 0.7, 0.5)]
    assert by_length == sorted(by_length, reverse=True) and by_length[0] > 2.5 * by_length[2]
    assert by_temperature == sorted(by_temperature)
    assert by_length == pytest.approx([0.43, 0.26, 0.14], abs=0.03)


def test_ac_share_is_none_for_equal_tokens_and_all_for_opposite_ones():
    one = random(1, 4)
    assert ts.ac_share(one.expand(6, 4)) < 1e-24
    assert ts.ac_share(torch.cat([one, -one])) == pytest.approx(1.0)


# --- the temperature ------------------------------------------------------------------------------


def by_hand(model, temperature):
    for block in model.layers:
        for parameter in block.self_attn.q_proj.parameters():
            parameter.data.div_(temperature)
    return model


@pytest.mark.parametrize("qkv_bias", [False, True])
def test_the_labs_encoder(qkv_bias):
    model = encoder(qkv_bias=qkv_bias)
    with ts.apply_temperature(model, 0.6):
        got = model(IDS)
    plain = model(IDS)
    torch.testing.assert_close(got, by_hand(model, 0.6)(IDS), rtol=0, atol=1e-10)
    assert (got - plain).abs().max() > 1e-3


def test_one_changes_nothing_and_leaving_undoes_it_even_after_an_error():
    model = encoder()
    plain = model(IDS)
    with ts.apply_temperature(model, 1.0):
        assert torch.equal(model(IDS), plain)
    with pytest.raises(RuntimeError, match="on purpose"), ts.apply_temperature(model, 0.5):
        raise RuntimeError("on purpose")
    assert torch.equal(model(IDS), plain)


def test_gradients_go_through_the_temperature():
    model = encoder()
    with ts.apply_temperature(model, 0.5):
        model(IDS).cos().sum().backward()
    got = [block.self_attn.q_proj.weight.grad for block in model.layers]
    other = by_hand(encoder(), 0.5)
    other(IDS).cos().sum().backward()
    for g, block in zip(got, other.layers, strict=True):
        # d/dW f(W / t) = f'(W / t) / t
        torch.testing.assert_close(g, block.self_attn.q_proj.weight.grad / 0.5, atol=1e-9, rtol=0)


SMALL = dict(
    vocab_size=40, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24
)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_bert_with_a_padded_row(implementation):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.BertConfig(**SMALL, initializer_range=0.6)
    model = transformers.BertModel(config, add_pooling_layer=False).double().eval()
    model.set_attn_implementation(implementation)
    mask = torch.ones_like(IDS)
    mask[1, 9:] = 0
    with ts.apply_temperature(model, 0.7):
        got = model(IDS, attention_mask=mask).last_hidden_state
    plain = model(IDS, attention_mask=mask).last_hidden_state
    for layer in model.encoder.layer:
        for parameter in layer.attention.self.query.parameters():
            parameter.data.div_(0.7)
    wanted = model(IDS, attention_mask=mask).last_hidden_state
    close = 1e-10 if implementation == "sdpa" else 1e-4  # eager's softmax is in float32
    torch.testing.assert_close(got, wanted, rtol=0, atol=close)
    assert (got - plain).abs().max() > 1e-2
    alone = model(IDS[1:, :9]).last_hidden_state  # the padding stays out at any temperature
    torch.testing.assert_close(got[1:, :9], alone, rtol=0, atol=max(close, 1e-8))


def test_qwen3_normalises_queries_first():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.Qwen3Config(**SMALL, num_key_value_heads=1, head_dim=8)
    model = transformers.Qwen3Model(config).double().eval()
    model.set_attn_implementation("sdpa")
    with ts.apply_temperature(model, 0.5):
        got = model(IDS).last_hidden_state
    plain = model(IDS).last_hidden_state
    for layer in model.layers:
        layer.self_attn.q_norm.weight.data.div_(0.5)
    torch.testing.assert_close(got, model(IDS).last_hidden_state, rtol=0, atol=1e-10)
    assert (got - plain).abs().max() > 1e-4


def test_t5_divides_its_position_bias_too():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.T5Config(
        vocab_size=40, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2
    )
    model = transformers.T5EncoderModel(config).double().eval()
    maps = model(IDS, output_attentions=True).attentions[0].double()
    with ts.apply_temperature(model, 0.5):
        sharp = model(IDS, output_attentions=True).attentions[0].double()
    # Twice the scores squares every weight, whatever part of a score is a bias.
    expected = maps.square() / maps.square().sum(-1, keepdim=True)
    torch.testing.assert_close(sharp, expected, rtol=0, atol=1e-5)
    assert (sharp - maps).abs().max() > 1e-2


# --- embeddings -----------------------------------------------------------------------------------


def test_mean_cosine_is_over_pairs_of_different_rows():
    x = random(5, 3)
    pairs = [
        torch.cosine_similarity(x[i], x[j], dim=0).item()
        for i in range(5)
        for j in range(5)
        if i != j
    ]
    assert ts.mean_cosine(x) == pytest.approx(sum(pairs) / 20, abs=1e-12)
    assert ts.mean_cosine(x[:1].expand(4, 3)) == pytest.approx(1.0)


def test_the_embedder_is_the_mean_at_unit_length_centred_if_wanted():
    model = encoder()
    embed = ts.TinyEmbedder(model)
    pooled = model.hidden(IDS).mean(1)
    torch.testing.assert_close(embed(IDS), pooled / pooled.norm(dim=1, keepdim=True))
    centred = ts.TinyEmbedder(model, centre=pooled.mean(0))(IDS)
    assert ts.mean_cosine(centred) == pytest.approx(-1.0)  # two texts about their middle


def test_the_curve_cuts_the_same_texts():
    embed = ts.TinyEmbedder(encoder())
    ids = torch.randint(0, 40, (6, 20), generator=torch.Generator().manual_seed(0))
    curve = ts.length_collapse_curve(embed, ids, (1, 7, 20), batch=4)
    assert list(curve) == [1, 7, 20]
    assert curve[7] == pytest.approx(ts.mean_cosine(embed(ids[:, :7])), abs=1e-12)
    assert curve[20] > curve[1]  # independent tokens: means of more of them are more alike


# --- refusals -------------------------------------------------------------------------------------


@pytest.mark.no_shape_checks
def test_says_what_is_wrong():
    with pytest.raises(ValueError, match="temperature: expected a positive number, got 0"):
        with ts.apply_temperature(encoder(), 0):
            pass
    with pytest.raises(ValueError, match="temperature: .* got nan"):
        ts.random_attention(3, math.nan, torch.Generator())
    with pytest.raises(ValueError, match="model: expected attention with queries of their own"):
        with ts.apply_temperature(torch.nn.Linear(2, 2), 0.5):
            pass
    with pytest.raises(ValueError, match="attention: expected"):
        ts.filter_rate(torch.zeros(3, 4))
    with pytest.raises(ValueError, match="x: expected at least one token"):
        ts.dc_ac_split(torch.zeros(2, 0, 4))
    with pytest.raises(ValueError, match="lengths: expected 1 to 13, got 14"):
        ts.length_collapse_curve(ts.TinyEmbedder(encoder()), IDS, [14])
    with pytest.raises(ValueError, match="embeddings: expected at least two rows"):
        ts.mean_cosine(torch.zeros(1, 4))
