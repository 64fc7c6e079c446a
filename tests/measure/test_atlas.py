"""The surveys' race is fair: equal state, equal parameters, tasks that hold what they promise."""

from __future__ import annotations

import pytest
import torch

from corelib.data.synthetic import IGNORE
from corelib.measure.probes import state_bytes
from corelib.measure.races import atlas

pytestmark = [pytest.mark.method("s4_survey"), pytest.mark.method("mamba360")]


def test_models_have_equal_parameters():
    sizes = {n: sum(p.numel() for p in atlas.SmallModel(n).parameters()) for n in atlas.NAMES}
    assert max(sizes.values()) < 1.01 * min(sizes.values())
    again = [atlas.SmallModel("S4D", seed=seed).head.weight for seed in (0, 0, 1)]
    assert torch.equal(again[0], again[1]) and not torch.equal(again[0], again[2])


def test_models_have_equal_state_at_the_tasks_length():
    x = torch.zeros(1, atlas.LENGTH, atlas.WIDTH)
    wanted = 4 * atlas.WIDTH * atlas.STATE
    inputs = {"Mamba": 4 * 3 * atlas.WIDTH}  # of its short convolution
    for name in atlas.NAMES:
        _, state = atlas.SmallModel(name).mixer(x)
        assert state_bytes(state) == wanted + inputs.get(name, 0), name


@pytest.mark.parametrize("name", atlas.TASKS)
def test_tasks_have_answers_that_the_past_decides(name):
    ids, targets = atlas.TASKS[name].draw(32, torch.Generator().manual_seed(0))
    assert ids.shape == targets.shape == (32, atlas.LENGTH) and ids.max() < atlas.VOCAB
    for row, wanted in zip(ids.tolist(), targets.tolist()):
        asked = [t for t, answer in enumerate(wanted) if answer != IGNORE]
        assert asked
        if name == "delayed recall":
            assert asked == [atlas.LENGTH - 1] and wanted[-1] == row[0]
        if name == "selective copy":
            assert [wanted[t] for t in asked] == [i for i in row[: asked[0]] if i != 6]
    if name == "induction":
        period = torch.arange(32) // 4 + 4
        for row, p in zip(torch.cat([ids, targets[:, -1:]], 1), period):
            assert torch.equal(row[p:], row[:-p])


def test_training_lowers_the_loss():
    task = atlas.TASKS["delayed recall"]
    model = atlas.SmallModel("Transformer")
    losses = atlas.train(model, task, steps=25)
    assert sum(losses[-5:]) < 0.7 * sum(losses[:5])
    assert atlas.accuracy(model, task) > 0.3  # chance is 1 in 6


def test_a_model_is_causal():
    model, (ids, _) = atlas.SmallModel("Mamba"), atlas.recall(2, torch.Generator().manual_seed(0))
    changed = ids.clone()
    changed[:, 10:] = 3
    assert torch.allclose(model(ids)[:, :10], model(changed)[:, :10], atol=1e-6)
