"""What a transformer layer costs in full, with thin weights, and with Linformer: counted, and as
formulas (`greenformers`).

A layer has four square projections and a feed-forward ``4 C`` wide: ``12 C^2`` multiplications a
token; attention adds ``2 n C``. Factors of rank ``r`` make the weights ``8 C r + 10 C r``.
Linformer pays ``2 k C`` for attention and ``2 k C`` for mixing keys and values, whatever ``n``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from corelib.measure.memory import peak_memory
from corelib.measure.work import count_work


def layer_macs(n: int, C: int, *, rank: int | None = None, keys: int | None = None) -> int:
    """Multiplications a token of one layer on ``n`` tokens, by the formulas at the top.

    ``rank``: of every weight (LRT); ``keys``: Linformer's; None is full, and both may be given.
    """
    weights = 12 * C * C if rank is None else 18 * C * rank
    return weights + (2 * n * C if keys is None else 4 * keys * C)


def crossover(C: int, rank: int, keys: int) -> int:
    """The length up to which LRT multiplies less than Linformer (below 0: nowhere)."""
    return 6 * C + 2 * keys - 9 * rank


def measured_crossover(
    lengths: Sequence[int], first: Sequence[float], second: Sequence[float]
) -> float | None:
    """The length from which ``second`` stays below ``first``, between two of ``lengths``.

    Costs of any kind; interpolated between logarithms. None where it is not below at the end.
    """
    if not len(lengths) == len(first) == len(second) or len(lengths) < 2:
        counts = len(lengths), len(first), len(second)
        raise ValueError(f"lengths, first, second: expected as many of each, got {counts}")
    gaps = [math.log(a / b) for a, b in zip(first, second, strict=True)]
    if gaps[-1] <= 0:
        return None
    last = max((i for i, gap in enumerate(gaps) if gap <= 0), default=None)
    if last is None:
        return float(lengths[0])
    share = -gaps[last] / (gaps[last + 1] - gaps[last])
    return math.exp((1 - share) * math.log(lengths[last]) + share * math.log(lengths[last + 1]))


class Cost(NamedTuple):
    """One forward pass: operations (a multiplication and an addition are two), numbers and bytes.

    ``peak_bytes``: the most that tensors made on the way held at one time.
    """

    operations: int
    parameters: int
    weight_bytes: int
    peak_bytes: int


@torch.no_grad()
def flops_params_memory(model: nn.Module, *inputs: Tensor) -> Cost:
    """Counted on ``model(*inputs)`` as it runs, not taken from formulas."""
    weights = list(model.parameters())
    return Cost(
        count_work(lambda: model(*inputs)),
        sum(w.numel() for w in weights),
        sum(w.nbytes for w in weights),
        peak_memory(lambda: model(*inputs)),
    )


class EnergyEstimate(NamedTuple):
    """An estimate, nothing measured: it is proportional to the operations that went in."""

    seconds: float
    kwh: float
    grams_co2: float


def energy_estimate(
    operations: float,
    *,
    operations_per_second: float,
    watts: float,
    overhead: float = 1.58,
    grams_co2_per_kwh: float = 433.0,
) -> EnergyEstimate:
    """What so many operations may take on hardware that *reaches* this rate at this power.

    ``overhead`` of the data centre and CO2 (0.954 pounds a kWh, the USA) as in Strubell et al.,
    arXiv 1906.02243.
    """
    named = dict(operations=operations, operations_per_second=operations_per_second, watts=watts)
    for name, value in named.items():
        if not value > 0:
            raise ValueError(f"{name}: expected a positive number, got {value}")
    seconds = operations / operations_per_second
    kwh = overhead * watts * seconds / 3.6e6
    return EnergyEstimate(seconds, kwh, grams_co2_per_kwh * kwh)
