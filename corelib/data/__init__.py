"""Small real data that ships with the lab, and synthetic tasks with known answers."""

from .synthetic import IGNORE, TaskBatch, delayed_recall, induction, mqar, passkey, selective_copy
from .text import documents, split_text

__all__ = [
    "IGNORE",
    "TaskBatch",
    "delayed_recall",
    "documents",
    "induction",
    "mqar",
    "passkey",
    "selective_copy",
    "split_text",
]
