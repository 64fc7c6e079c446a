"""The texts that ship with the lab: Shakespeare's works and Python source, split by work.

>>> from corelib.data import documents
>>> sorted(documents("shakespeare", "test"))
['macbeth.txt', 'measure_for_measure.txt', 'much_ado_about_nothing.txt']
"""

from __future__ import annotations

import pathlib

from ._archive import FOLDER, read_archive

CORPORA = ("shakespeare", "python")
SPLITS = ("train", "valid", "test")


def documents(corpus: str, split: str, folder: pathlib.Path = FOLDER) -> dict[str, str]:
    """Name -> text of every document of ``corpus`` in ``split``, in alphabetical order.

    ``corpus``: ``"shakespeare"`` (a document is a play or poem) or ``"python"`` (a module; its
    name starts with its package). ``split``: ``"train"``, ``"valid"`` or ``"test"``. No work or
    package is in two splits.

    Raises ``ValueError`` for an unknown name and ``FileNotFoundError``, naming the command that
    brings it, for missing data.
    """
    if corpus not in CORPORA:
        raise ValueError(f"corpus: expected one of {CORPORA}, got {corpus!r}")
    if split not in SPLITS:
        raise ValueError(f"split: expected one of {SPLITS}, got {split!r}")
    start = f"{split}/"
    found = read_archive(corpus, pathlib.Path(folder))
    return {name[len(start) :]: text for name, text in found.items() if name.startswith(start)}


def split_text(split: str) -> list[str]:
    """All documents of a split: the plays and poems first, then the Python modules."""
    return [text for corpus in CORPORA for text in documents(corpus, split).values()]
