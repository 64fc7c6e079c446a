"""A pytest plugin for `gpu_check`: keep the tests that run kernels through the runner fixture.

The others (mutants, byte counts, error messages) say nothing about a device.
"""

from __future__ import annotations


def pytest_collection_modifyitems(config, items):
    kept = [item for item in items if "interpreter" in getattr(item, "fixturenames", ())]
    config.hook.pytest_deselected(items=[item for item in items if item not in kept])
    items[:] = kept
