"""Progress of work that takes more than a moment, shown only while it runs.

In a notebook the bar is an HTML element that is emptied at the end, in a terminal it is tqdm's;
elsewhere (tests, pipes) nothing is shown. Nothing is written to a notebook's stderr.
"""

from __future__ import annotations

import html
import os
import sys
import time
from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

Item = TypeVar("Item")

PATIENCE = 2.0  # seconds: shorter work needs no bar
INTERVAL = 0.2  # seconds between two updates


def progress(items: Iterable[Item], label: str, total: int | None = None) -> Iterator[Item]:
    """Yield ``items``; from two seconds on show how far we are.

    Args:
        items: what to go through.
        label: what is being done, in a word or two.
        total: how many there are, where ``len(items)`` does not say.
    """
    if total is None and hasattr(items, "__len__"):
        total = len(items)  # type: ignore[arg-type]
    bar = _bar(label, total)
    try:
        for done, item in enumerate(items):
            bar.update(done)
            yield item
    finally:
        bar.close()


class _Silent:
    def update(self, done: int) -> None: ...

    def close(self) -> None: ...


class _Terminal(_Silent):
    def __init__(self, label: str, total: int | None):
        from tqdm import tqdm

        self.bar = tqdm(total=total, desc=label, leave=False, delay=PATIENCE)

    def update(self, done: int) -> None:
        self.bar.update(done - self.bar.n)

    def close(self) -> None:
        self.bar.close()


class _Notebook(_Silent):
    """A display that is updated in place; emptied, it leaves nothing to see behind."""

    def __init__(self, label: str, total: int | None):
        self.label, self.total = label, total
        self.start = self.last = time.monotonic()
        self.handle: Any = None

    def update(self, done: int) -> None:
        now = time.monotonic()
        if now - self.start < PATIENCE or (self.handle and now - self.last < INTERVAL):
            return
        self.last = now
        self._show(done)

    def _show(self, done: int) -> None:
        from IPython.display import DisplayHandle

        bundle = {"text/html": self._html(done), "text/plain": ""}
        if self.handle is None:
            self.handle = DisplayHandle()
            self.handle.display(bundle, raw=True)
        else:
            self.handle.update(bundle, raw=True)

    def _html(self, done: int) -> str:
        label = html.escape(self.label)
        if self.total:
            bar = f"<progress value='{done}' max='{self.total}'></progress> {done}/{self.total}"
        else:
            bar = f"<progress></progress> {done}"
        return f"<div class='progress-note'><label>{label} {bar}</label></div>"

    def close(self) -> None:
        if self.handle is not None:
            self.handle.update({"text/html": "", "text/plain": ""}, raw=True)


def _bar(label: str, total: int | None) -> _Silent:
    if "PYTEST_CURRENT_TEST" in os.environ:
        return _Silent()
    shell = sys.modules["IPython"].get_ipython() if "IPython" in sys.modules else None
    if shell is not None and hasattr(shell, "kernel"):
        return _Notebook(label, total)
    if sys.stderr is not None and sys.stderr.isatty():
        try:
            return _Terminal(label, total)
        except ImportError:  # tqdm comes with the labs extra only
            pass
    return _Silent()
