"""Time and size budgets, checked on what a full test run recorded.

    python tests/budgets.py build/results/tests.json

A lab may take 20 s and 600 kB, a method's tests 3 s, the tests of each kernel module 10 s (those of
an operation and its backward share a file), and the mutants that they must catch 20 s a file. Times
count on one core of a quiet machine; this one may be busy, so a time over budget is named, and one
over NOISE times the budget fails the run. Sizes do not depend on the machine and have no such
allowance. Other test files have no budget and only appear among the slowest.
"""

from __future__ import annotations

import argparse
import collections
import json
import pathlib
import sys

ROOT = pathlib.Path(__file__).resolve().parent.parent
LAB_SECONDS, METHOD_SECONDS, KERNEL_SECONDS, MUTANT_SECONDS = 20.0, 3.0, 10.0, 20.0
MUTANTS = " (mutants)"
LAB_BYTES = 600_000
NOISE = 3.0
KERNELS = "tests/kernels/test_"


def method_files() -> set[str]:
    """``tests/<family>/test_<slug>.py`` of every catalog row."""
    from corelib.catalog import methods

    return {f"tests/{row.family}/test_{row.slug}.py" for row in methods()}


def kernel_files() -> set[str]:
    """``tests/kernels/test_<kernel>.py`` of every kernel module."""
    names = (path.stem for path in (ROOT / "kernels").glob("*.py"))
    return {f"{KERNELS}{name}.py" for name in names if name != "report"}


def seconds_by_file(tests: dict[str, dict]) -> dict[str, float]:
    """File -> seconds. A lab counts with its kernel's start, a test without shared set-up."""
    spent: collections.Counter[str] = collections.Counter()
    for name, test in tests.items():
        file = name.split("::")[0]
        whole = file.endswith(".ipynb")
        if "::test_mutants_" in name:
            file += MUTANTS
        spent[file] += test["seconds"] if whole else test.get("call", 0.0)
    return dict(spent)


def budget_of(file: str, methods: set[str], kernels: set[str]) -> float | None:
    if file.endswith(".ipynb"):
        return LAB_SECONDS
    if file in methods:
        return METHOD_SECONDS
    if file.removesuffix(MUTANTS) not in kernels:
        return None
    if file.endswith(MUTANTS):
        return MUTANT_SECONDS
    backward = file.removesuffix(".py") + "_backward.py"
    return KERNEL_SECONDS * (1 + (backward in kernels))


def over_time(spent: dict[str, float], methods: set[str], kernels: set[str]) -> tuple[list, list]:
    """Lines for files that fail, and for files that are only named."""
    failed, named = [], []
    for file, seconds in sorted(spent.items(), key=lambda item: -item[1]):
        budget = budget_of(file, methods, kernels)
        if budget is None or seconds <= budget:
            continue
        line = f"{file}: {seconds:.1f} s, the budget is {budget:.0f} s"
        (failed if seconds > NOISE * budget else named).append(line)
    return failed, named


def over_size(labs: pathlib.Path) -> list[str]:
    """Lines for notebooks that are too large."""
    found = []
    for path in sorted(labs.rglob("*.ipynb")):
        size = path.stat().st_size
        if ".ipynb_checkpoints" not in path.parts and size > LAB_BYTES:
            limit = LAB_BYTES / 1000
            found.append(f"{path.name}: {size / 1000:.0f} kB, the budget is {limit:.0f} kB")
    return found


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("tests", type=pathlib.Path, help="the file that pytest wrote with --record")
    parser.add_argument("--labs", type=pathlib.Path, default=ROOT / "labs")
    chosen = parser.parse_args(arguments)
    spent = seconds_by_file(json.loads(chosen.tests.read_text(encoding="utf-8")))
    methods, kernels = method_files(), kernel_files()
    held = {f: s for f, s in spent.items() if budget_of(f, methods, kernels) is not None}
    for file, seconds in sorted(held.items(), key=lambda item: -item[1])[:10]:
        print(f"{seconds:8.1f} s of {budget_of(file, methods, kernels):2.0f}  {file}")
    failed, named = over_time(spent, methods, kernels)
    failed += over_size(chosen.labs)
    for line in named:
        print(f"over budget (fails at {NOISE:.0f} times): {line}")
    for line in failed:
        print(f"TOO MUCH: {line}")
    print(f"{len(held)} labs, methods and kernels held to their budgets, {len(failed)} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
