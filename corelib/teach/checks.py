"""Numbers that a lab depends on: asserted where they appear, and printed so that they stay put.

A lab's printed text is never compared (the last digits move between processors); what matters goes
through `check`, which raises when it is off and prints one line that is the same everywhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Number
from typing import Any

import torch
from torch import Tensor

#: Without a tolerance, floating numbers must agree to this share of the largest expected one.
RELATIVE = 1e-5
#: ... and to this much when everything expected is zero.
ABSOLUTE = 1e-6


class CheckFailed(AssertionError):
    """A number in a lab is not what the text around it says."""


def check(name: str, value: Any, expected: Any, tolerance: float | None = None) -> None:
    """Raise unless ``value`` is ``expected``, and print one stable line when it is.

    Args:
        name: what is checked, in a few words.
        value, expected: two numbers, or tensors (arrays, lists of numbers) of one shape: compared
            element by element. Anything else, a string or a shape for example, must be equal.
        tolerance: the largest absolute difference allowed. By default whole numbers must be
            equal and floating ones agree to 1e-5 of the largest expected magnitude.

    Raises:
        CheckFailed: with the value, the expectation and how far off it is.
        ValueError: the tolerance is negative, or given for things that are not numbers.
    """
    if tolerance is not None and not tolerance >= 0:
        raise ValueError(f"tolerance: expected a number of at least 0, got {tolerance}")
    got, want = _as_tensor(value), _as_tensor(expected)
    if got is None or want is None:
        if tolerance is not None:
            raise ValueError(f"tolerance: {name!r} compares no numbers, so it must be equal")
        if isinstance(value, Tensor) or isinstance(expected, Tensor) or value != expected:
            raise CheckFailed(f"{name}: got {value!r}, expected {expected!r}")
        print(f"✓ {name}: {expected}")
        return
    _compare(name, got, want, tolerance)


def check_range(name: str, value: Any, low: float, high: float) -> None:
    """Raise unless ``low <= value <= high``; the printed line names the range only.

    This is the form for what training gives: it moves with the thread count and the processor.
    """
    if not low <= high:
        raise ValueError(f"low, high: expected low <= high, got {low} and {high}")
    number = float(value)
    if not low <= number <= high:
        raise CheckFailed(f"{name}: got {number:.3g}, expected {low:.3g} to {high:.3g}")
    print(f"✓ {name}: between {low:.3g} and {high:.3g}")


def _as_tensor(value: Any) -> Tensor | None:
    """Numbers as a tensor on the CPU, or None for what is not numeric."""
    if isinstance(value, Tensor):
        return value.detach().cpu()
    if isinstance(value, (str, bytes, bool, type(None), torch.Size, tuple)):
        return None  # tuples are shapes and the like: equal or not
    is_number = isinstance(value, Number) or hasattr(value, "__array__")
    is_list = isinstance(value, Sequence) and len(value) > 0
    if not (is_number or is_list):
        return None
    try:
        return torch.as_tensor(value, dtype=torch.float64 if isinstance(value, float) else None)
    except (TypeError, ValueError, RuntimeError):
        return None


def _compare(name: str, got: Tensor, want: Tensor, tolerance: float | None) -> None:
    if got.shape != want.shape:
        raise CheckFailed(f"{name}: got shape {tuple(got.shape)}, expected {tuple(want.shape)}")
    if tolerance is None:
        tolerance = default_tolerance(got, want)
    wide = torch.complex128 if got.is_complex() or want.is_complex() else torch.float64
    got, want = got.to(wide), want.to(wide)
    off = difference(got, want)
    worst = off.max().item() if off.numel() else 0.0
    if not worst <= tolerance:
        raise CheckFailed(f"{name}: {_how_off(got, want, off, tolerance)}")
    if want.dim() == 0:
        sign = "=" if tolerance == 0 else "≈"
        print(f"✓ {name}: {_number(got.item())} {sign} {_number(want.item())}")
    else:
        words = "equal" if tolerance == 0 else f"equal within {tolerance:.0e}"
        print(f"✓ {name}: shape {tuple(want.shape)}, {words}")


def default_tolerance(got: Tensor, want: Tensor) -> float:
    """0 for whole numbers, else `RELATIVE` of the largest finite magnitude that is expected."""
    if not (got.is_floating_point() or want.is_floating_point() or want.is_complex()):
        return 0.0
    finite = want[torch.isfinite(want)].abs()
    largest = finite.max().item() if finite.numel() else 0.0
    return RELATIVE * largest if largest > 0 else ABSOLUTE


def difference(got: Tensor, want: Tensor) -> Tensor:
    """Absolute difference. Equal infinities and two NaNs are 0 apart, one NaN makes a NaN."""
    same = (got == want) | (torch.isnan(got) & torch.isnan(want))
    return torch.where(same, 0.0, (got - want).abs())


def _how_off(got: Tensor, want: Tensor, off: Tensor, tolerance: float) -> str:
    where = int(off.flatten().argmax())
    a, b = _number(got.flatten()[where].item(), 7), _number(want.flatten()[where].item(), 7)
    within = f" within {tolerance:.1g}" if tolerance else ""
    words = f"got {a}, expected {b}{within}, off by {off.max().item():.3g}"
    if want.dim():
        index = tuple(int(i) for i in torch.unravel_index(torch.tensor(where), want.shape))
        count = int((~(off <= tolerance)).sum())
        words += f" at {index} ({count} of {off.numel()} differ)"
    return words


def _number(value: float | complex, digits: int = 3) -> str:
    """Some significant digits, whole numbers in full."""
    if isinstance(value, float) and value.is_integer() and abs(value) < 1e15:
        return f"{int(value):,}"
    return f"{value:.{digits}g}"
