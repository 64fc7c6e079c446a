"""A claim holds or raises, and what held can be read back from the executed notebook."""

from __future__ import annotations

import json
import re

import nbformat
import pytest
import torch
from nbclient import NotebookClient

from corelib.catalog import find
from corelib.teach import ClaimFailed, claim
from corelib.teach.claims import card, values_line
from corelib.teach.lab_contents import read_lab

LEAN = dict(
    slug="lean_attention",
    text="Stream-K evens the load.",
    predicate=lambda values: values["busy"] > 0.9,
    values={"busy": 0.97},
    paper="near 100 %",
    source="abstract",
    scope="8 requests, modelled",
)


def made(**changes):
    return claim(**{**LEAN, **changes})


def test_a_claim_that_holds_prints_a_stable_line(capsys):
    made()
    made(values={"busy": 0.95})
    first, second = capsys.readouterr().out.splitlines()
    assert first == second == "claim ✓ lean_attention: Stream-K evens the load."


def test_a_claim_that_does_not_hold_raises(capsys):
    with pytest.raises(ClaimFailed, match=r"lean_attention: .* does not hold for busy = 0.5"):
        made(values={"busy": 0.5})
    assert capsys.readouterr().out == ""
    assert issubclass(ClaimFailed, AssertionError)


def test_a_claim_not_shown_needs_a_false_predicate(capsys):
    made(values={"busy": 0.5}, not_shown="needs a GPU with 108 processors")
    assert "✗ not shown at this scale" in capsys.readouterr().out
    with pytest.raises(ClaimFailed, match="now it shows .*Remove not_shown"):
        made(values={"busy": 0.97}, not_shown="needs a GPU with 108 processors")


@pytest.mark.parametrize("name", ["text", "paper", "source", "scope", "not_shown"])
@pytest.mark.parametrize("value", ["", "  ", 3])
def test_words_are_required(name, value):
    with pytest.raises(ValueError, match=f"{name}: expected some words"):
        made(**{name: value})


def test_an_unknown_method_is_refused():
    with pytest.raises(ValueError, match="slug: expected one of the catalog's, got 'leen'"):
        made(slug="leen")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), {1, 2}, None, object()])
def test_values_that_json_cannot_hold_are_refused(value):
    with pytest.raises(ValueError, match="values: 'odd' is"):
        made(values={"busy": 0.97, "odd": value})


def test_no_values_are_refused():
    with pytest.raises(ValueError, match="values: expected what was measured"):
        made(values={})


def test_a_predicate_may_be_of_tensors():
    made(values={"busy": torch.tensor(0.97)})
    with pytest.raises(ClaimFailed, match="busy = 0.5"):
        made(values={"busy": torch.tensor(0.5)})


def test_values_are_written_short():
    values = {"ratio": 3.14159, "tokens": 32768, "seconds": 12345.6, "fits": True, "on": "CPU"}
    line = "ratio = 3.14, tokens = 32,768, seconds = 12,346, fits = True, on = CPU"
    assert values_line(values) == line
    assert values_line({"a": [1, 0.5], "b": {"c": 2}}) == "a = [1, 0.5], b = (c = 2)"


def record(**changes):
    words = {"paper": "1 < 2", "source": "abstract", "scope": "ours"}
    base = {"slug": "lean_attention", "text": "<b>&", "ours": {"x": 1.0}, "shown": True}
    return {**base, **words, **changes}


def test_the_card_escapes_and_says_what_it_is():
    page = card(record(), find(172))
    assert "&lt;b&gt;&amp;" in page and "1 &lt; 2" in page and "<b>" not in page
    assert "✓ Claim" in page and "lean_attention (172)" in page and "reconstruction" not in page
    hidden = card(record(shown=False, not_shown="needs a GPU"), find(172))
    assert "✗ Claim, not shown at this scale" in hidden and "needs a GPU" in hidden


def test_the_card_says_what_was_built_from_an_abstract():
    assert find(3).basis == "abstract"
    assert "our reconstruction" in card(record(), find(3))


CELL = """\
from corelib.teach import claim
claim("lean_attention", "It is even.", lambda v: v["busy"] > 0.9, {"busy": 0.97, "lengths": [1, 2]},
      paper="near 100 %", source="abstract", scope="8 requests")
claim("lean_attention", "It is fast.", lambda v: v["ratio"] > 2, {"ratio": 0.5},
      paper="2.6x", source="abstract", scope="CPU", not_shown="needs a GPU")"""


def test_claims_are_read_back_from_an_executed_notebook(tmp_path):
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(CELL)])
    NotebookClient(notebook, kernel_name="python3", timeout=120).execute()
    path = tmp_path / "099_made_up.ipynb"
    nbformat.validate(notebook)
    nbformat.write(notebook, path)
    lab = read_lab(path)
    assert lab.run and lab.errors == () and lab.code_cells == 1
    even, fast = lab.claims_of("lean_attention")
    assert even["ours"] == {"busy": 0.97, "lengths": [1, 2]} and even["shown"]
    assert fast["not_shown"] == "needs a GPU" and not fast["shown"]
    shown = json.loads(path.read_text())["cells"][0]["outputs"]
    assert [out["output_type"] for out in shown] == ["display_data"] * 2
    html = "".join(shown[0]["data"]["text/html"])
    assert "It is even." in html and not re.search(r"<script|https?://", html)
