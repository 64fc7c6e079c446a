"""What a lab is made of: checks, claims, exercises, figures and sliders.

Names load when they are first touched, so that a check costs no plotting library.
"""

from __future__ import annotations

import importlib
import sys
import types

_HOME = {
    "check": "checks",
    "check_range": "checks",
    "CheckFailed": "checks",
    "claim": "claims",
    "ClaimFailed": "claims",
    "ledger_markdown": "ledger",
    "exercise": "exercise",
    "solution": "exercise",
    "Exercise": "exercise",
    "ExerciseFailed": "exercise",
    "explore": "explore",
}
# Everything else that labs draw with is a public function of the figures module.
_FIGURES = "figures"

__all__ = sorted([*_HOME, _FIGURES])


class _Package(types.ModuleType):
    """Keeps a name for its function: importing the file ``explore.py`` would bind the module."""

    def __setattr__(self, name: str, value: object) -> None:
        is_module = isinstance(value, types.ModuleType)
        super().__setattr__(name, getattr(value, name) if name in _HOME and is_module else value)


def __getattr__(name: str):
    if name == _FIGURES:
        return importlib.import_module(f".{name}", __name__)
    if name in _HOME:
        value = getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)
    elif name.startswith("_"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    else:
        value = _figure(name)
    globals()[name] = value
    return value


def _figure(name: str):
    figures = importlib.import_module(f".{_FIGURES}", __name__)
    if name not in getattr(figures, "__all__", dir(figures)):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(figures, name)


def __dir__():
    return __all__


sys.modules[__name__].__class__ = _Package
