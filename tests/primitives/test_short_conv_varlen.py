"""The short convolution over packed sequences, against each sequence alone."""

from __future__ import annotations

import pytest
import torch

from corelib.primitives import causal_short_conv, cumulative_lengths
from corelib.primitives.short_conv_varlen import causal_short_conv_varlen

EXACT = dict(atol=1e-12, rtol=1e-12)


def inputs(lengths, C=3, W=4):
    torch.manual_seed(0)
    n, total = len(lengths), sum(lengths)
    shapes = (total, C), (C, W), (C,), (n, C, W - 1)
    return [torch.randn(shape, dtype=torch.float64) for shape in shapes]


@pytest.mark.parametrize("W", [1, 2, 4])
@pytest.mark.parametrize("lengths", [[5, 0, 1, 2, 9], [1], [0, 0], []])
def test_equals_each_sequence_alone_with_gradients(lengths, W):
    x, weight, bias, state = (y.requires_grad_() for y in inputs(lengths, W=W))
    leaves = [x, weight, bias, state]
    got = causal_short_conv_varlen(
        x, weight, cumulative_lengths(torch.tensor(lengths, dtype=torch.int64)), bias,
        state=state, return_state=True,
    )  # fmt: skip
    ys, lasts = [x[:0]], [state[:0]]
    for piece, before in zip(x.split(lengths) if lengths else [], state):
        options = dict(state=before[None], return_state=True)
        y, last = causal_short_conv(piece.T[None], weight, bias, **options)
        ys.append(y[0].T)
        lasts.append(last)
    wanted = torch.cat(ys), torch.cat(lasts)
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b, **EXACT)
    grads = [
        torch.autograd.grad(
            y.sin().sum() + last.cos().sum(), leaves, allow_unused=True, materialize_grads=True
        )
        for y, last in (got, wanted)
    ]
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, **EXACT)


def test_no_state_is_zeros():
    x, weight, _, _ = inputs([2, 3])
    starts = torch.tensor([0, 2, 5])
    got = causal_short_conv_varlen(x, weight, starts)
    zeros = torch.zeros(2, 3, 3, dtype=torch.float64)
    torch.testing.assert_close(got, causal_short_conv_varlen(x, weight, starts, state=zeros))


@pytest.mark.no_shape_checks
def test_bad_input_is_named():
    x, weight, _, state = inputs([2, 3])
    with pytest.raises(ValueError, match=r"state: expected shape \(2, 3, 3\)"):
        causal_short_conv_varlen(x, weight, torch.tensor([0, 2, 5]), state=state[:1])
    with pytest.raises(ValueError, match="cu_seqlens: expected to end at 5"):
        causal_short_conv_varlen(x, weight, torch.tensor([0, 2, 4]))
