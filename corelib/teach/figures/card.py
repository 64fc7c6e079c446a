"""The kernel report as a table: what the compiler made of each kernel, target by target."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from typing import Any

COLUMNS = (
    "kernel",
    "direction",
    "target",
    "registers",
    "spills",
    "shared memory",
    "occupancy",
    "matrix instructions",
    "status",
)


class KernelCard:
    """Rows of the kernel report, shown as an HTML table and as Markdown in plain text."""

    def __init__(self, rows: Sequence[Mapping[str, Any]], title: str):
        self.title = title
        self.cells = [_cells(row) for row in rows]

    def _repr_html_(self) -> str:
        head = "".join(f'<th scope="col">{column}</th>' for column in COLUMNS)
        body = "".join(
            "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in cells) + "</tr>"
            for cells in self.cells
        )
        return (
            '<div class="kernel-card" style="overflow-x:auto"><table>'
            f"<caption>{html.escape(self.title)}</caption>"
            f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
        )

    def __repr__(self) -> str:
        lines = [" | ".join(COLUMNS), " | ".join("---" for _ in COLUMNS)]
        lines += [" | ".join(cells) for cells in self.cells]
        return "\n".join([self.title, "", *(f"| {line} |" for line in lines)])


def kernel_card(
    rows: Sequence[Mapping[str, Any]],
    *,
    title: str = "What the compiler made of it",
    kernel: str | None = None,
    targets: Sequence[str] | None = None,
) -> KernelCard:
    """The report's rows as a table, the last expression of a cell.

    Args:
        rows: of ``corelib.kernels.report``.
        title: the table's caption.
        kernel: only rows of the kernels whose name or module contains this.
        targets: only these architectures.

    Raises:
        ValueError: no row is left.
    """
    chosen = [
        row
        for row in rows
        if (kernel is None or kernel in f"{row.get('module', '')} {row.get('kernel', '')}")
        and (targets is None or row.get("target") in targets)
    ]
    if not chosen:
        known = sorted({str(row.get("kernel")) for row in rows})
        raise ValueError(f"no row for kernel {kernel!r} and targets {targets}: there are {known}")
    return KernelCard(chosen, title)


def _cells(row: Mapping[str, Any]) -> list[str]:
    """The texts of one row; a dash where the report says nothing."""
    label = row.get("label")
    name = f"{row.get('kernel', '–')} ({label})" if label else str(row.get("kernel", "–"))
    instructions = row.get("matrix_instructions")
    if isinstance(instructions, Mapping):
        instructions = ", ".join(f"{count} {name}" for name, count in instructions.items())
    occupancy = row.get("occupancy")
    shared = row.get("shared")
    return [
        name,
        str(row.get("direction", "–")),
        str(row.get("target", "–")),
        str(row.get("registers", "–")),
        "–" if row.get("spills") is None else f"{row['spills']} B" if row["spills"] else "none",
        "–" if shared is None else f"{shared / 1024:.0f} KiB",
        "–" if occupancy is None else f"{occupancy:.0%}",
        instructions or ("none" if row.get("dots") else "no dot in it"),
        str(row.get("status") or "; ".join(row.get("problems") or ()) or "–"),
    ]
