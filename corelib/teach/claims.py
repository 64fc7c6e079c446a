"""Claims: what a paper says, as a predicate over what the lab just measured.

A claim that holds shows a card and leaves a record in the cell's output; the ledger
(`corelib.teach.ledger`) and the catalog's results read these records from the executed labs. A
claim that does not hold raises. A claim that cannot show at the size of a lab is recorded as such,
with the reason and the scale it would need.
"""

from __future__ import annotations

import html
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ..catalog import Method, methods
from .lab_contents import CLAIM_MIME

STYLE = (
    "border: 1px solid currentColor; border-left: 6px solid {colour}; border-radius: 4px; "
    "padding: .5em .9em; margin: .3em 0; max-width: 46em; overflow-wrap: anywhere"
)
# A blue and an orange that are told apart by every kind of colour vision, on light and on dark.
SHOWN, NOT_SHOWN = "#0072b2", "#d55e00"


class ClaimFailed(AssertionError):
    """What was measured does not bear the claim out (or now bears out one marked as not shown)."""


def claim(
    slug: str,
    text: str,
    predicate: Callable[[Mapping[str, Any]], bool],
    values: Mapping[str, Any],
    paper: str,
    source: str,
    scope: str,
    *,
    not_shown: str | None = None,
) -> None:
    """Hold what was measured against what a paper claims, and record it.

    >>> claim(
    ...     "lean_attention", "Stream-K keeps every processor busy whatever the lengths are.",
    ...     lambda v: v["busy"] > 0.95, {"busy": 0.97},
    ...     paper="near 100 % occupancy", source="abstract", scope="schedule of 8 requests, CPU",
    ... )

    Args:
        slug: the method, by its slug in the catalog.
        text: the claim in one sentence.
        predicate: called with ``values``; whether they bear the claim out.
        values: name -> what was measured: numbers, strings, or lists and mappings of these.
        paper: the paper's own figure or words.
        source: where the paper says it: abstract, a table, a section, the released code.
        scope: what ours was measured on: size, data, machine.
        not_shown: for a claim that does not show here: the reason, and the scale it would need.
            The predicate must then be false.

    Raises:
        ClaimFailed: the predicate is false, or true although ``not_shown`` says otherwise.
        ValueError: no such method, an empty text, or values that cannot be recorded.
    """
    method = _method(slug)
    words = {"text": text, "paper": paper, "source": source, "scope": scope}
    if not_shown is not None:
        words["not_shown"] = not_shown
    for name, value in words.items():
        if not isinstance(value, str) or not value.strip():
            raise ValueError(f"{name}: expected some words, got {value!r}")
    if not values:
        raise ValueError("values: expected what was measured, got nothing")
    holds = bool(predicate(values))
    ours = {str(name): _plain(name, value) for name, value in values.items()}
    if holds == (not_shown is not None):
        raise ClaimFailed(_failure(slug, text, ours, holds))
    record = {"slug": slug, **words, "ours": ours, "shown": holds}
    _display(record, method)


def _method(slug: str) -> Method:
    for method in methods():
        if method.slug == slug:
            return method
    raise ValueError(f"slug: expected one of the catalog's, got {slug!r}")


def _failure(slug: str, text: str, ours: dict, holds: bool) -> str:
    if holds:
        return (
            f"{slug}: {text!r} is marked as not shown, and now it shows ({values_line(ours)}). "
            "Remove not_shown."
        )
    return f"{slug}: {text!r} does not hold for {values_line(ours)}"


def _plain(name: str, value: Any) -> Any:
    """``value`` as JSON can hold it."""
    if hasattr(value, "tolist"):  # a tensor, an array or one of their scalars
        value = value.tolist()
    if isinstance(value, Mapping):
        return {str(key): _plain(name, item) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, (str, bytes)):
        return [_plain(name, item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"values: {name!r} is {value}, expected a finite number")
    if not isinstance(value, (str, bool, int, float)):
        raise ValueError(
            f"values: {name!r} is a {type(value).__name__}, expected a number, a string, "
            "or a list or mapping of these"
        )
    return value


def values_line(values: Mapping[str, Any]) -> str:
    """``{"ratio": 3.14159}`` as ``ratio = 3.14``."""
    return ", ".join(f"{name} = {_short(value)}" for name, value in values.items())


def _short(value: Any) -> str:
    if isinstance(value, Mapping):
        return "(" + values_line(value) + ")"
    if isinstance(value, list):
        return "[" + ", ".join(map(_short, value)) + "]"
    if isinstance(value, float):
        return f"{value:,.0f}" if 1000 <= abs(value) < 1e9 else f"{value:.3g}"
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return str(value)


def _display(record: dict, method: Method) -> None:
    """Show the card; in a notebook the output also carries the record."""
    mark = "✓" if record["shown"] else "✗ not shown at this scale"
    line = f"claim {mark} {record['slug']}: {record['text']}"
    try:
        from IPython import get_ipython
        from IPython.display import display
    except ImportError:
        get_ipython = display = None
    if get_ipython is None or get_ipython() is None:
        print(line)
        return
    display({"text/plain": line, "text/html": card(record, method), CLAIM_MIME: record}, raw=True)


def card(record: dict, method: Method) -> str:
    """The claim as a small piece of HTML that reads on light and dark pages."""
    shown = record["shown"]
    rows = [("The paper", f"{record['paper']} ({record['source']})")]
    rows += [("Ours", f"{values_line(record['ours'])} ({record['scope']})")]
    if not shown:
        rows += [("Not shown here", record["not_shown"])]
    if method.basis == "abstract":
        rows += [("Basis", "the abstract only: our reconstruction")]
    listed = "".join(
        f"<div><strong>{name}:</strong> {html.escape(text)}</div>" for name, text in rows
    )
    head = "✓ Claim" if shown else "✗ Claim, not shown at this scale"
    return (
        f'<div class="longseq-claim" style="{STYLE.format(colour=SHOWN if shown else NOT_SHOWN)}">'
        f"<div><strong>{head}</strong> · {html.escape(method.slug)} ({method.number})</div>"
        f"<div><em>{html.escape(record['text'])}</em></div>{listed}</div>"
    )
