"""Whether a returned value is the expected one, and in which words it is not."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .checks import default_tolerance, difference


def differs(got: Any, expected: Any, tolerance: float | None = None) -> str | None:
    """What is wrong with ``got``, in words; None when it is as ``expected``.

    Tensors, arrays and numbers agree within ``tolerance`` and must have one shape (their dtype is
    free); lists and tuples, which may stand for each other, and mappings agree entry by entry.
    """
    if isinstance(expected, Mapping) and isinstance(got, Mapping):
        if set(got) != set(expected):
            return (
                f"returned the keys {sorted(map(str, got))}, expected {sorted(map(str, expected))}"
            )
        pairs = [(f"[{key!r}]", got[key], expected[key]) for key in expected]
        return _first_difference(pairs, tolerance)
    if isinstance(expected, (list, tuple)) and isinstance(got, (list, tuple)):
        if len(got) != len(expected):
            return f"returned {len(got)} values, expected {len(expected)}"
        pairs = [(f"[{i}]", *pair) for i, pair in enumerate(zip(got, expected, strict=True))]
        return _first_difference(pairs, tolerance)
    if _is_numeric(got) and _is_numeric(expected):
        return _numbers_differ(torch.as_tensor(got), torch.as_tensor(expected), tolerance)
    if got is None and expected is not None:
        return f"returned None, expected {summary(expected)} (is a return missing?)"
    if type(got) is not type(expected) or got != expected:
        return f"returned {summary(got)}, expected {summary(expected)}"
    return None


def _first_difference(pairs: list[tuple[str, Any, Any]], tolerance: float | None) -> str | None:
    for place, got, expected in pairs:
        if trouble := differs(got, expected, tolerance):
            return f"{place} {trouble}"
    return None


def _is_numeric(value: Any) -> bool:
    return isinstance(value, (Tensor, bool, int, float, complex)) or hasattr(value, "__array__")


def _numbers_differ(got: Tensor, expected: Tensor, tolerance: float | None) -> str | None:
    got, expected = got.detach(), expected.detach()
    if got.shape != expected.shape:
        return f"returned shape {tuple(got.shape)}, expected {tuple(expected.shape)}"
    allowed = default_tolerance(got, expected) if tolerance is None else tolerance
    wide = torch.complex128 if got.is_complex() or expected.is_complex() else torch.float64
    off = difference(got.to(wide), expected.to(wide))
    if off.numel() == 0 or off.max() <= allowed:
        return None
    where = int(off.flatten().argmax())
    words = f"returned {summary(got)}, expected {summary(expected)}"
    if got.dim() and got.numel() > 1:
        index = tuple(int(i) for i in torch.unravel_index(torch.tensor(where), got.shape))
        a, b = got.flatten()[where].item(), expected.flatten()[where].item()
        words += f"; furthest apart at {index}: {a:.4g} against {b:.4g}"
    return f"{words}; largest difference {off.max().item():.3g}"


def summary(value: Any) -> str:
    """A value in a few words: small tensors in full, larger ones by shape and range."""
    if isinstance(value, (list, tuple)):
        inside = ", ".join(map(summary, value[:4])) + (", …" if len(value) > 4 else "")
        return f"[{inside}]" if isinstance(value, list) else f"({inside})"
    if not isinstance(value, Tensor) and hasattr(value, "__array__"):
        value = torch.as_tensor(value)
    if isinstance(value, Tensor):
        return _tensor_summary(value.detach())
    if isinstance(value, float):
        return f"{value:.6g}"
    text = getattr(value, "__name__", None) or repr(value)
    return text if len(text) <= 60 else text[:59] + "…"


def _tensor_summary(tensor: Tensor) -> str:
    if tensor.numel() <= 8 and not tensor.is_complex():
        plain = tensor.flatten().tolist()
        rounded = [str(x) if isinstance(x, bool) else f"{x:.4g}" for x in plain]
        shape = "" if tensor.dim() < 2 else f" as {tuple(tensor.shape)}"
        return (rounded[0] if tensor.dim() == 0 else f"[{', '.join(rounded)}]") + shape
    words = f"tensor {tuple(tensor.shape)}"
    if tensor.is_complex() or tensor.dtype == torch.bool:
        return words
    return f"{words} from {tensor.min().item():.3g} to {tensor.max().item():.3g}"
