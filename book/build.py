"""Build the book into build/book/_build/html, without a network and from committed outputs only.

    python book/build.py             what `make book` runs; only changed pages are built again
    python book/build.py --fresh     from nothing
    python book/build.py --labs DIR  another folder of labs

The source tree in build/book/src is this folder, the labs as committed, and the pages that grow
with the project: map, parts, catalog, ledger, kernel report, API reference, bibliography.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import pathlib
import shutil
import subprocess
import sys
import time

BOOK = pathlib.Path(__file__).resolve().parent
ROOT = BOOK.parent
OUT = ROOT / "build/book"
sys.path.insert(0, str(BOOK))

from pages import api, papers, parts, pictures, plan, reports  # noqa: E402


def front_matter() -> dict[str, bytes]:
    """What is written by hand, by its place in the source tree."""
    kinds = {".md", ".yml", ".bib", ".css", ".js", ".svg", ".py"}
    files = [path for path in BOOK.rglob("*") if path.suffix in kinds and path.is_file()]
    own = {BOOK / "build.py", *(BOOK / "pages").rglob("*")}
    return {
        path.relative_to(BOOK).as_posix(): path.read_bytes()
        for path in files
        if path not in own and "__pycache__" not in path.parts
    }


def source_tree(labs: pathlib.Path) -> dict[str, bytes]:
    """Every file of the book's source, by its place."""
    from corelib.catalog import methods

    rows = methods()
    book_parts = plan.read_parts(BOOK, labs, rows)
    modules = api.read_modules(ROOT)
    pages = {
        "map.md": parts.map_page(book_parts),
        "catalog.md": papers.catalog_page(book_parts, {module.name for module in modules}),
        "catalog.bib": papers.bibliography(rows),
        "bibliography.md": papers.bibliography_page(rows),
        "ledger.md": reports.ledger_page(labs),
        "kernels.md": reports.kernel_page(),
        "api/index.md": api.index_page(modules),
        "_toc.yml": table_of_contents(book_parts),
        "_keywords.json": papers.keywords(book_parts),
    }
    pages |= {f"{part.document}.md": parts.part_page(part, book_parts) for part in book_parts}
    pages |= {f"{module.document}.md": api.module_page(module) for module in modules}
    files = front_matter() | {name: text.encode() for name, text in pages.items()}
    landing = files["index.md"].decode()
    landing = landing.replace("PATTERNS", pictures.patterns())
    files["index.md"] = landing.replace("PROGRESS", parts.progress(book_parts)).encode()
    built = [lab for part in book_parts for lab in part.built]
    for lab in built:
        if '"kernelspec"' not in lab.path.read_text(encoding="utf-8"):
            sys.exit(f"{lab.name} was never executed: make run-lab LAB={lab.number}")
    return files | {f"{lab.document}.ipynb": lab.path.read_bytes() for lab in built}


def table_of_contents(book_parts: list[plan.Part]) -> str:
    """Sphinx external-toc's file (JSON is YAML): parts with their built labs, then registers."""
    chapters = []
    for part in book_parts:
        labs = [{"file": lab.document, "title": parts.numbered(lab)} for lab in part.built]
        chapter = {"file": part.document, "title": f"{part.number} · {part.title}"}
        chapters.append(chapter | ({"sections": labs} if labs else {}))
    registers = ["catalog", "ledger", "kernels", "api/index", "bibliography"]
    toc = {
        "format": "jb-book",
        "root": "index",
        "parts": [
            {"caption": "The book", "chapters": [{"file": "map"}, *chapters]},
            {"caption": "Registers", "chapters": [{"file": name} for name in registers]},
        ],
    }
    return json.dumps(toc, indent=1)


def synchronise(files: dict[str, bytes], folder: pathlib.Path) -> None:
    """Make ``folder`` hold exactly ``files``; what is unchanged keeps its time stamp."""
    for path in sorted(folder.rglob("*"), reverse=True):
        if path.is_file() and path.relative_to(folder).as_posix() not in files:
            path.unlink()
    for name, content in files.items():
        path = folder / name
        if not path.exists() or path.read_bytes() != content:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)


def machinery(files: dict[str, bytes]) -> str:
    """A hash of what every page depends on: a change there builds all of them again."""
    shared = {name: content for name, content in files.items() if name.startswith("_")}
    words = [sys.version, *sorted(name for name in files if not name.startswith("_"))]
    digest = hashlib.sha256("\n".join(words).encode())
    for name in sorted(shared):
        digest.update(name.encode() + shared[name])
    return digest.hexdigest()


def build(labs: pathlib.Path = ROOT / "labs", out: pathlib.Path = OUT, fresh: bool = False) -> int:
    """Write the source tree and run jupyter-book on it. Returns its exit code."""
    files = source_tree(labs)
    stamp = out / "machinery.txt"
    if fresh or not stamp.exists() or stamp.read_text() != machinery(files):
        shutil.rmtree(out, ignore_errors=True)
    source = out / "src"
    source.mkdir(parents=True, exist_ok=True)
    synchronise(files, source)
    command = [sys.executable, "-c", "from jupyter_book.cli.main import main; main()", "build"]
    command += [str(source), "--path-output", str(out), "-W", "-n", "--keep-going", "--quiet"]
    environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1"}
    # Pages already read do not repeat their warnings: after a failure the next build starts afresh.
    stamp.unlink(missing_ok=True)
    code = subprocess.call(command, env=environment)
    if code == 0:
        stamp.write_text(machinery(files))
    return code


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--fresh", action="store_true", help="build every page again")
    parser.add_argument("--labs", type=pathlib.Path, default=ROOT / "labs")
    arguments = parser.parse_args()
    start = time.perf_counter()
    code = build(arguments.labs, fresh=arguments.fresh)
    if code:
        sys.exit("The book was not built: the warnings above name the page and the line.")
    index = (OUT / "_build/html/index.html").relative_to(ROOT)
    print(f"book built in {time.perf_counter() - start:.0f} s: open {index}")


if __name__ == "__main__":
    main()
