"""Execute labs in a fresh kernel and write their outputs, made small and stable.

    python labs/run_lab.py 002            one lab by its number (or several)
    python labs/run_lab.py all            every lab
    python labs/run_lab.py --check        say which committed labs are not in normal form

This is the only way that outputs are committed. A cell that raises, or that prints to stderr,
leaves the notebook as it was.
"""

from __future__ import annotations

import argparse
import base64
import os
import pathlib
import re
import sys
import time

for _name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ[_name] = "1"

import nbformat  # noqa: E402
from nbclient import NotebookClient  # noqa: E402
from nbclient.exceptions import CellExecutionError  # noqa: E402
from tqdm import tqdm  # noqa: E402

LABS = pathlib.Path(__file__).parent
README_PICTURE = LABS.parent / "book/_static/readme.png"
WIDGET = "application/vnd.jupyter.widget-view+json"
KERNEL = {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"}
LIMIT_BYTES = 600_000
# Where a person's or a build machine's own folders would show up in an output.
MACHINE_PATH = re.compile(r"(?<![\w.])/(?:root|home|tmp|Users|usr|opt|work)/[\w.-]+")


def find_labs(names: list[str]) -> list[pathlib.Path]:
    """Notebook paths for numbers, beginnings of names or ``all``."""
    every = sorted(p for p in LABS.rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts)
    if names == ["all"]:
        return every
    found = []
    for name in names:
        wanted = name if "_" in name else f"{name}_"  # 110 is not 1101
        matches = [path for path in every if path.stem.startswith(wanted) or path == LABS / name]
        if not matches:
            known = ", ".join(path.stem for path in every)
            raise SystemExit(f"no lab starts with {name!r}; there are: {known}")
        found += matches
    return found


def normalise(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """The same notebook without what changes from machine to machine or run to run.

    Widget views go (a trusted notebook would show "model not found"; without them it shows the
    slider that works in a static page), and so do timings and trust marks. An image's alternative
    text is copied from its text/plain to where the book's builder looks for it.
    """
    notebook.metadata = {"kernelspec": KERNEL, "language_info": {"name": "python"}}
    notebook.nbformat, notebook.nbformat_minor = 4, 5
    count = 0
    for index, cell in enumerate(notebook.cells):
        cell.id = f"cell-{index:03d}"
        kept = ("tags", "mystnb", "jupyter")
        cell.metadata = {name: cell.metadata[name] for name in kept if name in cell.metadata}
        if cell.cell_type != "code":
            continue
        cell.metadata.pop("mystnb", None)
        count += bool(cell.source.strip())
        cell.execution_count = count if cell.source.strip() else None
        cell.outputs = [out for out in cell.outputs if not _is_empty(out)]
        for output in cell.outputs:
            if "metadata" in output:
                output.metadata = {}
            if "execution_count" in output:
                output.execution_count = count
            if "data" in output:
                output.data.pop(WIDGET, None)
                if "image/png" in output.data:
                    alt = " ".join(output.data.get("text/plain", "").split())
                    cell.metadata["mystnb"] = {"image": {"alt": alt}}
    return notebook


def _is_empty(output: nbformat.NotebookNode) -> bool:
    """A widget's view alone, or what a progress bar left when it cleared itself."""
    data = {name: text for name, text in output.get("data", {"text": "-"}).items() if text}
    return set(data) <= {WIDGET}


def troubles(notebook: nbformat.NotebookNode) -> list[str]:
    """What an executed lab must not hold."""
    found = []
    for index, cell in enumerate(notebook.cells):
        for output in cell.get("outputs", []):
            if output.get("name") == "stderr":
                found.append(f"cell {index} prints to stderr: {output.text.strip()[:200]}")
            text = str(output.get("text", "")) + str(output.get("data", {}).get("text/plain", ""))
            if MACHINE_PATH.search(text):
                found.append(f"cell {index} shows a path: {MACHINE_PATH.search(text)[0]}")
            alt = cell.metadata.get("mystnb", {}).get("image", {}).get("alt", "")
            if "image/png" in output.get("data", {}) and (not alt or alt.startswith("<Figure")):
                found.append(f"cell {index} shows a figure without alternative text")
    return found


def run(path: pathlib.Path) -> None:
    """Execute ``path`` top to bottom and write it back in normal form."""
    notebook = nbformat.read(path, as_version=4)
    cells = sum(cell.cell_type == "code" for cell in notebook.cells)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    client = NotebookClient(
        notebook,
        timeout=300,
        kernel_name="python3",
        resources={"metadata": {"path": str(path.parent)}},
        record_timing=False,
        store_widget_state=False,
        extra_arguments=["--IPKernelApp.log_level=ERROR"],
    )
    start = time.perf_counter()
    with tqdm(total=cells, desc=path.stem, leave=False, disable=not sys.stderr.isatty()) as bar:
        client.on_cell_executed = lambda **_: bar.update()
        try:
            client.execute()
        except CellExecutionError as error:
            raise SystemExit(f"{path.name}: a cell failed, nothing was written\n{error}") from None
    seconds = time.perf_counter() - start
    notebook = normalise(notebook)
    if found := troubles(notebook):
        raise SystemExit(f"{path.name}: nothing was written\n  " + "\n  ".join(found))
    text = nbformat.writes(notebook) + "\n"
    path.write_text(text, encoding="utf-8")
    if picture := readme_picture(notebook):
        README_PICTURE.write_bytes(picture)
    size = len(text.encode())
    print(f"✓ {path.stem}: {cells} code cells, {seconds:.1f} s, {size / 1e3:.0f} kB", flush=True)
    if size > LIMIT_BYTES:
        print(f"  larger than the {LIMIT_BYTES / 1e3:.0f} kB a lab may have")


def readme_picture(notebook: nbformat.NotebookNode) -> bytes | None:
    """The figure of the cell tagged ``readme-picture``: README.md shows it."""
    for cell in notebook.cells:
        if "readme-picture" in cell.metadata.get("tags", []):
            for output in cell.outputs:
                if "image/png" in output.get("data", {}):
                    return base64.b64decode(output.data["image/png"])
    return None


def is_normal(path: pathlib.Path) -> bool:
    """Whether the committed file is what `normalise` would write."""
    text = path.read_text(encoding="utf-8")
    return text == nbformat.writes(normalise(nbformat.reads(text, as_version=4))) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("labs", nargs="*", help="numbers such as 002, or all")
    parser.add_argument("--check", action="store_true", help="only look, run nothing")
    arguments = parser.parse_args()
    if not arguments.labs and not arguments.check:
        parser.error("name a lab, for example 002, or all")
    paths = find_labs(arguments.labs or ["all"])
    if arguments.check:
        odd = [path.name for path in paths if not is_normal(path)]
        sys.exit(f"not in normal form, run run_lab.py on: {', '.join(odd)}" if odd else 0)
    for path in paths:
        run(path)


if __name__ == "__main__":
    main()
