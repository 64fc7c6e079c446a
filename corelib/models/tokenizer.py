"""Byte-pair encoding over bytes: any bytes in, the same bytes out, and an exact byte count.

Training (Sennrich et al., arXiv 1508.07909) merges the most frequent pair of neighbouring tokens,
over and over; here the alphabet is the 256 bytes (as in GPT-2), so no input is unknown. Text is
first cut into pieces that no merge crosses: words with the blank before them, single digits
(numbers stay legible to a model), runs of punctuation, runs of white space.

Ids: ``0..255`` the bytes, then one id per merge in the order learnt, then the special tokens,
which stand for no bytes. ``bytes_of(ids)`` is therefore exact, and bits per byte comparable
between models of any vocabulary.

    python -m corelib.models.tokenizer      # learns corelib/models/tokenizer.json again
"""

from __future__ import annotations

import collections
import functools
import heapq
import json
import pathlib
from collections.abc import Iterable, Sequence

import torch
from jaxtyping import Int
from torch import Tensor

from ..tokenization.shared import BPE, WORDS, join_pair

SHIPPED = pathlib.Path(__file__).parent / "tokenizer.json"
SPECIAL = ("<|doc|>", "<|mask|>", "<|ask|>", "<|pad|>")


class Tokenizer:
    """``merges``: pairs of ids, in the order learnt; ``special``: names of the last ids."""

    def __init__(self, merges: Sequence[Sequence[int]], special: Sequence[str] = SPECIAL):
        plain = BPE(merges, WORDS)
        self.merges, self.special = plain.merges, tuple(special)
        self.bytes = plain.bytes[: plain.end] + [b""] * len(self.special)
        self.vocab = len(self.bytes)
        self.special_ids = {s: self.vocab - len(special) + n for n, s in enumerate(special)}
        self.doc, self.mask, self.ask, self.pad = (self.special_ids.get(s, -1) for s in SPECIAL)
        self._ids_of_piece = functools.lru_cache(maxsize=200_000)(
            lambda piece: tuple(plain.merged(list(piece)))
        )

    @property
    def n_plain(self) -> int:
        """How many ids stand for bytes; the special ones come behind."""
        return self.vocab - len(self.special)

    def encode(self, text: str | bytes) -> list[int]:
        """The ids of ``text`` (a string is taken as UTF-8). Special tokens are never produced."""
        if not isinstance(text, (str, bytes)):
            raise TypeError(f"text: expected str or bytes, got {type(text).__name__}")
        data = text.encode("utf-8") if isinstance(text, str) else text
        return [i for piece in WORDS.split(data) for i in self._ids_of_piece(piece)]

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The bytes that ``ids`` stand for; special tokens stand for none."""
        return b"".join(self.bytes[int(i)] for i in ids)

    def decode(self, ids: Iterable[int]) -> str:
        """Text of ``ids``; bytes that are no UTF-8 (a cut character) become U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    @functools.cached_property
    def byte_counts(self) -> Int[Tensor, " vocab"]:
        """Bytes per id."""
        return torch.tensor([len(b) for b in self.bytes])

    def bytes_of(self, ids: Int[Tensor, " ..."]) -> int:
        """How many bytes ``ids`` stand for."""
        return int(self.byte_counts[ids].sum())

    def save(self, path: pathlib.Path) -> None:
        pairs = ",\n".join(json.dumps(list(pair)) for pair in self.merges)
        head = f'{{"special": {json.dumps(list(self.special))},\n"merges": ['
        pathlib.Path(path).write_text(f"{head}\n{pairs}\n]}}\n")


def train_bpe(texts: Iterable[str], vocab: int, special: Sequence[str] = SPECIAL) -> Tokenizer:
    """Learn ``vocab - 256 - len(special)`` merges; ties go to the pair with the smaller ids."""
    wanted = vocab - 256 - len(special)
    if wanted < 0:
        raise ValueError(f"vocab: expected at least {256 + len(special)}, got {vocab}")
    counts = collections.Counter(p for text in texts for p in WORDS.split(text.encode("utf-8")))
    words = [list(piece) for piece in counts]
    weight = list(counts.values())
    pairs: dict[tuple[int, int], int] = collections.Counter()
    where: dict[tuple[int, int], set[int]] = collections.defaultdict(set)
    for w, word in enumerate(words):
        for pair in zip(word, word[1:], strict=False):
            pairs[pair] += weight[w]
            where[pair].add(w)
    heap = [(-n, pair) for pair, n in pairs.items()]
    heapq.heapify(heap)
    merges: list[tuple[int, int]] = []
    while len(merges) < wanted and heap:
        n, pair = heapq.heappop(heap)
        if pairs[pair] != -n:  # an outdated entry: the current one is in the heap as well
            continue
        if n > -2:
            break
        merges.append(pair)
        for changed in _apply(pair, 255 + len(merges), words, weight, pairs, where):
            heapq.heappush(heap, (-pairs[changed], changed))
    return Tokenizer(merges, special)


def _apply(pair, new, words, weight, pairs, where) -> set[tuple[int, int]]:
    """Merge ``pair`` in all words, keep the pair counts right; returns the pairs that changed."""
    changed: set[tuple[int, int]] = set()
    for w in where.pop(pair):
        old = words[w]
        words[w] = join_pair(old, pair, new)
        for p in zip(old, old[1:], strict=False):
            pairs[p] -= weight[w]
            changed.add(p)
        for p in zip(words[w], words[w][1:], strict=False):
            pairs[p] += weight[w]
            where[p].add(w)
            changed.add(p)
    pairs[pair] = 0
    return {p for p in changed if pairs[p] > 0}


@functools.cache
def load_tokenizer(path: pathlib.Path = SHIPPED) -> Tokenizer:
    """The tokenizer that the shipped models share (2,048 ids)."""
    if not pathlib.Path(path).exists():
        raise FileNotFoundError(
            f"the tokenizer {path} is missing; learn it with: python -m corelib.models.tokenizer"
        )
    stored = json.loads(pathlib.Path(path).read_text())
    return Tokenizer(stored["merges"], stored["special"])


def main() -> None:
    from ..data.text import split_text

    tokenizer = train_bpe(split_text("train"), 2048)
    tokenizer.save(SHIPPED)
    ids = [i for text in split_text("valid") for i in tokenizer.encode(text)]
    print(f"{SHIPPED.name}: {tokenizer.vocab} ids, ", end="")
    print(f"{tokenizer.bytes_of(torch.tensor(ids)) / len(ids):.2f} bytes a token on held-out text")


if __name__ == "__main__":
    main()
