"""What works: the catalog's rows held against the last full test run.

``python -m corelib.results build/results/tests.json`` (the last step of `make test`) reads the
outcome of every test, the executed labs and the kernels' report card, and writes
``corelib/results.json``: for each row its parts, each ``"ok"`` or what is wrong. A row works when
all parts that its kind needs are ok. Which these are stands in `NEEDS`:

* module: it imports. Tests: every test of ``tests/<family>/test_<slug>.py``, and every other test
  marked ``method(slug)``, ran and passed.
* kernels: for each kernel of the row, every test of ``tests/kernels/test_<kernel>.py`` (and of
  ``test_<kernel>_….py``) passed, and the report card has it compiled for every target without
  problems (no spills, matrix instructions wherever the source holds a ``tl.dot``).
* lab: the home lab was executed top to bottom and every cell passed under nbval. Derive, see, race:
  it has these sections (for this method, by cell tag, where a lab has several). Claims: an executed
  cell recorded at least one.
* models: a benchmark has at least three of our models measured, as the mapping ``MEASURED`` in its
  module or under ``"models"`` in its claims' values. Taxonomy: a survey's module has ``TAXONOMY``.
"""

from __future__ import annotations

import argparse
import collections
import importlib
import importlib.util
import json
import pathlib
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass

from .catalog import HERE, Method, methods
from .kernels.gates.specialisation import TARGETS
from .teach.lab_contents import Lab, find_labs, read_lab

ROOT = HERE.parent
_WHOLE = ("module", "tests", "kernels", "lab", "derive", "see", "race", "claims")
#: Kind of row -> the parts it needs.
NEEDS = {
    "method": _WHOLE,
    "systems": _WHOLE,
    "model": _WHOLE,
    "recipe": ("module", "tests", "lab", "race", "claims"),
    "benchmark": ("module", "tests", "lab", "models"),
    "survey": ("module", "tests", "lab", "taxonomy"),
}
OK = "ok"
MODELS_MEASURED = 3


@dataclass(frozen=True)
class Evidence:
    """What a full test run left behind.

    Attributes:
        tests: node id -> ``{"outcome": "passed" | …, "methods": [slug, …]}``.
        labs: home (``00_foundations/002_…``) -> the lab, or the error that reading it gave.
        report: the rows of the kernels' report card.
        homes: home -> how many catalog rows have it.
    """

    tests: Mapping[str, dict]
    labs: Mapping[str, Lab | ValueError]
    report: list[dict]
    homes: Mapping[str, int]


def collect(
    tests_json: str | pathlib.Path,
    labs_dir: str | pathlib.Path,
    report_json: str | pathlib.Path,
    rows: list[Method] | None = None,
) -> dict[str, dict[str, str]]:
    """Slug -> part -> ``"ok"`` or what is wrong with it.

    Args:
        tests_json: the file that pytest wrote with ``--record``.
        labs_dir: the folder of executed labs.
        report_json: the kernels' report card; a file that is not there has no rows.
        rows: the rows to judge; the whole catalog by default.
    """
    report = pathlib.Path(report_json)
    evidence = Evidence(
        tests=json.loads(pathlib.Path(tests_json).read_text(encoding="utf-8")),
        labs={f"{p.parent.name}/{p.stem}": _read(p) for p in find_labs(labs_dir)},
        report=json.loads(report.read_text(encoding="utf-8"))["rows"] if report.exists() else [],
        homes=collections.Counter(method.lab for method in methods()),
    )
    return {row.slug: judge(row, evidence) for row in (methods() if rows is None else rows)}


def judge(row: Method, evidence: Evidence) -> dict[str, str]:
    """The parts of one row."""
    parts = {}
    for need in NEEDS[row.kind]:
        if need == "kernels":
            parts |= {f"kernel {name}": _kernel(name, evidence) for name in row.kernels}
        else:
            parts[need] = _PARTS[need](row, evidence)
    return parts


def _read(path: pathlib.Path) -> Lab | ValueError:
    try:
        return read_lab(path)
    except ValueError as error:
        return error


def _outcome(tests: Mapping[str, dict], what: str) -> str:
    """``ok`` when there are tests and all passed; a skipped test shows nothing, so it is not ok."""
    if not tests:
        return f"no {what} ran"
    off = {name: test["outcome"] for name, test in tests.items() if test["outcome"] != "passed"}
    if not off:
        return OK
    first = min(off)
    name = first.partition("::")[2] or first
    return f"{len(off)} of {len(tests)} {what}s did not pass ({name} {off[first]})"


def _in_file(evidence: Evidence, path: str) -> dict[str, dict]:
    return {n: test for n, test in evidence.tests.items() if n.startswith(f"{path}::")}


def _module(row: Method, evidence: Evidence) -> str:
    try:
        row.load()
    except Exception as error:
        if isinstance(error, ModuleNotFoundError) and error.name == row.module:
            return "not built"
        return f"cannot be imported ({type(error).__name__})"
    return OK


def _tests(row: Method, evidence: Evidence) -> str:
    own = _in_file(evidence, f"tests/{row.family}/test_{row.slug}.py")
    marked = {n: t for n, t in evidence.tests.items() if row.slug in t.get("methods", ())}
    return _outcome({**own, **marked}, "test")


def _kernel(name: str, evidence: Evidence) -> str:
    gates = re.compile(rf"tests/kernels/test_{name}(_\w+)?\.py::")
    tests = _outcome({n: t for n, t in evidence.tests.items() if gates.match(n)}, "test")
    if tests != OK:
        return tests
    targets = collections.defaultdict(set)
    for row in evidence.report:
        if row["module"] == name:
            targets[f"{row['kernel']} {row['label']}"].add(row["target"])
            if row["problems"]:
                return f"{row['label']} on {row['target']}: {row['problems'][0]}"
    if not targets:
        return "not on the report card"
    for label, compiled in targets.items():
        if missing := set(TARGETS) - compiled:
            return f"{label} was not compiled for {', '.join(sorted(missing))}"
    return OK


def _lab(row: Method, evidence: Evidence) -> str:
    lab = evidence.labs.get(row.lab)
    if lab is None:
        return f"{row.lab} is not written"
    if isinstance(lab, ValueError):
        return str(lab)
    if lab.errors or not lab.run:
        return f"{row.lab} was not executed top to bottom without errors"
    cells = _in_file(evidence, f"labs/{row.lab}.ipynb")
    if 0 < len(cells) < lab.code_cells:
        return f"only {len(cells)} of {lab.code_cells} cells ran under nbval"
    return _outcome(cells, "cell")


def _section(name: str):
    def state(row: Method, evidence: Evidence) -> str:
        lab = evidence.labs.get(row.lab)
        alone = evidence.homes[row.lab] == 1
        if isinstance(lab, Lab) and lab.has_section(name, row.slug, alone):
            return OK
        return f"no section {name.capitalize()}" + ("" if alone else f" tagged {name}-{row.slug}")

    return state


def _claims_of(row: Method, evidence: Evidence) -> list[dict]:
    lab = evidence.labs.get(row.lab)
    return lab.claims_of(row.slug) if isinstance(lab, Lab) else []


def _claims(row: Method, evidence: Evidence) -> str:
    return OK if _claims_of(row, evidence) else "none recorded in the executed lab"


def _attribute(row: Method, name: str) -> object:
    """``name`` of the row's module; None where there is no such module or attribute."""
    try:
        return getattr(importlib.import_module(row.module), name, None)
    except Exception:
        return None


def _models(row: Method, evidence: Evidence) -> str:
    measured = set(_attribute(row, "MEASURED") or ())
    for claim in _claims_of(row, evidence):
        measured |= set(claim["ours"].get("models", ()))
    if len(measured) >= MODELS_MEASURED:
        return OK
    return f"{len(measured)} models measured, at least {MODELS_MEASURED} are needed"


def _taxonomy(row: Method, evidence: Evidence) -> str:
    return OK if _attribute(row, "TAXONOMY") else "its module has no TAXONOMY"


_PARTS = {
    "module": _module,
    "tests": _tests,
    "lab": _lab,
    "derive": _section("derive"),
    "see": _section("see"),
    "race": _section("race"),
    "claims": _claims,
    "models": _models,
    "taxonomy": _taxonomy,
}


def working(results: Mapping[str, Mapping[str, str]]) -> set[str]:
    """The slugs whose parts are all ok."""
    return {slug for slug, parts in results.items() if set(parts.values()) == {OK}}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m corelib.results", description="What works.")
    parser.add_argument("tests", help="the file that pytest wrote with --record")
    parser.add_argument("--labs", type=pathlib.Path, default=ROOT / "labs")
    parser.add_argument("--report", type=pathlib.Path, default=ROOT / "kernels/report.json")
    parser.add_argument("--out", type=pathlib.Path, default=HERE / "results.json")
    chosen = parser.parse_args(arguments)
    if importlib.util.find_spec("triton") is None:
        print("Triton is not installed, so no kernel was tested: results.json stays as it is.")
        return 0
    before = json.loads(chosen.out.read_text(encoding="utf-8")) if chosen.out.exists() else {}
    results = collect(chosen.tests, chosen.labs, chosen.report)
    chosen.out.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n", "utf-8")
    works = working(results)
    stopped = sorted(working(before) - works)
    print(f"{len(works)} of {len(results)} catalog rows work")
    for slug in sorted(works - working(before)):
        print(f"  {slug} works now")
    for slug in stopped:
        wrong = "; ".join(f"{part}: {s}" for part, s in results.get(slug, {}).items() if s != OK)
        print(f"  {slug} stopped working: {wrong}")
    return 1 if stopped else 0


if __name__ == "__main__":
    sys.exit(main())
