"""What a language model has learnt: bits per byte, retrieval, use of far context, induction.

Every function takes any callable ``(ids, cache=None) -> logits``; none trains or changes it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ..data import synthetic
from ..data.synthetic import IGNORE, TaskBatch
from .cache import DenseCache
from .tokenizer import Tokenizer

Model = Callable[..., Tensor]


@torch.no_grad()
def token_nats(model: Model, ids: Int[Tensor, "B L"]) -> Float[Tensor, "B M"]:
    """``-log p`` of ``ids[:, 1:]`` given all before, in nats; ``M = L - 1``."""
    logits = model(ids[:, :-1]).float()
    return torch.nn.functional.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")


def bits_per_byte(
    model: Model,
    texts: Iterable[str],
    tokenizer: Tokenizer,
    *,
    context: int = 2048,
    stride: int = 1024,
) -> float:
    """Code length of ``texts`` in bits per byte of UTF-8, each text on its own.

    Every token is scored once, with at least ``context - stride`` tokens before it (fewer only
    near the start of a text, which begins after ``<|doc|>``).
    """
    if not 0 < stride < context:
        raise ValueError(f"stride: expected 1 to {context - 1}, got {stride}")
    nats, size = 0.0, 0
    for text in texts:
        ids = torch.tensor([tokenizer.doc, *tokenizer.encode(text)])
        size += tokenizer.bytes_of(ids)
        done = 1
        while done < len(ids):
            end = min(len(ids), context if done == 1 else done + stride)
            scored = token_nats(model, ids[None, max(0, end - context) : end])[0]
            nats += float(scored[done - end :].sum())
            done = end
    return nats / math.log(2) / max(size, 1)


@torch.no_grad()
def exact_match(model: Model, batch: TaskBatch, rows: int = 8) -> float:
    """Share of rows whose every known answer is the model's first choice."""
    right = []
    for first in range(0, len(batch.ids), rows):
        ids, targets = (part[first : first + rows] for part in batch)
        said = model(ids).argmax(-1)
        right.append(((said == targets) | (targets == IGNORE)).all(1))
    return float(torch.cat(right).float().mean())


@torch.no_grad()
def answer_accuracy(model: Model, batch: TaskBatch, rows: int = 8) -> float:
    """Share of the known answers that are the model's first choice."""
    right, known = 0, 0
    for first in range(0, len(batch.ids), rows):
        ids, targets = (part[first : first + rows] for part in batch)
        right += int((model(ids).argmax(-1) == targets).sum())
        known += int((targets != IGNORE).sum())
    return right / known


def passkey_accuracy(
    model: Model,
    tokenizer: Tokenizer,
    haystack: Int[Tensor, " N"],
    *,
    length: int = 2048,
    trials: int = 100,
    keys: int = 1,
    depth: float | None = None,
    seed: int = 0,
) -> float:
    """Share of ``trials`` in which every digit of every key is right; chance is ``10**-5``."""
    batch = synthetic.passkey(
        trials,
        length,
        haystack=haystack,
        encode=tokenizer.encode,
        generator=torch.Generator().manual_seed(seed),
        keys=keys,
        depth=depth,
    )
    return exact_match(model, batch)


def gain_of_context(
    model: Model,
    stream: Int[Tensor, " N"],
    *,
    short: int = 512,
    long: int = 1900,
    scored: int = 64,
    rows: int = 64,
    seed: int = 0,
) -> tuple[float, float]:
    """Nats a token saved by reading ``long`` instead of ``short`` tokens before it.

    The same ``scored`` tokens are predicted twice, so that only the context differs. Returns mean
    and standard error over ``rows`` places of ``stream``.
    """
    generator = torch.Generator().manual_seed(seed)
    first = torch.randint(0, len(stream) - long - scored, (rows,), generator=generator)
    gains = []
    for start in first.tolist():
        window = stream[None, start : start + long + scored]
        far = token_nats(model, window)[0, -scored:].mean()
        near = token_nats(model, window[:, long - short :])[0, -scored:].mean()
        gains.append(near - far)
    gain = torch.stack(gains)
    return float(gain.mean()), float(gain.std() / rows**0.5)


def loss_by_position(
    model: Model,
    stream: Int[Tensor, " N"],
    *,
    length: int = 2048,
    rows: int = 64,
    seed: int = 0,
) -> Float[Tensor, " M"]:
    """Mean nats at each position of random windows of ``stream``; ``M = length - 1``."""
    generator = torch.Generator().manual_seed(seed)
    first = torch.randint(0, len(stream) - length, (rows,), generator=generator).tolist()
    return torch.stack([token_nats(model, stream[None, s : s + length])[0] for s in first]).mean(0)


class AttentionRecorder(DenseCache):
    """A cache that also keeps every layer's attention weights: ``weights[layer] (B, H, L, S)``."""

    def __init__(self) -> None:
        super().__init__()
        self.weights: dict[int, Tensor] = {}

    def attend(
        self, layer: int, q: Float[Tensor, "B H n D"], *, scale: float | None = None
    ) -> Float[Tensor, "B H n D"]:
        k, v = self.layers[layer]
        repeat, n, S = q.shape[1] // k.shape[1], q.shape[2], k.shape[2]
        k, v = (t.repeat_interleave(repeat, 1) for t in (k, v))
        scores = q @ k.transpose(-1, -2) * (q.shape[-1] ** -0.5 if scale is None else scale)
        hidden = torch.ones(n, S, dtype=torch.bool).triu(S - n + 1)
        self.weights[layer] = scores.masked_fill(hidden, -torch.inf).softmax(-1)
        return self.weights[layer] @ v


@torch.no_grad()
def induction_scores(
    model: Model, *, vocab: int, period: int = 64, rows: int = 8, seed: int = 0
) -> tuple[Float[Tensor, "layers H"], float]:
    """How much each head looks at what followed the last time, and how well the model copies.

    On random ids that repeat once (Olsson et al., arXiv 2209.11895): the mean attention weight
    from position ``t`` of the second round to ``t - period + 1``; about ``1 / t`` by chance. And
    the share of second-round ids that are the first choice.
    """
    generator = torch.Generator().manual_seed(seed)
    batch = synthetic.induction(rows, 2 * period, vocab=vocab, period=period, generator=generator)
    recorder = AttentionRecorder()
    logits = model(batch.ids, recorder)
    stripes = []
    for layer in sorted(recorder.weights):
        stripe = recorder.weights[layer].diagonal(1 - period, -2, -1)  # t -> t - period + 1
        stripes.append(stripe[..., 1:].mean((0, 2)))
    copied = (logits.argmax(-1) == batch.targets)[:, period:].float().mean()
    return torch.stack(stripes), float(copied)


@torch.no_grad()
def acceptance(
    target: Model, draft: Model, stream: Int[Tensor, " N"], *, rows: int = 16, length: int = 512
) -> tuple[float, float]:
    """How often ``target`` would take a token of ``draft`` in speculative sampling.

    Returns the mean of ``sum(min(p, q))`` at temperature 1 (Leviathan et al., arXiv 2211.17192,
    corollary 3.6), and the share of positions where both have the same first choice.
    """
    places = torch.linspace(0, len(stream) - length - 1, rows).long().tolist()
    overlap, same = [], []
    for start in places:
        ids = stream[None, start : start + length]
        p, q = target(ids).softmax(-1), draft(ids).softmax(-1)
        overlap.append(torch.minimum(p, q).sum(-1).mean())
        same.append((p.argmax(-1) == q.argmax(-1)).float().mean())
    return float(torch.stack(overlap).mean()), float(torch.stack(same).mean())
