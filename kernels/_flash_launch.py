"""How flash attention's kernels are launched: checks, block sizes, arguments, specialisations.

One table serves the launcher and the offline compile gate, so that what is reported is what runs.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from corelib.kernels._flash_table import candidates_for, slice_width
from corelib.kernels._shared import (
    Blocks,
    check_device,
    is_interpreted,
    launch,
    padded,
    precision,
)

MAX_WIDTH = 256
#: Small, unequal and cheap: what the interpreter runs.
INTERPRETED = Blocks(block_m=32, block_n=16)


class Options(NamedTuple):
    """What attends to what. Query ``i`` stands at key position ``i + shift``."""

    causal: bool
    window: int | None
    sinks: int
    scale: float
    shift: int


class Packed(NamedTuple):
    """Where the sequences of a packed batch start, and the longest of them."""

    starts_q: Tensor
    starts_k: Tensor
    longest_q: int
    longest_k: int


def options_for(
    q: Tensor, causal: bool, window: int | None, sinks: int, scale: float | None, shift: int
) -> Options:
    """Check the options; ``scale=None`` is ``D ** -0.5``."""
    for name, value, least in (("window", window, 1), ("sinks", sinks, 0)):
        if value is None and name == "window":
            continue
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"{name}: expected an int, got {type(value).__name__}")
        if value < least:
            raise ValueError(f"{name}: expected at least {least}, got {value}")
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    return Options(bool(causal), window, sinks, scale, shift)


def check_inputs(q: Tensor, k: Tensor, v: Tensor) -> None:
    """Raise unless ``q (B, H, L, D)``, ``k (B, G, S, D)`` and ``v (B, G, S, V)`` fit together."""
    for name, x in (("q", q), ("k", k), ("v", v)):
        if not isinstance(x, Tensor):
            raise TypeError(f"{name}: expected a tensor, got {type(x).__name__}")
        if x.dtype not in (torch.float16, torch.bfloat16, torch.float32):
            raise TypeError(f"{name}: expected float16, bfloat16 or float32, got {x.dtype}")
        if x.dtype != q.dtype:
            raise TypeError(f"{name}: expected the dtype of q, {q.dtype}, got {x.dtype}")
        if x.device != q.device:
            raise ValueError(f"{name}: expected the device of q, {q.device}, got {x.device}")
        if x.dim() != 4:
            raise ValueError(f"{name}: expected (batch, heads, length, width), got {shape_of(x)}")
        if not 1 <= x.shape[-1] <= MAX_WIDTH:
            raise ValueError(f"{name}: expected a width of 1 to {MAX_WIDTH}, got {x.shape[-1]}")
    if q.shape[0] != k.shape[0] or q.shape[-1] != k.shape[-1]:
        raise ValueError(f"k: expected q's batch and width, {shape_of(q)}, got {shape_of(k)}")
    if k.shape[:-1] != v.shape[:-1]:
        raise ValueError(f"v: expected k's shape {shape_of(k)} up to width, got {shape_of(v)}")
    if k.shape[1] == 0 or q.shape[1] % k.shape[1]:
        raise ValueError(f"k: expected heads that divide q's {q.shape[1]}, got {k.shape[1]}")


def shape_of(x: object) -> object:
    """The shape of a tensor or else the type, for messages."""
    return tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__


def empty_like_rows(x: Tensor, width: int, dtype: torch.dtype) -> Tensor:
    """``(B, H, L, width)``, heads inside tokens where ``x (B, H, L, D)`` has them so."""
    B, H, L, _ = x.shape
    if x.stride(1) < x.stride(2):
        return torch.empty((B, L, H, width), dtype=dtype, device=x.device).transpose(1, 2)
    return torch.empty((B, H, L, width), dtype=dtype, device=x.device)


def with_contiguous_rows(*tensors: Tensor) -> list[Tensor]:
    return [x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous() for x in tensors]


def strides(**tensors: Tensor) -> dict[str, int]:
    """``q (B, H, L, D)`` -> ``{"q_b": …, "q_h": …, "q_l": …}``."""
    return {
        f"{name}_{axis}": x.stride(i) for name, x in tensors.items() for i, axis in enumerate("bhl")
    }


def arguments(
    q: Tensor, k: Tensor, v: Tensor, options: Options, packed: Packed | None, **tensors: Tensor
) -> dict[str, Any]:
    """What all of flash attention's kernels take; ``tensors`` are passed with their strides."""
    (_, H, L, D), (_, G, S, _), V = q.shape, k.shape, v.shape[-1]
    tensors = {"q": q, "k": k, "v": v, **tensors}
    return {
        **tensors,
        **strides(**tensors),
        "starts_q": None if packed is None else packed.starts_q,
        "starts_k": None if packed is None else packed.starts_k,
        "lse_h": L,
        "heads_per_group": H // G,
        "L": L,
        "S": S,
        "shift": options.shift,
        "window": options.window or 0,
        "sinks": options.sinks if options.window else 0,
        "scale_log2": options.scale * math.log2(math.e),
        "D": D,
        "V": V,
        "CAUSAL": options.causal,
        "WINDOW": options.window is not None,
        "VARLEN": packed is not None,
        "PRECISION": precision(q.dtype),
        "SLICE": slice_width(q.dtype, D, V),
        "BLOCK_D": padded(D),
        "BLOCK_V": padded(V),
    }


def target() -> str:
    """The compile target whose blocks this machine's GPU takes."""
    if torch.version.hip is not None:
        return "gfx942"
    major, _ = torch.cuda.get_device_capability()
    return {9: "sm_90", 10: "sm_100", 11: "sm_100"}.get(major, "sm_80")


def run(name: str, kernel: Any, which: str, given: dict[str, Any], grid: Any) -> None:
    """Launch one of the kernels on a grid that is not empty."""
    check_device(name, kernel, given["q"], given["k"], given["v"])
    if is_interpreted(kernel):
        candidates = [INTERPRETED]
    else:
        candidates = candidates_for(which, target(), given["q"].dtype, given["D"], given["V"])
    if 0 in grid(candidates[0]):
        return
    key = tuple(given[x] for x in ("D", "V", "CAUSAL", "WINDOW", "VARLEN"))
    launch(kernel, grid, candidates, given, (given["q"].dtype, *key))
