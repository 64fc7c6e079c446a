"""Races, scaling fits, counted memory and bytes, and a model of the hardware.

Nothing here imports matplotlib or triton. The names are bound eagerly where a module is called
like its function (``race``, ``progress``, ``io_meter``): bound lazily, the module would win.
"""

from __future__ import annotations

import importlib

from .gradients import forward_backward
from .hardware import A100, H100, HardwareSpec, ModelledTime, roofline, this_machine
from .io_meter import IOCount, count_io, io_meter
from .machine import machine
from .memory import peak_memory
from .progress import progress
from .race import Missing, Race, format_seconds, race
from .scaling import Exponent, Sweep, fit_exponent, sweep

_FROM_RACES = ("Row", "peer", "register", "registered", "rows")
__all__ = [
    "A100",
    "Exponent",
    "H100",
    "HardwareSpec",
    "IOCount",
    "Missing",
    "ModelledTime",
    "Race",
    "Sweep",
    "count_io",
    "fit_exponent",
    "format_seconds",
    "forward_backward",
    "io_meter",
    "machine",
    "peak_memory",
    "progress",
    "race",
    "roofline",
    "sweep",
    "this_machine",
    *_FROM_RACES,
]


def __getattr__(name: str):
    if name in _FROM_RACES:
        return getattr(importlib.import_module(".races", __name__), name)
    raise AttributeError(f"module 'corelib.measure' has no attribute {name!r}")


def __dir__():
    return __all__
