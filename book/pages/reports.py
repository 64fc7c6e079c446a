"""Pages made from results: the ledger of claims and the kernels' report card."""

from __future__ import annotations

import importlib
import pathlib


def ledger_page(labs: pathlib.Path) -> str:
    """Every claim that an executed lab has checked, beside the paper's figure."""
    try:
        ledger = importlib.import_module("corelib.teach.ledger")
    except ModuleNotFoundError:
        return "# Ledger of claims\n\nNo ledger.\n"
    return "# Ledger of claims\n\n" + ledger.ledger_markdown(labs) + "\n"


def kernel_page() -> str:
    try:
        report = importlib.import_module("corelib.kernels.report")
    except ModuleNotFoundError:
        return "# Kernel report card\n\nNo report.\n"
    return "# Kernel report card\n\n" + report.markdown() + "\n"
