"""What `make test` and `make quick` run, in order, with the slowest named at the end.

    python tests/run.py            everything: tests, kernel gates, labs, book in a browser
    python tests/run.py --quick    the tests of what changed, under two minutes

The full run writes build/results/tests.json (outcome and seconds of every test), from it
corelib/results.json (what works), and holds labs and tests to their time budgets.
"""

from __future__ import annotations

import argparse
import collections
import json
import os
import pathlib
import subprocess
import sys
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent
RECORD = ROOT / "build/results/tests.json"
RECORD_WITHOUT_TRITON = RECORD.with_name("tests_without_triton.json")
PYTEST = [sys.executable, "-m", "pytest", "-q"]
# The labs' numbers are checked by predicates inside them, so nbval compares no text.
NBVAL = ["--nbval-lax", "--nbval-cell-timeout=120"]
FAILED: list[str] = []  # titles of the steps that failed
WITHOUT_TRITON = ["tests/primitives", "tests/foundations", "tests/measure", "tests/teach"]


def step(title: str, command: list[str], **env: str) -> bool:
    """Run one command, show what it prints, and say how long it took."""
    print(f"\n── {title}", flush=True)
    start = time.perf_counter()
    code = subprocess.call(command, cwd=ROOT, env={**os.environ, **env})
    print(f"── {title}: {'ok' if code == 0 else 'FAILED'}, {time.perf_counter() - start:.0f} s")
    if code:
        FAILED.append(title)
    return code == 0


def everything(jobs: int, extra: list[str]) -> bool:
    parallel = ["-n", str(jobs), "--dist", "loadscope", "--timeout", "900"]
    first_lab = str(next((ROOT / "labs").rglob("001_*.ipynb")).relative_to(ROOT))
    for path in (RECORD, RECORD_WITHOUT_TRITON):
        path.unlink(missing_ok=True)  # a run that dies leaves nothing to mistake for its own
    blocked = {"PYTHONPATH": str(ROOT / "tests/no_triton")}
    ok = step(
        "tests, kernel gates, labs and book",
        [*PYTEST, "tests", "labs", *NBVAL, *parallel, "--record", str(RECORD), *extra],
    )
    ok &= step(
        "the quick tests and one lab with Triton blocked",
        [*PYTEST, *WITHOUT_TRITON, first_lab, *NBVAL, *parallel, "-m", "not slow"]
        + ["--record", str(RECORD_WITHOUT_TRITON)],
        **blocked,
    )
    ok &= step("time and size budgets", [sys.executable, "tests/budgets.py", str(RECORD)])
    if RECORD.exists():
        slowest()
    ok &= step("what works now", [sys.executable, "-m", "corelib.results", str(RECORD)])
    what_failed()
    return ok


def slowest(count: int = 15) -> None:
    """Print the files and labs that took longest."""
    seconds: collections.Counter[str] = collections.Counter()
    for test, result in json.loads(RECORD.read_text()).items():
        seconds[test.split("::")[0]] += result["seconds"]
    print(f"\n── the slowest of {len(seconds)} test files and labs")
    for name, spent in seconds.most_common(count):
        print(f"{spent:8.1f} s  {name}")


def what_failed(lines: int = 12) -> None:
    """Name the failed steps and tests last: a log is often read from its end, or cut there."""
    for title in FAILED:
        print(f"\n── FAILED: {title}")
    for path in filter(pathlib.Path.exists, (RECORD, RECORD_WITHOUT_TRITON)):
        for test, result in json.loads(path.read_text()).items():
            if "error" in result:
                print(f"\n── {test}", *result["error"].splitlines()[-lines:], sep="\n   ")


def changed() -> list[str]:
    """Files that differ from the last commit; on a clean tree, those of the last commit."""

    def git(*words: str) -> list[str]:
        done = subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True)
        return done.stdout.splitlines()

    now = git("diff", "--name-only", "HEAD") + git("ls-files", "--others", "--exclude-standard")
    return now or git("diff", "--name-only", "HEAD~1", "HEAD")


def tests_of(files: list[str]) -> list[str]:
    """The tests that mirror the changed files (a package's __init__ stands for its folder)."""
    targets = set()
    for name in files:
        path = pathlib.PurePath(name)
        if path.parts[0] == "labs" and path.suffix == ".ipynb":
            targets.add(name)
        elif path.parts[0] == "book":
            targets.add("tests/book/test_pages.py")
        elif path.parts[0] == "tests" and path.name.startswith("test_"):
            targets.add(name)
        elif path.parts[0] in ("corelib", "kernels"):
            folder = pathlib.PurePath("tests", *path.parts[path.parts[0] == "corelib" : -1])
            mirror = folder / f"test_{path.stem}.py"
            targets.add(str(mirror if (ROOT / mirror).exists() else folder))
    return sorted(target for target in targets if (ROOT / target).exists() and target != "tests")


def quick(jobs: int, extra: list[str]) -> bool:
    targets = tests_of(changed()) or ["tests/test_catalog.py", "tests/test_testing.py"]
    print("changed, so tested:", *targets, sep="\n  ")
    command = [*PYTEST, *targets, *NBVAL, "-m", "not slow", "-n", str(jobs), "--dist", "loadscope"]
    return step("quick tests", [*command, *extra])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--jobs", type=int, default=2)
    arguments, extra = parser.parse_known_args()
    start = time.perf_counter()
    ok = (quick if arguments.quick else everything)(arguments.jobs, extra)
    print(f"\n{'passed' if ok else 'FAILED'} in {(time.perf_counter() - start) / 60:.1f} minutes")
    sys.exit(not ok)


if __name__ == "__main__":
    main()
