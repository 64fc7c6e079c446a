"""The gated average of RAT (arXiv 2507.04416), in chunks that run side by side.

    h_t = g_t h_{t-1} + (1 - g_t) x_t               zero before each chunk, a gate for each channel

A gated recurrence whose two shares sum to one, so that nothing outgrows the inputs. No chunk knows
of the one before: all of them are rows of one batch, and the scan is as long as a chunk instead of
the text. `rat` runs it over keys and values. Kernel: `corelib.kernels.diagonal_scan`.
Oracle: the recurrence as a loop.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from corelib.primitives import diagonal_scan


def chunk_scan(
    g: Float[Tensor, "B L C"],
    x: Float[Tensor, "B L C"],
    chunk: int,
    *,
    state: Float[Tensor, "B C"] | None = None,
    start: int = 0,
) -> Float[Tensor, "B L C"]:
    """``h_t = g_t h_{t-1} + (1 - g_t) x_t``, from zero in every chunk; chunks run side by side.

    Args:
        start: how many tokens of the first chunk came before.
        state: ``h`` after them (needed only where ``start`` is not 0).
    """
    check_chunk(chunk)
    if g.shape != x.shape or x.dim() != 3:
        raise ValueError(
            f"g, x: expected one shape (B, L, C), got {tuple(g.shape)} and {tuple(x.shape)}"
        )
    if not 0 <= start < chunk or (start and state is None):
        raise ValueError(f"start: expected 0, or less than {chunk} and a state, got {start}")
    B, L, C = x.shape
    chunk = min(chunk, max(1, start + L))
    fed = torch.addcmul(x, g, x, value=-1)
    around = start, -(start + L) % chunk
    if any(around):  # with steps that keep the state and add nothing
        g, fed = F.pad(g, (0, 0, *around), value=1.0), F.pad(fed, (0, 0, *around))
    decay, fed = (y.reshape(-1, chunk, C) for y in (g, fed))
    before = None
    if start:
        rest = fed.new_zeros(B, len(fed) // B - 1, C)
        before = torch.cat([state[:, None], rest], 1).flatten(0, 1)
    h = diagonal_scan(decay, fed, state=before)
    return h.reshape(B, -1, C)[:, start : start + L]


def scan_heads(
    g: Float[Tensor, "B H L D"],
    x: Float[Tensor, "B G L D"],
    chunk: int,
    state: Float[Tensor, "B H D"],
    start: int,
) -> Float[Tensor, "B H L D"]:
    """`chunk_scan` of heads, in the state's dtype; heads of a group start from the same ``x``."""
    if x.shape[1] < g.shape[1]:
        x = x.repeat_interleave(g.shape[1] // x.shape[1], 1)
    flat = (y.to(state.dtype).transpose(1, 2).flatten(2) for y in (g, x))
    h = chunk_scan(*flat, chunk, state=state.flatten(1), start=start)
    return h.unflatten(2, (g.shape[1], -1)).transpose(1, 2)


def check_chunk(chunk: int) -> None:
    """A whole number of at least 1; raises TypeError or ValueError."""
    if isinstance(chunk, bool) or not isinstance(chunk, int):
        raise TypeError(f"chunk: expected an int, got {type(chunk).__name__}")
    if chunk < 1:
        raise ValueError(f"chunk: expected at least 1, got {chunk}")
