"""Pathfinder: does a dashed curve join the two discs?

After Linsley et al. (arXiv 1805.08315) and Long Range Arena (Tay et al., arXiv 2011.04006, section
2.2.5; Path-X is the same at 128 by 128). Our own renderer: in every picture two long curves and
some shorter ones wander about and never come near each other. The discs lie at both ends of one
long curve (label 1) or at an end of each (label 0), so that only following a curve tells.

`REACH` is what makes the label a fact of the drawing: pixels of one curve are at most that far
apart (in the larger of the two coordinates), pixels of two curves are farther.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from .labelled import LabelledBatch, balanced_labels

BLANK, DASH, DISC = 0, 1, 2
PERIOD, VISIBLE = 4, 3  # of four steps along a curve three are drawn
REACH = 2
BEND = 0.22  # radians, standard deviation of the turn at each step of one pixel
PATIENCE = 40  # attempts at the curves of a picture before it is begun anew
ROUNDS = 50


def pathfinder(
    batch: int,
    side: int,
    *,
    generator: torch.Generator,
    distractors: int | None = None,
    length: int | None = None,
) -> LabelledBatch:
    """Pictures of ``side`` by ``side`` pixels, row by row: ids `BLANK`, `DASH` or `DISC`.

    ``length``: steps of one pixel along each long curve, half the side by default; the
    ``distractors`` (one for every 16 pixels of ``side`` but the first) are half as long.

    Raises ``ValueError`` for sizes that do not fit together or leave too little room.
    """
    length = side // 2 if length is None else length
    distractors = side // 16 - 1 if distractors is None else distractors
    if side < 16 or not 4 <= length <= 2 * side or not 0 <= distractors <= side // 4:
        raise ValueError(
            "side, length, distractors: expected side >= 16, 4 <= length <= 2 * side and "
            f"distractors <= side // 4, got {side}, {length} and {distractors}"
        )
    steps = torch.tensor([length, length] + [length // 2] * distractors)
    labels = balanced_labels(batch, 2, generator)
    finished: list[Tensor] = []
    missing = batch
    for _ in range(ROUNDS):
        points, complete = _curves(missing + 16, side, steps, generator)
        finished.append(points[complete][:missing])
        missing -= len(finished[-1])
        if not missing:
            break
    else:
        raise ValueError(
            f"side: too little room for {len(steps)} curves of {length} steps, got {side}"
        )
    return _draw(torch.cat(finished), steps, labels, side)


def _curves(batch: int, side: int, steps: Tensor, generator: torch.Generator):
    """Points ``(B, curves, steps + 1, 2)`` of curves that keep apart, and which rows have all."""
    curves, longest = len(steps), int(steps.max())
    points = torch.zeros(batch, curves, longest + 1, 2, dtype=torch.int64)
    done = torch.zeros(batch, dtype=torch.int64)
    taken = torch.zeros(batch, side, side, dtype=torch.bool)
    for _ in range(PATIENCE):
        rows = (done < curves).nonzero().flatten()
        if not len(rows):
            break
        wanted = steps[done[rows]]
        candidate = _wander(len(rows), side, longest, generator)
        candidate = candidate.gather(1, _held(wanted, longest))
        inside = ((candidate >= 1) & (candidate <= side - 2)).all(2).all(1)
        rows, candidate = rows[inside], candidate[inside]
        cover = with_discs(candidate, side)
        free = ~(near(taken[rows]) & cover).flatten(1).any(1)
        rows = rows[free]
        points[rows, done[rows]] = candidate[free]
        taken[rows] |= cover[free]
        done[rows] += 1
    return points, done == curves


def _wander(batch: int, side: int, steps: int, generator: torch.Generator) -> Tensor:
    """Pixels ``(batch, steps + 1, 2)`` of curves with a slowly turning direction."""
    start = 1 + (side - 3) * torch.rand(batch, 1, 2, generator=generator)
    turns = BEND * torch.randn(batch, steps, generator=generator)
    turns[:, 0] += 2 * torch.pi * torch.rand(batch, generator=generator)
    direction = turns.cumsum(1)
    moves = torch.stack([direction.sin(), direction.cos()], -1)
    return torch.cat([start, start + moves.cumsum(1)], 1).round().long()


def _held(wanted: Tensor, longest: int) -> Tensor:
    """Indices that stay at the last of ``wanted`` steps once it is reached."""
    index = torch.minimum(torch.arange(longest + 1), wanted[:, None])
    return index[..., None].expand(-1, -1, 2)


def _mark(points: Int[Tensor, "B n 2"], side: int) -> Bool[Tensor, "B side side"]:
    marked = torch.zeros(len(points), side * side, dtype=torch.bool)
    marked.scatter_(1, points[..., 0] * side + points[..., 1], True)
    return marked.view(-1, side, side)


def _grow(marked: Bool[Tensor, "B side side"], by: int) -> Bool[Tensor, "B side side"]:
    """Everything within ``by`` pixels, in the larger of the two coordinates."""
    return F.max_pool2d(marked[:, None].float(), 2 * by + 1, 1, by)[:, 0] > 0


def near(marked: Bool[Tensor, "B side side"]) -> Bool[Tensor, "B side side"]:
    """Everything that counts as connected with what is marked."""
    return _grow(marked, REACH)


def with_discs(points: Int[Tensor, "B n 2"], side: int) -> Bool[Tensor, "B side side"]:
    """All pixels that a curve may take, drawn or not, with a disc at both ends."""
    return _mark(points, side) | _grow(_mark(points[:, [0, -1]], side), 1)


def _draw(points: Tensor, steps: Tensor, labels: Tensor, side: int) -> LabelledBatch:
    shown = torch.arange(points.shape[2]) % PERIOD < VISIBLE
    ink = torch.zeros(len(points), side, side, dtype=torch.bool)
    for n, wanted in enumerate(steps.tolist()):
        drawn = shown[: wanted + 1].clone()
        drawn[-1] = True  # every curve ends in a drawn pixel
        ink |= _mark(points[:, n, : wanted + 1][:, drawn], side)
    discs = _grow(_mark(_disc_centres(points, labels), side), 1)
    ids = torch.where(discs, DISC, torch.where(ink, DASH, BLANK)).flatten(1)
    return LabelledBatch(ids, torch.full((len(ids),), side * side), labels)


def _disc_centres(points: Tensor, labels: Tensor) -> Int[Tensor, "B 2 2"]:
    """Both ends of the first curve, or an end of each of two, as far apart as those if possible.

    Matching the distances keeps it from giving the answer away.
    """
    ends = points[:, :2][:, :, [0, -1]]  # (B, curve, end, 2)
    joined = ends[:, 0]
    pairs = torch.stack(
        [torch.stack([ends[:, 0, a], ends[:, 1, b]], 1) for a in (0, 1) for b in (0, 1)], 1
    )
    off = (disc_distance(pairs) - disc_distance(joined)[:, None]).abs()
    apart = pairs[torch.arange(len(pairs)), off.argmin(1)]
    return torch.where((labels == 1)[:, None, None], joined, apart)


def disc_distance(centres: Int[Tensor, "*B 2 2"]) -> Float[Tensor, "*B"]:
    """Pixels between the two discs, as the crow flies."""
    return (centres[..., 0, :] - centres[..., 1, :]).float().norm(dim=-1)
