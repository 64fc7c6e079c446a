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


def update(
    *, module: str | None = None, force: bool = False, jobs: int = 2, path: pathlib.Path = SHIPPED
) -> dict[str, Any]:
    """Run gates 1 and 2 for the kernel modules that changed, and write the report.

    Args:
        module: look at this kernel module alone.
        force: for all of them, changed or not.
        jobs: how many targets are compiled at once.
    """
    import triton

    report, present = read(path), kernel_modules()
    changed = present if force or report["triton"] != triton.__version__ else stale(report)
    for name in (name for name in changed if module in (None, name)):
        entry, compiled = None, []
        if name in present:
            print(f"· {name}: compiling for {', '.join(TARGETS)}", file=sys.stderr, flush=True)
            runs = report["modules"].get(name, {}).get("runs", [])  # each says of which version
            entry = {"hash": source_hash(name), "interpreted": False, "runs": runs}
            compiled = _compiled(name, jobs)  # an edit meanwhile makes it stale again
        _replace(name, entry, compiled, path)
    for name, entry in read(path)["modules"].items():
        if not entry["interpreted"] and module in (None, name):
            print(f"· {name}: running its tests interpreted", file=sys.stderr, flush=True)
            _replace(name, entry | {"interpreted": tests_pass(name)}, None, path)
    return read(path)


def _replace(name: str, entry: dict | None, rows: list | None, path: pathlib.Path) -> None:
    """Put one module's part into the report as it now stands: another run may have written too."""
    import triton

    report = read(path)
    report["triton"] = triton.__version__
    report["modules"] = {key: kept for key, kept in report["modules"].items() if key != name}
    if entry is not None:
        report["modules"][name] = entry
    if rows is not None:
        report["rows"] = [row for row in report["rows"] if row["module"] != name] + rows
    write(report, path)


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
