"""The short causal convolution of sequences that are packed one after another.

    y[t] = bias + sum_i weight[:, i] x[t - W + 1 + i]        x before a sequence: its state

Each sequence gets its ``W - 1`` earlier inputs in front, then one convolution runs over all of
them: the first true step sees nothing of the sequence before. Linear in the number of steps.
Oracle: `causal_short_conv` of each sequence alone.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from .short_conv import causal_short_conv
from .take_rows import take_rows
from .varlen import _lengths, sequence_ids


def causal_short_conv_varlen(
    x: Float[Tensor, "total C"],
    weight: Float[Tensor, "C W"],
    cu_seqlens: Int[Tensor, " ends"],
    bias: Float[Tensor, " C"] | None = None,
    *,
    state: Float[Tensor, "n C inputs"] | None = None,
    return_state: bool = False,
) -> Float[Tensor, "total C"] | tuple[Float[Tensor, "total C"], Float[Tensor, "n C inputs"]]:
    """`causal_short_conv` of each packed sequence by itself.

    Args:
        state: the ``W - 1`` inputs before each sequence; None: zeros.
        return_state: also return the last ``W - 1`` inputs of each. A sequence without steps
            leaves its state as it is.
    """
    n, total, before = len(_lengths(cu_seqlens, "cu_seqlens", len(x))), len(x), weight.shape[1] - 1
    wanted = (n, x.shape[1], before)
    state = x.new_zeros(wanted) if state is None else state
    if tuple(state.shape) != wanted:
        raise ValueError(f"state: expected shape {wanted}, got {tuple(state.shape)}")
    real = torch.arange(total, device=x.device) + before * (sequence_ids(cu_seqlens) + 1)
    gaps = torch.arange(n, device=x.device)[:, None] * before + torch.arange(
        before, device=x.device
    )  # what the state rows before each sequence add to its start
    places = torch.cat([real, (cu_seqlens[:-1, None].long() + gaps).flatten()])
    source = torch.empty_like(places)
    source[places] = torch.arange(len(places), device=x.device)
    rows = torch.cat([x, state.mT.flatten(0, 1).to(x.dtype)])
    longer = take_rows(rows, source, places[:, None])
    y = causal_short_conv(longer.T[None], weight, bias)[0].T
    y = take_rows(y, real, source.where(source < total, -1)[:, None])
    if not return_state:
        return y
    last = (cu_seqlens[1:, None].long() + gaps).flatten()
    return y, longer[last].unflatten(0, (n, before)).mT
