"""Pages made from results: the ledger of claims and the kernels' report card."""

from __future__ import annotations

import pathlib
import re
from collections.abc import Sequence

from corelib.kernels import report
from corelib.teach.ledger import ledger_markdown

from .markdown import escape, link

COLUMNS = ("kernel", "target", "registers", "spills", "shared KiB", "occupancy %")


def ledger_page(labs: pathlib.Path) -> str:
    """Every claim that an executed lab has checked, beside the paper's figure."""
    before, bar, rest = ledger_markdown(labs).partition("\n|")
    table, _, after = rest.partition("\n\n")
    written = (
        [before, f":::{{table}}\n:class: ledger\n\n|{table.strip()}\n:::"] if bar else [before]
    )
    return (
        "# Ledger of claims\n\n"
        "Each lab ends by holding the paper's claims against what it has just measured. A claim "
        "is a predicate: a lab whose claim stops being true does not run to its end. What does "
        "not show at the scale of a laptop stays here too, with the reason and the scale it "
        "would need.\n\n" + "\n\n".join([*written, after]) + "\n"
    )


def kernel_page() -> str:
    """The report card: a section a kernel module, a row a kernel and target."""
    lines = [
        "# Kernel report card",
        "Every Triton kernel here is tried without a GPU: **interpreted**, its results and "
        "gradients equal to the PyTorch reference; **compiled** offline for NVIDIA sm_80, sm_90 "
        "and sm_100 and AMD gfx942, the numbers below read from the compiled code. Where it was "
        "also *run on* a GPU, the device and the date are named, and its races there follow; the "
        "*floor* is modelled from the device's own copy bandwidth. A range spans a kernel's "
        "specialisations (data types, head widths, masks).",
        "Occupancy is the share of a processor's resident threads that registers and shared "
        "memory leave room for. A spill is a register that did not fit and went to memory; there "
        "should be none. Matrix instructions show that a `tl.dot` reached the tensor cores.",
    ]
    rows = report.summary()
    if not rows:
        lines.append("No kernel is on the card yet.")
    for module in dict.fromkeys(row["kernel"].partition(".")[0] for row in rows):
        own = [row for row in rows if row["kernel"].partition(".")[0] == module]
        lines += _section(module, own)
    return "\n\n".join(lines) + "\n"


def _section(module: str, rows: Sequence[dict[str, str]]) -> list[str]:
    document = f"api/corelib.kernels.{module}"
    status = dict.fromkeys(text for row in rows for text in row["status"].split("; "))
    if not any("run on" in text for text in status):
        status["never run on a GPU"] = None
    head = [*COLUMNS, "matrix instructions"]
    table = [f"| {' | '.join(head)} |", "|" + " --- |" * len(head)]
    for before, row in zip([None, *rows], rows, strict=False):
        table.append(f"| {' | '.join(_cells(row, before))} |")
    source = link(f"`corelib.kernels.{module}`", document, here="kernels")
    return [
        f"## {escape(module)}",
        f"{{.facts}}\n{source}: {escape(', '.join(status))}",
        "\n".join(table),
        *_races(module),
    ]


def _races(module: str) -> list[str]:
    """What a GPU took for the kernel and for what a user would call instead."""
    raced = report.races(module)
    if not raced:
        return []
    columns = ("race", "contestant", "µs", "time ÷ kernel")
    table = [f"| {' | '.join(columns)} |", "| --- | --- | ---: | ---: |"]
    for before, row in zip([None, *raced], raced, strict=False):
        shown = {**row, "race": row["race"].partition(": ")[2]}
        if before and before["race"] == row["race"]:
            shown["race"] = ""
        table.append(f"| {' | '.join(escape(shown[column]) for column in columns)} |")
    where = ", ".join(dict.fromkeys(row["measured on"] for row in raced))
    how = f"Raced on a GPU ({escape(where)}); medians, launching included:"
    return [how, "\n".join(table)]


def _cells(row: dict[str, str], before: dict[str, str] | None) -> list[str]:
    """One row's cells; the kernel is named where it differs from the row above."""
    names = ("kernel", "direction")
    name = row["kernel"].partition(".")[2].strip("_").removesuffix("_kernel")
    name = f"{name}, {row['direction']}"
    if before and [before[key] for key in names] == [row[key] for key in names]:
        name = ""
    # The many shapes of AMD's matrix instruction are one thing to a reader.
    matrix = re.sub(r"v_mfma_\w+(, v_mfma_\w+)*", "v_mfma", row["matrix instructions"])
    cells = {**row, "kernel": name}
    return [escape(cells[column]) for column in COLUMNS] + [
        escape(matrix if row["tl.dot"] == "yes" else "no dot")
    ]
