"""The baseline that a small language model has to beat: interpolated n-grams over bytes.

Witten-Bell smoothing (Witten & Bell 1991; Chen & Goodman 1998, section 2.5), recursively from
order ``n`` down to the uniform law over 256 bytes:

    p(x | h) = (count(h x) + distinct(h) * p(x | h[1:])) / (count(h) + distinct(h))

where ``distinct(h)`` is how many different bytes followed ``h`` in training. Order 5 conditions on
the 4 bytes before. The law sums to one over the 256 bytes, so bits per byte are exact.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np


class WittenBell:
    """``order=5``: at most 4 bytes of context. `fit` counts, `bits` scores."""

    def __init__(self, order: int = 5):
        if not 1 <= order <= 8:
            raise ValueError(f"order: expected 1 to 8 (contexts fit in 64 bits), got {order}")
        self.order = order
        self.tables: list[tuple[np.ndarray, ...]] = []

    @staticmethod
    def _grams(data: np.ndarray, n: int) -> np.ndarray:
        """The ``n`` bytes that end at each position, as one number; positions ``n-1 …``."""
        out = np.zeros(max(len(data) - n + 1, 0), dtype=np.uint64)
        for k in range(n):
            out = out * np.uint64(256) + data[k : k + len(out)]
        return out

    def fit(self, texts: Iterable[bytes]) -> WittenBell:
        """Count all n-grams up to the order, never across the border of two texts."""
        pieces = [np.frombuffer(text, np.uint8).astype(np.uint64) for text in texts]
        self.tables = []
        for n in range(1, self.order + 1):
            grams = np.concatenate([self._grams(piece, n) for piece in pieces])
            gram, count = np.unique(grams, return_counts=True)
            start = np.unique(gram >> np.uint64(8), return_index=True)
            total = np.add.reduceat(count, start[1])
            distinct = np.diff(np.append(start[1], len(gram)))
            self.tables.append((gram, count, start[0], total, distinct))
        return self

    def probabilities(self, text: bytes) -> np.ndarray:
        """``p(text[i] | the bytes before it)`` for every byte; shorter contexts at the start."""
        if not self.tables:
            raise ValueError("WittenBell: call fit(texts) before asking for probabilities")
        data = np.frombuffer(text, np.uint8).astype(np.uint64)
        p = np.full(len(data), 1 / 256)
        for n, (gram, count, context, total, distinct) in enumerate(self.tables, start=1):
            asked = self._grams(data, n)
            seen = _look_up(asked, gram, count)
            history = asked >> np.uint64(8)
            sum_, kinds = (_look_up(history, context, column) for column in (total, distinct))
            lower = p[n - 1 :]
            known = sum_ > 0
            mixed = (seen + kinds * lower) / np.where(known, sum_ + kinds, 1)
            p[n - 1 :] = np.where(known, mixed, lower)
        return p

    def bits(self, text: bytes) -> float:
        """The code length of ``text`` in bits."""
        return float(-np.log2(self.probabilities(text)).sum())


def _look_up(asked: np.ndarray, keys: np.ndarray, values: np.ndarray) -> np.ndarray:
    """``values`` at ``asked`` in the sorted ``keys``; 0 where there is none."""
    place = np.searchsorted(keys, asked).clip(max=len(keys) - 1)
    return np.where(keys[place] == asked, values[place], 0)
