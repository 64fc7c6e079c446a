"""RAT's races: the contestants compute one thing, the task can be solved, the runs are there."""

from __future__ import annotations

import torch

from corelib.measure.races.rat import (
    ASKED,
    CHUNKS,
    PAIRS,
    SEEDS,
    VALUES,
    inputs,
    learn_recall,
    ours,
    pairs,
    recall,
    written_out,
)


def test_the_ways_agree():
    tensors = [x.double() for x in inputs(96, heads=2)]
    torch.testing.assert_close(written_out(*tensors), ours(*tensors), atol=1e-12, rtol=1e-11)


def test_pairs_can_be_answered_by_looking_up():
    keys, values, wanted = pairs(20, torch.Generator().manual_seed(3))
    for row in range(20):
        assert len(set(keys[row, :PAIRS].tolist())) == PAIRS
        told = dict(zip(keys[row, :PAIRS].tolist(), values[row, :PAIRS].tolist()))
        assert [told[key] for key in keys[row, PAIRS:].tolist()] == wanted[row].tolist()
    assert (values[:, PAIRS:] == VALUES).all() and keys.shape == (20, PAIRS + ASKED)


def test_training_is_repeatable():
    runs = [learn_recall("window 16", seed=0, steps=3) for _ in range(2)]
    assert runs[0] == runs[1] and 0 <= runs[0]["recall"] < 0.3


def test_recorded_runs_are_complete_and_fall_with_the_chunk():
    found = recall()
    assert set(found) == {*(f"chunk {n}" for n in CHUNKS), "window 16"}
    assert all(len(scores) == len(SEEDS) for scores in found.values())
    means = [sum(found[f"chunk {n}"]) for n in CHUNKS]
    assert means == sorted(means, reverse=True)
