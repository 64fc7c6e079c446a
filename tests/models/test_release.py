"""From a finished run to the zoo's three files: measured as stored, refused while unfinished."""

import dataclasses

import pytest
import torch

from corelib.models import release, zoo
from corelib.models.decoder import DecoderConfig
from corelib.models.kinds import find_kind
from corelib.models.mixture import Mixture
from corelib.models.recipes import Recipe, Stage
from corelib.models.text_kinds import DecoderKind
from corelib.models.train import Trainer

CONFIG = DecoderConfig(width=16, layers=1, heads=2, kv_heads=1, head_width=8, hidden=24)
TINY = Recipe(
    "tiny", "decoder", CONFIG, (Stage(32, 2, 2, Mixture(passkey=0.0, mqar=0.0, repeats=0.0)),)
)


def finished(tmp_path, recipe, steps):
    trainer = Trainer(recipe, tmp_path / recipe.name)
    for _ in range(steps):
        trainer.step()
    trainer.save()
    return trainer


def test_release_measures_the_stored_model_and_writes_its_card(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(release.RECIPES, "tiny", TINY)
    seen = []
    monkeypatch.setattr(DecoderKind, "figures", lambda self, m: seen.append(m) or {"a bar": 0.5})
    trainer = finished(tmp_path, TINY, 2)
    path = release.release("tiny", build=tmp_path, folder=tmp_path / "zoo")
    stored = zoo.load("tiny", folder=tmp_path / "zoo")
    for a, b, c in zip(
        trainer.model.parameters(), stored.parameters(), seen[0].parameters(), strict=True
    ):
        assert torch.equal(a.half().float(), b) and torch.equal(b, c)
    assert path == tmp_path / "zoo" / "tiny.safetensors"
    card = zoo.card("tiny", tmp_path / "zoo")
    assert "| a bar | 0.5 |" in card and "2 of 2 × 32" in card and "128 tokens" in card
    assert zoo.figures("tiny", tmp_path / "zoo")["figures"] == {"a bar": 0.5}
    assert "measured in" in capsys.readouterr().out
    text = zoo.sample("tiny", "To be", 5, folder=tmp_path / "zoo")
    assert text.startswith("To be") and text == zoo.sample(
        "tiny", "To be", 5, folder=tmp_path / "zoo"
    )


@pytest.mark.no_shape_checks
def test_an_unfinished_run_is_not_released(tmp_path, monkeypatch):
    monkeypatch.setitem(release.RECIPES, "tiny", TINY)
    finished(tmp_path, TINY, 1)
    with pytest.raises(ValueError, match="tiny is at step 1 of 2"):
        release.release("tiny", build=tmp_path, folder=tmp_path / "zoo")
    assert zoo.names(tmp_path / "zoo") == []


def test_an_encoder_is_measured_on_hidden_tokens(tmp_path):
    kind = find_kind("encoder")
    encoder = kind.build(dataclasses.replace(CONFIG, context=512), 0)
    with torch.no_grad():  # uniform: every logit alike
        encoder.embed_tokens.weight.zero_()
    found = kind.figures(encoder)
    assert found["nats a hidden token"] == pytest.approx(7.6246, abs=1e-3)
    assert found["hidden tokens right"] < 0.02
