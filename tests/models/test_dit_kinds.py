"""The image models' kinds: what they learn from, that they learn, and what is measured."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch

from corelib.data.moving_digits import moving_digits, shrink
from corelib.generation import diffusion
from corelib.generation.gridit import GridConfig, SRConfig, from_grid
from corelib.models import dit_kinds, kinds, recipes, zoo
from corelib.models.recipes import Recipe, Stage, from_dict
from corelib.models.train import Trainer

pytestmark = pytest.mark.method("gridit")

GRIDS = Recipe(
    "try", "grids", GridConfig(width=24, layers=1, heads=2, condition=8), (Stage(64, 4, 12),)
)
FRAMES = Recipe(
    "try", "frames", SRConfig(width=24, layers=1, heads=2, condition=8), (Stage(16, 4, 12),)
)


@pytest.mark.parametrize("recipe", [GRIDS, FRAMES])
def test_a_recipe_survives_json(recipe):
    assert from_dict(json.loads(json.dumps(dataclasses.asdict(recipe)))) == recipe


@pytest.mark.parametrize("recipe", [GRIDS, FRAMES])
def test_batches_depend_on_the_step_alone(recipe):
    kind = kinds.find_kind(recipe.kind)
    one, two, other = (kind.batch(recipe, step) for step in (3, 3, 4))
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
    assert not torch.equal(one[0], other[0])


def test_grids_hold_clips_and_some_labels_are_withheld():
    clips = moving_digits(400, 16, generator=torch.Generator().manual_seed(0))
    config = GridConfig()
    grid, label = dit_kinds.GridKind().made(config, clips, torch.Generator().manual_seed(1))
    frames = (from_grid(grid, 4, 4)[:, :, 0] + 1) / 2
    torch.testing.assert_close(frames, shrink(clips.frames), atol=1e-6, rtol=0)
    withheld = label == 10
    assert torch.equal(label[~withheld], clips.labels[:, 0][~withheld])
    assert 0.05 < withheld.float().mean() < 0.16
    full, _ = dit_kinds.GridKind().made(GridConfig(side=24), clips, torch.Generator())
    assert full.shape == (400, 1, 96, 96)


def test_levels_cover_the_whole_range_once():
    kind = kinds.find_kind("grids")
    t = kind.drawn(GridConfig(), 10, "train", torch.Generator().manual_seed(0))[2]
    assert torch.equal((t - 1) // 100, torch.arange(10))
    assert 1 <= t.min() and t.max() <= 1000


def test_the_loss_is_that_of_the_velocity():
    kind = dit_kinds.GridKind()
    batch = clean, noise, t, _ = kind.batch(GRIDS, 0)
    model = kind.build(GRIDS.config, 0)  # says zero before training
    want = (diffusion.velocity(dit_kinds.grid_schedule(12), clean, noise, t) ** 2).mean()
    torch.testing.assert_close(kind.loss(model, batch, None), want)


@pytest.mark.parametrize("recipe", [GRIDS, FRAMES])
def test_training_lowers_the_loss_on_clips_it_never_saw(recipe, tmp_path):
    trainer = Trainer(recipe, tmp_path)
    before = trainer.kind.held_out(trainer.model)
    for _ in range(recipe.steps):
        trainer.step()
    assert trainer.kind.held_out(trainer.model) < 0.95 * before


def test_more_pixels_more_noise():
    small, large = (dit_kinds.grid_schedule(side).alpha[500] for side in (12, 24))
    assert large < small


def test_real_clips_measure_as_real():
    clips = moving_digits(4, 16, generator=torch.Generator().manual_seed(0))
    found = dit_kinds.clip_figures(shrink(clips.frames), clips.labels[:, 0])
    assert found["distance to the nearest digit"] < 1e-6
    assert found["frames of the class"] == 1.0
    assert found["jumps of more than 1.5 pixels"] == 0.0
    assert 0.3 < found["pixels a frame"] < 1.0


def test_samples_are_clips():
    model = dit_kinds.GridKind().build(GRIDS.config, 0)
    frames = dit_kinds.sample_grids(model, torch.tensor([1, 2]), steps=2)
    assert frames.shape == (2, 16, 12, 12) and frames.min() >= 0 and frames.max() <= 1


def test_grid_dit_still_makes_digits_that_fly():
    """A sample of what its card says, made again from the stored weights."""
    label = torch.arange(10)
    found = dit_kinds.clip_figures(
        dit_kinds.sample_grids(zoo.load("grid_dit"), label, steps=10, guidance=2.0), label
    )
    card = zoo.figures("grid_dit")["figures"]
    assert card["frames of the class"] > 0.9 and found["frames of the class"] > 0.75
    assert found["distance to the nearest digit"] < 2 * card["distance to the nearest digit"]
    assert 0.3 < found["pixels a frame"] < 1.0


def test_frame_sr_still_beats_interpolation():
    found = dit_kinds.FrameKind().figures(zoo.load("frame_sr"))
    assert found["mean squared error"] < 0.5 * found["mean squared error, bilinear"]


@pytest.mark.parametrize("name", ["grid_dit", "frame_sr"])
def test_the_card_says_what_a_user_needs(name):
    card = zoo.card(name)
    for word in ("Data", "Training", f"models.train {name}", "Known limits", "minutes"):
        assert word in card
    curve = zoo.figures(name)["curve"]
    assert curve[-1]["step"] == recipes.RECIPES[name].steps
    assert curve[-1]["valid"] < curve[0]["valid"]
    assert zoo.load(name).config == recipes.RECIPES[name].config


@pytest.mark.parametrize("name", ["grid_dit", "frame_sr"])
def test_released_sizes(name):
    recipe = recipes.RECIPES[name]
    model = kinds.find_kind(recipe.kind).build(recipe.config, None)
    assert 2 * model.n_parameters < 2_000_000
    assert recipe.config.side == 12
