"""The 209 papers of the lab, and which of them work.

>>> from corelib.catalog import find, methods
>>> row = find("lean attention")      # also find(172), find("2405.10480"), find("leanattention")
>>> row.works, row.missing             # measured by the last full test run, not declared
>>> row.load()                         # the module corelib.foundations.lean_attention
>>> [m.slug for m in methods("decoding")]

Rows come from ``catalog.toml``; what works comes from ``results.json``, which `make test` writes
(`corelib.results` has the definition). ``python -m corelib.catalog [family] [--json]`` prints both.
"""

from __future__ import annotations

import argparse
import difflib
import functools
import importlib
import json
import pathlib
import re
import sys
import types
import unicodedata
from dataclasses import asdict, dataclass

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

HERE = pathlib.Path(__file__).parent
KINDS = ("method", "systems", "model", "recipe", "benchmark", "survey")


class NoMatch(LookupError, ValueError):
    """No row, or more than one, fits what `find` was asked for."""


@dataclass(frozen=True)
class Method:
    """One paper: a row of the catalog (the columns are explained at the top of catalog.toml)."""

    number: str
    slug: str
    title: str
    arxiv: str
    arxiv_checked: str
    year: int
    family: str
    kind: str
    basis: str
    lab: str
    also: tuple[str, ...] = ()
    kernels: tuple[str, ...] = ()

    @property
    def module(self) -> str:
        """Dotted name of the module that holds the method."""
        return f"corelib.{self.family}.{self.slug}"

    @property
    def url(self) -> str:
        """Address of the paper's abstract, or an empty string."""
        return f"https://arxiv.org/abs/{self.arxiv}" if self.arxiv else ""

    @property
    def parts(self) -> dict[str, str]:
        """Each part that this kind of row needs -> ``"ok"`` or what is wrong with it."""
        return dict(_results().get(self.slug, {"results": "none recorded, run `make test`"}))

    @property
    def missing(self) -> list[str]:
        """What still stands between the row and working, one line each."""
        return [f"{part}: {state}" for part, state in self.parts.items() if state != "ok"]

    @property
    def works(self) -> bool:
        """Whether every part was there and passed in the last full test run."""
        return not self.missing

    def load(self) -> types.ModuleType:
        """Import the method's module.

        Raises:
            ModuleNotFoundError: the method is in the catalog but not built yet.
        """
        try:
            return importlib.import_module(self.module)
        except ModuleNotFoundError as error:
            if error.name not in (self.module, self.module.rpartition(".")[0]):
                raise  # the module is there; something that it needs is not
            raise ModuleNotFoundError(
                f"{self.slug} ({self.number}, {self.title!r}) is in the catalog but not built yet; "
                f"it will be {self.module}",
                name=self.module,
            ) from None


@functools.cache
def _rows() -> tuple[Method, ...]:
    rows = tomllib.loads((HERE / "catalog.toml").read_text(encoding="utf-8"))["method"]
    as_tuples = {"also", "kernels"}
    return tuple(
        Method(**{name: tuple(v) if name in as_tuples else v for name, v in row.items()})
        for row in rows
    )


@functools.cache
def _results() -> dict[str, dict[str, str]]:
    path = HERE / "results.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def families() -> list[str]:
    """The families in the order of their part in the book."""
    return [family for _, family in sorted({(m.lab.split("_")[0], m.family) for m in _rows()})]


def methods(family: str | None = None) -> list[Method]:
    """All rows in the order of their numbers, or those of one family.

    Raises:
        ValueError: there is no such family.
    """
    if family is not None and family not in families():
        known = ", ".join(families())
        raise ValueError(f"family: expected one of {known}; got {family!r}")
    return [method for method in _rows() if family in (None, method.family)]


def find(text: str | int) -> Method:
    """The one row that fits ``text``: a slug, a number, an arXiv id, or words of the title.

    Case, spaces, hyphens and accents do not matter. Exact forms win over words, whole words over
    pieces of words.

    Raises:
        NoMatch: (a ``LookupError`` and a ``ValueError``) nothing fits, with the closest names; or
            several rows fit equally well, with their names.
        TypeError: ``text`` is neither a string nor an integer.
    """
    if isinstance(text, bool) or not isinstance(text, (str, int)):
        raise TypeError(f"text: expected a string or an integer, got {type(text).__name__}")
    query = str(text).strip()
    if not _squash(query):
        raise NoMatch("text: expected a slug, number, arXiv id or words of a title, got nothing")
    if _IDENTIFIER.search(query):
        tiers = (_is_identifier,)
    else:
        tiers = (_is_name, _has_phrase, _has_words, _has_pieces)
    for fits in tiers:
        hits = [method for method in _rows() if fits(method, query)]
        if len(hits) == 1:
            return hits[0]
        if hits:
            listed = "; ".join(_label(method) for method in hits[:8])
            more = f"; and {len(hits) - 8} more" if len(hits) > 8 else ""
            raise NoMatch(f"{len(hits)} methods match {query!r}: {listed}{more}")
    if len(tiers) == 1:
        last = _rows()[-1].number
        raise NoMatch(f"no method has the number or arXiv id {query!r}; numbers end at {last}")
    closest = "; ".join(_label(method) for method in _closest(query))
    raise NoMatch(f"no method matches {query!r}; closest: {closest}")


# A catalog number, or an arXiv id: bare, in an address, with a version.
_IDENTIFIER = re.compile(r"^(\d+)$|(?<!\d)(\d{4}\.\d{4,5})(?:v\d+)?(?:\.pdf)?$")


def _label(method: Method) -> str:
    return f"{method.slug} ({method.number}, {_short(method.title, 60)})"


def _short(title: str, width: int) -> str:
    return title if len(title) <= width else title[: width - 1].rstrip() + "…"


def _words(text: str) -> list[str]:
    """Lower-case words, no accents, no plural; ``LeanAttention`` is two, lean and attention."""
    plain = unicodedata.normalize("NFKD", text.replace("γ", "gamma"))
    plain = "".join(c for c in plain if not unicodedata.combining(c))
    parted = re.sub(r"(?<=[a-z])(?=[A-Z][a-z])", " ", plain)
    found = re.findall(r"[a-z0-9]+", parted.lower())
    return [word[:-1] if len(word) > 4 and word[-1] == "s" else word for word in found]


@functools.cache
def _squash(text: str) -> str:
    return "".join(_words(text))


def _is_identifier(method: Method, query: str) -> bool:
    """The catalog number (with or without zeros) or the arXiv id."""
    number, arxiv = _IDENTIFIER.search(query).groups()
    return int(number) == int(method.number) if number else arxiv == method.arxiv


def _is_name(method: Method, query: str) -> bool:
    """The slug, the whole title, or the name that the title opens with before its colon."""
    names = (method.slug, method.title, method.title.partition(":")[0])
    return _squash(query) in map(_squash, names)


def _has_phrase(method: Method, query: str) -> bool:
    """The words of the query stand in the title one after the other."""
    return f" {' '.join(_words(query))} " in f" {' '.join(_words(method.title))} "


def _has_words(method: Method, query: str) -> bool:
    """All words of the query are words of the slug or the title."""
    return set(_words(query)) <= {*_words(method.title), *_words(method.slug)}


def _has_pieces(method: Method, query: str) -> bool:
    """All words of the query begin a word of the title, or the whole query stands in it."""
    own = [*_words(method.title), *_words(method.slug)]
    begun = all(any(word.startswith(piece) for word in own) for piece in _words(query))
    return begun or _squash(query) in _squash(method.title)


def _closest(query: str, count: int = 3) -> list[Method]:
    """The rows whose slug, opening name or words look most like ``query``."""

    def likeness(method: Method) -> float:
        wanted = _squash(query)
        names = (method.slug, method.title.partition(":")[0])
        whole = max(difflib.SequenceMatcher(None, wanted, _squash(name)).ratio() for name in names)
        shared = set(_words(query)) & {*_words(method.title), *_words(method.slug)}
        return whole + len(shared) / (1 + len(_words(query)))

    return sorted(_rows(), key=likeness, reverse=True)[:count]


def table(rows: list[Method]) -> str:
    """A line per row for a terminal, and a last line that counts."""
    lines = [f"{'no.':4}{'slug':27}{'title':51}{'family':17}{'kind':10}works"]
    for m in rows:
        line = f"{m.number:4}{_short(m.slug, 26):27}{_short(m.title, 50):51}{m.family:17}"
        lines.append(f"{line}{m.kind:10}{'yes' if m.works else '-'}")
    working = sum(method.works for method in rows)
    return "\n".join([*lines, f"{working} of {len(rows)} work"])


def as_json(rows: list[Method]) -> str:
    """The rows with all their columns, ``works`` and ``missing``."""
    listed = [{**asdict(m), "works": m.works, "missing": m.missing} for m in rows]
    return json.dumps(listed, indent=1, ensure_ascii=False)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m corelib.catalog", description="The papers of the lab, and which work."
    )
    parser.add_argument("family", nargs="?", help="one of " + ", ".join(families()))
    parser.add_argument("--json", action="store_true", help="all columns, works and missing")
    chosen = parser.parse_args(arguments)
    try:
        rows = methods(chosen.family)
    except ValueError as error:
        parser.error(str(error))
    print(as_json(rows) if chosen.json else table(rows))


if __name__ == "__main__":
    main()
