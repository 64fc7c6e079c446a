"""The catalog page, and the bibliography's entries, from the catalog's rows."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence

from .markdown import escape, link
from .plan import Part

KIND_NOTES = {
    "abstract": "our reconstruction: only the abstract was at hand",
    "secondary": "known from other papers' accounts",
}


def catalog_page(parts: Sequence[Part], modules: set[str]) -> str:
    """All papers in one table; book.js puts a filter above it, which the page can do without.

    ``modules`` are the modules that exist, so that a row can link to its page of the reference.
    """
    methods = sorted((m for part in parts for lab in part.labs for m in lab.methods), key=_number)
    labs = {lab.name: lab for part in parts for lab in part.labs}
    titles = {method: part.title for part in parts for lab in part.labs for method in lab.methods}
    working = sum(method.works for method in methods)
    head = [
        "# Catalog of papers",
        f"{len(methods)} papers, {working} working. A paper *works* here when its module passes "
        "every test, its kernels pass their gates, and its lab derives it, shows it, races it and "
        "checks its claims. The last full test run decides that, nothing else does: in Python, "
        '`corelib.find("lean attention").works` gives the same answer.',
        ":::{table}\n:class: catalog",
        "| No. | Paper | Part | Kind | Year | Works |\n| --- | --- | --- | --- | --- | --- |",
    ]
    rows = [
        "| "
        + " | ".join(
            (
                method.number,
                _paper(method, modules),
                escape(titles[method]),
                method.kind,
                str(method.year),
                _state(method, labs[method.lab], modules),
            )
        )
        + " |"
        for method in methods
    ]
    return "\n\n".join(head) + "\n" + "\n".join(rows) + "\n:::\n"


def _number(method) -> str:
    return method.number


def _paper(method, modules: set[str]) -> str:
    """The title, linked to the paper, and the name to import it by."""
    title = f"[{escape(method.title)}]({method.url})" if method.url else escape(method.title)
    name = f"`{method.slug}`"
    if method.module in modules:
        name = link(name, f"api/{method.module}", here="catalog")
    notes = [KIND_NOTES[method.basis]] if method.basis in KIND_NOTES else []
    if method.arxiv_checked == "recalled":
        notes.append("arXiv number recalled, not looked up")
    return f"{title} {name}" + (f" [{'; '.join(notes)}]{{.note}}" if notes else "")


def _state(method, lab, modules: set[str]) -> str:
    """The lab if it is built, and what is missing until the paper works."""
    place = link(f"lab {lab.number}", lab.document, here="catalog") + " " if lab.path else ""
    if method.works:
        return f"{place}[works]{{.works}}"
    if method.module not in modules:
        return f"{place}[not yet built]{{.not-built}}"
    return f"{place}[{escape('; '.join(method.missing))}]{{.missing}}"


def keywords(parts: Sequence[Part]) -> str:
    """JSON: page -> names under which the search must find it, a paper's name in one word too."""
    words: dict[str, list[str]] = {}
    for part in parts:
        for lab in part.labs:
            names = [name for method in lab.methods for name in _names(method)]
            for document in (part.document, lab.document) if lab.path else (part.document,):
                words.setdefault(document, []).extend(names)
    return json.dumps(words, indent=1, ensure_ascii=False)


def _names(method) -> list[str]:
    """``Lean Attention: …`` (lean_attention) -> LeanAttention, lean_attention and single words."""
    opening = method.title.partition(":")[0] if ":" in method.title else ""
    whole = [re.sub(r"[\s_-]", "", opening), method.slug, method.slug.replace("_", "")]
    words = re.findall(r"\w+", f"{method.title} {method.slug.replace('_', ' ')}")
    return [word for word in (*whole, *words) if word]


def bibliography(methods: Sequence) -> str:
    """BibTeX: one entry a paper, its key the slug, its label the catalog number."""
    return "\n".join(_entry(method) for method in methods)


def _entry(method) -> str:
    fields = {
        "number": method.number,
        "title": "{" + method.title.replace("γ", r"$\gamma$") + "}",
        "year": str(method.year),
    }
    if method.arxiv:
        fields |= {"eprint": method.arxiv, "archiveprefix": "arXiv"}
    if method.arxiv_checked == "recalled":
        fields["note"] = "arXiv number recalled, not looked up"
    written = ",\n".join(f"  {name} = {{{value}}}" for name, value in fields.items())
    return f"@misc{{{method.slug},\n{written}\n}}\n"


def bibliography_page(methods: Sequence) -> str:
    return (
        "# Bibliography\n\n"
        f"The {len(methods)} papers of the [catalog](catalog.md), under their numbers there, and "
        "the other works that the labs stand on.\n\n"
        "```{bibliography}\n:all:\n```\n"
    )
