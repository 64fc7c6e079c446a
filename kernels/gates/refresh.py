"""Bring the report card up to date: run gates 1 and 2 for the kernels that changed."""

from __future__ import annotations

import json
import os
import pathlib
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from corelib.kernels.gates.compile import compile_module
from corelib.kernels.gates.specialisation import TARGETS
from corelib.kernels.report import SHIPPED, kernel_modules, parts, read, source_hash, stale

ROOT = SHIPPED.parent.parent


def update(*, force: bool = False, jobs: int = 2, path: pathlib.Path = SHIPPED) -> dict[str, Any]:
    """Run gates 1 and 2 for the kernel modules that changed, and write the report.

    Args:
        force: for all of them, changed or not.
        jobs: how many targets are compiled at once.
    """
    import triton

    report = read(path)
    present = kernel_modules()
    changed = present if force or report["triton"] != triton.__version__ else stale(report)
    report["triton"] = triton.__version__
    for name in changed:
        report["rows"] = [row for row in report["rows"] if row["module"] != name]
        report["modules"].pop(name, None)
        if name in present:
            print(f"· {name}: compiling for {', '.join(TARGETS)}", file=sys.stderr, flush=True)
            read_before = source_hash(name)  # an edit meanwhile makes it stale again
            report["rows"] += _compiled(name, jobs)
            report["modules"][name] = {"hash": read_before, "interpreted": False, "runs": []}
            write(report, path)
    for name, entry in report["modules"].items():
        if not entry["interpreted"]:
            print(f"· {name}: running its tests interpreted", file=sys.stderr, flush=True)
            entry["interpreted"] = tests_pass(name)
            write(report, path)
    return report


def write(report: dict[str, Any], path: pathlib.Path = SHIPPED) -> None:
    """One row a line, so that a change of one kernel is a change of its lines."""
    report["rows"].sort(key=_order)
    lines = ",\n".join(json.dumps(row, sort_keys=True) for row in report["rows"])
    head = json.dumps({"triton": report["triton"], "modules": report["modules"]}, sort_keys=True)
    path.write_text(f'{head[:-1]}, "rows": [\n{lines}\n]}}\n', encoding="utf-8")


def tests_pass(name: str, options: Sequence[str] = (), **environment: str) -> bool:
    """Whether all tests of a kernel module pass (only in a checkout: a wheel carries none).

    Args:
        name: the kernel module, without ``corelib.kernels.``.
        options: for pytest.
        environment: variables to set.
    """
    tests = sorted((ROOT / "tests/kernels").glob(f"test_{name}*.py"))
    if not tests:
        return False
    env = {**os.environ, "OMP_NUM_THREADS": "1", "CORELIB_KERNELS": "", **environment}
    command = [sys.executable, "-m", "pytest", "-q", *options, *map(str, tests)]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    print("\n".join(done.stdout.splitlines()[-15 if done.returncode else -1 :]), file=sys.stderr)
    return done.returncode == 0


def _compiled(name: str, jobs: int) -> list[dict[str, Any]]:
    jobs_to_do = [
        (f"corelib.kernels.{part}", [target]) for part in parts(name) for target in TARGETS
    ]
    with ThreadPoolExecutor(jobs) as pool:
        found = pool.map(lambda job: compile_module(*job), jobs_to_do)
        return [{"module": name, **row} for done in found for row in done]


def _order(row: dict[str, Any]) -> tuple:
    direction = ("forward", "backward").index(row["direction"])
    return row["module"], direction, row["kernel"], row["label"], TARGETS.index(row["target"])
