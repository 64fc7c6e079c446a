"""The book's plan: parts, their labs (built or not yet) and the papers that each lab covers."""

from __future__ import annotations

import json
import pathlib
import re
from collections.abc import Sequence
from dataclasses import dataclass

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    import tomli as tomllib

SPELLINGS = {
    "2d": "2D", "bits": "bits", "cnn": "CNN", "fft": "FFT", "lm": "LM", "lstm": "LSTM", "rl": "RL",
    "rnn": "RNN", "rnns": "RNNs", "s4": "S4", "ssd": "SSD", "ssm": "SSM", "vlm": "VLM",
    "jacobi": "Jacobi", "legendre": "Legendre", "mamba": "Mamba",
}  # fmt: skip


@dataclass(frozen=True)
class Lab:
    """One notebook of the plan. ``path`` is None until it is built."""

    name: str  # "00_foundations/002_softmax_as_a_reduction"
    title: str
    goals: tuple[str, ...]  # what its reader will be able to do
    minutes: int | None
    methods: tuple
    path: pathlib.Path | None

    @property
    def number(self) -> str:
        return self.name.split("/")[1].split("_")[0]

    @property
    def document(self) -> str:
        """The page's name inside the book, without a suffix."""
        return f"labs/{self.name}"


@dataclass(frozen=True)
class Part:
    """One of the thirteen parts."""

    folder: str
    title: str
    about: str
    needs: tuple[str, ...]
    labs: tuple[Lab, ...]
    place: tuple[int, int]  # column and row in the map

    @property
    def number(self) -> int:
        return int(self.folder.split("_")[0])

    @property
    def document(self) -> str:
        return f"parts/{self.folder}"

    @property
    def built(self) -> list[Lab]:
        return [lab for lab in self.labs if lab.path]

    @property
    def minutes(self) -> int:
        """Minutes of the labs that are built."""
        return sum(lab.minutes or 0 for lab in self.built)


def read_parts(book: pathlib.Path, labs: pathlib.Path, methods: Sequence) -> list[Part]:
    """The parts in order, each lab either read from its notebook or as the plan has it."""
    parts = []
    for entry in tomllib.loads((book / "parts.toml").read_text(encoding="utf-8"))["part"]:
        folder = entry["folder"]
        names = {f"{folder}/{base}" for base in entry["bases"]}
        names |= {method.lab for method in methods if method.lab.startswith(folder + "/")}
        names |= {f"{folder}/{path.stem}" for path in (labs / folder).glob("*.ipynb")}
        found = [read_lab(name, labs, methods) for name in sorted(names, key=_lab_number)]
        needs, place = tuple(entry["needs"]), tuple(entry["place"])
        parts.append(Part(folder, entry["title"], entry["about"], needs, tuple(found), place))
    return parts


def read_lab(name: str, labs: pathlib.Path, methods: Sequence) -> Lab:
    """A lab of the plan; title, goals and minutes come from its notebook if it is built."""
    covered = tuple(method for method in methods if method.lab == name)
    path = labs / f"{name}.ipynb"
    if not path.exists():
        return Lab(name, _title_of(name), (), None, covered, None)
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    text = "\n\n".join("".join(c["source"]) for c in cells[:8] if c["cell_type"] == "markdown")
    title = re.search(r"^# +(.+)$", text, re.MULTILINE)
    minutes = re.search(r"\b(\d+)(?:\s*[–-]\s*(\d+))?[\s*-]*min(?:utes?)?\b", text)
    return Lab(
        name,
        title[1].strip() if title else _title_of(name),
        _goals(text),
        int(minutes[2] or minutes[1]) if minutes else None,
        covered,
        path,
    )


def _lab_number(name: str) -> int:
    return int(name.split("/")[1].split("_")[0])


def _title_of(name: str) -> str:
    """``107_selective_scan_and_ssd`` -> ``107 · Selective scan and SSD``."""
    number, *words = name.split("/")[1].split("_")
    words = [SPELLINGS.get(word, word) for word in words]
    words[0] = words[0][0].upper() + words[0][1:]
    return f"{number} · {' '.join(words)}"


def _goals(text: str) -> tuple[str, ...]:
    """The items of the list below "You will be able to"."""
    listed = re.search(r"able to\W*\n((?:\s*[-*+] .+(?:\n(?!\n|[-*+] ).+)*\n?)+)", text)
    items = re.split(r"^\s*[-*+] ", listed[1], flags=re.MULTILINE)[1:] if listed else []
    return tuple(" ".join(item.split()).rstrip(",;.") for item in items)
