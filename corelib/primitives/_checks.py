"""What a caller of the attention functions can get wrong, said in one place."""

from __future__ import annotations

from torch import Tensor


def check_attention(
    q: Tensor, k: Tensor, v: Tensor, window: int | None, sinks: int, scale: float | None
) -> None:
    """Raise ValueError or TypeError unless ``q (B, H, L, D)``, ``k (B, G, S, D)`` and
    ``v (B, G, S, V)`` fit together and the options make sense."""
    check_same_kind(q=q, k=k, v=v)
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.dim() != 4:
            raise ValueError(
                f"{name}: expected 4 axes (batch, heads, length, width), got shape {tuple(x.shape)}"
            )
    if not q.shape[0] == k.shape[0] == v.shape[0]:
        raise ValueError(
            f"q, k, v: expected one batch size, got {q.shape[0]}, {k.shape[0]} and {v.shape[0]}"
        )
    check_heads_and_widths(q, k, v, heads_axis=1)
    if k.shape[2] != v.shape[2]:
        raise ValueError(f"v: expected the length of k, {k.shape[2]}, got {v.shape[2]}")
    check_options(window, sinks, scale)


def check_same_kind(**tensors: Tensor) -> None:
    """All tensors are floating point, of one dtype and on one device."""
    names, values = list(tensors), list(tensors.values())
    for name, x in tensors.items():
        if not isinstance(x, Tensor):
            raise TypeError(f"{name}: expected a tensor, got {type(x).__name__}")
        if not x.is_floating_point():
            raise TypeError(f"{name}: expected a floating-point dtype, got {x.dtype}")
        if x.dtype != values[0].dtype:
            raise TypeError(
                f"{name}: expected the dtype of {names[0]}, {values[0].dtype}, got {x.dtype}"
            )
        if x.device != values[0].device:
            raise ValueError(
                f"{name}: expected the device of {names[0]}, {values[0].device}, got {x.device}"
            )


def check_heads_and_widths(q: Tensor, k: Tensor, v: Tensor, *, heads_axis: int) -> None:
    """Grouped heads divide and ``q`` is as wide as ``k``."""
    heads, groups = q.shape[heads_axis], k.shape[heads_axis]
    if v.shape[heads_axis] != groups:
        raise ValueError(f"v: expected the heads of k, {groups}, got {v.shape[heads_axis]}")
    if groups == 0 or heads == 0 or heads % groups:
        raise ValueError(
            f"k: expected a number of heads that divides q's {heads} heads, got {groups}"
        )
    if q.shape[-1] != k.shape[-1]:
        raise ValueError(f"k: expected the width of q, {q.shape[-1]}, got {k.shape[-1]}")
    if q.shape[-1] == 0:
        raise ValueError("q: expected a head width of at least 1, got 0")


def check_options(window: int | None, sinks: int, scale: float | None) -> None:
    """``window`` is at least 1 or None, ``sinks`` at least 0, ``scale`` a number or None."""
    if window is not None:
        if isinstance(window, bool) or not isinstance(window, int):
            raise TypeError(f"window: expected an int or None, got {type(window).__name__}")
        if window < 1:
            raise ValueError(f"window: expected at least 1 (or None for no window), got {window}")
    if isinstance(sinks, bool) or not isinstance(sinks, int):
        raise TypeError(f"sinks: expected an int, got {type(sinks).__name__}")
    if sinks < 0:
        raise ValueError(f"sinks: expected at least 0, got {sinks}")
    if scale is not None and not isinstance(scale, int | float):
        raise TypeError(f"scale: expected a number or None, got {type(scale).__name__}")
