"""Reading an image with fewer and fewer tokens: prompts, importance, a prefill that prunes.

A prompt is a line of tokens: some text, the vision tokens, more text. `prefill` runs it through a
decoder layer by layer; between two layers a *pruner* may look at the attention of the layer just
passed and say which vision tokens go on. Text always goes on. Every token keeps the position that
it had in the whole prompt, and each layer's cache holds only the tokens that entered it.

``model`` is anything with ``layers`` (called as ``block(x, positions, frequencies, cache, n)``),
``frequencies``, ``norm``, ``embed(ids)`` and ``logits(x)``: `corelib.models.vlm.TinyVLM`, or your
own. ``cache`` is any empty key/value cache of the contract (`corelib.contracts.KVCache`).

What other papers compare with: `fastv` (arXiv 2403.06764: once, after the second layer, by the
attention of the last token); before the decoder, `pool` (means of squares) and `thin` (by lot).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from corelib.primitives.column_sums import attention_column_sums


@dataclasses.dataclass(frozen=True)
class Prompt:
    """``x (B, L, C)`` at ``positions (B, L)``: ``first`` text tokens, ``vision`` tokens, text.

    ``places (B, vision)``: which tokens of the uncut image they are. ``end``: the position that
    comes next, the same however many tokens were dropped.
    """

    x: Float[Tensor, "B L C"]
    positions: Tensor
    places: Int[Tensor, "B vision"]
    first: int
    end: int

    @property
    def vision(self) -> int:
        return self.places.shape[1]

    @property
    def text(self) -> int:
        return self.x.shape[1] - self.vision

    def keep(self, kept: Int[Tensor, "B n"]) -> Prompt:
        """Only the vision tokens ``kept``: indices among those that are left, in rising order."""
        B, L = self.x.shape[:2]
        line = torch.arange(L, device=self.x.device).expand(B, L)
        behind = line[:, self.first + self.vision :]
        index = torch.cat([line[:, : self.first], kept + self.first, behind], 1)
        x = self.x.gather(1, index[..., None].expand(-1, -1, self.x.shape[2]))
        positions = self.positions.gather(1, index)
        places = self.places.gather(1, kept)
        return dataclasses.replace(self, x=x, positions=positions, places=places)


def make_prompt(
    before: Float[Tensor, "B P C"], vision: Float[Tensor, "B n C"], after: Float[Tensor, "B M C"]
) -> Prompt:
    """A prompt from embedded text, vision tokens and embedded text."""
    x = torch.cat([before, vision, after], 1)
    B, L = x.shape[:2]
    line = torch.arange(L, device=x.device).expand(B, L)
    return Prompt(x, line, line[:, : vision.shape[1]], before.shape[1], L)


@dataclasses.dataclass
class Look:
    """What a pruner sees of the layer just passed: its queries, its keys, and whose they are."""

    layer: int
    q: Float[Tensor, "B H L D"]
    k: Float[Tensor, "B G L D"]
    prompt: Prompt

    def of_vision(self, scores: Float[Tensor, "B L"]) -> Float[Tensor, "B vision"]:
        """The part of ``scores`` that belongs to vision tokens."""
        return scores[:, self.prompt.first : self.prompt.first + self.prompt.vision]


Pruner = Callable[[Look], Tensor | None]


def received(
    q: Float[Tensor, "B H L D"],
    k: Float[Tensor, "B G L D"],
    weights: Float[Tensor, "*#rows L"] | None = None,
) -> Float[Tensor, "B L"]:
    """Causal attention that each token receives: mean over heads, sum of the weighted rows.

    ``weights``: ``(L,)`` or ``(B, L)``; ``None`` takes the mean of all rows.
    """
    B, _, L, _ = q.shape
    if weights is None:
        weights = torch.full((L,), 1 / L, dtype=torch.float64)
    weights = weights.to(q.device, torch.promote_types(q.dtype, torch.float32)).expand(B, L)
    return attention_column_sums(q, k, causal=True, weights=weights[:, None]).mean(1)


def from_all(look: Look) -> Float[Tensor, "B vision"]:
    """Importance: the mean attention that a vision token receives from all tokens."""
    return look.of_vision(received(look.q, look.k))


def from_text(look: Look) -> Float[Tensor, "B vision"]:
    """Importance: the mean attention that it receives from the text behind the image."""
    L, behind = look.q.shape[2], look.prompt.first + look.prompt.vision
    rows = (torch.arange(L) >= behind).double()
    return look.of_vision(received(look.q, look.k, rows / max(1, L - behind)))


def from_last(look: Look) -> Float[Tensor, "B vision"]:
    """Importance: the attention of the last token of the prompt."""
    return look.of_vision(attention_column_sums(look.q[:, :, -1:], look.k, causal=True).mean(1))


def best(scores: Float[Tensor, "B N"], n: int) -> Int[Tensor, "B n"]:
    """The ``n`` largest of each row, in rising order of their places."""
    if not 0 <= n <= scores.shape[1]:
        raise ValueError(f"n: expected 0 to {scores.shape[1]}, got {n}")
    return scores.topk(n, -1).indices.sort(-1).values


def fastv(ratio: float, *, after: int = 1, score: Callable[[Look], Tensor] = from_last) -> Pruner:
    """Keep a share ``ratio`` of the vision tokens, once, by the attention of the last token.

    after: the number of the layer behind which it happens, and whose attention is taken.
    """
    _check_ratio(ratio)

    def prune(look: Look) -> Tensor | None:
        if look.layer != after:
            return None
        return best(score(look), round(ratio * look.prompt.vision))

    return prune


def thin(prompt: Prompt, ratio: float, seed: int = 0) -> Prompt:
    """``prompt`` with a share ``ratio`` of its vision tokens, drawn by lot before any layer."""
    _check_ratio(ratio)
    lots = torch.rand(prompt.places.shape, generator=torch.Generator().manual_seed(seed))
    return prompt.keep(best(lots.to(prompt.places.device), round(ratio * prompt.vision)))


def _check_ratio(ratio: float) -> None:
    if not 0 <= ratio <= 1:
        raise ValueError(f"ratio: expected 0 to 1, got {ratio}")


def pool(prompt: Prompt, columns: int, side: int) -> Prompt:
    """``prompt`` with means of squares of ``side`` by ``side`` tokens, at their mean positions.

    The image has ``columns`` tokens in a row; squares at its border may be smaller. A pooled token
    is named after the first place of its square. Raises ``ValueError`` where rows are not whole.
    """
    if columns < 1 or prompt.vision % columns or side < 1:
        raise ValueError(
            f"columns: expected a divisor of {prompt.vision} tokens and a side of at least 1, "
            f"got {columns} and {side}"
        )
    first, last = prompt.first, prompt.first + prompt.vision
    line = prompt.positions.to(prompt.x.dtype)
    parts = [prompt.x[:, first:last].mT, line[:, None, first:last]]
    pooled = [
        F.avg_pool2d(part.unflatten(2, (-1, columns)), side, ceil_mode=True).flatten(2)
        for part in parts
    ]
    places = prompt.places.unflatten(1, (-1, columns))[:, ::side, ::side].flatten(1)
    x = torch.cat([prompt.x[:, :first], pooled[0].mT, prompt.x[:, last:]], 1)
    positions = torch.cat([line[:, :first], pooled[1][:, 0], line[:, last:]], 1)
    return dataclasses.replace(prompt, x=x, positions=positions, places=places)


@dataclasses.dataclass
class Prefilled:
    """``logits (B, vocab)`` behind the prompt, and what decoding goes on with.

    ``entered[l] (B, n)``: the places of the vision tokens that entered layer ``l``.
    """

    logits: Float[Tensor, "B vocab"]
    cache: Any
    end: int
    entered: list[Tensor]

    @property
    def counts(self) -> list[int]:
        """How many vision tokens entered each layer."""
        return [places.shape[1] for places in self.entered]


class _Watched:
    """A cache that also remembers what a layer asked and was asked."""

    def __init__(self, cache: Any):
        self.cache = cache

    def append(self, layer: int, k: Tensor, v: Tensor) -> None:
        self.k = k
        self.cache.append(layer, k, v)

    def attend(self, layer: int, q: Tensor, *, scale: float | None = None) -> Tensor:
        self.q = q
        return self.cache.attend(layer, q, scale=scale)


@torch.no_grad()
def prefill(model: Any, prompt: Prompt, cache: Any, prune: Pruner | None = None) -> Prefilled:
    """Run ``prompt`` through ``model``; between layers, ``prune(look)`` names who goes on.

    A pruner returns indices ``(B, n)`` among the vision tokens that are left, in rising order, or
    ``None`` to keep all. Behind the last layer it is not asked.
    """
    watched, entered = _Watched(cache), []
    last = len(model.layers) - 1
    for n, block in enumerate(model.layers):
        entered.append(prompt.places)
        x = block(prompt.x, prompt.positions, model.frequencies, watched, n)
        prompt = dataclasses.replace(prompt, x=x)
        if prune is not None and n < last and prompt.vision:
            kept = prune(Look(n, watched.q, watched.k, prompt))
            prompt = prompt if kept is None else prompt.keep(kept)
    logits = model.logits(model.norm(prompt.x[:, -1:]))[:, 0]
    return Prefilled(logits, cache, prompt.end, entered)


@torch.no_grad()
def answer(model: Any, prefilled: Prefilled, words: int) -> Int[Tensor, "B words"]:
    """The ``words`` most likely words, one after another; the cache grows by one less."""
    logits, said = prefilled.logits, []
    for n in range(words):
        said.append(logits.argmax(-1))
        if n == words - 1:
            break
        x = model.embed(said[-1][:, None])
        positions = torch.full((1,), prefilled.end + n)
        for layer, block in enumerate(model.layers):
            x = block(x, positions, model.frequencies, prefilled.cache, layer)
        logits = model.logits(model.norm(x))[:, 0]
    return torch.stack(said, 1)
