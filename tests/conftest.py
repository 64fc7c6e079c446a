"""Fixtures that several folders of tests share."""

from __future__ import annotations

import importlib.util
import json
import os
import pathlib

import pytest

CLAIM_MIME = "application/vnd.longseq.claim+json"


@pytest.fixture
def made_lab(tmp_path):
    """Writes an executed lab below ``tmp_path/labs`` and returns its path.

    ``made_lab(home, headings, claims, tags)``: ``tags`` maps a heading to its cell's tag.
    """

    def write(home, headings=("Derive", "See", "Race"), claims=(), tags=None):
        cells = [_markdown(f"## {name}", (tags or {}).get(name)) for name in headings]
        cells.append(_code(1, []))
        for number, claim in enumerate(claims, 2):
            data = {"text/plain": "claim", CLAIM_MIME: claim}
            output = {"output_type": "display_data", "data": data, "metadata": {}}
            cells.append(_code(number, [output]))
        path = tmp_path / "labs" / f"{home}.ipynb"
        path.parent.mkdir(parents=True, exist_ok=True)
        book = {"cells": cells, "metadata": {}, "nbformat": 4, "nbformat_minor": 5}
        path.write_text(json.dumps(book), encoding="utf-8")
        return path

    return write


@pytest.fixture
def fla_naive():
    """``fla_naive(op, name)``: a function of fla's naive references.

    Their file is loaded by itself: the package wants Triton.
    """
    package = importlib.util.find_spec("fla")
    if package is None:
        stop = pytest.fail if os.environ.get("CI") else pytest.skip
        stop("fla-core is not installed")  # in CI an oracle may not go missing
    from corelib.kernels.gates.interpreter import load_file

    ops = pathlib.Path(package.origin).parent / "ops"
    return lambda op, name: getattr(load_file(str(ops / op / "naive.py")), name)


def _markdown(source, tag):
    metadata = {"tags": [tag]} if tag else {}
    return {"cell_type": "markdown", "metadata": metadata, "source": [source]}


def _code(number, outputs):
    return {
        "cell_type": "code",
        "metadata": {},
        "execution_count": number,
        "source": ["1 + 1"],
        "outputs": outputs,
    }
