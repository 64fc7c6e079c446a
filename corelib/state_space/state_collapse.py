"""How a recurrent state collapses: what it holds, what that does to the loss, what it can recall.

After Stuffed Mamba (arXiv 2410.07145, sections 3 and 4). A model collapses if past its training
length its loss somewhere exceeds twice the largest within it (`collapse_ratio`, section 4.2).
`recall_stream` is a language model's situation in small: facts are told and asked for again soon,
without end, and old facts are in the way of new ones. `collapse_probe` reads the states of every
`Mamba2Block` of a model on the way, `capacity_curve` its answers over lengths.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from ..data.synthetic import IGNORE, TaskBatch
from ..primitives.selective_scan import step_size
from .mamba2 import Mamba2Block

Scan = Callable[..., Tensor | tuple[Tensor, Tensor]]


def recall_stream(
    batch: int,
    length: int,
    *,
    keys: int,
    values: int,
    within: int,
    generator: torch.Generator,
) -> TaskBatch:
    """Pairs ``key value key value …`` without end; half of them ask for one told not long ago.

    A pair is told with a random key and value, or repeats one of the last ``within`` pairs with the
    value that its key has had last: that value is the target. Ids below ``keys`` are keys, the
    ``values`` above them values.
    """
    for name, number in dict(length=length, keys=keys, values=values, within=within).items():
        if number < 1:
            raise ValueError(f"{name}: expected at least 1, got {number}")
    pairs, rows = length // 2 + 1, torch.arange(batch)
    key = torch.randint(keys, (batch, pairs), generator=generator)
    value = torch.randint(values, (batch, pairs), generator=generator)
    asked = torch.rand(batch, pairs, generator=generator) < 0.5
    back = torch.randint(1, within + 1, (batch, pairs), generator=generator)
    asked[:, 0] = False
    latest = torch.zeros(batch, keys, dtype=torch.int64)
    for p in range(pairs):
        again = key[rows, (p - back[:, p]).clamp(min=0)]
        key[:, p] = torch.where(asked[:, p], again, key[:, p])
        value[:, p] = torch.where(asked[:, p], latest[rows, key[:, p]], value[:, p])
        latest[rows, key[:, p]] = value[:, p]
    ids = torch.stack([key, value + keys], -1).flatten(1)
    targets = torch.full_like(ids, IGNORE)
    targets[:, ::2] = torch.where(asked, value + keys, IGNORE)
    return TaskBatch(ids[:, :length], targets[:, :length])


# --- looking into a model -------------------------------------------------------------------------


@contextlib.contextmanager
def patched(model: nn.Module, scan: Scan) -> Iterator[nn.Module]:
    """``model`` with ``scan`` in place of `ssd_chunked` in all its `Mamba2Block` layers."""
    blocks = _blocks(model)
    before = [block.scan for block in blocks]
    try:
        for block in blocks:
            block.scan = scan
        yield model
    finally:
        for block, scan in zip(blocks, before, strict=True):
            block.scan = scan


class Probe(NamedTuple):
    """What `collapse_probe` saw, at ``P`` positions: means over the batch, a row for each layer.

    ``norm``, ``mean``, ``variance``: of the numbers in a head's state. ``retained``: how much of
    the first step is left. ``loss``: in nats, over the scored positions since the one before (NaN
    where there are none).
    """

    positions: Int[Tensor, " P"]
    norm: Float[Tensor, "layers P H"]
    mean: Float[Tensor, "layers P H"]
    variance: Float[Tensor, "layers P H"]
    retained: Float[Tensor, "layers P H"]
    loss: Float[Tensor, " P"]


@torch.no_grad()
def collapse_probe(model: nn.Module, task: TaskBatch, *, every: int = 16) -> Probe:
    """Run ``model`` over a batch and look at its states and its loss at every ``every`` positions.

    Works with any scan that goes on from a state; so not inside ``patched(model, window_state)``.
    Raises ValueError for a model without `Mamba2Block`, or an ``every`` below 1.
    """
    if every < 1:
        raise ValueError(f"every: expected at least 1, got {every}")
    blocks = _blocks(model)
    seen: list[list[tuple[Tensor, ...]]] = [[] for _ in blocks]
    before = [block.scan for block in blocks]
    try:
        for block, rows in zip(blocks, seen, strict=True):
            block.scan = _recorder(block.scan, rows, every)
        logits = model(task.ids)
    finally:
        for block, scan in zip(blocks, before, strict=True):
            block.scan = scan
    statistics = [torch.stack([torch.stack(row) for row in rows], 1) for rows in seen]
    L = task.ids.shape[1]
    positions = torch.tensor([min(start + every, L) for start in range(0, L, every)])
    return Probe(positions, *torch.stack(statistics, 1), binned_loss(logits, task, every))


def _recorder(scan: Scan, rows: list, every: int) -> Scan:
    """``scan`` in pieces; the statistics of the state behind each are added to ``rows``."""

    def recording(
        x, dt, A, B, C, D=None, *, dt_bias=None, dt_softplus=False, chunk=64, state=None,
        return_state=False,
    ):  # fmt: skip
        dt = step_size(dt, dt_bias, dt_softplus)
        ys, log_kept = [x[:, :, :0]], 0.0
        for start in range(0, x.shape[2], every):
            now = slice(start, start + every)
            parts = x[:, :, now], dt[:, :, now], A, B[:, :, now], C[:, :, now], D
            y, state = scan(*parts, chunk=chunk, state=state, return_state=True)
            ys.append(y)
            first = dt[:, :, max(start, 1) : start + every]  # what fades the first step
            log_kept = log_kept + first.sum(2) * A
            numbers = state.flatten(2)
            variance, mean = torch.var_mean(numbers, 2, correction=0)
            whole = numbers.norm(dim=2), mean, variance, torch.exp(log_kept)
            rows.append(tuple(part.mean(0) for part in whole))
        y = torch.cat(ys, 2)
        return (y, state) if return_state else y

    return recording


def binned_loss(
    logits: Float[Tensor, "B L vocab"], task: TaskBatch, every: int
) -> Float[Tensor, " P"]:
    """Mean loss of the scored positions of each bin of ``every``; NaN where there are none."""
    loss = F.cross_entropy(logits.mT, task.targets, ignore_index=IGNORE, reduction="none").sum(0)
    scored = (task.targets != IGNORE).sum(0)
    short = -len(loss) % every
    total, count = (F.pad(part, [0, short]).view(-1, every).sum(1) for part in (loss, scored))
    return total / count


def collapse_ratio(positions: Int[Tensor, " P"], loss: Float[Tensor, " P"], trained: int) -> float:
    """Largest loss past the training length over the largest within; above 2: collapsed.

    Raises ValueError where one of the two has no loss.
    """
    scored = ~loss.isnan()
    inside, past = loss[scored & (positions <= trained)], loss[scored & (positions > trained)]
    if not len(inside) or not len(past):
        raise ValueError(f"trained: expected losses on both sides of it, got {trained}")
    return (past.max() / inside.max()).item()


@torch.no_grad()
def capacity_curve(
    models: Mapping, lengths: Sequence[int], task: Callable[[int], TaskBatch]
) -> dict[object, list[float]]:
    """For each model, the share of right answers at each length; ``task(length)`` asks."""
    if not models or not lengths:
        raise ValueError("models, lengths: expected at least one of each, got none")
    asked = {length: task(length) for length in lengths}
    return {
        name: [_accuracy(model(batch.ids), batch) for batch in asked.values()]
        for name, model in models.items()
    }


def recall_length(lengths: Sequence[int], accuracy: Sequence[float], least: float = 0.95) -> int:
    """The longest length up to which every accuracy is at least ``least``; 0 if none is."""
    reached = 0
    for length, share in sorted(zip(lengths, accuracy, strict=True)):
        if share < least:
            break
        reached = length
    return reached


def _accuracy(logits: Tensor, task: TaskBatch) -> float:
    scored = task.targets != IGNORE
    if not scored.any():
        raise ValueError("task: expected some scored positions, got none")
    return (logits.argmax(-1) == task.targets)[scored].double().mean().item()


def _blocks(model: nn.Module) -> list[Mamba2Block]:
    blocks = [module for module in model.modules() if isinstance(module, Mamba2Block)]
    if not blocks:
        raise ValueError(f"model: expected some Mamba2Block, got {type(model).__name__} without")
    return blocks
