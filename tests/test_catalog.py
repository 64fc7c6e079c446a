"""The catalog's rows, and how they are found and listed."""

from __future__ import annotations

import json
import pathlib
import subprocess
import sys

import pytest

from corelib import catalog
from corelib.catalog import KINDS, NoMatch, families, find, methods

ROOT = pathlib.Path(__file__).resolve().parent.parent


def test_there_are_209_numbered_rows():
    assert [m.number for m in methods()] == [f"{n:03d}" for n in range(1, 210)]


def test_what_names_a_row_is_unique_and_well_formed():
    rows = methods()
    assert len({m.slug for m in rows}) == len({m.title for m in rows}) == len(rows)
    ids = [m.arxiv for m in rows if m.arxiv]
    assert len(set(ids)) == len(ids)
    for m in rows:
        assert m.slug.isidentifier() and m.slug == m.slug.lower(), m
        assert m.kind in KINDS, m
        assert m.basis in ("read", "known", "secondary", "abstract"), m
        assert m.arxiv_checked in ("yes", "recalled", ""), m
        assert 2010 < m.year < 2030, m


def test_labs_are_named_by_part_and_number():
    for m in methods():
        for lab in (m.lab, *m.also):
            folder, _, name = lab.partition("/")
            number = name.partition("_")[0]
            part = folder.partition("_")[0]
            assert number.isdigit() and int(number) // 100 == int(part), (m.slug, lab)
            assert folder.partition("_")[2] in families(), (m.slug, lab)


def test_a_kernel_that_exists_is_spelled_as_its_file():
    planned = {kernel for m in methods() for kernel in m.kernels}
    built = {
        path.stem.removesuffix("_backward")
        for path in (ROOT / "kernels").glob("*.py")
        if "SPECIALISATIONS" in path.read_text(encoding="utf-8") and path.stem != "report"
    }
    assert built <= planned, "a kernel that no row of the catalog names"


def test_every_row_is_found_by_each_of_its_names():
    for m in methods():
        assert find(m.slug) is find(m.number) is find(int(m.number)) is find(m.title) is m
        assert find(m.slug.replace("_", "-").upper()) is m
        if m.arxiv:
            assert find(m.arxiv) is find(f"https://arxiv.org/abs/{m.arxiv}v2") is m


@pytest.mark.parametrize(
    ("text", "slug"),
    [
        ("lean attention", "lean_attention"),
        ("LeanAttention", "lean_attention"),
        ("decode-phase of transformers", "lean_attention"),
        ("MInference", "minference"),
        ("γ-MoD", "gamma_mod"),
        ("DeepSpeed Ulysses", "ulysses"),
        ("long convolution", "long_conv"),  # a plural in the title
        ("speculative decoding batch", "batch_spec"),  # words in any order
        ("infllm", "infllm"),  # the exact name wins over infllm_v2
        ("needle", "needle_threading"),
    ],
)
def test_words_find_the_one_row(text, slug):
    assert find(text).slug == slug


def test_unknown_words_bring_suggestions():
    with pytest.raises(
        NoMatch, match=r"no method matches 'leen atention'; closest: lean_attention"
    ):
        find("leen atention")
    with pytest.raises(ValueError, match="closest:"):
        find("zzz")
    with pytest.raises(LookupError, match="numbers end at 209"):
        find(999)


def test_ambiguous_words_list_the_candidates():
    with pytest.raises(NoMatch, match=r"methods match 'mamba': .*motion_mamba .*stuffed_mamba"):
        find("mamba")


@pytest.mark.no_shape_checks
def test_what_is_no_name_is_refused():
    with pytest.raises(ValueError, match="got nothing"):
        find("  ")
    with pytest.raises(TypeError, match="expected a string or an integer, got list"):
        find([172])
    with pytest.raises(TypeError, match="got bool"):
        find(True)


def test_methods_of_one_family():
    decoding = methods("decoding")
    assert len(decoding) == 19 and {m.family for m in decoding} == {"decoding"}
    assert sum(len(methods(family)) for family in families()) == 209
    with pytest.raises(ValueError, match="family: expected one of foundations.*got 'poetry'"):
        methods("poetry")


def test_load_imports_the_module():
    assert find("lean attention").load().__name__ == "corelib.foundations.lean_attention"


def test_load_says_that_a_method_is_not_built(monkeypatch):
    row = find("gamma_mod")
    monkeypatch.setitem(sys.modules, row.module, None)  # as if there were no such file
    with pytest.raises(ModuleNotFoundError, match=r"gamma_mod \(171.*not built yet; it will be"):
        row.load()


def test_load_passes_on_what_a_module_lacks(tmp_path, monkeypatch):
    import corelib.foundations as package

    (tmp_path / "lra.py").write_text("import a_library_that_nobody_has\n")
    monkeypatch.setattr(package, "__path__", [str(tmp_path)])
    monkeypatch.delitem(sys.modules, "corelib.foundations.lra", raising=False)
    with pytest.raises(ModuleNotFoundError, match="a_library_that_nobody_has"):
        find("lra").load()


@pytest.fixture
def recorded(monkeypatch):
    """Sets what the last full test run is taken to have found."""
    return lambda results: monkeypatch.setattr(catalog, "_results", lambda: results)


def test_works_is_what_was_recorded(recorded):
    row = find(172)
    recorded({"lean_attention": {"module": "ok", "tests": "ok"}})
    assert row.works and row.missing == []
    recorded({"lean_attention": {"module": "ok", "tests": "1 of 9 tests did not pass (x failed)"}})
    assert not row.works and row.missing == ["tests: 1 of 9 tests did not pass (x failed)"]
    recorded({})
    assert not row.works and "make test" in row.missing[0]


def test_shipped_results_have_every_row():
    shipped = json.loads((ROOT / "corelib/results.json").read_text(encoding="utf-8"))
    assert list(shipped) == [m.slug for m in methods()]
    for m in methods():
        if m.works:
            assert (ROOT / f"corelib/{m.family}/{m.slug}.py").exists(), m.slug
            assert (ROOT / f"labs/{m.lab}.ipynb").exists(), m.slug


def _printed(*arguments: str) -> str:
    command = [sys.executable, "-m", "corelib.catalog", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT).stdout


def test_command_prints_a_table_of_one_family():
    lines = _printed("serving").splitlines()
    assert lines[0].split() == ["no.", "slug", "title", "family", "kind", "works"]
    assert len(lines) == 2 + len(methods("serving"))
    assert lines[-1].endswith(f"of {len(methods('serving'))} work")


def test_command_prints_json_with_works_and_missing():
    rows = json.loads(_printed("--json"))
    assert len(rows) == 209
    lean = rows[171]
    row = find(172)
    assert (lean["slug"], lean["works"], lean["missing"]) == (row.slug, row.works, row.missing)
    columns = "number slug title arxiv arxiv_checked year family kind basis lab also kernels"
    assert list(lean) == [*columns.split(), "works", "missing"]


def test_command_refuses_an_unknown_family(capsys):
    with pytest.raises(SystemExit):
        catalog.main(["poetry"])
    assert "expected one of foundations" in capsys.readouterr().err
