"""Windows over a Mamba-2 state on this machine: a difference of two scans against doing them anew.

``all windows anew`` runs a scan of ``WINDOW`` steps for each position, all of them in one batch;
``banded matrix`` writes down who sees whom, as attention does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from ...primitives import ssd_chunked
from ...state_space.stuffed_mamba import window_state
from ..scaling import sweep
from . import Row, register, rows

H, K, V, WINDOW = 2, 16, 16, 32
SHAPE = f"B1 H{H} K{K} V{V} window {WINDOW} float32"


def inputs(L: int) -> tuple[Tensor, ...]:
    """``x, dt, A, B, C`` of one sequence that forgets slowly."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(1, H, L, V, generator=g)
    dt = torch.rand(1, H, L, generator=g)
    B, C = (torch.randn(1, 1, L, K, generator=g) * K**-0.5 for _ in range(2))
    return x, dt, torch.tensor([-0.02, -0.1]), B, C


def all_windows(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, window: int) -> Tensor:
    """Every position's last steps as a sequence of its own; steps before the first have dt = 0."""

    def windows(part: Tensor) -> Tensor:
        early = part.new_zeros(*part.shape[:2], window - 1, *part.shape[3:])
        slid = torch.cat([early, part], 2).unfold(2, window, 1)  # (1, heads, L, ..., window)
        return slid[0].transpose(0, 1).movedim(-1, 2)

    parts = (windows(part) for part in (x, dt, B, C))
    x, dt, B, C = parts
    return ssd_chunked(x, dt, A, B, C, chunk=window)[:, :, -1].transpose(0, 1)[None]


def banded(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, window: int) -> Tensor:
    """The decays of all pairs as a matrix (L, L), zero outside the window."""
    sums = (dt * A[:, None]).cumsum(-1)
    apart = sums[..., :, None] - sums[..., None, :]
    seen = torch.ones(apart.shape[-2:], dtype=torch.bool).tril().triu(1 - window)
    weights = apart.masked_fill(~seen, -torch.inf).exp() * (C @ B.mT)
    return weights @ (dt[..., None] * x)


def contestants(L: int) -> dict[str, Callable]:
    """The same windows, three ways."""
    runs = {"corelib": window_state, "all windows anew": all_windows, "banded matrix": banded}
    return {name: partial(run, *inputs(L), window=WINDOW) for name, run in runs.items()}


@register("state-window", "a sliding window over Mamba-2's state: by difference, anew, as a matrix")
def state_window(quick: bool) -> Iterator[Row]:
    lengths = (64, 128) if quick else (256, 512, 1024, 2048, 4096)
    result = sweep(lengths, contestants, tolerance=1e-3, repeats=3, min_time=0.05)
    yield from rows(result, what="forward", shape=SHAPE)
