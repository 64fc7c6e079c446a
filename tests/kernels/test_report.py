"""The report card: shipped, in step with the sources, readable without Triton."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

from corelib.kernels import report
from corelib.kernels.gates.specialisation import TARGETS

TESTS = pathlib.Path(__file__).parents[1]
UPDATE = "run: python -m corelib.kernels.report --update"


def test_the_shipped_card_is_in_step_with_the_sources():
    assert report.stale() == [], UPDATE


def test_every_kernel_is_interpreted_and_compiles_everywhere_without_a_problem():
    card = report.rows()
    assert {row["module"] for row in card} == set(report.kernel_modules())
    assert [row for row in card if row["problems"]] == []
    for row in card:
        assert row["status"][:2] == ["interpreted", f"compiled for {row['target']}"], UPDATE
    kernels = {(row["module"], row["kernel"], row["direction"]) for row in card}
    for kernel in kernels:
        found = {r["target"] for r in card if (r["module"], r["kernel"], r["direction"]) == kernel}
        assert found == set(TARGETS)


def test_compiling_a_kernel_again_gives_the_shipped_row():
    triton = pytest.importorskip("triton")
    if triton.__version__ != report.read()["triton"]:
        pytest.skip(f"the card speaks of Triton {report.read()['triton']}")
    from corelib.kernels.gates.compile import compile_module

    shipped = min(
        (row for row in report.read()["rows"] if row["target"] == "sm_80"),
        key=lambda row: (row["registers"], row["label"]),
    )
    module, label = shipped["module"], shipped["label"]
    again = []
    for part in report.parts(module):
        again += compile_module(f"corelib.kernels.{part}", ["sm_80"], [label])
    assert shipped in [{"module": module, **row} for row in again]


def test_the_hash_follows_imported_kernel_modules(tmp_path, monkeypatch):
    (tmp_path / "gates").mkdir()
    for name in report._GATE:
        (tmp_path / name).write_text("gate")
    (tmp_path / "op.py").write_text(
        "from corelib.kernels._shared import tile\nSPECIALISATIONS = []\n"
    )
    (tmp_path / "op_backward.py").write_text("SPECIALISATIONS = []\n")
    (tmp_path / "_shared.py").write_text("from . import _deeper\n")
    (tmp_path / "_deeper.py").write_text("x = 1\n")
    (tmp_path / "other.py").write_text("y = 1\n")
    monkeypatch.setattr(report, "HERE", tmp_path)
    before = report.source_hash("op")
    assert report.kernel_modules() == ["op"] and report.parts("op") == ["op", "op_backward"]
    (tmp_path / "other.py").write_text("y = 2\n")
    assert report.source_hash("op") == before
    seen = {before}
    for name in ("_deeper.py", "_shared.py", "op.py", "op_backward.py", "gates/compile.py"):
        path = tmp_path / name
        path.write_text(path.read_text() + "# changed\n")
        seen.add(report.source_hash("op"))
    assert len(seen) == 6


def made_row(**changes):
    row = {"module": "op", "kernel": "k", "label": "a", "direction": "forward", "target": "sm_90"}
    row |= {"registers": 100, "spills": 0, "shared": 2048, "occupancy": 0.5, "has_dot": True}
    return row | {"matrix_instructions": {"HGMMA": 4}, "problems": []} | changes


@pytest.fixture
def made(monkeypatch):
    """A card of three variants: one good, one refused, one that does not compile."""
    broken = dict.fromkeys(("registers", "spills", "shared", "occupancy", "has_dot"))
    rows = [
        made_row(),
        made_row(label="b", registers=200, spills=8, problems=["spills 8 bytes a thread"]),
        made_row(label="c", **broken, matrix_instructions=None, problems=["does not compile"]),
    ]
    run = {"device": "Some GPU", "target": "sm_90", "date": "2031-02-03", "hash": "h"}
    module = {"hash": "h", "interpreted": True, "runs": [run]}
    card = {"triton": "9.9", "modules": {"op": module}, "rows": rows}
    monkeypatch.setattr(report, "read", lambda path=None: card)
    monkeypatch.setattr(report, "stale", lambda known=None: [])
    return card


def test_status_says_what_happened_and_no_more(made):
    good, refused, broken = report.rows("op")
    ran = "run on (Some GPU, 2031-02-03)"
    assert good["status"] == ["interpreted", "compiled for sm_90", ran]
    assert refused["status"] == ["interpreted", "refused: spills 8 bytes a thread", ran]
    made["modules"]["op"]["hash"] = "another"
    assert report.rows("op")[0]["status"][2] == "an earlier version run on (Some GPU, 2031-02-03)"
    assert "has run on a GPU yet" in report.table()
    made["modules"]["op"]["hash"] = "h"
    assert "Ran on Some GPU, 2031-02-03: 1 of 1 modules." in report.table()
    made["modules"]["op"].update(interpreted=False, runs=[])
    assert report.rows("op")[0]["status"] == ["compiled for sm_90"]
    made["rows"][0]["target"] = "gfx942"
    run = {"device": "G", "target": "sm_90", "date": "2031-02-03", "hash": "h"}
    made["modules"]["op"]["runs"] = [run]
    assert report.rows("op")[0]["status"] == ["compiled for gfx942"]
    with pytest.raises(ValueError, match=r"module: expected one of \['op'\], got 'oops'"):
        report.rows("oops")


def test_summary_spans_the_variants(made):
    (row,) = report.summary()
    assert row["kernel"] == "op.k" and row["variants"] == "3" and row["tl.dot"] == "yes"
    assert (row["registers"], row["spills"], row["shared KiB"]) == ("100–200", "0–8", "2")
    assert row["matrix instructions"] == "HGMMA" and "refused: does not compile" in row["status"]
    assert report.markdown().count("\n| ") == 2
    assert "None of these kernels has run" not in report.markdown()
    made["modules"]["op"]["runs"] = []
    assert "None of these kernels has run on a GPU yet." in report.table()


def test_the_command_prints_the_card_without_triton():
    env = dict(os.environ, PYTHONPATH=str(TESTS / "no_triton"))
    command = [sys.executable, "-m", "corelib.kernels.report", "--json"]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == report.rows()


def test_races_on_a_gpu_are_rows_of_their_own(made):
    assert report.races("op") == [] and "Raced" not in report.markdown()
    times = {"big": {"kernel": 10.0, "peer": 25.0, "floor": 4.0}}
    made["modules"]["op"]["runs"][0]["microseconds"] = times
    kernel, peer, floor = report.races("op")
    assert kernel["race"] == "op: big" and peer["µs"] == "25" and peer["time ÷ kernel"] == "2.50"
    assert floor["contestant"] == "floor (modelled)" and floor["time ÷ kernel"] == "0.40"
    assert report.markdown().count("op: big") == 3 and report.table().count("op: big") == 3
