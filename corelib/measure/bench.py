"""Run the registered races: ``python -m corelib.measure.bench [names] [--quick] [--json FILE]``.

Prints a table per race as it finishes and writes all of them to ``build/bench/bench.md`` and
``build/bench/bench.json`` below the current folder. A race that fails is reported, the others go
on, and the exit status is 1.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import pathlib
import sys
import time
import traceback
from collections.abc import Sequence

from .machine import machine
from .race import format_seconds
from .races import Registered, Row, registered

OUT = pathlib.Path("build/bench")
HEAD = (
    "what",
    "shape",
    "contestant",
    "median",
    "time ÷ corelib",
    "exponent",
    "% of copy bandwidth",
    "% of GEMM rate",
)


@dataclasses.dataclass(frozen=True)
class Result:
    """The rows of one race, or what went wrong."""

    race: Registered
    rows: tuple[Row, ...]
    seconds: float
    error: str = ""


def run(races: Sequence[Registered], quick: bool) -> list[Result]:
    """Run ``races`` one after another, printing each when it is done."""
    results = []
    for number, race in enumerate(races, 1):
        print(f"· {number}/{len(races)} {race.name}: {race.title}", flush=True)
        start = time.perf_counter()
        try:
            rows, error = tuple(race.run(quick)), ""
        except Exception as problem:
            traceback.print_exc()
            rows, error = (), f"{type(problem).__name__}: {problem}"
        results.append(Result(race, rows, time.perf_counter() - start, error))
        print(table(results[-1]), flush=True)
    return results


def table(result: Result) -> str:
    """One race as a heading and a Markdown table."""
    title = f"\n## {result.race.name}: {result.race.title}\n"
    if result.error:
        return f"{title}\n**Failed:** {result.error}\n"
    cells = [HEAD, *(_cells(row) for row in result.rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(HEAD))]
    left = 3  # columns of words; the rest are numbers
    rule = [":" + "-" * (w - 1) if i < left else "-" * (w - 1) + ":" for i, w in enumerate(widths)]
    lines = [
        [
            c.ljust(w) if i < left else c.rjust(w)
            for i, (c, w) in enumerate(zip(line, widths, strict=True))
        ]
        for line in cells
    ]
    lines.insert(1, rule)
    body = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    return f"{title}\n{body}\n\n{result.seconds:.0f} s.\n"


def _cells(row: Row) -> tuple[str, ...]:
    return (
        row.what,
        row.shape,
        row.contestant,
        row.note if row.seconds is None else format_seconds(row.seconds),
        "–" if row.ratio is None else f"{row.ratio:.2f}",
        "–" if row.exponent is None else str(row.exponent),
        "–" if row.bandwidth_share is None else f"{row.bandwidth_share:.0%}",
        "–" if row.gemm_share is None else f"{row.gemm_share:.0%}",
    )


def as_json(results: Sequence[Result]) -> dict:
    """Everything that was measured, ready for ``json.dump``."""
    return {
        "machine": machine(),
        "races": [
            {
                "name": result.race.name,
                "title": result.race.title,
                "error": result.error,
                "rows": [dataclasses.asdict(row) for row in result.rows],
            }
            for result in results
        ],
    }


def as_markdown(results: Sequence[Result]) -> str:
    """The page that ``make bench`` leaves behind."""
    return f"# Races\n\nMeasured on: {machine()}.\n" + "".join(map(table, results))


def choose(names: Sequence[str]) -> list[Registered]:
    """The races of those names (a name may be the beginning of several); all when none given.

    Raises:
        ValueError: a name that no race begins with.
    """
    races = registered()
    if not names:
        return list(races.values())
    chosen: dict[str, Registered] = {}
    for name in names:
        found = {full: race for full, race in races.items() if full.startswith(name)}
        if not found:
            raise ValueError(f"no race called {name!r}: there are {', '.join(races) or 'none'}")
        chosen |= found
    return list(chosen.values())


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m corelib.measure.bench", description=__doc__)
    parser.add_argument("names", nargs="*", help="races to run, or beginnings of their names")
    parser.add_argument("--quick", action="store_true", help="small sizes")
    parser.add_argument("--json", type=pathlib.Path, default=OUT / "bench.json", metavar="FILE")
    parser.add_argument("--list", action="store_true", help="print the names and stop")
    options = parser.parse_args(arguments)
    try:
        races = choose(options.names)
    except ValueError as problem:
        parser.error(str(problem))
    if options.list:
        print("\n".join(f"{race.name:<24}{race.title}" for race in races))
        return 0
    results = run(races, options.quick)
    page = options.json.with_suffix(".md")
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps(as_json(results), indent=1) + "\n", encoding="utf-8")
    page.write_text(as_markdown(results), encoding="utf-8")
    print(f"Written: {page} and {options.json}")
    return int(any(result.error for result in results))


if __name__ == "__main__":
    sys.exit(main())
