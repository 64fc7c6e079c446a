"""Tasks whose right answers are known by construction, in token ids, for any vocabulary.

Every generator returns a `TaskBatch`: ``targets[b, t]`` is what a left-to-right model should say
after reading ``ids[b, : t + 1]``, and `IGNORE` where there is nothing to know. Drawing is by an
explicit generator, so that a seed names the data.

Sources: passkey (Mohtashami & Jaggi, arXiv 2305.16300), MQAR (Arora et al., arXiv 2312.04927,
section 3), selective copying and induction (Gu & Dao, arXiv 2312.00752, section 4.1), delayed
recall (the adding-problem family: Hochreiter & Schmidhuber 1997, section 5; here one symbol is
held over a delay), chain of keys (the variable tracking of RULER, Hsieh et al., arXiv 2404.06654,
section 3, reduced to ids).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor

IGNORE = -100

NAMES = ("oak", "ash", "elm", "fir", "yew", "bay", "fig", "lime", "pear", "plum", "rose", "vine")


class TaskBatch(NamedTuple):
    """``ids`` to read and ``targets`` to say, both ``(B, L)`` int64; `IGNORE` is not scored."""

    ids: Int[Tensor, "B L"]
    targets: Int[Tensor, "B L"]


def _require(name: str, value: int, least: int) -> None:
    if value < least:
        raise ValueError(f"{name}: expected at least {least}, got {value}")


def _draw(low: int, high: int, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return torch.randint(low, high, shape, generator=generator)


def passkey(
    batch: int,
    length: int,
    *,
    haystack: Int[Tensor, " N"],
    encode: Callable[[str], list[int]],
    generator: torch.Generator,
    keys: int = 1,
    digits: int = 5,
    symbols: int = 10,
    depth: float | None = None,
) -> TaskBatch:
    """Named numbers hidden in real text; the text ends by asking for each of them.

    ``haystack``: ids of text, from which each row takes a random stretch. ``depth``: where the
    needles go, from 0 (the start) to 1 (right before the questions); at random when None.
    ``symbols``: how many different digits the numbers of a row are made of; with few of them a
    number must be copied by place, for the digit before says little. The targets are the digits of
    the answers. Sequences are exactly ``length`` long.
    """
    _require("keys", keys, 1)
    if not 1 <= symbols <= 10:
        raise ValueError(f"symbols: expected 1 to 10 different digits, got {symbols}")
    if keys > len(NAMES):
        raise ValueError(f"keys: expected at most {len(NAMES)}, got {keys}")
    if depth is not None and not 0 <= depth <= 1:
        raise ValueError(f"depth: expected 0 to 1, got {depth}")
    rows = [
        _passkey_row(length, haystack, encode, generator, keys, digits, symbols, depth)
        for _ in range(batch)
    ]
    return TaskBatch(*(torch.stack(part) for part in zip(*rows, strict=True)))


def _digits(count, symbols, generator) -> list[int]:
    if symbols == 10:
        return _draw(0, 10, (count,), generator).tolist()
    which = torch.randperm(10, generator=generator)
    return which[_draw(0, symbols, (count,), generator)].tolist()


def _passkey_row(length, haystack, encode, generator, keys, digits, symbols, depth):
    order = torch.randperm(len(NAMES), generator=generator)[:keys].tolist()
    numbers = ["".join(map(str, _digits(digits, symbols, generator))) for _ in order]
    needles = [
        encode(f"\nThe pass key of {NAMES[n]} is {number}. Remember it.\n")
        for n, number in zip(order, numbers, strict=True)
    ]
    tail, answered = [], []
    for place in torch.randperm(keys, generator=generator).tolist():
        question = encode(f"\nWhat is it? The pass key of {NAMES[order[place]]} is ")
        answer = encode(numbers[place])
        tail += question + answer
        answered += [False] * len(question) + [True] * len(answer)
    room = length - sum(map(len, needles)) - len(tail) + 1  # the last digit is only a target
    if room < 0 or len(haystack) < room:
        raise ValueError(
            f"length: {keys} keys of {digits} digits need more than {length - room} tokens and a "
            f"haystack of that many, got length {length} and a haystack of {len(haystack)}"
        )
    start = int(_draw(0, len(haystack) - room + 1, (1,), generator))
    if depth is None:
        cuts = sorted(_draw(0, room + 1, (keys,), generator).tolist())
    else:
        cuts = [round(depth * room)] * keys
    text, before = [], 0
    for cut, needle in zip(cuts, needles, strict=True):
        text += haystack[start + before : start + cut].tolist() + needle
        before = cut
    text += haystack[start + before : start + room].tolist()
    full = torch.tensor(text + tail)
    scored = torch.tensor([False] * len(text) + answered)
    return full[:-1], torch.where(scored, full, IGNORE)[1:]


def mqar(
    batch: int,
    length: int,
    *,
    vocab: int,
    pairs: int,
    generator: torch.Generator,
    ask: int | None = None,
) -> TaskBatch:
    """Multi-query associative recall: ``pairs`` keys with values, then keys asked for again.

    A row is ``k1 v1 k2 v2 … [ask] k3 v3 k1 v1 …``: distinct keys and values from the first
    ``vocab`` ids, then random keys of the row, each followed by its value, to the end. The
    targets are the values at their second and later appearances.
    """
    _require("pairs", pairs, 1)
    head = 2 * pairs + (ask is not None)
    _require("length", length, head + 1)
    _require("vocab", vocab, 2 * pairs)
    queries = (length - head + 1) // 2
    drawn = torch.stack([torch.randperm(vocab, generator=generator) for _ in range(batch)])
    keys, values = drawn[:, :pairs], drawn[:, pairs : 2 * pairs]
    asked = _draw(0, pairs, (batch, queries), generator)
    parts = [torch.stack([keys, values], -1).flatten(1)]
    if ask is not None:
        parts.append(torch.full((batch, 1), ask))
    parts.append(torch.stack([keys.gather(1, asked), values.gather(1, asked)], -1).flatten(1))
    full = torch.cat(parts, 1)
    targets = torch.full_like(full, IGNORE)
    targets[:, head::2] = full[:, head + 1 :: 2]
    return TaskBatch(full[:, :length], targets[:, :length])


def induction(
    batch: int, length: int, *, vocab: int, period: int, generator: torch.Generator
) -> TaskBatch:
    """Random ids that repeat with ``period``: once the second round has begun, all is known."""
    _require("period", period, 1)
    _require("length", length, period + 1)
    one = _draw(0, vocab, (batch, period), generator)
    full = one.repeat(1, length // period + 2)[:, : length + 1]
    targets = full[:, 1:].clone()
    targets[:, :period] = IGNORE
    return TaskBatch(full[:, :-1], targets)


def selective_copy(
    batch: int,
    length: int,
    *,
    vocab: int,
    items: int,
    noise: int,
    ask: int,
    generator: torch.Generator,
) -> TaskBatch:
    """``items`` ids scattered among ``noise``; after ``ask`` they are to be said in order.

    Ids are drawn from ``0 … vocab - 1`` without ``noise`` and ``ask``.
    """
    _require("items", items, 1)
    _require("length", length, 2 * items)
    body = length - items  # the body, then ask, then all answers but the last as inputs
    usable = torch.tensor([i for i in range(vocab) if i not in (noise, ask)])
    said = usable[_draw(0, len(usable), (batch, items), generator)]
    places = torch.stack([torch.randperm(body, generator=generator)[:items] for _ in range(batch)])
    ids = torch.full((batch, length), noise)
    ids.scatter_(1, places.sort(1).values, said)
    ids[:, body] = ask
    ids[:, body + 1 :] = said[:, :-1]
    targets = torch.full_like(ids, IGNORE)
    targets[:, body:] = said
    return TaskBatch(ids, targets)


def delayed_recall(
    batch: int,
    length: int,
    *,
    vocab: int,
    ask: int,
    generator: torch.Generator,
    symbols: Sequence[int] | None = None,
) -> TaskBatch:
    """The first id is asked for at the very end, after ``length - 2`` others that mean nothing.

    ``symbols``: what may have to be remembered; the distractors avoid them, ``ask`` too. By
    default the lower half of the vocabulary.
    """
    _require("length", length, 2)
    kept = torch.tensor(list(range(vocab // 2)) if symbols is None else list(symbols))
    other = torch.tensor([i for i in range(vocab) if i != ask and i not in set(kept.tolist())])
    if len(other) == 0 or ask in kept.tolist():
        raise ValueError("symbols: must leave distractors in the vocabulary and not hold `ask`")
    ids = other[_draw(0, len(other), (batch, length), generator)]
    ids[:, 0] = kept[_draw(0, len(kept), (batch,), generator)]
    ids[:, -1] = ask
    targets = torch.full_like(ids, IGNORE)
    targets[:, -1] = ids[:, 0]
    return TaskBatch(ids, targets)


def chain_of_keys(
    batch: int, length: int, *, vocab: int, hops: int, ask: int, generator: torch.Generator
) -> TaskBatch:
    """Look a key up, then what was found, and so on: ``hops`` times, through shuffled pairs.

    A row is ``k v k v … ask start``. Its pairs are the links of chains ``a -> b -> c …`` of
    ``hops`` links, in random order; the last chain may be cut short, and with an odd ``length``
    the row begins with an id of its own. Only the last position is scored: the end of the chain
    that begins with ``start``. With ``hops=1`` it is one associative lookup.
    """
    _require("hops", hops, 1)
    _require("length", length, 2 * hops + 2)
    links = (length - 2) // 2
    chains, rest = divmod(links, hops)
    used = links + chains + (rest > 0) + length % 2
    usable = torch.tensor([i for i in range(vocab) if i != ask])
    _require("vocab", vocab, used + (ask < vocab))
    rows = [usable[torch.randperm(len(usable), generator=generator)[:used]] for _ in range(batch)]
    ids = torch.stack(rows)
    whole = ids[:, : chains * (hops + 1)].view(batch, chains, hops + 1)
    cut = ids[:, chains * (hops + 1) : used - length % 2]
    pairs = torch.stack([whole[..., :-1], whole[..., 1:]], -1).flatten(1, 2)
    if rest:
        pairs = torch.cat([pairs, torch.stack([cut[:, :-1], cut[:, 1:]], -1)], 1)
    order = torch.stack([torch.randperm(links, generator=generator) for _ in range(batch)])
    pairs = pairs.gather(1, order[..., None].expand(-1, -1, 2)).flatten(1)
    end = torch.tensor([[ask]]).expand(batch, 1)
    row = torch.cat([ids[:, used - length % 2 :], pairs, end, whole[:, 0, :1]], 1)
    targets = torch.full_like(row, IGNORE)
    targets[:, -1] = whole[:, 0, -1]
    return TaskBatch(row, targets)
