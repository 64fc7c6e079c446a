"""The budgets hold labs, methods and kernels to their seconds and bytes."""

from __future__ import annotations

import importlib.util
import json
import pathlib

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent


@pytest.fixture
def budgets():
    spec = importlib.util.spec_from_file_location("budgets", ROOT / "tests/budgets.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def judged(budgets, tmp_path, capsys):
    """Runs the command on a recording and returns its exit code and its lines."""
    (tmp_path / "labs").mkdir()

    def run(tests):
        (tmp_path / "tests.json").write_text(json.dumps(tests))
        code = budgets.main([str(tmp_path / "tests.json"), "--labs", str(tmp_path / "labs")])
        return code, capsys.readouterr().out

    return run


LEAN = "tests/foundations/test_lean_attention.py"
FLASH = "tests/kernels/test_flash_attention.py"  # two kernel modules: it has a backward
SPLIT = "tests/kernels/test_split_kv_decode.py"
LAB = "labs/00_foundations/002_softmax_as_a_reduction.ipynb"


def took(seconds, call=None):
    return {"outcome": "passed", "seconds": seconds, "call": seconds if call is None else call}


def test_within_budget_passes(judged):
    tests = {f"{LEAN}::a": took(2.9), f"{FLASH}::a": took(9.9), f"{LAB}::Cell 0": took(19.9)}
    code, out = judged(tests)
    assert code == 0 and "3 labs, methods and kernels held to their budgets, 0 failed" in out
    assert out.splitlines()[0].split() == ["19.9", "s", "of", "20", LAB]


@pytest.mark.parametrize(("file", "budget"), [(LEAN, 3), (SPLIT, 10), (FLASH, 20), (LAB, 20)])
def test_a_sum_over_budget_is_named_and_far_over_fails(judged, file, budget):
    tests = {f"{file}::a": took(0.6 * budget), f"{file}::b": took(0.6 * budget)}
    code, out = judged(tests)
    assert code == 0 and f"over budget (fails at 3 times): {file}" in out
    tests[f"{file}::c"] = took(2 * budget)
    code, out = judged(tests)
    assert code == 1 and f"TOO MUCH: {file}: {3.2 * budget:.1f} s" in out


def test_mutants_have_a_budget_of_their_own(judged):
    tests = {f"{FLASH}::test_mutants_are_caught[x]": took(19.0), f"{FLASH}::a": took(19.0)}
    code, out = judged(tests)
    assert code == 0 and "over budget" not in out
    tests[f"{FLASH}::test_mutants_are_caught[y]"] = took(60.0)
    code, out = judged(tests)
    assert code == 1 and f"TOO MUCH: {FLASH} (mutants): 79.0 s" in out


def test_shared_set_up_counts_for_labs_only(judged):
    assert judged({f"{LEAN}::a": took(60.0, call=1.0)})[0] == 0
    assert judged({f"{LAB}::Cell 0": took(61.0, call=1.0)})[0] == 1


def test_other_files_have_no_budget(judged):
    code, out = judged({"tests/book/test_book.py::a": took(300.0)})
    assert code == 0 and "test_book" not in out


def test_a_large_notebook_fails(judged, tmp_path):
    (tmp_path / "labs/003_x.ipynb").write_text("x" * 600_001)
    code, out = judged({})
    assert code == 1 and "TOO MUCH: 003_x.ipynb: 600 kB" in out
