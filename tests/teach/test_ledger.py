"""The ledger is what the executed labs recorded, no more and no less."""

from __future__ import annotations

import json

import pytest

from corelib.teach import ledger_markdown
from corelib.teach.lab_contents import find_labs, read_lab
from corelib.teach.ledger import ledger, main

HOME = "00_foundations/002_softmax"
EVEN = {
    "slug": "lean_attention",
    "text": "Even | loads cost $5 <b>",
    "paper": "near 100 %",
    "source": "abstract",
    "scope": "8 requests",
    "ours": {"busy": 0.97123},
    "shown": True,
}
FAST = {**EVEN, "slug": "longvq", "text": "It is fast.", "shown": False, "not_shown": "needs a GPU"}


@pytest.fixture
def labs(tmp_path, made_lab):
    made_lab("02_linear_time/208_codebook", claims=[FAST])
    made_lab(HOME, claims=[EVEN])
    made_lab("00_foundations/.ipynb_checkpoints/002_softmax-checkpoint", claims=[EVEN, EVEN])
    return tmp_path / "labs"


def test_entries_follow_the_book_and_carry_the_catalog(labs):
    first, second = ledger(labs)
    assert (first["number"], first["lab"], first["not_shown"]) == ("172", HOME, None)
    assert first["ours"] == {"busy": 0.97123} and first["title"].startswith("Lean Attention")
    assert not first["reconstruction"] and second["reconstruction"]
    assert (second["shown"], second["not_shown"]) == (False, "needs a GPU")


def test_a_claim_of_no_method_is_an_error(labs, made_lab):
    made_lab(HOME, claims=[{**EVEN, "slug": "leen"}])
    with pytest.raises(ValueError, match=f"{HOME}: a claim of 'leen', not in the catalog"):
        ledger(labs)


def test_markdown_is_a_table_that_nothing_breaks(labs):
    lines = ledger_markdown(labs).splitlines()
    assert lines[0] == "Claims: 2 (methods: 2). Shown: 1. Not at this scale: 1."
    header, rule, first, second = lines[2:]
    bars = [line.replace(r"\|", "").count("|") for line in (header, rule, first, second)]
    assert bars == [7] * 4
    assert r"Even \| loads cost \$5 &lt;b&gt;" in first and "busy = 0.971" in first
    assert "our reconstruction" in second and "not at this scale: needs a GPU" in second


def test_markdown_of_no_claims_says_so(tmp_path):
    (tmp_path / "labs").mkdir()
    assert ledger_markdown(tmp_path / "labs") == "No lab has recorded a claim yet.\n"


def test_command_prints_blocks_and_json(labs, capsys):
    main(["--labs", str(labs)])
    text = capsys.readouterr().out
    assert "✓ 172 lean_attention" in text and "ours:  busy = 0.971 (8 requests)" in text
    assert "not at this scale: needs a GPU" in text
    main(["--labs", str(labs), "--json"])
    assert json.loads(capsys.readouterr().out) == ledger(labs)


def test_a_missing_folder_is_an_error(tmp_path, capsys):
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        ledger(tmp_path / "nowhere")
    with pytest.raises(SystemExit):
        main(["--labs", str(tmp_path / "nowhere")])
    assert "name one with --labs" in capsys.readouterr().err


def test_the_labs_that_ship_can_be_read():
    for entry in ledger():
        assert entry["text"] and entry["ours"] and isinstance(entry["shown"], bool)


def test_labs_come_in_the_order_of_the_book(labs):
    assert [path.stem for path in find_labs(labs)] == ["002_softmax", "208_codebook"]


def test_a_lab_is_read_from_its_file(labs, made_lab):
    tags = {"Derive": "derive-lean_attention"}
    lab = read_lab(made_lab(HOME, ["1 · Derive it", "Sightseeing", "Race"], [EVEN], tags))
    assert (lab.home, lab.number, lab.code_cells, lab.run) == (HOME, "002", 2, True)
    assert lab.headings == ("1 · Derive it", "Sightseeing", "Race")
    has = {
        name: lab.has_section(name, "lean_attention", True) for name in ("derive", "see", "race")
    }
    assert has == {"derive": True, "see": False, "race": True}
    assert not lab.has_section("race", "lean_attention", alone=False)


def test_a_lab_run_out_of_order_is_not_run(made_lab):
    path = made_lab(HOME, claims=[EVEN])
    path.write_text(path.read_text().replace('"execution_count": 2', '"execution_count": 7'))
    assert not read_lab(path).run


def test_what_is_no_notebook_is_refused(tmp_path):
    (tmp_path / "x.ipynb").write_text("[]")
    with pytest.raises(ValueError, match="x.ipynb is not a notebook"):
        read_lab(tmp_path / "x.ipynb")
