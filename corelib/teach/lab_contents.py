"""What an executed lab holds, read from the notebook file: sections, claims, errors.

Plain JSON reading: nothing is run and no notebook library is needed, so that the ledger, the
catalog's results and the book can all look into a lab.
"""

from __future__ import annotations

import json
import pathlib
import re
from dataclasses import dataclass, field

#: The MIME type under which `corelib.teach.claim` leaves its record in a cell's output.
CLAIM_MIME = "application/vnd.longseq.claim+json"
#: The parts of a lab that a method must have.
SECTIONS = ("derive", "see", "race")
CHECKPOINTS = ".ipynb_checkpoints"


@dataclass(frozen=True)
class Lab:
    """One notebook.

    Attributes:
        path: the file.
        code_cells: how many code cells there are (nbval makes a test of each).
        run: every code cell with something in it was executed, in order, top to bottom.
        errors: names of the exceptions that stand in outputs.
        headings: the text of every Markdown heading.
        tags: every cell tag.
        claims: the records that `corelib.teach.claim` left in the outputs.
    """

    path: pathlib.Path
    code_cells: int
    run: bool
    errors: tuple[str, ...] = ()
    headings: tuple[str, ...] = ()
    tags: frozenset[str] = frozenset()
    claims: tuple[dict, ...] = field(default=())

    @property
    def number(self) -> str:
        """``002`` of ``002_softmax_as_a_reduction.ipynb``."""
        return self.path.stem.partition("_")[0]

    @property
    def home(self) -> str:
        """As the catalog's ``lab`` column names it: folder and name without the ending."""
        return f"{self.path.parent.name}/{self.path.stem}"

    def has_section(self, name: str, slug: str, alone: bool) -> bool:
        """Whether the lab has section ``name`` for the method ``slug``.

        A lab of several methods says whose a section is by the cell tag ``<name>-<slug>``, on the
        Markdown cell with the heading. In a lab of one method (``alone``) the heading is enough.
        """
        if f"{name}-{slug}" in self.tags:
            return True
        word = re.compile(rf"\b{name.capitalize()}\b")
        return alone and any(word.search(heading) for heading in self.headings)

    def claims_of(self, slug: str) -> list[dict]:
        return [claim for claim in self.claims if claim.get("slug") == slug]


def find_labs(labs_dir: str | pathlib.Path) -> list[pathlib.Path]:
    """Every notebook below ``labs_dir``, in the order of the book.

    Raises:
        FileNotFoundError: there is no such folder.
    """
    folder = pathlib.Path(labs_dir)
    if not folder.is_dir():
        raise FileNotFoundError(f"labs_dir: there is no folder {folder}")
    found = (p for p in folder.rglob("*.ipynb") if CHECKPOINTS not in p.parts)
    return sorted(found, key=lambda path: (path.parent.name, path.stem))


def read_lab(path: str | pathlib.Path) -> Lab:
    """Read one notebook.

    Raises:
        ValueError: the file is not a notebook.
    """
    path = pathlib.Path(path)
    try:
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path.name} is not a notebook: {error}") from error
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    counts = [cell.get("execution_count") for cell in code if _text(cell["source"]).strip()]
    prose = "\n".join(_text(c["source"]) for c in cells if c["cell_type"] == "markdown")
    outputs = [output for cell in code for output in cell.get("outputs", [])]
    bundles = [output.get("data", {}) for output in outputs]
    return Lab(
        path=path,
        code_cells=len(code),
        run=counts == list(range(1, len(counts) + 1)),
        errors=tuple(out.get("ename", "error") for out in outputs if _is_error(out)),
        headings=tuple(re.findall(r"^#+[ \t]+(.+?)[ \t]*$", prose, re.MULTILINE)),
        tags=frozenset(t for c in cells for t in c.get("metadata", {}).get("tags", [])),
        claims=tuple(bundle[CLAIM_MIME] for bundle in bundles if CLAIM_MIME in bundle),
    )


def _is_error(output: dict) -> bool:
    return output.get("output_type") == "error"


def _text(source: str | list[str]) -> str:
    return source if isinstance(source, str) else "".join(source)
