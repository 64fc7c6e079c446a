"""Reading bytes with a token model: the covers of a text, kept up to date byte by byte
(arXiv 2410.09303).

`byte_exact` has the lemma and the words. Here is the machine behind its `ByteView`. A cover is a
left part, whose ids all end inside the text, and one more id that begins there and reaches its end.
All covers with one left part share the model's law behind it, so that one call serves them all:

    P(text + byte) = sum over nodes of P(node) * sum over v of P(v | node)
                     v: ids that spell the rest of the text behind the node, then this byte

* `RestrictedModel`: the token model without the ids that no encoding has, and two tables of ids by
  their bytes.
* a node: a left part; its law is asked for when first needed.
* `ByteReader`: the nodes of the text so far. A byte drops those that no id carries on, and adds one
  for each id that ends with it.

Oracle: `byte_exact.covers`, and brute force over all encodings.
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
from .shared import Boundary, Tokenizer, boundary_of

END = 256  # the outcome "the text ends here"

Law = Float[Tensor, "257"]


class RestrictedModel:
    """A token model restricted to reachable ids; `byte_exact.ByteView` explains the arguments.

    ``spelled`` and ``longer`` say which ids have certain bytes, and which begin so and go on.
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


class _Node:
    """The left part of covers: ids that end at ``place``. Asks the model when first needed."""

    def __init__(self, view: RestrictedModel, prefix: tuple[int, ...], tail: tuple[int, ...] = ()):
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

    def __init__(self, view: RestrictedModel, prefix: tuple[int, ...] = ()):
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
