"""A row works only while every part of it does."""

from __future__ import annotations

import json
import pathlib
import shutil
import sys
import types

import pytest

from corelib import results
from corelib.catalog import KINDS, Method, find
from corelib.kernels.gates.specialisation import TARGETS
from corelib.results import NEEDS, collect, working

ROOT = pathlib.Path(__file__).resolve().parent.parent
HOME = "00_foundations/099_made_up"
CLAIM = {"slug": "made_up", "text": "it is fast", "ours": {"ratio": 2.0}, "shown": True}


def row(kind="method", slug="made_up", lab=HOME, kernels=("fast_op",)) -> Method:
    words = {"title": "Made Up", "arxiv": "", "arxiv_checked": "", "basis": "known"}
    where = {"family": "foundations", "lab": lab, "kernels": tuple(kernels)}
    return Method(number="999", slug=slug, year=2024, kind=kind, **words, **where)


@pytest.fixture
def world(tmp_path, made_lab, monkeypatch):
    """A method with everything it needs; tests take one thing away."""
    module = types.SimpleNamespace(
        tests={
            "tests/foundations/test_made_up.py::test_a": {"outcome": "passed", "seconds": 0.1},
            "tests/foundations/test_made_up.py::test_b": {"outcome": "passed", "seconds": 0.1},
            "tests/kernels/test_fast_op.py::test_c": {"outcome": "passed", "seconds": 0.1},
            f"labs/{HOME}.ipynb::Cell 0": {"outcome": "passed", "seconds": 0.1},
            f"labs/{HOME}.ipynb::Cell 1": {"outcome": "passed", "seconds": 0.1},
        },
        report=[
            {"module": "fast_op", "kernel": "_fast", "label": "fp16", "target": t, "problems": []}
            for t in TARGETS
        ],
    )
    made_lab(HOME, claims=[CLAIM])
    monkeypatch.setitem(sys.modules, "corelib.foundations.made_up", types.ModuleType("made_up"))
    monkeypatch.setattr(results, "methods", lambda: [row()])

    def judged(wanted=None) -> dict[str, str]:
        (tmp_path / "tests.json").write_text(json.dumps(module.tests))
        (tmp_path / "report.json").write_text(json.dumps({"rows": module.report}))
        wanted = wanted or row()
        paths = (tmp_path / "tests.json", tmp_path / "labs", tmp_path / "report.json")
        return collect(*paths, rows=[wanted])[wanted.slug]

    module.judged = judged
    return module


def off(parts: dict[str, str]) -> dict[str, str]:
    return {part: state for part, state in parts.items() if state != "ok"}


def test_every_kind_has_its_needs():
    assert set(NEEDS) == set(KINDS)


@pytest.mark.parametrize("kind", ["method", "systems", "model", "recipe"])
def test_a_row_with_everything_works(world, kind):
    parts = world.judged(row(kind))
    assert off(parts) == {} and "kernel fast_op" in parts or kind == "recipe"
    assert working({"made_up": parts}) == {"made_up"}


@pytest.mark.parametrize("outcome", ["failed", "skipped", "error"])
@pytest.mark.parametrize(
    ("test", "part"),
    [
        ("tests/foundations/test_made_up.py::test_b", "tests"),
        ("tests/kernels/test_fast_op.py::test_c", "kernel fast_op"),
        (f"labs/{HOME}.ipynb::Cell 1", "lab"),
    ],
)
def test_a_test_that_does_not_pass_stops_the_row(world, test, part, outcome):
    world.tests[test]["outcome"] = outcome
    found = off(world.judged())
    assert list(found) == [part] and outcome in found[part]


@pytest.mark.parametrize(
    ("prefix", "part"),
    [
        ("tests/foundations", "tests"),
        ("tests/kernels", "kernel fast_op"),
        ("labs", "lab"),
        (f"labs/{HOME}.ipynb::Cell 0", "lab"),
    ],
)
def test_tests_that_did_not_run_stop_the_row(world, prefix, part):
    world.tests = {n: test for n, test in world.tests.items() if not n.startswith(prefix)}
    assert list(off(world.judged())) == [part]


def test_a_marked_test_elsewhere_counts(world):
    marked = {"outcome": "failed", "methods": ["made_up"]}
    world.tests["tests/primitives/test_scan.py::test_z"] = marked
    assert list(off(world.judged())) == ["tests"]
    marked["methods"] = ["another"]
    assert off(world.judged()) == {}


@pytest.mark.parametrize("gone", ["Derive", "See", "Race"])
def test_a_section_that_is_gone_stops_the_row(world, made_lab, gone):
    made_lab(HOME, [name for name in ("Derive", "See", "Race") if name != gone], [CLAIM])
    assert list(off(world.judged())) == [gone.lower()]


def test_in_a_shared_lab_sections_carry_the_method(world, made_lab, monkeypatch):
    monkeypatch.setattr(results, "methods", lambda: [row(), row(slug="its_neighbour")])
    assert list(off(world.judged())) == ["derive", "see", "race"]
    tags = {name: f"{name.lower()}-made_up" for name in ("Derive", "See", "Race")}
    made_lab(HOME, claims=[CLAIM], tags=tags)
    assert off(world.judged()) == {}
    made_lab(HOME, claims=[CLAIM], tags={**tags, "See": "see-its_neighbour"})
    assert list(off(world.judged())) == ["see"]


def test_a_lab_without_its_claim_stops_the_row(world, made_lab):
    made_lab(HOME, claims=[{**CLAIM, "slug": "another"}])
    assert list(off(world.judged())) == ["claims"]


def test_a_lab_that_is_gone_unreadable_or_unrun_stops_the_row(world, made_lab):
    path = made_lab(HOME, claims=[CLAIM])
    path.write_text(path.read_text().replace('"execution_count": 1', '"execution_count": null'))
    assert list(off(world.judged())) == ["lab"]
    path.write_text("{")
    assert "not a notebook" in off(world.judged())["lab"]
    path.unlink()
    assert list(off(world.judged())) == ["lab", "derive", "see", "race", "claims"]


def test_an_error_in_an_output_stops_the_row(world, made_lab):
    path = made_lab(HOME, claims=[CLAIM])
    path.write_text(path.read_text().replace("display_data", "error"))
    assert "lab" in off(world.judged())


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"problems": ["spills 8 bytes a thread"]}, "fp16 on sm_80: spills 8 bytes a thread"),
        ({"target": "sm_70"}, "_fast fp16 was not compiled for sm_80"),
    ],
)
def test_a_kernel_that_fails_its_gate_stops_the_row(world, change, words):
    world.report[0] |= change
    assert off(world.judged()) == {"kernel fast_op": words}


def test_a_kernel_that_is_not_on_the_report_card_stops_the_row(world):
    for compiled in world.report:
        compiled["module"] = "fast_op_too"
    assert off(world.judged()) == {"kernel fast_op": "not on the report card"}


def test_all_files_of_a_kernels_tests_count(world):
    world.tests["tests/kernels/test_fast_op_mutants.py::test_m"] = {"outcome": "failed"}
    assert list(off(world.judged())) == ["kernel fast_op"]


def test_a_module_that_is_gone_or_broken_stops_the_row(world, monkeypatch, tmp_path):
    import corelib.foundations as package

    monkeypatch.delitem(sys.modules, "corelib.foundations.made_up")
    assert off(world.judged()) == {"module": "not built"}
    (tmp_path / "made_up.py").write_text("1 / 0\n")
    monkeypatch.setattr(package, "__path__", [str(tmp_path)])
    assert off(world.judged()) == {"module": "cannot be imported (ZeroDivisionError)"}


def test_a_benchmark_needs_three_measured_models(world, made_lab):
    bench = row("benchmark")
    assert off(world.judged(bench)) == {"models": "0 models measured, at least 3 are needed"}
    module = sys.modules["corelib.foundations.made_up"]
    module.MEASURED = {"tiny": 0.1, "small": 0.2}
    assert list(off(world.judged(bench))) == ["models"]
    made_lab(HOME, claims=[{**CLAIM, "ours": {"models": {"small": 0.2, "medium": 0.4}}}])
    assert off(world.judged(bench)) == {}


def test_a_survey_needs_its_taxonomy(world):
    survey = row("survey")
    assert list(off(world.judged(survey))) == ["taxonomy"]
    sys.modules["corelib.foundations.made_up"].TAXONOMY = [{"name": "softmax"}]
    assert off(world.judged(survey)) == {}


# ---- the same on a copy of what ships


@pytest.fixture
def real(tmp_path):
    """LeanAttention's labs and report card as they ship, and a test run in which all passed."""
    lean = find("lean attention")
    shutil.copytree(ROOT / "labs", tmp_path / "labs", ignore=shutil.ignore_patterns("*.py"))
    shutil.copy(ROOT / "kernels/report.json", tmp_path / "report.json")
    files = [f"tests/{lean.family}/test_{lean.slug}.py"]
    files += [f"tests/kernels/test_{kernel}.py" for kernel in lean.kernels]
    names = [f"{file}::test_it" for file in files if (ROOT / file).exists()]
    cells = json.loads((ROOT / f"labs/{lean.lab}.ipynb").read_text(encoding="utf-8"))["cells"]
    count = sum(cell["cell_type"] == "code" for cell in cells)
    names += [f"labs/{lean.lab}.ipynb::Cell {n}" for n in range(count)]
    tests = {name: {"outcome": "passed", "seconds": 0.1} for name in names}

    def judged() -> dict[str, str]:
        (tmp_path / "tests.json").write_text(json.dumps(tests))
        paths = (tmp_path / "tests.json", tmp_path / "labs", tmp_path / "report.json")
        return off(collect(*paths, rows=[lean])[lean.slug])

    return types.SimpleNamespace(
        judged=judged, tests=tests, lab=tmp_path / f"labs/{lean.lab}.ipynb"
    )


def test_lean_attention_works_as_it_ships(real):
    assert real.judged() == {}


def test_lean_attention_stops_working_when_a_part_breaks(real):
    for test in list(real.tests):
        real.tests[test]["outcome"] = "failed"
        assert len(real.judged()) == 1, test
        real.tests[test]["outcome"] = "passed"
    text = real.lab.read_text(encoding="utf-8")
    for section in ("Derive", "See", "Race"):
        tag = f"{section.lower()}-lean_attention"
        gone = text.replace(section, "Elsewhere").replace(tag, "elsewhere")
        real.lab.write_text(gone, encoding="utf-8")
        assert list(real.judged()) == [section.lower()]
    real.lab.write_text(text.replace("lean_attention", "something_else"), encoding="utf-8")
    assert list(real.judged()) == ["claims"]


# ---- the command


def test_command_writes_the_same_bytes_and_names_what_changed(world, tmp_path, capsys):
    world.judged()
    out = tmp_path / "results.json"
    paths = ["--labs", str(tmp_path / "labs"), "--report", str(tmp_path / "report.json")]
    command = [str(tmp_path / "tests.json"), *paths, "--out", str(out)]
    assert results.main(command) == 0
    assert "made_up works now" in capsys.readouterr().out
    first = out.read_bytes()
    assert results.main(command) == 0 and out.read_bytes() == first
    world.tests["tests/foundations/test_made_up.py::test_b"]["outcome"] = "failed"
    world.judged()
    assert results.main(command) == 1
    assert "made_up stopped working: tests: 1 of 2" in capsys.readouterr().out
    assert json.loads(out.read_text())["made_up"]["tests"] != "ok"


def test_command_leaves_the_file_where_triton_is_missing(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(results.importlib.util, "find_spec", lambda name: None)
    assert results.main(["no such file", "--out", str(tmp_path / "results.json")]) == 0
    assert not (tmp_path / "results.json").exists()
    assert "Triton is not installed" in capsys.readouterr().out
