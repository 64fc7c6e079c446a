"""The kernel report as a table: what the compiler made of each kernel, target by target."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence


class KernelCard:
    """Rows of the report card, shown as HTML tables, and as Markdown in plain text.

    ``races``: what was timed on real devices, a second table where there is something.
    """

    def __init__(
        self,
        rows: Sequence[Mapping[str, str]],
        title: str,
        races: Sequence[Mapping[str, str]] = (),
    ):
        self.title, self.rows, self.races = title, list(rows), list(races)
        self.columns = list(self.rows[0])

    def _tables(self) -> list[tuple[str, list[Mapping[str, str]]]]:
        tables = [(self.title, self.rows)]
        return tables + ([("Raced on a GPU", self.races)] if self.races else [])

    def _repr_html_(self) -> str:
        return "".join(_html_table(*table) for table in self._tables())

    def __repr__(self) -> str:
        return "\n\n".join(_markdown_table(*table) for table in self._tables())


def _html_table(title: str, rows: list[Mapping[str, str]]) -> str:
    head = "".join(f'<th scope="col">{html.escape(name)}</th>' for name in rows[0])
    body = "".join(
        "<tr>" + "".join(f"<td>{html.escape(str(cell))}</td>" for cell in row.values()) + "</tr>"
        for row in rows
    )
    return (
        '<div class="kernel-card" style="overflow-x:auto;white-space:nowrap"><table>'
        f"<caption>{html.escape(title)}</caption>"
        f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def _markdown_table(title: str, rows: list[Mapping[str, str]]) -> str:
    lines = [list(rows[0]), ["---"] * len(rows[0]), *(row.values() for row in rows)]
    body = "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)
    return f"{title}\n\n{body}"


def kernel_card(
    module: str | None = None,
    *,
    targets: Sequence[str] | None = None,
    title: str = "What the compiler made of it (compiled offline)",
    rows: Sequence[Mapping[str, str]] | None = None,
) -> KernelCard:
    """The shipped report card as a table: the last expression of a cell.

    Of one module, the races that were held on GPUs follow in a table of their own.

    Args:
        module: a kernel module such as ``"flash_attention"``; by default all.
        targets: only these architectures, such as ``["sm_90"]``.
        title: the table's caption.
        rows: rows to show, all with the same columns, instead of
            `corelib.kernels.report.summary`.

    Raises:
        ValueError: no such module, or no row is left.
    """
    raced: Sequence[Mapping[str, str]] = ()
    if rows is None:
        from ...kernels.report import races, summary

        rows, raced = summary(module), races(module) if module else ()
    chosen = [row for row in rows if targets is None or row["target"] in targets]
    if not chosen:
        known = sorted({row["target"] for row in rows})
        raise ValueError(f"no row is left for targets {targets}: there are {known}")
    return KernelCard(chosen, title, raced)
