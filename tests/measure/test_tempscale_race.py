"""What the shipped runs of the tempscale race rest on."""

import pytest
import torch

from corelib.linear_time.tempscale import ac_share, apply_temperature
from corelib.measure.races import tempscale as runs

pytestmark = pytest.mark.method("tempscale")


@pytest.fixture(scope="module")
def probe():
    return runs.lab_encoder()


def test_questions_follow_their_passages(probe):
    texts, questions = runs.passages(probe.encode, 3, 40)
    longer, _ = runs.passages(probe.encode, 3, 40 + runs.QUESTION)
    assert texts.shape == (3, 40) and questions.shape == (3, runs.QUESTION)
    assert torch.equal(torch.cat([texts, questions], 1), longer)
    assert len({tuple(row) for row in texts.tolist()}) == 3


def test_the_maps_are_those_that_the_encoder_computes(probe):
    """Of the first layer: its maps times its values give what its attention adds."""
    ids = runs.passages(probe.encode, 2, 12)[0]
    block, x = probe.model.layers[0], probe.states(ids)[0]
    given, added = [], []
    hooks = [
        block.self_attn.register_forward_pre_hook(lambda _, args: given.append(args[0])),
        block.self_attn.register_forward_hook(lambda _, args, out: added.append(out)),
    ]
    maps = probe.maps(ids)
    for hook in hooks:
        hook.remove()
    assert len(maps) == len(probe.model.layers)
    layer = block.self_attn
    values = layer.v_proj(given[0]).unflatten(-1, (-1, layer.head_width)).transpose(1, 2)
    values = values.repeat_interleave(layer.heads // layer.kv_heads, 1)
    out = layer.o_proj((maps[0] @ values).transpose(1, 2).flatten(2))
    torch.testing.assert_close(out, added[0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(maps[0].sum(-1), torch.ones(2, layer.heads, 12))
    assert x.shape == given[0].shape


def test_the_maps_feel_the_temperature(probe):
    """A tenth of the scores' divisor makes rows a tenth as undecided, or near it."""
    ids = runs.passages(probe.encode, 1, 12)[0]
    plain = probe.maps(ids)[0]
    with apply_temperature(probe.model, 0.5):
        sharp = probe.maps(ids)[0]
    expected = plain.square() / plain.square().sum(-1, keepdim=True)
    torch.testing.assert_close(sharp, expected, rtol=1e-3, atol=1e-5)


def test_states_end_with_what_is_pooled(probe):
    ids = runs.passages(probe.encode, 3, 12)[0]
    states = probe.states(ids)
    assert len(states) == len(probe.model.layers) + 1
    torch.testing.assert_close(states[-1], probe.model.hidden(ids))
    torch.testing.assert_close(probe.pooled(ids, batch=2), states[-1].mean(1))


def test_the_score_is_one_over_the_rank():
    texts = torch.eye(4)
    questions = torch.tensor([[1.0, 0, 0, 0], [2, 1, 0, 0], [0, 0, 0, 1], [3, 2, 1, 0.5]])
    ranks = runs.retrieval(questions, texts)
    assert ranks.tolist() == pytest.approx([1, 1 / 2, 1 / 4, 1 / 4])
    assert runs.about_the_middle(texts).mean(0).abs().max() < 1e-7


def test_a_layer_that_averages_passes_nothing_and_one_that_copies_passes_all():
    x = torch.randn(2, 6, 3, generator=torch.Generator().manual_seed(0))
    flat, copies = torch.full((2, 1, 6, 6), 1 / 6), torch.eye(6).expand(2, 1, 6, 6)
    assert runs._passed(flat, x) < 1e-6 and runs._passed(copies, x) == pytest.approx(1.0)


def test_a_run_can_be_repeated(probe):
    """The shipped figures of the encoder at 30 tokens."""
    shipped = {
        (r["length"], r["temperature"]): r for r in runs.recorded() if r["encoder"] == "encoder"
    }
    assert set(shipped) == {(n, t) for n in runs.LENGTHS for t in runs.TEMPERATURES}
    with torch.no_grad():
        again = runs.measure(probe, 30, 1.0, shipped[30, 1.0]["texts"])
        texts = runs.passages(probe.encode, 16, max(runs.LENGTHS))[0][:, -30:]
        share = ac_share(probe.states(texts)[-1]).mean().item()
    assert again["cosine"] == pytest.approx(shipped[30, 1.0]["cosine"], abs=2e-3)
    assert share == pytest.approx(shipped[30, 1.0]["ac"][-1], abs=2e-3)
