"""Training: batches as declared, a killed run goes on bit for bit, the optimiser does its sums."""

import dataclasses
import json

import pytest
import torch

from corelib.data import IGNORE
from corelib.models import text_kinds, train, zoo
from corelib.models.decoder import DecoderConfig
from corelib.models.mixture import (
    Mixture,
    masked_batch,
    text_rows,
    token_stream,
    training_batch,
)
from corelib.models.optim import Muon, orthogonalise
from corelib.models.recipes import RECIPES, Recipe, Stage, from_dict
from corelib.models.tokenizer import load_tokenizer

CONFIG = DecoderConfig(width=16, layers=1, heads=2, kv_heads=1, head_width=8, hidden=24)
EVEN = Mixture(passkey=0.2, mqar=0.2, repeats=0.2)
TINY = Recipe(
    "tiny",
    "decoder",
    CONFIG,
    (Stage(64, 4, 3), Stage(128, 2, 3, EVEN)),
    lr=1e-2,
    warmup=2,
    eval_every=4,
)


@pytest.fixture(autouse=True)
def short_stream(monkeypatch):
    """One sentence over and over is reading enough here."""
    whole = torch.tensor(
        load_tokenizer().encode("To be, or not to be: that is the question. " * 200)
    )
    monkeypatch.setattr(text_kinds, "token_stream", lambda split: whole)


def gen(seed=0):
    return torch.Generator().manual_seed(seed)


def test_the_stream_holds_every_document_once():
    from corelib.data import split_text

    tokenizer, stream = load_tokenizer(), token_stream("valid")
    documents = tokenizer.decode_bytes(stream.tolist())
    assert documents == "".join(split_text("valid")).encode()
    assert int((stream == tokenizer.doc).sum()) == len(split_text("valid"))


@pytest.mark.parametrize("kind", ["passkey", "mqar", "repeats", "text"])
def test_batches_of_one_kind(kind):
    shares = {k: float(k == kind) for k in ("passkey", "mqar", "repeats")}
    stream = token_stream("valid")
    ids, targets, weights = training_batch(
        Mixture(**shares, answer_weight=3.0), stream, 6, 128, gen()
    )
    assert ids.shape == targets.shape == weights.shape == (6, 128)
    known = weights > 0
    follows = ids[:, 1:] == targets[:, :-1]
    assert bool(follows[known[:, :-1]].all())  # a scored target is the token that comes next
    expected = {"passkey": {1.0, 3.0}, "mqar": {0.0, 3.0}, "repeats": {0.0, 1.0}, "text": {1.0}}
    assert set(weights.unique().tolist()) == expected[kind]
    if kind == "repeats":
        for row, seen in zip(ids, known, strict=True):
            first = int(seen.nonzero()[0])
            assert torch.equal(row[first:], row[: 128 - first])


def test_shares_are_kept_on_average():
    _, _, weights = training_batch(EVEN, token_stream("valid"), 300, 128, gen())
    text = (weights == 1).all(1).float().mean()
    assert 0.3 < float(text) < 0.5


def test_masked_batches():
    tokenizer, stream = load_tokenizer(), token_stream("valid")
    ids, targets, weights = masked_batch(stream, 40, 64, gen())
    chosen = weights > 0
    assert torch.equal(ids[~chosen], targets[~chosen])
    assert 0.18 < float(chosen.float().mean()) < 0.22
    hidden = float((ids == tokenizer.mask)[chosen].float().mean())
    kept = float((ids == targets)[chosen].float().mean())
    assert 0.75 < hidden < 0.85 and 0.06 < kept < 0.14


def test_text_rows_predict_the_next_token():
    batch = text_rows(torch.arange(100), 5, 20, gen())
    assert torch.equal(batch.targets, batch.ids + 1) and IGNORE not in batch.targets


def test_a_killed_run_goes_on_bit_for_bit(tmp_path):
    whole = train.run(TINY, tmp_path / "whole", log=lambda line: None)
    part = train.Trainer(TINY, tmp_path / "part")
    for _ in range(4):
        part.step()
    part.save()
    again = train.run(TINY, tmp_path / "part", log=lambda line: None)
    assert again.done == whole.done == 6 and again.tokens == whole.tokens == TINY.tokens
    for a, b in zip(whole.model.parameters(), again.model.parameters(), strict=True):
        assert torch.equal(a, b)
    curve = json.loads((tmp_path / "part" / "curve.json").read_text())
    assert [point["step"] for point in curve][-1] == 6 and "valid" in curve[-1]


def test_a_run_can_begin_with_released_weights(tmp_path):
    trainer = train.Trainer(
        dataclasses.replace(RECIPES["draft_lm"], start="draft_lm"), tmp_path / "x"
    )
    for a, b in zip(trainer.model.parameters(), zoo.load("draft_lm").parameters(), strict=True):
        assert torch.equal(a, b) and a.requires_grad


def test_training_lowers_the_loss(tmp_path):
    recipe = dataclasses.replace(TINY, stages=(Stage(32, 8, 30, Mixture(0.0, 0.0, 0.0)),))
    trainer = train.Trainer(recipe, tmp_path)
    losses = [trainer.step() for _ in range(30)]
    assert losses[0] > 7.4 and losses[-1] < 4.0


def test_what_is_done_may_not_change_and_what_is_ahead_may(tmp_path):
    trainer = train.Trainer(TINY, tmp_path)
    trainer.step()
    trainer.save()
    ahead = dataclasses.replace(TINY, stages=(TINY.stages[0], Stage(64, 2, 5)))
    train.Trainer(ahead, tmp_path).load()
    behind = dataclasses.replace(TINY, stages=(Stage(64, 2, 3), TINY.stages[1]))
    with pytest.raises(ValueError, match="its first 1 steps differ"):
        train.Trainer(behind, tmp_path).load()
    with pytest.raises(ValueError, match="other sizes or seed"):
        train.Trainer(dataclasses.replace(TINY, seed=9), tmp_path).load()


def test_recipes():
    for recipe in RECIPES.values():
        assert from_dict(json.loads(json.dumps(dataclasses.asdict(recipe)))) == recipe
        assert recipe.lr_at(recipe.steps - 1) < 0.02 * recipe.lr
        if type(recipe.config) is DecoderConfig:
            assert max(stage.length for stage in recipe.stages) == recipe.config.context
            assert recipe.config.vocab == load_tokenizer().vocab
        assert sum(s.steps * s.rows * s.length for s in recipe.stages) == recipe.tokens
    assert TINY.stage_at(2) is TINY.stages[0] and TINY.stage_at(3) is TINY.stages[1]
    with pytest.raises(ValueError, match="step: expected 0 to 5"):
        TINY.stage_at(6)


@pytest.mark.parametrize("shape", [(12, 12), (8, 20), (20, 8)])
def test_orthogonalise_evens_out_singular_values(shape):
    m = torch.randn(shape, generator=gen(1)) @ torch.diag(torch.logspace(0, -1, shape[1]))
    s = torch.linalg.svdvals(orthogonalise(m))
    assert 0.3 < float(s.min()) and float(s.max()) < 1.4
    u, _, v = torch.linalg.svd(m, full_matrices=False)
    near = orthogonalise(m) * (u @ v)
    assert float(near.sum()) > 0.9 * (u @ v).norm() * orthogonalise(m).norm()


def test_muon_step_has_the_declared_size():
    p = torch.nn.Parameter(torch.zeros(8, 32))
    p.grad = torch.randn(8, 32, generator=gen())
    Muon([p], lr=0.1).step()
    typical = float(p.detach().square().mean().sqrt())  # 0.6 * lr * sqrt(32) / sqrt(32)
    assert 0.7 * 0.06 < typical < 1.2 * 0.06
    with pytest.raises(ValueError, match="parameters: expected matrices"):
        Muon([torch.nn.Parameter(torch.zeros(3))], lr=0.1)


def test_the_rate_rises_stays_and_falls_twice():
    recipe = Recipe(
        "x", "decoder", CONFIG, (Stage(8, 1, 50),), lr=1.0, warmup=4, decay=0.5, restart=10
    )
    rates = [recipe.lr_at(step) for step in range(50)]
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0] and rates[19] == 1.0
    assert rates[39] == 1 / 20 and rates[40:44] == [0.25, 0.5, 0.75, 1.0] and rates[49] == 1 / 5
    assert all(a >= b for a, b in zip(rates[4:39], rates[5:40], strict=True))
