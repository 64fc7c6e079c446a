"""The kernel report as a table: what the compiler made of each kernel, target by target."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence


class KernelCard:
    """Rows of the report card, shown as an HTML table, and as Markdown in plain text."""

    def __init__(self, rows: Sequence[Mapping[str, str]], title: str):
        self.title, self.rows = title, list(rows)
        self.columns = list(self.rows[0])

    def _repr_html_(self) -> str:
        head = "".join(f'<th scope="col">{html.escape(name)}</th>' for name in self.columns)
        body = "".join(
            "<tr>"
            + "".join(f"<td>{html.escape(str(cell))}</td>" for cell in row.values())
            + "</tr>"
            for row in self.rows
        )
        return (
            '<div class="kernel-card" style="overflow-x:auto"><table>'
            f"<caption>{html.escape(self.title)}</caption>"
            f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
        )

    def __repr__(self) -> str:
        lines = [self.columns, ["---"] * len(self.columns), *(row.values() for row in self.rows)]
        body = "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)
        return f"{self.title}\n\n{body}"


def kernel_card(
    module: str | None = None,
    *,
    targets: Sequence[str] | None = None,
    title: str = "What the compiler made of it (compiled offline)",
    rows: Sequence[Mapping[str, str]] | None = None,
) -> KernelCard:
    """The shipped report card as a table: the last expression of a cell.

    Args:
        module: a kernel module such as ``"flash_attention"``; by default all.
        targets: only these architectures, such as ``["sm_90"]``.
        title: the table's caption.
        rows: rows to show, all with the same columns, instead of
            `corelib.kernels.report.summary`.

    Raises:
        ValueError: no such module, or no row is left.
    """
    if rows is None:
        from ...kernels.report import summary

        rows = summary(module)
    chosen = [row for row in rows if targets is None or row["target"] in targets]
    if not chosen:
        known = sorted({row["target"] for row in rows})
        raise ValueError(f"no row is left for targets {targets}: there are {known}")
    return KernelCard(chosen, title)
