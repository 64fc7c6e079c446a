"""The map of the whole book and a page for each part."""

from __future__ import annotations

from collections.abc import Sequence

from .markdown import escape, link
from .pictures import part_graph
from .plan import Lab, Part


def map_page(parts: Sequence[Part]) -> str:
    """The graph of the parts, then every part with its labs."""
    labs = sum(len(part.labs) for part in parts)
    built = sum(len(part.built) for part in parts)
    papers = sum(len(lab.methods) for part in parts for lab in part.labs)
    lines = [
        "# Map of the field",
        f"Thirteen parts, {labs} labs, {papers} papers. An arrow means *read this first*: "
        "every part starts from Foundations, and most need only one part more. "
        f"So far {built} {'lab is' if built == 1 else 'labs are'} built; the others are shown as "
        "planned, with the papers that they will cover.",
        part_graph(parts),
    ]
    for part in parts:
        lines.append(f"## {part.number} · {link(escape(part.title), part.document, here='map')}")
        lines.append(f"{escape(part.about)}\n\n{_facts(part, parts, here='map')}")
        lines.append(_lab_list(part, here="map"))
    return "\n\n".join(lines) + "\n"


def progress(parts: Sequence[Part]) -> str:
    """How far the book is, in a sentence."""
    labs = [lab for part in parts for lab in part.labs]
    methods = [method for lab in labs for method in lab.methods]
    built, working = sum(lab.path is not None for lab in labs), sum(m.works for m in methods)
    return (
        f"So far {built} of {len(labs)} [labs](map.md) are built and {working} of {len(methods)} "
        "[papers](catalog.md) work."
    )


def part_page(part: Part, parts: Sequence[Part]) -> str:
    """What the part is about, what it needs, and its labs with their papers."""
    lines = [f"# {escape(part.title)}", escape(part.about), _facts(part, parts, here=part.document)]
    if part.built:
        lines.append("## Labs")
        lines += [_lab_entry(lab, here=part.document) for lab in part.built]
    planned = [lab for lab in part.labs if not lab.path]
    if planned:
        lines.append("## Planned labs" if part.built else "## Planned labs, none built yet")
        lines += [_lab_entry(lab, here=part.document) for lab in planned]
    return "\n\n".join(lines) + "\n"


def _facts(part: Part, parts: Sequence[Part], *, here: str) -> str:
    """Prerequisites and minutes, in a line."""
    needed = [other for other in parts if other.folder in part.needs]
    needs = ", ".join(link(escape(other.title), other.document, here=here) for other in needed)
    minutes = f" · **{part.minutes} minutes** of built labs" if part.minutes else ""
    built = f"**{len(part.built)} of {len(part.labs)}** labs built"
    return f"{{.facts}}\nNeeds {needs or 'Python and some PyTorch'} · {built}{minutes}"


def _lab_list(part: Part, *, here: str) -> str:
    """Built labs by name and minutes, then the names of those that are planned."""
    lists = []
    if part.built:
        built = [f"* {_lab_line(lab, here=here)}" for lab in part.built]
        lists.append("{.labs}\n" + "\n".join(built))
    planned = [f"* {escape(numbered(lab))}" for lab in part.labs if not lab.path]
    if planned:
        lists.append("{.not-built}\nNot yet built:\n\n{.labs .not-built}\n" + "\n".join(planned))
    return "\n\n".join(lists)


def _lab_line(lab: Lab, *, here: str) -> str:
    if not lab.path:
        return f"{escape(numbered(lab))} [not yet built]{{.not-built}}"
    minutes = f" · {lab.minutes} min" if lab.minutes else ""
    return f"**{link(escape(numbered(lab)), lab.document, here=here)}**{minutes}"


def _lab_entry(lab: Lab, *, here: str) -> str:
    """The lab's name, what it teaches, and the papers it covers."""
    papers = [f"* {escape(m.title)} {{cite}}`{m.slug}`" for m in lab.methods]
    lines = [_lab_line(lab, here=here)]
    if lab.goals:
        lines.append("You will be able to")
        lines.append("{.papers}\n" + "\n".join(f"* {goal}" for goal in lab.goals))
    if papers and lab.goals:
        lines.append("Papers" if len(papers) > 1 else "Paper")
    lines.append("{.papers}\n" + "\n".join(papers) if papers else "A base for later labs.")
    return "\n\n".join(lines)


def numbered(lab: Lab) -> str:
    return lab.title if lab.title.startswith(lab.number) else f"{lab.number} · {lab.title}"
