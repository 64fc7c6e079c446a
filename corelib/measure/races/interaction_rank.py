"""A linear state space as heads: what each form costs, and how many heads training finds it takes.

With as many heads as the interaction rank all forms are the same function, which is checked.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from ...primitives import fft_conv
from ...state_space.interaction_rank import (
    heads_from_ssm,
    lag_attention,
    lag_attention_reference,
    lag_operators,
)
from ..scaling import sweep
from . import Row, register, rows

N, D = 4, 8


def system() -> dict[str, Tensor]:
    """Four poles near 1, eight channels in and out: interaction rank 4."""
    g = torch.Generator().manual_seed(0)
    B, C = torch.randn(N, D, generator=g), torch.randn(D, N, generator=g)
    return dict(A=torch.diag(torch.linspace(0.5, 0.99, N)), B=B, C=C)


def recurrence(x: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
    """The state space as it stands, step by step."""
    state, states, entering = x.new_zeros(len(x), len(A)), [], x @ B.T
    for t in range(x.shape[1]):
        state = state @ A.T + entering[:, t]
        states.append(state)
    return torch.stack(states, 1) @ C.T


def all_pairs(x: Tensor, lags: Tensor) -> Tensor:
    """A kernel for every pair of channels, by FFT: p d of them."""
    p, d = lags.shape[1:]
    kernels = lags.permute(1, 2, 0).reshape(p * d, -1)
    pairs = x.mT[:, None].expand(-1, p, -1, -1).reshape(len(x), p * d, -1)
    return fft_conv(pairs, kernels).view(len(x), p, d, -1).sum(2).mT


@register("lag-heads", "a linear state space as heads over lags")
def lag_heads_race(quick: bool) -> Iterator[Row]:
    given = system()

    def contestants(L: int) -> dict[str, Callable]:
        x = torch.randn(1, L, D, generator=torch.Generator().manual_seed(0))
        heads, lags = heads_from_ssm(**given, n=L, heads=N), lag_operators(**given, n=L)
        return {
            "corelib": lambda: lag_attention(x, *heads),
            "weights written down": lambda: lag_attention_reference(x, *heads),
            "a kernel for each pair": lambda: all_pairs(x, lags),
            "step by step": lambda: recurrence(x, **given),
        }

    lengths = (64, 128) if quick else (128, 256, 512, 1024, 2048)
    with torch.no_grad():
        result = sweep(lengths, contestants, tolerance=1e-3, repeats=3, min_time=0.05)
    yield from rows(result, what="forward", shape=f"B1 d{D} p{D} k{N} float32")


def train_heads(lags: Tensor, heads: int, steps: int = 400, seed: int = 0) -> list[float]:
    """Adam on lag heads; the expected squared error over white inputs, by step, over the target's.

    For white inputs the expectation is a sum over lags, each as often as it occurs, so that no
    sequences need be drawn.
    """
    g = torch.Generator().manual_seed(seed)
    n, p, d = lags.shape
    often, rows_ = torch.arange(n, 0, -1, dtype=lags.dtype)[:, None], lags.flatten(1)
    leaves = [
        0.3 * torch.randn(*s, generator=g, dtype=lags.dtype) for s in ((n, heads), (heads, p * d))
    ]
    leaves = [leaf.requires_grad_() for leaf in leaves]
    means, squares = ([torch.zeros_like(leaf) for leaf in leaves] for _ in range(2))
    whole, errors = (often * rows_.square()).sum(), []
    for step in range(1, steps + 1):
        error = (often * (leaves[0] @ leaves[1] - rows_).square()).sum() / whole
        errors.append(error.item())
        rate = 0.1 * (1 - step / (steps + 1))
        for leaf, grad, m, s in zip(leaves, torch.autograd.grad(error, leaves), means, squares):
            m.lerp_(grad, 0.1)
            s.lerp_(grad.square(), 0.01)
            change = m / (1 - 0.9**step) / ((s / (1 - 0.99**step)).sqrt() + 1e-12)
            leaf.data.sub_(rate * change)
    return errors
