"""Small helpers that write Markdown: escaping, links between pages, docstrings."""

from __future__ import annotations

import posixpath
import re

_SPECIAL = re.compile(r"([\\`*_{}\[\]<>#$|~^])")
_LIST_ITEM = re.compile(r"(?:[*+-]|\d+\.) +")


def escape(text: str) -> str:
    """``text`` as Markdown that shows exactly these characters."""
    return _SPECIAL.sub(r"\\\1", text)


def link(text: str, document: str, *, here: str) -> str:
    """A link from the page ``here`` to another page of the book, both named without suffix."""
    target = posixpath.relpath(document, posixpath.dirname(here) or ".")
    return f"[{text}]({target}.{'ipynb' if document.startswith('labs/') else 'md'})"


def fence(text: str, language: str = "text") -> str:
    """A code block whose fence is longer than any run of backticks inside."""
    longest = max((len(run) for run in re.findall(r"`{3,}", text)), default=2)
    ticks = "`" * (longest + 1)
    return f"{ticks}{language}\n{text}\n{ticks}"


def from_docstring(text: str) -> str:
    """A docstring's paragraphs and lists as Markdown; whatever is laid out by hand, as it is.

    Docstrings here are plain text, written for the terminal. Nothing in them can break the book:
    what is no paragraph, list or example is shown in fixed width, and all else is escaped.
    """
    written = [_block(block) for block in re.split(r"\n[ \t]*\n", text.strip("\n"))]
    return "\n\n".join(part for part in written if part)


def _block(block: str) -> str:
    lines = block.split("\n")
    if lines[0].lstrip().startswith(">>>"):
        return fence(_dedent(lines), "python")
    if _LIST_ITEM.match(lines[0]):
        return _list(lines)
    if len(lines) > 2 and all(line.lstrip().startswith("|") for line in lines):
        return _table(lines)
    head = [line for line in lines if not line.startswith((" ", "\t"))]
    if head == lines and not any(re.search(r"\S {3,}\S", line) for line in lines):
        return _inline(" ".join(lines))
    if len(head) == 1 and lines[0] == head[0] and head[0].endswith(":"):
        return f"{_inline(lines[0])}\n\n{fence(_dedent(lines[1:]))}"
    return fence(_dedent(lines))


def _table(lines: list[str]) -> str:
    """A table drawn with bars; its second line is the rule below the heads."""
    rows = [
        [_inline(cell.strip()) for cell in line.strip().strip("|").split("|")] for line in lines
    ]
    rows[1] = ["---"] * len(rows[0])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _list(lines: list[str]) -> str:
    items: list[str] = []
    for line in lines:
        if marker := _LIST_ITEM.match(line):
            items.append(line[marker.end() :])
        else:
            items[-1] += " " + line.strip()
    return "\n".join(f"* {_inline(item)}" for item in items)


def _dedent(lines: list[str]) -> str:
    margin = min((len(line) - len(line.lstrip()) for line in lines if line.strip()), default=0)
    return "\n".join(line[margin:].rstrip() for line in lines)


def _inline(text: str) -> str:
    """Escape prose but keep what stands between backticks as code."""
    if text.endswith("::"):
        text = text[:-1]
    pieces = re.split(r"(``[^`]+``|`[^`]+`)", text)
    return "".join(
        f"`{piece.strip('`')}`" if index % 2 else escape(piece)
        for index, piece in enumerate(pieces)
    )
