"""The tiny VLM: side by side is one at a time, the cache is exact, the loss sees what it should."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from corelib.data import digit_canvas as canvas
from corelib.models import vlm_training, zoo
from corelib.models.cache import DenseCache
from corelib.models.decoder import Decoder
from corelib.models.kinds import Kind, find_kind
from corelib.models.recipes import Recipe, Stage
from corelib.models.vlm import TinyVLM, VLMConfig
from corelib.models.vlm_kind import questions_of
from corelib.models.vlm_training import answer_loss, read_answers, side_by_side

SMALL = VLMConfig(
    width=32, layers=3, heads=4, kv_heads=2, head_width=8, hidden=32, rows=4, columns=5,
    vision_width=16, vision_heads=2,
)  # fmt: skip
EXACT = dict(atol=1e-10, rtol=1e-10)


def gen(seed=0):
    return torch.Generator().manual_seed(seed)


def drawn(batch=2, each=3):
    options = dict(rows=4, columns=5, fewest=3, most=6, smudges=2)
    canvases = canvas.digit_canvas(batch, gen(), **options)
    return canvases, canvas.ask(canvases.labels, each, gen(1))


@pytest.fixture(scope="module")
def model():
    return TinyVLM(SMALL).double().eval()


def test_the_image_stands_behind_the_first_word(model):
    canvases, asked = drawn()
    images, ids = canvases.images.double(), asked.ids[:, 0]
    x = model.prompt(images, ids)
    assert x.shape == (2, 20 + 5, 32)
    torch.testing.assert_close(x[:, 1:21], model.see(images), **EXACT)
    torch.testing.assert_close(x[:, [0, *range(21, 25)]], model.embed(ids), **EXACT)
    logits = model(ids, images=images)
    assert logits.shape == (2, 25, 64)
    torch.testing.assert_close(model(ids), Decoder.forward(model, ids), **EXACT)


def test_the_cache_goes_on_where_the_image_ended(model):
    canvases, asked = drawn()
    images, ids = canvases.images.double(), asked.ids[:, 0]
    whole, cache = model(ids, images=images), DenseCache()
    parts = [model(ids[:, :2], cache, images), model(ids[:, 2:], cache)]
    torch.testing.assert_close(torch.cat(parts, 1), whole, **EXACT)


def test_patches_keep_their_order_and_the_encoder_has_no_positions(model):
    images = torch.rand(1, 32, 40, generator=gen()).double()
    features = model.vision(images)
    moved = model.vision(images.roll(8, 2))
    tokens = features.patches.unflatten(1, (4, 5)).roll(1, 2).flatten(1, 2)
    torch.testing.assert_close(moved.patches, tokens, **EXACT)
    torch.testing.assert_close(moved.summary, features.summary, **EXACT)
    place = model.project(features) - model.projector(features.patches)
    words = model.embed(canvas.to_ids("r2 c4")[None])[0].sum(0)
    torch.testing.assert_close(place[0, 1 * 5 + 3], words, **EXACT)


def test_questions_side_by_side_are_questions_one_at_a_time(model):
    canvases, asked = drawn(each=4)
    images = canvases.images.double()
    found = read_answers(model, images, asked)
    start = torch.full((2, 1), canvas.START)
    for n in range(4):
        ids = torch.cat([start, asked.ids[:, n], asked.answers[:, n, :-1]], 1)
        alone = model(ids, images=images)[:, -3:]
        torch.testing.assert_close(found.logits[:, n], alone, **EXACT)


def test_looks_are_one_heads_attention_at_the_question_mark(model, monkeypatch):
    from corelib.models.evaluate import AttentionRecorder

    canvases, asked = drawn(each=2)
    monkeypatch.setattr(vlm_training, "GUIDED_LAYER", 1)
    found = read_answers(model, canvases.images.double(), asked)
    recorder = AttentionRecorder()
    ids = torch.cat([torch.full((2, 1), canvas.START), asked.ids[:, 1]], 1)
    model(ids, recorder, canvases.images.double())
    wanted = recorder.weights[1][:, 0, -1, :21]
    torch.testing.assert_close(found.looks[:, 1, :21].exp(), wanted.float(), atol=1e-5, rtol=1e-4)
    seen = (wanted[:, 1:] * asked.evidence[:, 1]).sum(1)
    some = asked.evidence[:, 1].any(1)
    loss = vlm_training.missed_evidence(found.looks[:, 1:2], asked.evidence[:, 1:2])
    torch.testing.assert_close(loss, -seen[some].log().mean().float(), atol=1e-5, rtol=1e-4)


def test_side_by_side_masks_and_positions():
    visible, positions = side_by_side(2, 2, 2)
    assert positions.tolist() == [0, 1, 2, 3, 2, 3]
    rows = ["100000", "110000", "111000", "111100", "110010", "110011"]
    assert visible.int().tolist() == [[int(x) for x in row] for row in rows]


def test_the_loss_falls_and_reaches_every_weight():
    model, (canvases, asked) = TinyVLM(SMALL), drawn(4, 4)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(12):
        loss = answer_loss(model, canvases, asked, guidance=0.5)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.7 * losses[0]
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


def test_the_kind_keeps_its_protocol(tmp_path):
    kind = find_kind("vlm")
    assert isinstance(kind, Kind)
    config = dataclasses.replace(SMALL, rows=12, columns=12)
    recipe = Recipe("tiny", "vlm", config, (Stage(145 + 2 * 7, 2, 3),))
    first, again, other = (kind.batch(recipe, step) for step in (1, 1, 2))
    assert first[1].ids.shape == (2, 2, 5)
    assert torch.equal(first[0].images, again[0].images)
    assert not torch.equal(first[0].images, other[0].images)
    model = kind.build(config, 0)
    assert kind.loss(model, first, recipe.stages[0]).requires_grad
    assert "12 by 12 patches" in kind.shape(config)
    path = zoo.store(model, "tiny", "vlm", tmp_path)
    again = zoo.load("tiny", folder=tmp_path)
    assert path.exists() and again.config == config
    ids = first[1].ids[:, 0]
    torch.testing.assert_close(
        again(ids, images=first[0].images), model(ids, images=first[0].images), atol=0.05, rtol=0.05
    )


def test_held_out_questions_are_of_the_other_digits():
    model = TinyVLM(SMALL)
    canvases, asked = questions_of("valid", model, 2, each=3)
    assert canvases.images.shape == (2, 32, 40) and asked.ids.shape == (2, 3, 5)


@pytest.mark.no_shape_checks
def test_an_image_of_another_size_is_named(model):
    with pytest.raises(ValueError, match=r"images: expected \(B, 32, 40\), got \(1, 40, 32\)"):
        model.see(torch.zeros(1, 40, 32))
