"""Rows picked by index, whose gradient picks rows as well.

    out[i] = x[index[i]]                        d_x[n] = sum_j d_out[inverse[n, j]]

PyTorch's gradient of picking is a scatter that adds row by row, slow on a CPU and in no fixed order
on a GPU. Whoever made ``index`` by sorting also knows the way back, and can pick instead.

>>> x = torch.tensor([[1.0], [2.0]])
>>> take_rows(x, torch.tensor([1, -1, 0]), torch.tensor([[2], [0]])).flatten()
tensor([2., 0., 1.])
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable


def take_rows(
    x: Float[Tensor, "N ..."], index: Int[Tensor, " rows"], inverse: Int[Tensor, "N k"]
) -> Float[Tensor, "rows ..."]:
    """``x[index]``; an entry of -1 gives a row of zeros.

    Args:
        inverse: the places in ``index`` of each row of ``x``, -1 where there are fewer than ``k``.
            Must list every one of them: only the gradient reads it, and nothing checks it.

    Raises ValueError or TypeError for shapes or dtypes that do not fit.
    """
    for name, rows, axes in (("index", index, 1), ("inverse", inverse, 2)):
        if rows.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"{name}: expected int32 or int64, got {rows.dtype}")
        if rows.dim() != axes:
            raise ValueError(f"{name}: expected {axes} axes, got shape {tuple(rows.shape)}")
    if len(inverse) != len(x):
        raise ValueError(f"inverse: expected {len(x)} rows, as many as x, got {len(inverse)}")
    return _TakeRows.apply(x, index, inverse)


class _TakeRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, index, inverse):
        ctx.save_for_backward(inverse)
        return _taken(x, index)

    @staticmethod
    @once_differentiable
    def backward(ctx, d_out):
        (inverse,) = ctx.saved_tensors
        if inverse.shape[1] == 1:
            return _taken(d_out, inverse[:, 0]), None, None
        return _taken(d_out, inverse.flatten()).unflatten(0, inverse.shape).sum(1), None, None


def _taken(x: Tensor, index: Tensor) -> Tensor:
    if not len(x) or not len(index):
        return x.new_zeros(len(index), *x.shape[1:])
    nowhere = index < 0
    out = x.index_select(0, index.clamp_min(0))
    return out.masked_fill_(nowhere.view(-1, *[1] * (x.dim() - 1)), 0) if nowhere.any() else out
