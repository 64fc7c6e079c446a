"""The tokenizer kit: small tokenizers over bytes, where their tokens may end, and exact toy models.

A tokenizer here is anything with ``encode(data) -> list[int]`` and ``bytes``, a list with the
bytes of every id (``b""`` for special ids); those of the shipped models (`corelib.models`) fit. The
ones of this module add ``end``, their last id, which ends a text and stands for no bytes.

A *boundary policy* says where text is cut before tokens are looked for; no token crosses a cut.
Two things follow that methods need to know. After some bytes the cuts to their left are settled,
whatever comes (`Boundary.safe_cut`). And the last cut may depend on what comes next: with the
policy of GPT-2 two line ends are one token at the end of a text and two tokens before a letter.
So a sequence of ids is *reachable* when some text's encoding begins with it, which is more than
``encode(decode(ids)) == ids`` (`reachable`).
"""

from __future__ import annotations

import collections
import dataclasses
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor


@runtime_checkable
class Tokenizer(Protocol):
    """``bytes``: what each id stands for. ``decode`` is joining them."""

    bytes: list[bytes]

    def encode(self, text: bytes) -> list[int]: ...


@dataclasses.dataclass(frozen=True)
class Boundary:
    """Where text is cut before it is tokenized.

    ``pieces``: a pattern whose matches, one after the other, are the pieces; None never cuts.
    ``settled``: a pattern that ends where a cut is certain whatever comes. ``probes``: what may
    come next, one example for every way in which it can move the last cut.
    """

    name: str
    pieces: re.Pattern[bytes] | None = None
    settled: re.Pattern[bytes] | None = None
    probes: tuple[bytes, ...] = ()

    def split(self, data: bytes) -> list[bytes]:
        """The pieces of ``data``; joined they are ``data``."""
        if self.pieces is None:
            return [data] if data else []
        return self.pieces.findall(data)

    def safe_cut(self, data: bytes) -> int:
        """The last place that is a cut in every text which begins with ``data``; 0 if none is."""
        found = self.settled.match(data) if self.settled else None
        return found.end() if found else 0

    def continuations(self, data: bytes) -> tuple[bytes, ...]:
        """What to append to ``data`` to see its last cut moved; nothing if it cannot move."""
        return self.probes if data[-1:].isspace() else ()


ANYWHERE = Boundary("anywhere")
#: Words with the blank before them, single digits, runs of punctuation, runs of white space.
WORDS = Boundary(
    "words",
    re.compile(rb" ?[A-Za-z]+|[0-9]| ?[^\sA-Za-z0-9]+|\s+(?!\S)|\s+"),
    re.compile(rb".*\S(?=\s)", re.DOTALL),
    (b"0",),
)


def decode_bytes(tokenizer: Tokenizer, ids: Iterable[int]) -> bytes:
    """The bytes that ``ids`` stand for."""
    return b"".join(tokenizer.bytes[i] for i in ids)


def boundary_of(tokenizer: Tokenizer, boundary: Boundary | None = None) -> Boundary:
    """``boundary``, or the one that the tokenizer names. Raises ValueError without either."""
    found = getattr(tokenizer, "boundary", None) if boundary is None else boundary
    if found is None:
        raise ValueError("boundary: the tokenizer names none, so expected one, such as WORDS")
    return found


def reachable(tokenizer: Tokenizer, ids: Sequence[int], boundary: Boundary | None = None) -> bool:
    """Whether the encoding of some text begins with ``ids``."""
    ids, data = list(ids), decode_bytes(tokenizer, ids)
    if tokenizer.encode(data) == ids:
        return True
    after = boundary_of(tokenizer, boundary).continuations(data)
    return any(tokenizer.encode(data + more)[: len(ids)] == ids for more in after)


# --- four tokenizers ------------------------------------------------------------------------------


class Vocabulary:
    """Ids for ``words`` in their order, and behind them ``end``, which stands for no bytes."""

    boundary = ANYWHERE

    def __init__(self, words: Sequence[bytes]):
        for word in words:
            if not isinstance(word, bytes) or not word:
                raise ValueError(f"words: expected non-empty bytes, got {word!r}")
        self.bytes = [*words, b""]
        self.id_of = {word: n for n, word in enumerate(words)}
        self.longest = max(map(len, words), default=0)
        self.end = len(words)
        self.vocab = self.end + 1

    def _fits(self, data: bytes, place: int) -> list[bytes]:
        """The words that ``data`` goes on with at ``place``, shortest first."""
        ahead = (data[place : place + n] for n in range(1, self.longest + 1))
        found = list(dict.fromkeys(word for word in ahead if word in self.id_of))
        if not found:
            raise ValueError(f"text: no word begins with byte {data[place]} (position {place})")
        return found


class ByteTokenizer(Vocabulary):
    """Ids 0 to 255 are the bytes."""

    def __init__(self):
        super().__init__([bytes([n]) for n in range(256)])

    def encode(self, text: bytes) -> list[int]:
        return list(text)


class LongestMatch(Vocabulary):
    """From the left, always the longest word that fits (as in WordPiece)."""

    def __init__(self, words: Sequence[bytes]):
        super().__init__(words)
        if len(self.id_of) < len(words):
            raise ValueError("words: expected every word once")

    def encode(self, text: bytes) -> list[int]:
        ids, place = [], 0
        while place < len(text):
            word = self._fits(text, place)[-1]
            ids.append(self.id_of[word])
            place += len(word)
        return ids


class Unigram(Vocabulary):
    """The words with the largest product of weights (Kudo, arXiv 1804.10959; here never sampled).

    ``weights``: word -> a positive number. Of equally good encodings, the one whose last word is
    shortest (then the one before it, and so on).
    """

    def __init__(self, weights: Mapping[bytes, float]):
        super().__init__(list(weights))
        if not all(0 < w < math.inf for w in weights.values()):
            raise ValueError("weights: expected positive numbers")
        self.score = {word: math.log(w) for word, w in weights.items()}

    def encode(self, text: bytes) -> list[int]:
        best: list[tuple[float, bytes]] = [(0.0, b"")]  # of every prefix: its score and last word
        for n in range(1, len(text) + 1):
            last = (text[m:n] for m in range(n - 1, max(n - self.longest, 0) - 1, -1))
            options = [(best[n - len(w)][0] + self.score[w], w) for w in last if w in self.score]
            best.append(max(options, key=lambda option: option[0], default=(-math.inf, b"")))
        if best[-1][0] == -math.inf:
            raise ValueError(f"text: the words do not make up {text!r}")
        ids, n = [], len(text)
        while n:
            ids.append(self.id_of[best[n][1]])
            n -= len(best[n][1])
        return ids[::-1]


class BPE(Vocabulary):
    """Byte-pair encoding with a boundary policy. ``merges``: pairs of ids, the first learnt first;
    the pair of rank ``n`` becomes id ``256 + n``."""

    def __init__(self, merges: Sequence[Sequence[int]], boundary: Boundary = WORDS):
        words = [bytes([n]) for n in range(256)]
        for a, b in merges:
            words.append(words[a] + words[b])
        super().__init__(words)
        self.merges, self.boundary = [(int(a), int(b)) for a, b in merges], boundary
        self.rank = {pair: n for n, pair in enumerate(self.merges)}

    def encode(self, text: bytes) -> list[int]:
        return [i for piece in self.boundary.split(text) for i in self.merged(list(piece))]

    def merged(self, ids: list[int]) -> list[int]:
        """The ids of one piece, given as its bytes."""
        while len(ids) > 1:
            pairs = zip(ids, ids[1:], strict=False)
            rank, pair = min((self.rank.get(pair, math.inf), pair) for pair in pairs)
            if rank == math.inf:
                break
            ids = join_pair(ids, pair, 256 + rank)
        return ids


def join_pair(ids: Sequence[int], pair: tuple[int, int], new: int) -> list[int]:
    """``ids`` with every ``pair``, from the left, replaced by ``new``."""
    out: list[int] = []
    n = 0
    while n < len(ids):
        found = tuple(ids[n : n + 2]) == pair
        out.append(new if found else ids[n])
        n += 1 + found
    return out


def train_bpe(texts: Iterable[bytes], merges: int, boundary: Boundary = WORDS) -> BPE:
    """Learn up to ``merges`` merges, the plain way: count all pairs, join the most frequent.

    Ties go to the smaller ids; a pair seen once is no pair. Every merge passes over all distinct
    pieces, so this is for small texts; `corelib.models.tokenizer` learns large ones.
    """
    counts = collections.Counter(piece for text in texts for piece in boundary.split(text))
    words = [(list(piece), n) for piece, n in counts.items()]
    learnt: list[tuple[int, int]] = []
    for new in range(256, 256 + merges):
        pairs: collections.Counter[tuple[int, int]] = collections.Counter()
        for ids, n in words:
            for pair in zip(ids, ids[1:], strict=False):
                pairs[pair] += n
        best = min(pairs, key=lambda pair: (-pairs[pair], pair), default=None)
        if best is None or pairs[best] < 2:
            break
        learnt.append(best)
        words = [(join_pair(ids, best, new), n) for ids, n in words]
    return BPE(learnt, boundary)


# --- an exact model -------------------------------------------------------------------------------


class ExactTokenModel:
    """The token model that a law over texts induces: ``ids (B, L) -> log-probabilities``.

    ``texts``: text -> probability. A text becomes ``[end, *encode(text), end]``; the conditionals
    of the next id are exact. After ids that begin no text all ids are equally likely: a model says
    something where it was never trained.
    """

    def __init__(self, texts: Mapping[bytes, float], tokenizer: Vocabulary):
        total = sum(texts.values())
        if not abs(total - 1) < 1e-9:
            raise ValueError(f"texts: expected probabilities that sum to 1, got {total}")
        self.vocab = tokenizer.vocab
        self.table: dict[tuple[int, ...], Tensor] = {}
        for text, p in texts.items():
            ids = (tokenizer.end, *tokenizer.encode(text), tokenizer.end)
            for n in range(1, len(ids) if p else 0):
                row = self.table.setdefault(ids[:n], torch.zeros(self.vocab, dtype=torch.float64))
                row[ids[n]] += p

    def __call__(self, ids: Int[Tensor, "B L"], cache=None) -> Float[Tensor, "B L vocab"]:
        if cache is not None:
            raise ValueError("cache: this model reads whole sequences and takes none")
        rows = [[self._row(row[: n + 1]) for n in range(len(row))] for row in ids.tolist()]
        return torch.stack([torch.stack(row) for row in rows])

    def _row(self, ids: list[int]) -> Tensor:
        counts = self.table.get(tuple(ids))
        counts = torch.ones(self.vocab, dtype=torch.float64) if counts is None else counts
        return (counts / counts.sum()).log()


def markov_texts(
    start: Mapping[str, float], step: Mapping[str, Mapping[str, float]], length: int
) -> dict[bytes, float]:
    """All texts of ``length`` characters of a Markov chain, with their probabilities."""
    law = {first: p for first, p in start.items() if p}
    for _ in range(length - 1):
        law = {x + b: p * q for x, p in law.items() for b, q in step[x[-1]].items() if q}
    return {x.encode(): p for x, p in law.items()}
