"""Handing a MIME bundle to the notebook, or its plain text to a terminal."""

from __future__ import annotations

import sys
from typing import Any


def has_kernel() -> bool:
    """Whether a notebook's kernel runs us: a widget can be served."""
    return hasattr(_shell(), "kernel")


def display_bundle(bundle: dict[str, Any]) -> None:
    """Display MIME type -> data; outside IPython print the ``text/plain`` part."""
    if _shell() is None:
        print(bundle["text/plain"])
        return
    from IPython.display import display

    display(bundle, raw=True)


def _shell() -> Any:
    ipython = sys.modules.get("IPython")
    return ipython.get_ipython() if ipython else None
