"""``make gpu-check``: the kernels' tests and races on this machine's GPU.

The tests are the very ones that the interpreter runs (those that take the ``interpreter`` fixture,
which hands out a runner on the GPU here), with tiles, warps and types that only a GPU takes. Then
every kernel is raced at a real size (`gpu_races`), where it must agree with its peers first. Where
a kernel module passes both, the device, the date, the versions and the races' times go into the
report card as *run on (device, date)*; a failure records nothing. Without a GPU nothing is checked
and nothing recorded.

Compiling takes much longer than running, so that tests share the processors, and the races of all
modules are made ready at once; the clock runs for one of them at a time.
"""

from __future__ import annotations

import datetime
import json
import multiprocessing
import os
import pathlib
import queue
import subprocess
import sys
import tempfile
from typing import Any

import torch

from corelib.kernels.gates.refresh import ROOT, write
from corelib.kernels.report import SHIPPED, read, stale

JOBS = max(1, min(12, (os.cpu_count() or 1) - 2))


def target_of(device: int = 0) -> str:
    """The compile target of a GPU, as in ``TARGETS``: ``"sm_90"``, ``"gfx942"``."""
    if torch.version.hip:
        return torch.cuda.get_device_properties(device).gcnArchName.split(":")[0]
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


# --- tests ----------------------------------------------------------------------------------------


def run_tests(modules: list[str]) -> dict[str, list[str]]:
    """Kernel module -> its tests that failed on the GPU; that none ran counts as a failure."""
    with tempfile.TemporaryDirectory() as folder:
        record = pathlib.Path(folder) / "tests.json"
        command = [sys.executable, "-m", "pytest", "-q", "-n", str(JOBS), "--tb=short"]
        command += ["-p", "corelib.kernels.gates.gpu_tests", "--record", str(record)]
        command += [str(ROOT / _tests_of(module)) for module in modules]
        env = {**os.environ, "OMP_NUM_THREADS": "1", "CORELIB_KERNELS": "native"}
        done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
        print("\n".join(done.stdout.splitlines()[-60 if done.returncode else -1 :]), flush=True)
        outcomes = json.loads(record.read_text()) if record.exists() else {}
    failed = {}
    for module in modules:
        own = {test: x for test, x in outcomes.items() if test.startswith(f"{_tests_of(module)}::")}
        failed[module] = [test for test, x in own.items() if x["outcome"] != "passed"]
        if not own:
            failed[module] = [f"no test of {module} ran"]
    return failed


def _tests_of(module: str) -> str:
    return f"tests/kernels/test_{module}.py"


# --- races ----------------------------------------------------------------------------------------


def run_races(modules: list[str]) -> dict[str, dict[str, Any]]:
    """Kernel module -> ``{"microseconds": {race: {contestant: …}}, "problems": […]}``.

    Each race's times have an entry ``floor``: the time that its bytes and operations take at the
    device's measured copy bandwidth and matrix rate (modelled). A module whose process died has a
    problem that says so.
    """
    from corelib.measure.hardware import this_machine

    device = this_machine("cuda")
    rates = device.bandwidth, device.peak("bfloat16")
    print(f"  copies {rates[0] / 1e12:.2f} TB/s, bfloat16 products {rates[1] / 1e12:.0f} TFLOP/s")
    context = multiprocessing.get_context("spawn")
    places, clock = context.Semaphore(JOBS), context.Lock()
    go, messages = context.Event(), context.Queue()
    workers = {
        module: context.Process(target=_race, args=(module, rates, places, clock, go, messages))
        for module in modules
    }
    for worker in workers.values():
        worker.start()
    waiting, results = set(workers), {}
    while len(results) < len(workers):
        try:
            module, found = messages.get(timeout=1)
            waiting.discard(module)
            results |= {module: found} if found is not None else {}
        except queue.Empty:
            for module, worker in workers.items():
                if not worker.is_alive() and module not in results and messages.empty():
                    problem = f"the process of its races ended with {worker.exitcode}"
                    results[module] = {"microseconds": {}, "problems": [problem]}
                    waiting.discard(module)
        if not waiting:
            go.set()
    return results


def _race(module: str, rates: tuple[float, float], places, clock, go, messages) -> None:
    """In a process of its own: compile and compare everything, wait for the others, then race."""
    from corelib.kernels.gates.gpu_ground import Ground, agreeing
    from corelib.kernels.gates.gpu_races import RACES
    from corelib.measure import race

    ready, result = {}, {"microseconds": {}, "problems": []}
    for title, make in RACES.get(module, {}).items():
        with places:
            try:
                contest = make(Ground("cuda"))
                ready[title] = contest, agreeing(contest)
            except torch.OutOfMemoryError:
                print(f"  {module}, {title}: left out, not enough memory on this device")
            except Exception as problem:
                text = f"{title}: {type(problem).__name__}: {problem}"
                result["problems"].append(text[:500])
            torch.cuda.empty_cache()
    print(f"  {module}: ready", flush=True)
    messages.put((module, None))
    go.wait()
    for title, (contest, runners) in ready.items():
        with clock:
            medians = race(runners, check=None, min_time=0.1).medians
            times = {name: round(1e6 * seconds, 1) for name, seconds in medians.items()}
            floor = max(contest.bytes / rates[0], contest.flops / rates[1])
            times |= {"floor": round(1e6 * floor, 1)} if floor else {}
            print(f"  {module}, {title}, microseconds: {times}", flush=True)
        result["microseconds"][title] = times
        torch.cuda.empty_cache()
    messages.put((module, result))


# --- both -----------------------------------------------------------------------------------------


def check(modules: list[str], report: dict[str, Any]) -> list[str]:
    """Test and race kernel modules; note in ``report`` those where all is well, return the rest."""
    import triton

    device = torch.cuda.get_device_name()
    print(f"· the tests of {len(modules)} kernel modules on {device}", flush=True)
    failed = run_tests(modules)
    good = [module for module in modules if not failed[module]]
    print("· their races", flush=True)
    raced = run_races(good)
    passed = [module for module in good if not raced[module]["problems"]]
    for module in passed:
        runs = report["modules"][module]["runs"]
        runs[:] = [run for run in runs if run["device"] != device]
        today = datetime.date.today().isoformat()
        versions = {"torch": torch.__version__, "triton": triton.__version__}
        times = raced[module]["microseconds"]
        runs.append(
            {"device": device, "target": target_of(), "date": today, **versions}
            | {"hash": report["modules"][module]["hash"], "microseconds": times}
        )
    for module in modules:
        problems = failed[module] or raced[module]["problems"]
        if problems:
            print(f"· {module} fails on {device}, nothing recorded:", *problems, sep="\n    ")
    return [module for module in modules if module not in passed]


def main() -> int:
    if not torch.cuda.is_available():
        print("no GPU: nothing was checked")
        return 0
    report = read()
    if changed := stale(report):
        print(f"{', '.join(changed)}: changed since the report card was made; first run")
        print("  python -m corelib.kernels.report --update")
        return 1
    failed = check(list(report["modules"]), report)
    write(report, SHIPPED)
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
