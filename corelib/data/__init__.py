"""Small real data that ships with the lab, and synthetic tasks with known answers."""

from .audio import mu_law_decode, mu_law_encode, synth_music
from .dna import GENOMES, dna, dna_ids, reverse_complement
from .images import digits, photograph, upsample
from .labelled import LabelledBatch
from .listops import listops
from .pathfinder import pathfinder
from .series import SERIES, Series, chronological_split, series
from .set_tasks import set_disjointness
from .spoken_tones import spoken_tones
from .synthetic import (
    IGNORE,
    TaskBatch,
    chain_of_keys,
    delayed_recall,
    induction,
    mqar,
    passkey,
    selective_copy,
)
from .text import documents, split_text
from .text_tasks import byte_retrieval, byte_text

__all__ = [
    "GENOMES",
    "IGNORE",
    "LabelledBatch",
    "SERIES",
    "Series",
    "TaskBatch",
    "byte_retrieval",
    "byte_text",
    "chain_of_keys",
    "chronological_split",
    "delayed_recall",
    "digits",
    "dna",
    "dna_ids",
    "documents",
    "induction",
    "listops",
    "mqar",
    "mu_law_decode",
    "mu_law_encode",
    "passkey",
    "pathfinder",
    "photograph",
    "reverse_complement",
    "selective_copy",
    "series",
    "set_disjointness",
    "split_text",
    "spoken_tones",
    "synth_music",
    "upsample",
]
