"""Challenges in Deploying Long-Context Transformers: A Theoretical Peak Performance Analysis
(arXiv 2405.08944).

Idea: four bills come with a long context - fewer users fit, prefilling takes longer, every new
token takes longer, and swapping one user for another takes longer - and four short formulas say
how much, from a model's shape and a machine's data sheet:

    kv_bytes(n)      = 2 layers kv_heads head_width kv_itemsize n
    concurrency      = floor((memory - weight_bytes) / kv_bytes(n))            HBM size
    prefill_seconds  = n (2 N + 2 layers heads head_width n) / flops           arithmetic
    decode_seconds   = tokens (weight_bytes + kv_bytes(n)) / bandwidth         HBM bandwidth
    switch_seconds   = 2 kv_bytes(n) / host_link                               link to the host

| here                     | paper                  | what                                        |
|:-------------------------|:-----------------------|:--------------------------------------------|
| n                        | context length         | tokens in the cache                         |
| N, `active_parameters`   | model parameters       | those that a token passes through           |
| tokens                   | one screen of answer   | 250 tokens by default                       |
| `Server`                 | GPU(s)                 | memory, bandwidth, flops, host_link         |
| `Shrink`                 | compression            | what a method makes smaller, and how much   |
| `session_sim`            | concurrent programming | users share a server, prompt, answer, read  |
| `TAXONOMY`               | tables of related work | layer, head, token, hidden x the four bills |

Everything here is *modelled*: the least time that a data sheet allows. Nothing was measured.
Exact: parameter counts and bytes. Approximate, as in the paper: the cache does not grow during an
answer; a lookup in the embedding counts as a product; softmax, norms, activations, launches and
the communication of several GPUs cost nothing; one user at a time computes. Causal attention
counts half of the square, once for scores and once for values.
Not reproduced: the paper prefills 50K tokens in 14.1 s, these formulas say 17.9 s (11.0 s without
attention); its attention term is not known to us. Which bills a method moves is our reading of
its mechanism, not a copy of the paper's table; reading time and host link are parameters.
Cost: arithmetic on a dozen numbers. Oracle: published parameter counts, the matrix products and
the cache of a model that runs, sessions by hand. No `nn.Module` and no kernel: nothing to compute.
"""

from __future__ import annotations

import dataclasses
import heapq
import json
import pathlib
from collections import deque
from collections.abc import Iterable
from numbers import Real
from typing import NamedTuple

from .model_shapes import MODELS, ModelSpec, Server
from .shared import check_counts, check_positive

_DATA = json.loads(pathlib.Path(__file__).with_suffix(".json").read_text(encoding="utf-8"))
ANSWER = 250  # tokens: about a screen of text


# --- the four bills -------------------------------------------------------------------------------


class Shrink(NamedTuple):
    """By what factor a method makes each thing smaller; 1: not at all."""

    stored: Real = 1  # bytes of the cache that stay in device memory
    attended: Real = 1  # operations of attention while prefilling
    read: Real = 1  # bytes of the cache read for a new token
    moved: Real = 1  # bytes of the cache that a switch moves


class FourMetrics(NamedTuple):
    """Users at a time, then seconds: of prefilling, of an answer, of a context switch."""

    concurrency: int
    prefill: float
    decode: float
    switch: float


def kv_bytes(model: ModelSpec, n: int) -> Real:
    """Bytes of the keys and values of ``n`` tokens."""
    check_counts(n=n)
    return 2 * model.layers * model.kv_heads * model.head_width * model.kv_itemsize * n


def prefill_flops(model: ModelSpec, n: int, attended: Real = 1) -> Real:
    """Operations of reading ``n`` tokens: the weights' products, and causal attention's."""
    check_counts(n=n)
    attention = 2 * model.layers * model.heads * model.head_width * n
    return n * (2 * model.active_parameters + attention / attended)


def concurrency(model: ModelSpec, server: Server, n: int, stored: Real = 1) -> int:
    """How many users' caches of ``n`` tokens fit beside the weights; 0 if not even one does."""
    spare = server.memory - model.itemsize * model.parameters
    return max(0, int(spare // (kv_bytes(model, n) / stored)))


def decode_seconds(
    model: ModelSpec,
    server: Server,
    n: int,
    tokens: int = ANSWER,
    *,
    users: int = 1,
    read: Real = 1,
) -> float:
    """Seconds until each of ``users`` (of ``n`` tokens) has ``tokens`` more.

    The weights are read once for all users, each cache by itself. Several users of a mixture of
    experts are taken to need all of them.
    """
    check_counts(tokens=tokens, users=users)
    parameters = model.active_parameters if users == 1 else model.parameters
    step = model.itemsize * parameters + users * kv_bytes(model, n) / read
    return tokens * step / server.bandwidth


def switch_seconds(model: ModelSpec, server: Server, n: int, moved: Real = 1) -> float:
    """Seconds to bring one cache of ``n`` tokens to the host and another one back."""
    return 2 * kv_bytes(model, n) / moved / server.host_link


def four_metrics(
    model: ModelSpec,
    server: Server,
    n: int,
    tokens: int = ANSWER,
    *,
    shrink: Shrink = Shrink(),  # noqa: B008  (immutable)
) -> FourMetrics:
    """The four bills of a context of ``n`` tokens, *modelled*.

    >>> four_metrics(**example()).concurrency
    1
    """
    check_positive(**shrink._asdict())
    return FourMetrics(
        concurrency(model, server, n, shrink.stored),
        prefill_flops(model, n, shrink.attended) / server.flops,
        decode_seconds(model, server, n, tokens, read=shrink.read),
        switch_seconds(model, server, n, shrink.moved),
    )


# --- what compression moves -----------------------------------------------------------------------

_SHRINKS = dict(concurrency="stored", prefill="attended", decode="read", switch="moved")
DIMENSIONS = ("layer", "head", "token", "hidden")


@dataclasses.dataclass(frozen=True)
class Entry:
    """A method: which dimension of the cache it works on, which bills it moves, and how.

    ``slug``: of the catalog's row; work outside of the catalog has an ``arxiv`` number instead.
    """

    name: str
    dimension: str
    moves: tuple[str, ...]
    how: str
    slug: str = ""
    arxiv: str = ""

    def shrink(self, ratio: Real) -> Shrink:
        """Everything that it moves made ``ratio`` times smaller."""
        return Shrink(**{_SHRINKS[bill]: ratio for bill in self.moves})


#: Methods by the dimension of the cache that they shrink.
TAXONOMY: tuple[Entry, ...] = tuple(Entry(**e | {"moves": tuple(e["moves"])}) for e in _DATA)


def compare(
    model: ModelSpec,
    server: Server,
    n: int,
    ratio: Real,
    entries: Iterable[Entry] = TAXONOMY,
) -> dict[str, FourMetrics]:
    """The four bills under every method, had it shrunk what it shrinks ``ratio`` times.

    The same ratio for all: this compares what they can move, not how far they get.
    """
    return {e.name: four_metrics(model, server, n, shrink=e.shrink(ratio)) for e in entries}


# --- sessions -------------------------------------------------------------------------------------


class Span(NamedTuple):
    """The server works for ``user``, from ``start`` to ``stop`` (seconds)."""

    user: int
    kind: str  # prefill, answer or switch
    start: float
    stop: float


class Sessions(NamedTuple):
    """All spans in order, when the last session ended, and how many swaps there were."""

    spans: list[Span]
    seconds: float
    switches: int


def session_sim(
    model: ModelSpec,
    server: Server,
    n: int,
    users: int,
    *,
    rounds: int = 3,
    tokens: int = ANSWER,
    think: Real = 60.0,
    shrink: Shrink = Shrink(),  # noqa: B008  (immutable)
) -> Sessions:
    """Everybody brings ``n`` tokens at time 0 and asks ``rounds`` times, ``think`` seconds apart.

    One user at a time computes, first come, first served. Who is done makes room; if there is no
    room, the cache that was used longest ago goes to the host, and comes back when it is needed.

    Raises ValueError if not a single cache fits.
    """
    check_counts(users=users, rounds=rounds)
    if not think >= 0:
        raise ValueError(f"think: expected seconds, got {think}")
    room, prefill, decode, switch = four_metrics(model, server, n, tokens, shrink=shrink)
    if room < 1:
        raise ValueError(f"n: expected a context that fits beside the weights, got {n}")
    queue = [(0.0, user, 0) for user in range(users)]  # ready since, who, rounds done
    held: deque[int] = deque()  # everybody comes in turn: the first was used longest ago
    spans, now, switches = [], 0.0, 0
    while queue:
        ready, user, done = heapq.heappop(queue)
        now = max(now, ready)
        out = back = False
        if user not in held:
            out, back = len(held) == room, done > 0
            if out:
                held.popleft()
            held.append(user)
        swap = switch / 2 * (out + back)
        work = (("switch", swap), ("prefill", 0.0 if done else prefill), ("answer", decode))
        for kind, seconds in work:
            if seconds:
                spans.append(Span(user, kind, now, now + seconds))
                now += seconds
        switches += swap > 0
        if done + 1 < rounds:
            heapq.heappush(queue, (now + think, user, done + 1))
        else:
            held.remove(user)
    return Sessions(spans, now, switches)


def example() -> dict:
    """The paper's running case: Yi-34B, 50K tokens, one A100 of 80 GB (data sheet numbers)."""
    server = Server("A100 80 GB", memory=80 * 1024**3, bandwidth=2e12, flops=312e12)
    return dict(model=MODELS["yi-34b-200k"], server=server, n=50_000)
