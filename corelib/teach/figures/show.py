"""Displaying a figure: one small PNG whose plain text is its alternative text."""

from __future__ import annotations

import base64
import sys
from typing import Any

from matplotlib.figure import Figure

from ..display import display_bundle
from ..style import missing_labels, png_bytes


def show(figure: Any, alt: str) -> None:
    """Display ``figure`` (or the figure of the axes given) and close it.

    Args:
        figure: a matplotlib figure with a title and labelled axes.
        alt: what it shows, for those who do not see it; the output's plain text.

    Raises:
        TypeError: no figure.
        ValueError: the title, the label of an axis or ``alt`` is missing.
    """
    display_bundle(bundle(figure, alt))


def bundle(figure: Any, alt: str) -> dict[str, Any]:
    """What `show` displays; closes the figure."""
    figure = getattr(figure, "figure", figure)
    if not isinstance(figure, Figure):
        raise TypeError(f"show needs a matplotlib figure, got {type(figure).__name__}")
    if not isinstance(alt, str) or not alt.strip():
        raise ValueError("show needs alt: a sentence on what the figure shows")
    missing = missing_labels(figure)
    if missing:
        raise ValueError(f"the figure lacks {' and '.join(missing)}")
    image = base64.b64encode(png_bytes(figure)).decode()
    if "matplotlib.pyplot" in sys.modules:  # else nobody can have registered it
        sys.modules["matplotlib.pyplot"].close(figure)
    return {"image/png": image, "text/plain": " ".join(alt.split())}
