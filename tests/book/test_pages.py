"""The generators of the book's pages, without a build."""

from __future__ import annotations

import ast
import json
import pathlib
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def pages():
    """The package book/pages, imported as book/build.py does."""
    sys.path.insert(0, str(ROOT / "book"))
    try:
        import pages.api
        import pages.markdown
        import pages.pictures
        import pages.plan
    finally:
        sys.path.remove(str(ROOT / "book"))
    return pages


@pytest.fixture(scope="module")
def parts(pages):
    from corelib.catalog import methods

    return pages.plan.read_parts(ROOT / "book", ROOT / "labs", methods())


def test_every_paper_has_its_lab_in_the_plan(parts):
    from corelib.catalog import methods

    planned = [method.number for part in parts for lab in part.labs for method in lab.methods]
    assert sorted(planned) == [method.number for method in methods()]
    assert [part.number for part in parts] == list(range(13))


def test_prerequisites_come_first(parts):
    place = {part.folder: part.place for part in parts}
    assert len(set(place.values())) == len(parts), "two boxes of the map lie on each other"
    for part in parts:
        assert all(place[need][0] < part.place[0] for need in part.needs), part.folder


def test_a_lab_is_read_from_its_notebook(pages, tmp_path):
    text = "# A title\n\nTakes 30–40 minutes.\n\n**You will be able to**\n\n- do\n  $x$,\n- stop.\n"
    lab = {"cells": [{"cell_type": "markdown", "source": text.splitlines(keepends=True)}]}
    path = tmp_path / "00_foundations/002_a_name.ipynb"
    path.parent.mkdir()
    path.write_text(json.dumps(lab), encoding="utf-8")
    read = pages.plan.read_lab("00_foundations/002_a_name", tmp_path, [])
    assert (read.title, read.minutes, read.number) == ("A title", 40, "002")
    assert read.goals == ("do $x$", "stop")
    planned = pages.plan.read_lab("00_foundations/107_selective_scan_and_ssd", tmp_path, [])
    assert (planned.path, planned.title) == (None, "107 · Selective scan and SSD")


@pytest.mark.parametrize(
    ("docstring", "markdown"),
    [
        ("Cost O(L_k * D_v), `x` and ``y*z``.", r"Cost O(L\_k \* D\_v), `x` and `y*z`."),
        ("Raises:\n    ValueError: bad", "Raises:\n\n```text\nValueError: bad\n```"),
        ("* one\n  and more\n* two", "* one and more\n* two"),
        (">>> f(1)\n2", "```python\n>>> f(1)\n2\n```"),
        ("m    l    o\n1    2    3", "```text\nm    l    o\n1    2    3\n```"),
        ("| a | b |\n|---|---|\n| 1 | 2_ |", "| a | b |\n| --- | --- |\n| 1 | 2\\_ |"),
        ("    ```{include} x\n    ```", "````text\n```{include} x\n```\n````"),
    ],
)
def test_docstrings_become_markdown(pages, docstring, markdown):
    assert pages.markdown.from_docstring(docstring) == markdown


def test_signatures_keep_shapes_and_markers(pages):
    source = (
        'def f(q: Float[Tensor, "B H L D"], /, k, *, causal: bool, scale: float | None=None, '
        '**rest) -> Float[Tensor, "B H L V"]: ...'
    )
    written = pages.api.signature(ast.parse(source).body[0])
    assert ast.dump(ast.parse(written + ": ...")) == ast.dump(ast.parse(source))
    assert written.count("\n") == 8


def test_every_public_module_has_a_page(pages):
    modules = {module.name: module for module in pages.api.read_modules(ROOT)}
    assert {"corelib", "corelib.catalog", "corelib.kernels.flash_attention"} <= set(modules)
    assert not any("._" in name for name in modules)
    for module in modules.values():
        text = pages.api.module_page(module)
        assert all(f"{module.name}.{node.name}" in text for node in module.public())


def test_patterns_never_read_the_future(pages):
    for _, _, _, weight in pages.pictures.PATTERNS:
        drawn = [weight(i, j) for i in range(pages.pictures.SIZE) for j in range(i + 1)]
        assert 0 <= min(drawn) and max(drawn) == 1
        assert all(weight(i, i) == 1 for i in range(pages.pictures.SIZE))
