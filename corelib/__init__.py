"""corelib: every method of the long-sequence lab, importable by name.

``import corelib`` is cheap: submodules load when they are first touched, and
Triton, matplotlib and transformers only when something needs them.

>>> from corelib import find
>>> find("lean attention").load()          # the module of catalog row 172
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .catalog import Method, find, methods  # noqa: F401

__version__ = "0.1.0"

_FROM_CATALOG = ("find", "methods", "Method")
_SUBMODULES = (
    "catalog",
    "contracts",
    "data",
    "decoding",
    "diffusion",
    "distributed",
    "evaluation",
    "foundations",
    "generation",
    "hf",
    "kernels",
    "linear_time",
    "measure",
    "models",
    "primitives",
    "runtime",
    "serving",
    "sparse_attention",
    "state_space",
    "teach",
    "testing",
    "tokenization",
    "training",
    "vision_language",
)
__all__ = [*_FROM_CATALOG, *_SUBMODULES, "__version__"]


def __getattr__(name: str):
    if name in _FROM_CATALOG:
        return getattr(importlib.import_module(".catalog", __name__), name)
    if name in _SUBMODULES:
        return importlib.import_module(f".{name}", __name__)
    raise AttributeError(f"module 'corelib' has no attribute {name!r}")


def __dir__():
    return sorted(__all__)
