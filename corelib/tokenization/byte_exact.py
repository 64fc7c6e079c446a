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
No `nn.Module`: the model stays as it is.
"""

from __future__ import annotations

import copy
import functools
import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from .followers import Followers
from .shared import (
    Boundary,
    LongestMatch,
    Tokenizer,
    boundary_of,
    decode_bytes,
    markov_texts,
    reachable,
)

END = 256  # the outcome "the text ends here"

Law = Float[Tensor, "257"]


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


class ByteView:
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

    def __init__(
        self,
        model: Callable[..., Tensor],
        tokenizer: Tokenizer,
        *,
        start: Sequence[int],
        end: int | None,
        boundary: Boundary | None = None,
        new_cache: Callable[[], Any] | None = None,
    ):
        if not len(start):
            raise ValueError("start: expected at least one id before the text, got none")
        if end is not None and not 0 <= end < len(tokenizer.bytes):
            raise ValueError(f"end: expected an id below {len(tokenizer.bytes)}, got {end}")
        self.model, self.tokenizer, self.start, self.end = model, tokenizer, tuple(start), end
        self.boundary, self.new_cache = boundary_of(tokenizer, boundary), new_cache
        self.calls, self.leaked = 0, []
        self.spelled: dict[bytes, list[int]] = defaultdict(list)  # ids with these bytes
        self.longer: dict[bytes, list[int]] = defaultdict(list)  # ids that begin so and go on
        for v, word in enumerate(tokenizer.bytes):
            if word:
                self.spelled[word].append(v)
            for n in range(len(word)):
                self.longer[word[:n]].append(v)
        self.followers = Followers(tokenizer, self.boundary)

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


class _Node:
    """The left part of covers: ids that end at ``place``. Asks the model when first needed."""

    def __init__(self, view: ByteView, prefix: tuple[int, ...], tail: tuple[int, ...] = ()):
        self.view, self.prefix, self.tail = view, prefix, tail
        self.parent: _Node | None = None
        self.place = 0

    def child(self, v: int) -> _Node:
        node = _Node(self.view, self.prefix, (*self.tail, v))
        node.parent, node.place = self, self.place + len(self.view.tokenizer.bytes[v])
        return node

    @functools.cached_property
    def allowed(self) -> Tensor:
        return self.view.followers.after(self.tail)

    @functools.cached_property
    def log_prob(self) -> float:
        """Of the tail, given the prefix."""
        if self.parent is None:
            return 0.0
        return self.parent.log_prob + self.parent.log_next[self.tail[-1]].item()

    @functools.cached_property
    def log_next(self) -> Tensor:
        """``(vocab,)``: log-probabilities of the next id, of reachable ones only."""
        words = len(self.view.tokenizer.bytes)
        logs = self._logits[:words].double().log_softmax(0)
        allowed = self.allowed.clone()
        if self.view.end is not None:
            allowed[self.view.end] = self.view.followers.may_end(self.tail)
        kept = logs.masked_fill(~allowed, -math.inf)
        total = kept.logsumexp(0)
        if total == -math.inf:  # nothing that the model says can follow: nothing follows
            return kept
        self.view.leaked.append(-math.expm1(min(total.item(), 0.0)))
        return kept - total

    @functools.cached_property
    def _logits(self) -> Tensor:
        return self._asked[0]

    @functools.cached_property
    def _asked(self) -> tuple[Tensor, Any]:
        """The logits behind the last id, and the cache that holds all ids."""
        view = self.view
        view.calls += 1
        ids = (*view.start, *self.prefix, *self.tail)
        cache = None
        if view.new_cache is not None:
            fresh = self.parent is None
            cache = view.new_cache() if fresh else copy.deepcopy(self.parent._asked[1])
            ids = ids if fresh else ids[-1:]
        with torch.no_grad():
            options = () if cache is None else (cache,)
            return view.model(torch.tensor([ids]), *options)[0, -1], cache


class ByteReader:
    """What follows the bytes read so far. Make one with `ByteView.reader`.

    ``text``: the bytes since the cut at which it started.
    """

    def __init__(self, view: ByteView, prefix: tuple[int, ...] = ()):
        self.view, self.text = view, b""
        self.nodes = [_Node(view, prefix)]

    def push(self, byte: int) -> None:
        """Read one more byte. Raises ValueError for what is no byte."""
        if not 0 <= byte < 256:
            raise ValueError(f"byte: expected 0 to 255, got {byte}")
        view, self.text = self.view, self.text + bytes([byte])
        ended = [
            node.child(v)
            for node in self.nodes
            for v in view.spelled.get(self.text[node.place :], ())
            if node.allowed[v]
        ]
        self.nodes = [n for n in self.nodes if self._goes_on(n)] + ended

    def _goes_on(self, node: _Node) -> bool:
        ids = self.view.longer.get(self.text[node.place :], [])
        return bool(node.allowed[ids].any())

    def covers(self) -> dict[tuple[int, ...], float]:
        """Every cover of the text, as ids since the cut, and its share of the probability."""
        weights: dict[tuple[int, ...], float] = {}
        for node in self.nodes:
            rest = self.text[node.place :]
            if not rest and node.tail:  # the last token ends here
                weights[node.tail] = math.exp(node.log_prob - self.log_prob)
            for v in self.view.longer.get(rest, ()) if rest else ():
                if node.allowed[v]:
                    log_weight = node.log_prob + node.log_next[v].item()
                    weights[(*node.tail, v)] = math.exp(log_weight - self.log_prob)
        return weights

    @property
    def log_prob(self) -> float:
        """``log P`` of texts that go on like this, given those up to the cut."""
        return self._joint().logsumexp(0).item()

    def law(self) -> Law:
        """``P(byte | text)``. Raises ValueError where the text itself is impossible."""
        joint = self._joint()
        if joint.max() == -math.inf:
            raise ValueError(f"text: {self.text!r} has probability zero, nothing follows it")
        return joint.softmax(0)

    def _joint(self) -> Law:
        """``log P(text + byte)`` for every byte and the end."""
        words = self.view.tokenizer.bytes
        logs, outcomes = [], []
        for node in self.nodes:
            rest = self.text[node.place :]
            ids = self.view.longer[rest]
            logs.append(node.log_prob + node.log_next[ids])
            outcomes += [words[v][len(rest)] for v in ids]
            if not rest and self.view.end is not None:
                logs.append(node.log_prob + node.log_next[[self.view.end]])
                outcomes.append(END)
        flat = torch.cat(logs) if logs else torch.zeros(0, dtype=torch.float64)
        top = flat.max() if len(flat) and flat.max() > -math.inf else 0.0
        sums = torch.zeros(257, dtype=torch.float64)
        sums.index_add_(0, torch.tensor(outcomes, dtype=torch.long), (flat - top).exp())
        return sums.log() + top


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
