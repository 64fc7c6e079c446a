"""Set-up shared by the tests and by nbval's run of the labs."""

from __future__ import annotations

import json
import os
import pathlib
import sys
import types

for _name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ.setdefault(_name, "1")
os.environ.setdefault("MPLBACKEND", "agg")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest  # noqa: E402

ROOT = pathlib.Path(__file__).parent

# jaxtyping's import hook breaks Triton, and teach's functions take figures, not tensors.
UNCHECKED = {"kernels", "teach", "__pycache__"}
CHECKED = [
    f"corelib.{path.stem}"
    for path in sorted((ROOT / "corelib").iterdir())
    if path.stem not in UNCHECKED | {"__init__"} and (path.is_dir() or path.suffix == ".py")
]

if "corelib.primitives" not in sys.modules:
    from beartype import BeartypeConf, beartype
    from jaxtyping import install_import_hook

    # An int is welcome where a float is expected. The hook wants the checker by its dotted name.
    sys.modules["shape_checker"] = types.ModuleType("shape_checker")
    sys.modules["shape_checker"].check = beartype(conf=BeartypeConf(is_pep484_tower=True))
    install_import_hook(CHECKED, "shape_checker.check")


@pytest.fixture(autouse=True)
def _shape_checks(request):
    """Tests of error messages see the package as a user does: without the shape checker."""
    import jaxtyping

    off = request.node.get_closest_marker("no_shape_checks") is not None
    jaxtyping.config.update("jaxtyping_disable", off)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture(scope="session")
def interpreter():
    """What runs kernels: a worker process that interprets them (a GPU in `make gpu-check`)."""
    pytest.importorskip("triton")
    from corelib.kernels.gates.interpreter import kernel_runner

    return kernel_runner()


def pytest_collection_modifyitems(items):
    for item in items:
        if hasattr(item.parent, "skip_compare"):  # a cell of a lab, run by nbval
            item.parent.skip_compare += ("text/html", "image/svg+xml")
        for marker in item.iter_markers("method"):
            item.user_properties += [("method", slug) for slug in marker.args]


class _Recorder:
    """Writes every test's outcome and seconds: the catalog and the budgets read the file."""

    def __init__(self, path: str):
        self.path = pathlib.Path(path)
        self.tests: dict[str, dict] = {}

    def pytest_runtest_logreport(self, report):
        test = self.tests.setdefault(report.nodeid, {"outcome": "passed", "seconds": 0.0})
        test["seconds"] = round(test["seconds"] + report.duration, 3)
        if report.when == "call":  # without shared set-up: what the test itself costs
            test["call"] = round(report.duration, 3)
        if slugs := [slug for name, slug in report.user_properties if name == "method"]:
            test["methods"] = slugs
        if report.outcome != "passed":
            test["outcome"] = report.outcome
        if report.failed:
            test["error"] = report.longreprtext

    def pytest_sessionfinish(self, session):
        if hasattr(session.config, "workerinput"):
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text(json.dumps(self.tests, indent=1, sort_keys=True) + "\n")


def pytest_addoption(parser):
    parser.addoption("--record", metavar="FILE", help="write outcomes and seconds as JSON")


def pytest_configure(config):
    if config.getoption("--record"):
        config.pluginmanager.register(_Recorder(config.getoption("--record")))
