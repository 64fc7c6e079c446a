"""The report card of the kernels: what each compiles to on each target, and how far it was tried.

$ python -m corelib.kernels.report              # the card, a row per kernel, direction and target
$ python -m corelib.kernels.report --json       # every specialisation, with all that was measured
$ python -m corelib.kernels.report --update     # run gates 1 and 2 again for what has changed
$ python -m corelib.kernels.report --update OP  # the same for one kernel module

The card is read from the shipped ``report.json``: no Triton and no GPU is needed. That file is also
the cache of the compile gate: a kernel is compiled again only when a hash of its source, of the
kernel modules that it imports and of the gate has changed, or with ``--force``.

A status is one of *interpreted* (its tests pass under Triton's interpreter), *compiled* (offline,
for the row's target, without a problem) and *run on (device, date)* (`gates.gpu_check` ran its
tests on that device; *an earlier version run on* where its source has changed since). A kernel that
never ran on a GPU is never called more than the first two.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import json
import pathlib
import sys
from collections.abc import Iterator, Sequence
from typing import Any

HERE = pathlib.Path(__file__).parent
SHIPPED = HERE / "report.json"
_GATE = ("gates/compile.py", "gates/architecture.py", "gates/specialisation.py")
_EMPTY: dict[str, Any] = {"triton": "", "modules": {}, "rows": []}


def kernel_modules() -> list[str]:
    """Names of the operations: the modules that declare ``SPECIALISATIONS``.

    ``<op>_backward`` is a part of ``<op>``, not an operation of its own.
    """
    declaring = {path.stem for path in HERE.glob("*.py") if _declares(path.stem)}
    backward = {f"{name}_backward" for name in declaring}
    return sorted(declaring - backward)


def parts(operation: str) -> list[str]:
    """The modules of an operation: its own and, where there is one, its backward's."""
    names = operation, f"{operation}_backward"
    return [name for name in names if (HERE / f"{name}.py").exists()]


def _declares(name: str) -> bool:
    """Whether a kernel module has SPECIALISATIONS; from its text, so that nothing is imported."""
    tree = ast.parse((HERE / f"{name}.py").read_text(encoding="utf-8"))
    assigned = [node for node in tree.body if isinstance(node, ast.Assign)]
    return any(ast.unparse(node.targets[0]) == "SPECIALISATIONS" for node in assigned)


def rows(module: str | None = None) -> list[dict[str, Any]]:
    """The shipped rows, of one kernel module or of all, each with its ``status`` (a list).

    A row has ``module kernel label direction target`` and what `gates.compile.compiled_row` lists.

    Raises:
        ValueError: no such kernel module on the card.
    """
    report = read()
    if module is not None and module not in report["modules"]:
        raise ValueError(f"module: expected one of {sorted(report['modules'])}, got {module!r}")
    return [
        row | {"status": _status(row, report["modules"][row["module"]])}
        for row in report["rows"]
        if module in (None, row["module"])
    ]


def read(path: pathlib.Path = SHIPPED) -> dict[str, Any]:
    """The shipped report as it stands: ``triton``, ``modules`` (name -> hash, …) and ``rows``."""
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else dict(_EMPTY)


def stale(report: dict[str, Any] | None = None) -> list[str]:
    """Kernel modules whose source is not the one that the report speaks of."""
    known = (report or read())["modules"]
    present = kernel_modules()
    changed = [name for name in present if known.get(name, {}).get("hash") != source_hash(name)]
    return changed + sorted(set(known) - set(present))


def source_hash(module: str) -> str:
    """Of a kernel module, of the kernel modules that it imports, and of the compile gate."""
    seen: dict[str, str] = {}
    waiting = parts(module)
    while waiting:
        name = waiting.pop()
        if name not in seen and (path := HERE / f"{name}.py").exists():
            seen[name] = path.read_text(encoding="utf-8")
            waiting += _imported(seen[name])
    texts = [f"{name}\n{text}" for name, text in sorted(seen.items())]
    texts += [(HERE / name).read_text(encoding="utf-8") for name in _GATE]
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()[:16]


def _imported(source: str) -> Iterator[str]:
    """Sibling modules that a kernel module's source imports, in whatever form."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            dotted = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            parent = ".".join(["corelib.kernels"] * bool(node.level) + [node.module or ""]).rstrip(
                "."
            )
            dotted = [parent] + [f"{parent}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in dotted:
            if name.startswith("corelib.kernels."):
                yield name.split(".")[2]


def _status(row: dict[str, Any], module: dict[str, Any]) -> list[str]:
    status = ["interpreted"] if module["interpreted"] else []
    status += [f"refused: {text}" for text in row["problems"]] or [f"compiled for {row['target']}"]
    for run in module["runs"]:
        if run["target"] == row["target"]:
            verb = "run on" if run["hash"] == module["hash"] else "an earlier version run on"
            status.append(f"{verb} ({run['device']}, {run['date']})")
    return status


def summary(module: str | None = None) -> list[dict[str, str]]:
    """The card as text cells: a row per kernel, direction and target, over its specialisations."""
    groups: dict[tuple, list[dict[str, Any]]] = {}
    for row in rows(module):
        key = row["module"], row["kernel"], row["direction"], row["target"]
        groups.setdefault(key, []).append(row)
    return [_summed(key, group) for key, group in groups.items()]


def _summed(key: tuple, group: list[dict[str, Any]]) -> dict[str, str]:
    module, kernel, direction, target = key
    good = [row for row in group if row["registers"] is not None]  # the others did not compile
    names = sorted({name for row in good for name in row["matrix_instructions"]})
    status = dict.fromkeys(text for row in group for text in row["status"])
    return {
        "kernel": f"{module}.{kernel}",
        "direction": direction,
        "target": target,
        "variants": str(len(group)),
        "registers": _span([row["registers"] for row in good]),
        "spills": _span([row["spills"] for row in good]),
        "shared KiB": _span([-(-row["shared"] // 1024) for row in good]),
        "occupancy %": _span([round(100 * row["occupancy"]) for row in good]),
        "tl.dot": "yes" if any(row["has_dot"] for row in good) else "no",
        "matrix instructions": ", ".join(names) or "none",
        "status": "; ".join(status),
    }


def races(module: str | None = None) -> list[dict[str, str]]:
    """What `gates.gpu_check` timed on real devices, as text cells: a row per race and contestant.

    Times are medians in microseconds; ``time ÷ kernel`` compares with the race's first contestant,
    the kernel. The contestant ``floor`` is modelled: bytes and operations at the device's own
    measured copy bandwidth and matrix rate.
    """
    modules, found = read()["modules"], []
    for name in [module] if module else modules:
        for run in modules[name]["runs"]:
            old = "" if run["hash"] == modules[name]["hash"] else ", an earlier version"
            for race, times in run.get("microseconds", {}).items():
                ordered = sorted(times, key=lambda who: (who == "floor", not _is_kernel(who)))
                found += [
                    {
                        "race": f"{name}: {race}",
                        "contestant": "floor (modelled)" if who == "floor" else who,
                        "µs": f"{times[who]:,.0f}",
                        "time ÷ kernel": f"{times[who] / times[ordered[0]]:.2f}",
                        "measured on": f"{run['device']}, {run['date']}{old}",
                    }
                    for who in ordered
                ]
    return found


def _is_kernel(contestant: str) -> bool:
    return contestant.startswith("kernel")


def _as_markdown(card: list[dict[str, str]]) -> str:
    lines = ["| " + " | ".join(card[0]) + " |", "|" + " --- |" * len(card[0])]
    return "\n".join(lines + ["| " + " | ".join(row.values()) + " |" for row in card])


def _span(values: list[int]) -> str:
    if not values:
        return "?"
    low, high = min(values), max(values)
    return str(low) if low == high else f"{low}–{high}"


def markdown(module: str | None = None) -> str:
    """The card as a Markdown table, and what it rests on."""
    card = summary(module)
    if not card:
        return "No kernel is on the report card.\n"
    text = _as_markdown(card) + "\n\n" + _footing() + "\n"
    if raced := races(module):
        text += "\n## Raced on a GPU\n\n" + _as_markdown(raced) + "\n"
    return text


def table(module: str | None = None) -> str:
    """The card as aligned plain text."""
    parts = [_aligned(summary(module)), _footing()]
    return "\n\n".join([*parts, *filter(None, [_aligned(races(module))])])


def _aligned(card: list[dict[str, str]]) -> str:
    cells = [list(card[0]), *(list(row.values()) for row in card)] if card else []
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = [
        "  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip()
        for row in cells
    ]
    return "\n".join(lines)


def _footing() -> str:
    report = read()
    text = f"Compiled offline with Triton {report['triton']}; a span covers a kernel's variants. "
    ran: dict[str, list[str]] = {}
    for name, module in report["modules"].items():
        for run in module["runs"]:
            if run["hash"] == module["hash"]:
                ran.setdefault(f"{run['device']}, {run['date']}", []).append(name)
    for where, names in ran.items():
        text += f"Ran on {where}: {len(names)} of {len(report['modules'])} modules. "
    text += "" if ran else "None of these kernels has run on a GPU yet."
    if changed := stale(report):
        text += f" Out of step with the source (run --update): {', '.join(changed)}."
    return text.strip()


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m corelib.kernels.report", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("module", nargs="?", help="one kernel module, such as flash_attention")
    parser.add_argument("--json", action="store_true", help="every row, as JSON")
    parser.add_argument("--update", action="store_true", help="run the gates for what changed")
    parser.add_argument("--force", action="store_true", help="with --update: for everything")
    parser.add_argument("--jobs", type=int, default=2, help="targets compiled at once")
    chosen = parser.parse_args(argv)
    refused = False
    if chosen.update or chosen.force:
        from corelib.kernels.gates.refresh import update

        report = update(module=chosen.module, force=chosen.force, jobs=chosen.jobs)
        refused = any(row["problems"] for row in report["rows"])
        refused |= not all(module["interpreted"] for module in report["modules"].values())
    print(json.dumps(rows(chosen.module), indent=1) if chosen.json else table(chosen.module))
    return int(refused)


if __name__ == "__main__":
    sys.exit(main())
