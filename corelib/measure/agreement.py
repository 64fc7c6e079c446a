"""Do two results hold the same numbers? Nested tensors, numbers, tuples and dictionaries."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from numbers import Real
from typing import Any

import torch
from torch import Tensor

# Largest difference over largest value. Wide enough for another order of summation over
# thousands of terms, narrow enough for a wrong mask or scale to show.
TOLERANCE = {
    torch.float64: 1e-9,
    torch.complex128: 1e-9,
    torch.float32: 1e-4,
    torch.complex64: 1e-4,
    torch.float16: 5e-3,
    torch.bfloat16: 3e-2,
}


def agreement(result: Any, reference: Any, tolerance: Real | None, name: str) -> float:
    """The largest difference over the largest value, at most ``tolerance``.

    Infinities and NaN must stand in the same places. ``tolerance=None`` takes `TOLERANCE` of the
    coarser of the two dtypes.

    Raises:
        ValueError: structure, shape or values differ; the message names the contestant and the
            place in the result.
    """
    worst = 0.0
    for place, got, expected in _pairs(result, reference, "result", name):
        if got.shape != expected.shape:
            raise ValueError(
                f"contestant {name!r}: {place} has shape {tuple(got.shape)}, "
                f"expected {tuple(expected.shape)}"
            )
        limit = _limit(got, expected) if tolerance is None else tolerance
        difference = _difference(got, expected)
        if not difference <= limit:
            raise ValueError(
                f"contestant {name!r} computes something else: {place} differs by "
                f"{difference:.1e} of the largest value, allowed is {limit:.0e}"
            )
        worst = max(worst, difference)
    return worst


def _pairs(got: Any, expected: Any, place: str, name: str):
    """Yield (place, tensor, tensor) for every leaf."""
    if isinstance(expected, Tensor) or _is_number(expected):
        if not (isinstance(got, Tensor) or _is_number(got)):
            raise ValueError(f"contestant {name!r}: {place} is a {type(got).__name__}, no tensor")
        yield place, torch.as_tensor(got).detach(), torch.as_tensor(expected).detach()
    elif isinstance(expected, Mapping) and isinstance(got, Mapping) and set(got) == set(expected):
        for key in expected:
            yield from _pairs(got[key], expected[key], f"{place}[{key!r}]", name)
    elif _is_sequence(expected) and _is_sequence(got) and len(got) == len(expected):
        for i, (a, b) in enumerate(zip(got, expected, strict=True)):
            yield from _pairs(a, b, f"{place}[{i}]", name)
    elif got != expected:
        raise ValueError(f"contestant {name!r}: {place} is {got!r:.80}, expected {expected!r:.80}")


def _is_number(value: Any) -> bool:
    return isinstance(value, (bool, int, float, complex))


def _is_sequence(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, (str, bytes))


def _limit(got: Tensor, expected: Tensor) -> float:
    return max(TOLERANCE.get(tensor.dtype, 0.0) for tensor in (got, expected))


def _difference(got: Tensor, expected: Tensor) -> float:
    """Largest difference over largest finite value; infinite when the non-finite places differ."""
    wide = torch.complex128 if got.is_complex() or expected.is_complex() else torch.float64
    got, expected = (tensor.to("cpu", wide) for tensor in (got, expected))
    finite = torch.isfinite(expected)
    same = (got == expected) | (got.isnan() & expected.isnan())
    if not bool(same[~finite].all()):
        return float("inf")
    got, expected = got[finite], expected[finite]
    if not expected.numel():
        return 0.0
    largest = expected.abs().max().item()
    difference = (got - expected).abs().max().item()
    return difference / largest if largest else difference
