"""Exact byte-level probabilities from tokenized language models (arXiv 2410.09303).

Idea: a prompt's encoding says more than its bytes, namely that the text went on in such a way that
the last token ended just there. Sum over every encoding that the text may turn out to have, and
the token model becomes the byte model that it is equal to: nothing is trained or approximated.

A *cover* of ``text`` is a sequence of ids that may begin an encoding, whose bytes begin with
``text`` and whose last token starts inside ``text``. With ``p`` the token model's law of its ids,

    P(text) = sum over t in covers(text) of p(t)                  (byte-token representation lemma)
    P(byte | text) = P(text + byte) / P(text)

| here      | paper                  | what                                                 |
|:----------|:-----------------------|:-----------------------------------------------------|
| text      | x_1..n                 | bytes                                                |
| covers    | cover(x_1..n)          | list of tuples of ids                                |
| reachable | valid                  | some text's encoding begins with these ids           |
| node      | t_1..k-1, "left" part  | all tokens of a cover but the last                   |
| law       | P(x_n+1 given x_1..n)  | (257,): the bytes, and `END` for the end of the text |

Exact: for the model restricted to reachable ids. Trained models leak some probability to ids that
no encoding has; as in the paper it is set to zero and the rest rescaled (`ByteView.leaked` says
how much it was).
Different: the paper calls a sequence valid when ``encode(decode(t)) == t``, which its proof needs
of every prefix too. GPT-2's cuts look one byte ahead and break that (two line ends are one token
at the end, two before a letter), so we ask for *reachable* instead; for tokenizers without such
cuts both are the same. New: the end of a text is an outcome too. The released code starts at the
last blank; so do we, at `Boundary.safe_cut`, where it changes nothing.
Cost: one call of the model per cover with another left part, two or three for a prompt's first law;
then one per byte. Checks of reachability are most of the time of a small model.
Oracle: brute force over all encodings; `naive_next_byte` and `healed_next_byte` are the baselines.
No `nn.Module`: the model stays as it is. How the covers are kept while reading: `byte_reader`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .byte_reader import END, ByteReader, Law, RestrictedModel
from .shared import (
    Boundary,
    LongestMatch,
    Tokenizer,
    boundary_of,
    decode_bytes,
    markov_texts,
    reachable,
)


def covers(
    tokenizer: Tokenizer, text: bytes, boundary: Boundary | None = None
) -> list[tuple[int, ...]]:
    """All reachable ids that spell ``text`` or more, and would not without the last of them."""
    _check_text(text)
    boundary, found = boundary_of(tokenizer, boundary), []
    open_: list[tuple[int, ...]] = [()]
    while open_:
        left = open_.pop()
        rest = text[len(decode_bytes(tokenizer, left)) :]
        for v, word in enumerate(tokenizer.bytes):
            fits = word and (word.startswith(rest) or rest.startswith(word))
            if fits and reachable(tokenizer, (*left, v), boundary):
                (found if word.startswith(rest) else open_).append((*left, v))
    return sorted(found) if text else [()]


class ByteView(RestrictedModel):
    """A token model seen as a model of bytes.

    Args:
        model: ``ids (B, L) -> logits (B, L, vocab)``; called with a cache if ``new_cache``.
        tokenizer: ``encode`` and ``bytes``; ids beyond ``len(tokenizer.bytes)`` are never used.
        start: ids before every text, at least one (``[tokenizer.doc]``).
        end: the id that ends a text, or None when texts never end.
        boundary: where the tokenizer cuts; None takes ``tokenizer.boundary``.
        new_cache: makes an empty KV cache; None reads the whole sequence again for every law.

    ``calls`` counts the calls of the model, ``leaked`` collects the probability of unreachable ids
    before each of them.
    """

    def reader(self, text: bytes = b"", *, restart: bool = True) -> ByteReader:
        """Read ``text``; ``restart``: from the last safe cut on, where all covers still agree."""
        _check_text(text)
        cut = self.boundary.safe_cut(text) if restart else 0
        reader = ByteReader(self, tuple(self.tokenizer.encode(text[:cut])))
        for byte in text[cut:]:
            reader.push(byte)
        return reader

    def next_byte(self, text: bytes) -> Law:
        """``P(byte | text)`` for the 256 bytes, and for the end of the text."""
        return self.reader(text).law()

    def log_prob(self, text: bytes, *, ended: bool = False) -> float:
        """``log P`` of texts that begin with ``text``; ``ended``: of this text and no more."""
        reader = self.reader(text, restart=False)
        more = reader.law()[END].log().item() if ended else 0.0
        return reader.log_prob + more


class ByteEnsemble:
    """Readers of models with different tokenizers, as one: the weighted mean of their laws."""

    def __init__(self, readers: Sequence[ByteReader], weights: Sequence[float] | None = None):
        weights = [1.0] * len(readers) if weights is None else list(weights)
        if not readers or len(weights) != len(readers) or min(weights) < 0 or not sum(weights):
            raise ValueError(
                f"weights: expected {len(readers) or 'some'} numbers ≥ 0 that are not all 0, "
                f"got {weights}"
            )
        self.readers, self.weights = list(readers), [w / sum(weights) for w in weights]

    def law(self) -> Law:
        pairs = zip(self.readers, self.weights, strict=True)
        return sum(weight * reader.law() for reader, weight in pairs)

    def push(self, byte: int) -> None:
        for reader in self.readers:
            reader.push(byte)


def generate_bytes(
    reader: ByteReader | ByteEnsemble, count: int, chooser: Callable[[Tensor], Tensor]
) -> bytes:
    """Up to ``count`` bytes more (fewer where the text ends), each picked by ``chooser``."""
    out = bytearray()
    while len(out) < count:
        byte = int(chooser(reader.law()))
        if byte == END:
            break
        out.append(byte)
        reader.push(byte)
    return bytes(out)


# --- what is done instead -------------------------------------------------------------------------


def naive_next_byte(view: ByteView, text: bytes) -> Law:
    """The first byte of the next token behind the encoding of ``text``: biased at its end."""
    return _first_bytes(view, view.tokenizer.encode(text))


def healed_next_byte(view: ByteView, text: bytes) -> Law:
    """Token healing: take the last token back, then only tokens that begin with its bytes."""
    ids = view.tokenizer.encode(text)
    if not ids:
        return _first_bytes(view, ids)
    probs, words = _next_probs(view, ids[:-1]), view.tokenizer.bytes
    taken, law = words[ids[-1]], torch.zeros(257, dtype=torch.float64)
    for v in view.longer.get(taken, ()):
        law[words[v][len(taken)]] += probs[v]
    law += sum(probs[v] for v in view.spelled[taken]) * _first_bytes(view, ids)
    return law / law.sum()


def _first_bytes(view: ByteView, ids: list[int]) -> Law:
    probs, law = _next_probs(view, ids), torch.zeros(257, dtype=torch.float64)
    every = view.longer[b""]
    law.index_add_(0, view.followers.first[every], probs[every])
    if view.end is not None:
        law[END] = probs[view.end]
    return law / law.sum()


def _next_probs(view: ByteView, ids: list[int]) -> Tensor:
    with torch.no_grad():
        logits = view.model(torch.tensor([[*view.start, *ids]]))[0, -1]
    return logits[: len(view.tokenizer.bytes)].double().softmax(0)


def _check_text(text: bytes) -> None:
    if not isinstance(text, bytes):
        raise TypeError(f"text: expected bytes, got {type(text).__name__}")


def example() -> dict:
    """The paper's toy: a chain of A and B, and a vocabulary that also has AA.

    After an A comes an A with probability 0.4; after a B both are as likely. Texts have 6 bytes.
    """
    step = {"A": {"A": 0.4, "B": 0.6}, "B": {"A": 0.5, "B": 0.5}}
    return dict(
        texts=markov_texts({"A": 0.5, "B": 0.5}, step, 6),
        tokenizer=LongestMatch([b"A", b"B", b"AA"]),
    )
