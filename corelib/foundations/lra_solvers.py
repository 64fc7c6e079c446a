"""Solvers whose scores on the arena are known beforehand, and rules of thumb that read very little.

The solvers show that the labels are facts of the sequences: 100 % on ListOps and Pathfinder, near
100 % for nearest neighbours on the digits. The rules of thumb show how far one gets without the
task: `read_root` looks at one token of a ListOps expression, `straight_line` only at where the
discs of a Pathfinder are. A model that does no better has not shown that it can do the task.
"""

from __future__ import annotations

import statistics
from collections import Counter

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from ..data import LabelledBatch
from ..data.listops import TOKENS
from ..data.pathfinder import BLANK, DISC, REACH
from .lra import Predict

Labels = Int[Tensor, " B"]


def evaluate_listops(words: list[str]) -> int:
    """The value of one expression, with a stack and no recursion."""
    stack: list[list] = [["", []]]
    for word in words:
        if word.startswith("["):
            stack.append([word, []])
        elif word == "]":
            operator, values = stack.pop()
            stack[-1][1].append(_apply(operator, values))
        else:
            stack[-1][1].append(int(word))
    ((_, (value,)),) = stack
    return value


def _apply(operator: str, values: list[int]) -> int:
    if operator == "[MED":
        return int(statistics.median(values))
    return {"[MIN": min, "[MAX": max, "[SM": lambda x: sum(x) % 10}[operator](values)


def solve_listops(batch: LabelledBatch) -> Labels:
    """Work every expression out."""
    rows = zip(batch.ids.tolist(), batch.lengths.tolist(), strict=True)
    return torch.tensor([evaluate_listops([TOKENS[i] for i in ids[:n]]) for ids, n in rows])


def read_root(train: LabelledBatch) -> Predict:
    """The answer that was commonest in ``train`` after the same first token; reads nothing else."""
    seen: dict[int, Counter] = {}
    for first, label in zip(train.ids[:, 0].tolist(), train.labels.tolist(), strict=True):
        seen.setdefault(first, Counter())[label] += 1
    best = {first: labels.most_common(1)[0][0] for first, labels in seen.items()}
    return lambda batch: torch.tensor([best.get(first, 0) for first in batch.ids[:, 0].tolist()])


def top_level_only(batch: LabelledBatch) -> Labels:
    """Apply the outermost operator to the digits that are its own arguments, skipping all lists."""
    answers = []
    for ids, n in zip(batch.ids.tolist(), batch.lengths.tolist(), strict=True):
        words, level, values = [TOKENS[i] for i in ids[:n]], 0, []
        for word in words:
            level += word.startswith("[") - (word == "]")
            values += [int(word)] if level == 1 and word.isdigit() else []
        answers.append(_apply(words[0], values) if values else 0)
    return torch.tensor(answers)


def solve_pathfinder(batch: LabelledBatch) -> Labels:
    """Flood the drawing from the topmost disc pixel; does it reach every disc pixel?"""
    side = round(batch.ids.shape[1] ** 0.5)
    ink, disc = batch.ids != BLANK, batch.ids == DISC
    flood = F.one_hot(disc.float().argmax(1), side * side).bool()
    while True:
        grown = F.max_pool2d(flood.view(-1, 1, side, side).float(), 2 * REACH + 1, 1, REACH)
        grown = (grown > 0).flatten(1) & ink
        if torch.equal(grown, flood):
            return (flood | ~disc).all(1).long()
        flood = grown


def disc_spread(batch: LabelledBatch) -> Float[Tensor, " B"]:
    """How far the disc pixels lie from their middle, root mean square: half the discs' distance."""
    side = round(batch.ids.shape[1] ** 0.5)
    disc = (batch.ids == DISC).float()
    at = torch.arange(side * side)
    places = torch.stack([at // side, at % side], -1).float()
    count = disc.sum(1, keepdim=True)
    middle = disc @ places / count
    return (
        (disc @ places.square().sum(1) / count[:, 0] - middle.square().sum(1)).clamp(min=0).sqrt()
    )


def straight_line(train: LabelledBatch) -> Predict:
    """Joined when the discs are near each other, by the distance that separates ``train`` best."""
    spread = disc_spread(train)
    right = [(((spread < cut).long() == train.labels).float().mean(), cut) for cut in spread]
    cut = max(right)[1]
    return lambda batch: (disc_spread(batch) < cut).long()


def nearest_neighbour(train: LabelledBatch) -> Predict:
    """The label of the training sequence at the smallest Euclidean distance, ids as numbers."""
    known = train.ids.float()

    def predict(batch: LabelledBatch) -> Labels:
        return train.labels[torch.cdist(batch.ids.float(), known).argmin(1)]

    return predict


def naive_bayes(train: LabelledBatch, vocab: int) -> Predict:
    """Which class makes these tokens likeliest if their order means nothing? Add-one smoothing."""
    counts = F.one_hot(train.labels).T.double() @ _histograms(train.ids, vocab)
    law = ((counts + 1) / (counts + 1).sum(1, keepdim=True)).log()
    return lambda batch: (_histograms(batch.ids, vocab) @ law.T).argmax(1)


def _histograms(ids: Int[Tensor, "B L"], vocab: int) -> Float[Tensor, "B vocab"]:
    counts = torch.zeros(len(ids), vocab, dtype=torch.float64)
    return counts.scatter_add_(1, ids, torch.ones_like(ids, dtype=torch.float64))
