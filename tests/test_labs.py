"""The lab runner's normal form, and that every committed lab keeps it."""

import importlib.util
import pathlib

import nbformat
import pytest
from nbformat import v4

ROOT = pathlib.Path(__file__).parent.parent
spec = importlib.util.spec_from_file_location("run_lab", ROOT / "labs/run_lab.py")
run_lab = importlib.util.module_from_spec(spec)
spec.loader.exec_module(run_lab)

LABS = run_lab.find_labs(["all"])


def test_a_number_chooses_one_lab():
    assert [path.stem[:4] for path in run_lab.find_labs(["110", "1101"])] == ["110_", "1101"]
    assert run_lab.find_labs(["001_start"]) == run_lab.find_labs(["001"])


def small_notebook(source: str) -> nbformat.NotebookNode:
    cells = [v4.new_markdown_cell("# A lab"), v4.new_code_cell(""), v4.new_code_cell(source)]
    return v4.new_notebook(cells=cells)


@pytest.mark.parametrize("path", LABS, ids=lambda path: path.stem)
def test_committed_labs_are_in_normal_form_and_clean(path):
    assert run_lab.is_normal(path), "run `make run-lab` on it"
    notebook = nbformat.read(path, as_version=4)
    assert run_lab.troubles(notebook) == []
    assert len(path.read_bytes()) <= run_lab.LIMIT_BYTES
    sources = [cell for cell in notebook.cells if cell.cell_type == "code" and cell.source]
    assert all(cell.execution_count for cell in sources), "a cell was never run"
    long = [cell.source for cell in sources if len(cell.source.splitlines()) > 30]
    assert not long, f"cells over 30 lines: {long[0][:80]}"


def test_normalising_strips_what_moves_and_keeps_the_rest():
    notebook = small_notebook("1")
    notebook.metadata["widgets"] = {"state": {}}
    figure = v4.new_output(
        "display_data",
        {"image/png": "AAAA", "text/plain": "A rising\n line", run_lab.WIDGET: {"model_id": "x"}},
        metadata={"needs_background": "light"},
    )
    cleared = v4.new_output("display_data", {"text/html": "", "text/plain": ""})
    widget_only = v4.new_output("display_data", {run_lab.WIDGET: {"model_id": "y"}})
    cell = notebook.cells[2]
    cell.outputs, cell.execution_count = [figure, cleared, widget_only], 17
    cell.metadata = {"trusted": True, "tags": ["hide-cell"], "execution": {"iopub": "12:00"}}
    run_lab.normalise(notebook)
    assert [set(out.data) for out in cell.outputs] == [{"image/png", "text/plain"}]
    assert cell.outputs[0].metadata == {}
    assert cell.execution_count == 1
    assert cell.metadata == {"tags": ["hide-cell"], "mystnb": {"image": {"alt": "A rising line"}}}
    assert "widgets" not in notebook.metadata
    before = nbformat.writes(notebook)
    assert nbformat.writes(run_lab.normalise(notebook)) == before


def test_troubles_names_paths_stderr_and_missing_alternative_text():
    notebook = small_notebook("1")
    notebook.cells[2].outputs = [
        v4.new_output("stream", name="stderr", text="a warning"),
        v4.new_output("stream", name="stdout", text="read /home/ann/data.txt"),
        v4.new_output("display_data", {"image/png": "AAAA", "text/plain": "<Figure size 640x480>"}),
    ]
    found = "\n".join(run_lab.troubles(run_lab.normalise(notebook)))
    assert "stderr" in found and "/home/ann" in found and "alternative text" in found


def test_a_failing_cell_leaves_the_file_alone(tmp_path):
    path = tmp_path / "900_broken.ipynb"
    nbformat.write(small_notebook("1 / 0"), path)
    before = path.read_text()
    with pytest.raises(SystemExit, match="ZeroDivisionError"):
        run_lab.run(path)
    assert path.read_text() == before


def test_an_unknown_lab_is_a_clear_error():
    with pytest.raises(SystemExit, match="no lab starts with '999'"):
        run_lab.find_labs(["999"])


def test_readme_shows_the_labs_own_picture():
    notebooks = [nbformat.read(path, as_version=4) for path in LABS]
    pictures = [picture for nb in notebooks if (picture := run_lab.readme_picture(nb))]
    assert pictures == [run_lab.README_PICTURE.read_bytes()]
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert str(run_lab.README_PICTURE.relative_to(ROOT)) in readme
