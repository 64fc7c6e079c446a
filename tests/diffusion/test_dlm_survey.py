"""The map is sound data linked to what is built; the race counts what it says."""

from __future__ import annotations

import pytest
import torch

from corelib.catalog import methods
from corelib.diffusion import policies, tabular
from corelib.diffusion.dlm_survey import (
    AXES,
    TAXONOMY,
    Contestant,
    Entry,
    browse,
    calls_of,
    contestants,
    race_policies,
    values,
)
from corelib.diffusion.shared import MaskedDiffusion
from corelib.models.decoder import sampler

SPACES = {"absorbing", "uniform", "embedding", "not published"}
ORIGINS = {"scratch", "AR model", "masked LM", "diffusion LM", "no training"}
CACHES = {"none", "prefix", "dual", "delayed", "not published"}
RULES = {*policies.POLICIES, "none", "any", "learned", "verified", "not published"}


@pytest.mark.parametrize("entry", TAXONOMY.values(), ids=list(TAXONOMY))
def test_a_row_holds_known_words(entry: Entry):
    assert set(entry.space.replace(" and ", ", ").split(", ")) <= SPACES | {"edits"}
    assert entry.origin in ORIGINS and entry.cache in CACHES and entry.policy in RULES
    assert entry.span in ("full", "block", "not published")
    assert entry.guidance in ("none", "classifier", "classifier-free")
    if entry.paper:
        year, _, number = entry.paper.partition(".")
        assert 20 <= int(year[:2]) <= 26 and 1 <= int(year[2:]) <= 12 and len(number) == 5
    assert set(entry.rows) <= {row.slug for row in methods()}
    assert not (entry.space == "embedding" and entry.policy != "none")  # nothing is committed
    if entry.built:
        assert entry.load() is not None


def test_every_policy_and_axis_is_on_the_map():
    named = {entry.policy for entry in TAXONOMY.values()}
    assert set(policies.POLICIES) - {"left_to_right"} <= named
    assert len(TAXONOMY) >= 40 and sum(bool(e.built) for e in TAXONOMY.values()) >= 15
    for axis in AXES:
        assert sum(values(axis).values()) >= len(TAXONOMY)
    assert {"041", "121"} <= {m.number for e in TAXONOMY.values() for m in e.papers()}


def test_what_is_not_built_says_so_and_the_rest_loads():
    with pytest.raises(LookupError, match="SEDD: .* nothing here runs it yet"):
        TAXONOMY["SEDD"].load()
    assert TAXONOMY["MDLM"].load() is MaskedDiffusion
    assert TAXONOMY["LLaDA"].load() is policies.max_prob
    assert TAXONOMY["LLaDA"].year == 2025 and TAXONOMY["text_dlm"].year is None


def test_browse_filters_by_axis():
    rows = browse(space="absorbing", cache="prefix")
    assert {"BD3-LM", "Fast-dLLM, prefix"} <= {row["name"] for row in rows}
    assert all(row["cache"] == "prefix" for row in rows)
    assert "MD4" in {row["name"] for row in browse(modality="images")}
    assert [row["name"] for row in browse(lambda e: e.year == 2022 and bool(e.built))] == [
        "MaskGIT"
    ]
    assert len({tuple(row) for row in browse()}) == 1


def test_the_race_counts_calls_and_kept_tokens():
    net = tabular.example(4)
    prompts = torch.tensor([[0, net.mask_id], [1, 0]])[:, :1]
    tokens = dict(answer=lambda ids: float((ids == ids[:, :1]).float().mean()))
    runners = contestants(sampler(0), per_step=(1, 3))
    runs = race_policies(net, net.mask_id, prompts, 3, runners, scores=tokens)
    by_name = {(run.policy, run.knob): run for run in runs}
    one = by_name["max_prob", "1 a step"]
    assert one.per_call == 1.0 and one.kept == 1.0 and one.scores["answer"] == 1.0
    assert by_name["margin", "3 a step"].per_call == 3.0
    assert {run.policy for run in runs} == set(policies.POLICIES)
    assert by_name["threshold", "tau 0.4"].per_call == 3.0
    assert list(one.row()) == ["policy", "knob", "per_call", "kept", "answer"]


def test_one_step_loses_what_the_slots_share():
    """Two slots that always agree: one at a time they do, together half of the time."""
    joint = torch.tensor([[0.5, 0.0], [0.0, 0.5]], dtype=torch.float64)
    net, prompts = tabular.TabularDenoiser(joint), torch.zeros(400, 0, dtype=torch.long)
    agree = dict(agree=lambda ids: float((ids[:, 0] == ids[:, 1]).float().mean()))
    runners = {"max_prob": {str(n): Contestant(policies.max_prob, n) for n in (1, 2)}}
    one, two = race_policies(
        net, net.mask_id, prompts, 2, runners, chooser=sampler(1), scores=agree
    )
    assert one.scores["agree"] == 1.0
    assert two.scores["agree"] == pytest.approx(0.5, abs=0.1)


def test_blocks_round_their_steps_up():
    net, prompts = tabular.example(6), torch.zeros(1, 1, dtype=torch.long)
    runners = {"max_prob": {"2": Contestant(policies.max_prob, 2)}}
    (run,) = race_policies(net, net.mask_id, prompts, 5, runners, block_len=3)
    assert run.made.nfe == 3 and run.per_call == pytest.approx(5 / 3)
    assert calls_of(torch.tensor([[0, 0, 2], [1, 2, 3]])).tolist() == [2, 3]


@pytest.mark.no_shape_checks
def test_errors_name_the_argument():
    with pytest.raises(ValueError, match="axis: expected one of"):
        values("colour")
    with pytest.raises(ValueError, match="cache: expected one of none"):
        browse(cache="large")
    with pytest.raises(ValueError, match="gen_len: expected at least 1"):
        race_policies(tabular.example(), 2, torch.zeros(1, 3, dtype=torch.long), 0, {})
