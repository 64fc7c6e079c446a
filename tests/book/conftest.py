"""The built book and a browser, shared by the tests of this folder."""

from __future__ import annotations

import importlib.util
import os
import pathlib
import shutil

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
FLAGS = (
    "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync"
).split()


def _missing(what: str) -> None:
    """Skip on a machine without the means, but never in CI: there the book must be looked at."""
    stop = pytest.fail if os.environ.get("CI") else pytest.skip
    stop(f"{what} is not installed, so nothing looks at the pages")


@pytest.fixture(scope="session")
def chromium():
    """A headless browser: the one that the system has, nothing is downloaded."""
    if importlib.util.find_spec("playwright") is None:
        _missing("playwright")
    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
    path = next(filter(None, map(shutil.which, names)), None)
    if path is None:
        _missing("chromium")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture(scope="session")
def book():
    """The folder of the built pages, made as `make book` makes them."""
    if importlib.util.find_spec("jupyter_book") is None:
        _missing("jupyter-book")
    spec = importlib.util.spec_from_file_location("book_build", ROOT / "book/build.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    out = ROOT / "build/book-tested"  # not where `make book` writes: both may run at once
    assert module.build(out=out) == 0, "the book does not build: its warnings are above"
    return out / "_build/html"
