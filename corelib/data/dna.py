"""Two whole genomes, small enough to ship: a virus and a chloroplast.

>>> from corelib.data import dna
>>> len(dna("phix174")), dna("phix174")[:9]
(5386, 'GAGTTTTAT')
"""

from __future__ import annotations

import pathlib

import torch
from jaxtyping import Int
from torch import Tensor

from ._archive import FOLDER, read_archive

#: Name -> accession number and what it is. Both molecules are circles: the end meets the start.
GENOMES = {
    "phix174": "NC_001422.1, coliphage phiX174, the first DNA genome ever read (1977)",
    "chloroplast": "NC_000932.1, chloroplast of Arabidopsis thaliana (thale cress)",
}
BASES = "ACGT"


def dna(name: str, folder: pathlib.Path = FOLDER) -> str:
    """The genome as letters ``A C G T``; the names are the keys of `GENOMES`.

    Raises ``ValueError`` for an unknown name and ``FileNotFoundError``, naming the command that
    brings it, for missing data.
    """
    if name not in GENOMES:
        raise ValueError(f"name: expected one of {tuple(GENOMES)}, got {name!r}")
    return read_archive("dna", pathlib.Path(folder))[f"{name}.txt"].strip()


def dna_ids(letters: str) -> Int[Tensor, " N"]:
    """Letters as ids: A 0, C 1, G 2, T 3, so that the complement of ``i`` is ``3 - i``."""
    found = [BASES.find(letter) for letter in letters]
    if -1 in found:
        raise ValueError(f"letters: expected only {BASES}, got {letters[found.index(-1)]!r}")
    return torch.tensor(found, dtype=torch.int64)


def reverse_complement(ids: Int[Tensor, "*B N"]) -> Int[Tensor, "*B N"]:
    """The other strand, read in its own direction."""
    return 3 - ids.flip(-1)
