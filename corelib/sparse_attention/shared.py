"""What the methods that make a trained model's attention sparse share: heads with planted patterns.

`planted_heads` draws queries and keys whose attention map has a known shape, so that an estimate
can be compared with the truth. The shapes are those that long-context models show (MInference,
arXiv 2407.02490, figure 3):

* ``"a_shape"``: the first keys (sinks) and the nearest ones;
* ``"vertical_slash"``: a few keys that everybody looks at, and a few distances;
* ``"block"``: stretches of text on a topic look at the stretches on the same topic;
* ``"dense"``: no pattern, the scores are plain noise.

Distances are planted with rotary features. With random frequencies ``w``, ``q_i = (cos w i, sin w
i)`` and ``k_j = (cos w (j + o), sin w (j + o))`` have the product ``sum cos(w (i - j - o))``, which
peaks where ``i - j = o`` and is small elsewhere.

Small, not zero: with ``n`` distances, 0 among them, on ``m = 3 D / 4`` features the other scores
vary by ``n * strength ** 2 / m``, and each weighs ``exp(n * strength ** 2 / (2 m))`` on average. A
line thus weighs as much as ``exp(strength - n * strength ** 2 / (2 m))`` positions off the lines:
340 with the defaults, which suit a thousand positions or so, and 17,000 with ``D=128, strength=12,
distances=2``. In longer prompts the lines are there, but no longer hold the attention.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

KINDS = ("a_shape", "vertical_slash", "block", "dense")


class Planted(NamedTuple):
    """One head per entry of ``kinds``, with what was planted in it.

    ``q, k, v (1, H, L, D)`` for ``scale=1``. ``columns[h]``: keys that all queries look at;
    ``distances[h]``: distances, 0 aside; ``topics (H, L)``: each position's topic, or -1.
    """

    q: Float[Tensor, "1 H L D"]
    k: Float[Tensor, "1 H L D"]
    v: Float[Tensor, "1 H L D"]
    columns: list[list[int]]
    distances: list[list[int]]
    topics: Tensor


def planted_heads(
    kinds: Sequence[str],
    L: int,
    *,
    D: int = 64,
    strength: float = 10.0,
    columns: int = 4,
    distances: int = 3,
    stretch: int = 64,
    seed: int = 0,
) -> Planted:
    """Heads of the given ``kinds`` over ``L`` positions.

    Args:
        kinds: some of `KINDS`, one per head.
        D: head width, a multiple of 8; distances are the purer, the wider it is.
        strength: how far a planted score lies above the others (nats).
        columns, distances: how many are planted in a vertical-slash head.
        stretch: tokens that keep to one topic in a block head.
        seed: same seed, same heads.
    """
    if unknown := sorted(set(kinds) - set(KINDS)):
        raise ValueError(f"kinds: expected some of {KINDS}, got {unknown}")
    if D < 8 or D % 8:
        raise ValueError(f"D: expected a multiple of 8, got {D}")
    if L < 1:
        raise ValueError(f"L: expected at least 1, got {L}")
    generator = torch.Generator().manual_seed(seed)
    heads = [_HEADS[kind](L, D, strength, columns, distances, stretch, generator) for kind in kinds]
    q, k, columns_of, distances_of, topics = zip(*heads, strict=True)
    v = torch.randn(1, len(heads), L, D, generator=generator)
    return Planted(
        torch.stack(q)[None], torch.stack(k)[None], v, [*columns_of], [*distances_of],
        torch.stack(topics),
    )  # fmt: skip


def _rotary(L: int, offset: int, frequencies: Tensor) -> Tensor:
    """``(L, 2 F)``: cosines and sines of positions ``offset ..``."""
    angles = (torch.arange(L) + offset)[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], -1)


def _distances(L, width, offsets, strength, spread, generator) -> tuple[Tensor, Tensor]:
    """Queries and keys ``(L, width)`` whose score at each offset is ``strength``.

    ``spread``: the largest frequency; small ones make a wide hill instead of a line.
    """
    frequencies = torch.rand(width // 2, generator=generator) * spread
    q = _rotary(L, 0, frequencies)
    k = sum(_rotary(L, o, frequencies) for o in offsets)
    return q, k * (2 * strength / width)


def _columns(L, width, places, strength) -> tuple[Tensor, Tensor]:
    """Keys at ``places`` that every query scores ``strength``."""
    q, k = torch.zeros(2, L, width)
    q[:, 0] = 1.0
    k[places, 0] = strength
    return q, k


def _noise(L, width, generator) -> tuple[Tensor, Tensor]:
    """Scores of unit variance."""
    q, k = torch.randn(2, L, width, generator=generator)
    return q, k * width**-0.5


def _joined(*parts: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Scores of parts side by side add up."""
    return tuple(torch.cat(x, -1) for x in zip(*parts, strict=True))


def _nowhere(L: int) -> Tensor:
    return torch.full((L,), -1)


def _a_shape(L, D, strength, columns, distances, stretch, generator):
    sinks = list(range(min(16, L)))
    near = _distances(L, D // 2, [0], strength, 0.3, generator)
    first = _columns(L, D // 4, sinks, strength)
    q, k = _joined(near, first, _noise(L, D // 4, generator))
    return q, k, sinks, [], _nowhere(L)


def _vertical_slash(L, D, strength, columns, distances, stretch, generator):
    places = torch.randperm(max(L // 2, 1), generator=generator)[:columns].sort().values.tolist()
    far = 1 + torch.randperm(max(L // 2, 1), generator=generator)[:distances].sort().values
    lines = _distances(L, 3 * D // 4, [0, *far.tolist()], strength, torch.pi, generator)
    q, k = _joined(lines, _columns(L, D // 8, places, strength), _noise(L, D // 8, generator))
    return q, k, places, far.tolist(), _nowhere(L)


def _block(L, D, strength, columns, distances, stretch, generator):
    count = -(-L // stretch)
    topics = torch.randint(max(2, count // 3), (count,), generator=generator)
    topics = topics.repeat_interleave(stretch)[:L]
    width = 3 * D // 4
    directions = torch.randn(int(topics.max()) + 1, width, generator=generator)
    directions = directions / directions.norm(dim=-1, keepdim=True)
    about = directions[topics], directions[topics] * strength
    q, k = _joined(about, _noise(L, D - width, generator))
    return q, k, [], [], topics


def _dense(L, D, strength, columns, distances, stretch, generator):
    q, k = _noise(L, D, generator)
    return q, k, [], [], _nowhere(L)


_HEADS = dict(zip(KINDS, (_a_shape, _vertical_slash, _block, _dense), strict=True))
