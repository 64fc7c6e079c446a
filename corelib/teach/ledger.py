"""The ledger: every claim of every executed lab, the paper's figure beside ours.

``python -m corelib.teach.ledger [--json]`` prints it; the book has it as a page.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import re

from ..catalog import methods
from .claims import values_line
from .lab_contents import find_labs, read_lab

#: Where the labs are in a checkout. An installed wheel has none and needs ``labs_dir``.
LABS = pathlib.Path(__file__).resolve().parents[2] / "labs"
COLUMNS = ("method", "claim", "the paper", "ours", "scope", "shows")


def ledger(labs_dir: str | pathlib.Path | None = None) -> list[dict]:
    """The claims recorded in the executed labs, in the order of the book.

    Each is a dictionary with ``number``, ``slug``, ``title``, ``lab``, ``text``, ``paper``,
    ``source``, ``ours`` (name -> measured value), ``scope``, ``shown``, ``not_shown`` (why not,
    and the scale it would need; None where it shows) and ``reconstruction`` (whether what was
    measured was built from the paper's abstract only).

    Raises:
        FileNotFoundError: there is no folder of labs.
        ValueError: a lab holds a claim of a method that the catalog does not know.
    """
    rows = {method.slug: method for method in methods()}
    entries = []
    for path in find_labs(LABS if labs_dir is None else labs_dir):
        lab = read_lab(path)
        for record in lab.claims:
            if record["slug"] not in rows:
                raise ValueError(f"{lab.home}: a claim of {record['slug']!r}, not in the catalog")
            method = rows[record["slug"]]
            facts = {"number": method.number, "title": method.title, "lab": lab.home}
            built = {"reconstruction": method.basis == "abstract"}
            entries.append({"not_shown": None, **record, **facts, **built})
    return entries


def _cells(entry: dict) -> tuple[str, ...]:
    """What the columns show of one entry."""
    name = f"{entry['number']} {entry['slug']}"
    if entry["reconstruction"]:
        name += " (our reconstruction)"
    paper = f"{entry['paper']} ({entry['source']})"
    shows = "yes" if entry["shown"] else f"not at this scale: {entry['not_shown']}"
    return name, entry["text"], paper, values_line(entry["ours"]), entry["scope"], shows


def ledger_markdown(labs_dir: str | pathlib.Path | None = None) -> str:
    """The ledger as a Markdown table, with a sentence that counts."""
    entries = ledger(labs_dir)
    if not entries:
        return "No lab has recorded a claim yet.\n"
    lines = ["| " + " | ".join(COLUMNS) + " |", "|" + "---|" * len(COLUMNS)]
    lines += ["| " + " | ".join(map(_escape, _cells(entry))) + " |" for entry in entries]
    return f"{summary(entries)}\n\n" + "\n".join(lines) + "\n"


def summary(entries: list[dict]) -> str:
    """How many claims of how many methods show."""
    shown = sum(entry["shown"] for entry in entries)
    count = len({entry["slug"] for entry in entries})
    hidden = len(entries) - shown
    return (
        f"Claims: {len(entries)} (methods: {count}). Shown: {shown}. Not at this scale: {hidden}."
    )


def _escape(text: str) -> str:
    """Text that Markdown, HTML and MyST's formulas leave as it is, on one line."""
    text = " ".join(text.split()).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\`*_\[\]{}$|~^#])", r"\\\1", text)


def ledger_text(entries: list[dict]) -> str:
    """The ledger for a terminal: a block per claim."""
    blocks = []
    for entry in entries:
        name, claim, paper, ours, scope, shows = _cells(entry)
        mark = "✓" if entry["shown"] else "✗"
        lines = [f"{mark} {name}: {claim}", f"  paper: {paper}", f"  ours:  {ours} ({scope})"]
        blocks.append("\n".join(lines if entry["shown"] else [*lines, f"  {shows}"]))
    return "\n".join([*blocks, summary(entries)])


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m corelib.teach.ledger", description="Every claim of every executed lab."
    )
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--labs", help="the folder of labs (default: this checkout's)")
    chosen = parser.parse_args(arguments)
    try:
        entries = ledger(chosen.labs)
    except FileNotFoundError as error:
        parser.error(f"{error}; name one with --labs")
    print(
        json.dumps(entries, indent=1, ensure_ascii=False) if chosen.json else ledger_text(entries)
    )


if __name__ == "__main__":
    main()
