"""A pytest plugin for `gpu_check`: keep the tests that run kernels through the runner fixture.

The others (mutants, error messages, and what is marked ``counted``: bytes and operations as the
interpreter sees them) say nothing about a device.
"""

from __future__ import annotations


def pytest_collection_modifyitems(config, items):
    kept = [item for item in items if _runs_kernels(item)]
    config.hook.pytest_deselected(items=[item for item in items if item not in kept])
    items[:] = kept


def _runs_kernels(item) -> bool:
    named = "interpreter" in getattr(item, "fixturenames", ())
    return named and item.get_closest_marker("counted") is None
