"""How Many Heads Make an SSM? A Unified Framework for Attention and State Space Models (arXiv
2512.15115).

Idea: write a layer on vectors as one block for every pair of positions, then ask how many different
blocks it can make.

    y_i = sum_j W_ij(X) x_j                              W_ij (p, d), an interaction operator
    heads:         W_ij = sum_h alpha^h_ij(X) V_h        alpha a number, V_h (p, d) of the head
    linear SSM:    W_ij = C A^(i-j) B                    for j <= i

With H heads the blocks span H dimensions at most, whatever the coefficients do. An SSM's span
``k = dim span{C A^t B : t < n} <= min(n, degree of A's minimal polynomial, p d)``, its *interaction
rank*. So fewer than k heads cannot be that SSM, and k can: a singular value decomposition of the
rows ``vec(C A^t B)`` gives ``V_h`` and the coefficients (`heads_from_ssm`). Weighing lag ``t`` by
``sqrt(n - t)``, as often as it occurs, the best H heads err on white inputs by exactly the singular
values left over (Eckart and Young; our addition, `least_error`).

In return attention has a *gradient highway*: for some inputs ``dy_i / dx_j`` does not shrink with
the distance, while a stable SSM's is ``C A^(i-j) B``, which does (`gradient_vs_distance`).

| here             | paper     | shape                                            |
|:-----------------|:----------|:-------------------------------------------------|
| W                | W_ij(X)   | (n, n, p, d)                                     |
| lag operators, G | C A^t B   | (n, p, d)                                        |
| coefficients     | alpha^h   | (H, n), by lag                                   |
| value_maps       | V_h       | (H, p, d)                                        |

Our reconstruction: of the paper we know the abstract. The coefficients of this class are any
numbers. **Softmax is not in it**: its coefficients are positive and sum to one, so H softmax heads
span no more, but may reach less, down to a sign. Costs: `interaction_operator` O(n d) runs of the
layer, `heads_from_ssm` one decomposition of (n, p d). Oracle: ``numpy.linalg.matrix_rank``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ..primitives import attention
from ..primitives.fft_conv import fast_length

Operators = Float[Tensor, "n p d"]
Maps = Float[Tensor, "H p d"]
#: Singular values below this share of the largest one are zeros.
TOLERANCE = 1e-9


class LagHeads(NamedTuple):
    """Heads whose numbers depend on the lag: ``coefficients (H, n)``, ``value_maps (H, p, d)``."""

    coefficients: Tensor
    value_maps: Tensor


# --- operators of a layer, and their span ---------------------------------------------------------


def interaction_operator(
    mix: Callable[[Tensor], Tensor], n: int, d: int, *, dtype: torch.dtype = torch.float64
) -> Float[Tensor, "n n p d"]:
    """``W_ij`` of a layer that is linear in its argument: unit vectors in, columns out.

    Args:
        mix: ``values (batch, n, d) -> y (batch, n, p)``. Of a layer whose coefficients depend on
            the content, close over the content: ``lambda v: weights_of(X) @ v @ V``.
        n: positions. d: width of the values.

    Raises:
        ValueError: ``mix`` changes the positions, or is not linear: ``W`` does not reproduce it.
    """
    for name, value in (("n", n), ("d", d)):
        if value < 1:
            raise ValueError(f"{name}: expected at least 1, got {value}")
    with torch.no_grad():
        columns = mix(torch.eye(n * d, dtype=dtype).view(n * d, n, d))
        if columns.dim() != 3 or columns.shape[:2] != (n * d, n):
            raise ValueError(f"mix: expected {(n * d, n, 'p')}, got {tuple(columns.shape)}")
        W = columns.view(n, d, n, -1).permute(2, 0, 3, 1)
        generator = torch.Generator().manual_seed(0)
        values = torch.randn(1, n, d, generator=generator, dtype=dtype)
        off = (mix(values) - torch.einsum("ijpd,bjd->bip", W, values)).abs().max()
    if not off <= 1e-6 * max(1.0, W.abs().max().item() * n * d):
        raise ValueError(
            f"mix: expected a layer that is linear in its values, it is off by {off:.2g}"
        )
    return W


def interaction_rank(W: Float[Tensor, "*pairs p d"], tolerance: float = TOLERANCE) -> int:
    """The dimension that the operators span: of ``W (n, n, p, d)`` or of lags ``(n, p, d)``."""
    if W.dim() < 3:
        raise ValueError(f"W: expected operators (..., p, d), got shape {tuple(W.shape)}")
    values = torch.linalg.svdvals(W.reshape(-1, W.shape[-2] * W.shape[-1]))
    return int((values > tolerance * values[0]).sum()) if len(values) else 0


def lag_operators(
    A: Float[Tensor, "N N"], B: Float[Tensor, "N d"], C: Float[Tensor, "p N"], n: int
) -> Operators:
    """``C A^t B`` for the lags ``t < n``: all that a linear SSM does to a sequence."""
    if n < 1:
        raise ValueError(f"n: expected at least 1, got {n}")
    reached, lags = B, []
    for _ in range(n):
        lags.append(C @ reached)
        reached = A @ reached
    return torch.stack(lags)


def operator_of_lags(lags: Operators) -> Float[Tensor, "n n p d"]:
    """``W_ij``: the operator of lag ``i - j`` below the diagonal and on it, zeros above."""
    at = torch.arange(len(lags), device=lags.device)
    lag = at[:, None] - at
    return torch.where((lag >= 0)[..., None, None], lags[lag.clamp(min=0)], 0.0)


# --- heads ----------------------------------------------------------------------------------------


def heads_from_ssm(
    A: Float[Tensor, "N N"],
    B: Float[Tensor, "N d"],
    C: Float[Tensor, "p N"],
    n: int,
    heads: int | None = None,
) -> LagHeads:
    """The best ``heads`` heads for this SSM on ``n`` positions; None takes as many as it needs.

    Value maps are the right singular vectors of ``sqrt(n - t) vec(C A^t B)``, coefficients the
    projections of ``vec(C A^t B)`` on them.
    """
    lags = lag_operators(A, B, C, n)
    heads = max(1, interaction_rank(lags)) if heads is None else heads
    p, d = lags.shape[1:]
    if not 1 <= heads <= p * d:
        raise ValueError(f"heads: expected 1 to {p * d}, got {heads}")
    rows = lags.flatten(1)
    _, _, Vh = torch.linalg.svd(_often(n, rows) * rows, full_matrices=True)
    return LagHeads((rows @ Vh[:heads].mT).mT, Vh[:heads].view(heads, p, d))


def least_error(lags: Operators) -> Float[Tensor, " H"]:
    """``sum |W_ij - best|^2`` with ``H = 0, 1, ...`` heads: what is left of the singular values.

    It is the expected squared error over a sequence of white inputs, and no coefficients, of the
    lag or not, do better.
    """
    rows = lags.flatten(1)
    squares = torch.linalg.svdvals(_often(len(lags), rows) * rows).square()
    left = squares.flip(0).cumsum(0).flip(0)
    return torch.cat([left, left.new_zeros(1)])


def _often(n: int, like: Tensor) -> Tensor:
    """Lag ``t`` occurs ``n - t`` times."""
    return torch.arange(n, 0, -1, dtype=like.dtype, device=like.device).sqrt()[:, None]


def lag_attention_reference(
    x: Float[Tensor, "B n d"], coefficients: Float[Tensor, "H n"], value_maps: Maps
) -> Float[Tensor, "B n p"]:
    """``y_i = sum_h sum_(j <= i) coefficients[h, i - j] V_h x_j``, its weights written down."""
    at = torch.arange(x.shape[1], device=x.device)
    lag = at[:, None] - at
    weights = torch.where(lag >= 0, coefficients[:, lag.clamp(min=0)], 0.0)  # (H, n, n)
    return sum(w @ x @ V.mT for w, V in zip(weights, value_maps, strict=True))


def lag_attention(
    x: Float[Tensor, "B n d"], coefficients: Float[Tensor, "H n"], value_maps: Maps
) -> Float[Tensor, "B n p"]:
    """As `lag_attention_reference`, by FFT: one transform a channel and head, O(n log n)."""
    n = x.shape[1]
    if n != coefficients.shape[1]:
        raise ValueError(f"coefficients: expected (H, {n}), got {tuple(coefficients.shape)}")
    circle = fast_length(2 * n - 1)  # long enough that nothing comes round
    weights = torch.fft.rfft(coefficients, circle)
    operators = torch.einsum("hf,hpd->fpd", weights, value_maps.to(weights.dtype))
    y = operators @ torch.fft.rfft(x, circle, dim=1)[..., None]
    return torch.fft.irfft(y[..., 0], circle, dim=1)[:, :n]


class LagAttention(nn.Module):
    """Trainable heads ``(B, n, d) -> (B, n, p)`` with a coefficient for each lag, of any sign."""

    def __init__(self, heads: int, n: int, d: int, p: int | None = None):
        super().__init__()
        p = d if p is None else p
        self.coefficients = nn.Parameter(torch.randn(heads, n) * (heads * n) ** -0.5)
        self.value_maps = nn.Parameter(torch.randn(heads, p, d) * d**-0.5)

    def forward(self, x: Float[Tensor, "B n d"]) -> Float[Tensor, "B n p"]:
        return lag_attention(x, self.coefficients, self.value_maps)


# --- gradients ------------------------------------------------------------------------------------


def gradient_vs_distance(
    layer: Callable[[Tensor], Tensor], x: Float[Tensor, "n d"]
) -> Float[Tensor, " n"]:
    """The spectral norm of ``dy_last / dx_j`` by distance ``n - 1 - j``, coefficients included.

    ``layer`` maps ``(1, n, d)`` to ``(1, n, p)``; the derivative is of the whole layer at ``x``.
    """
    if x.dim() != 2:
        raise ValueError(f"x: expected 2 axes (n, d), got shape {tuple(x.shape)}")
    J = torch.autograd.functional.jacobian(lambda x: layer(x[None])[0, -1], x)  # (p, n, d)
    return torch.linalg.matrix_norm(J.transpose(0, 1), 2).flip(0)


def fitting_key(
    n: int, far: int, *, strength: float = 8.0
) -> tuple[Callable[[Tensor], Tensor], Float[Tensor, "n 3"]]:
    """A gradient highway: causal attention, and an input whose last query fits one key only.

    The key stands ``far`` positions back. Channels are query, key and value; the score of the pair
    is ``strength ** 2``, all others are 0.
    """
    if not 0 < far < n:
        raise ValueError(f"far: expected 1 to {n - 1}, got {far}")
    x = torch.zeros(n, 3, dtype=torch.float64)
    x[:, 2] = torch.linspace(-1, 1, n, dtype=torch.float64)
    x[-1, 0] = x[-1 - far, 1] = strength

    def layer(x: Tensor) -> Tensor:
        q, k, v = (x[:, None, :, i : i + 1] for i in range(3))
        return attention(q, k, v, causal=True, scale=1.0)[:, 0]

    return layer, x


def decay_per_step(norms: Float[Tensor, " n"]) -> float:
    """The factor by which gradients shrink with each step of distance (geometric mean)."""
    if len(norms) < 2 or not bool((norms > 0).all()):
        raise ValueError("norms: expected two or more positive numbers")
    return torch.exp((norms[-1].log() - norms[0].log()) / (len(norms) - 1)).item()


def example() -> dict:
    """A spiral and a decay: three states, of which two turn; six positions of two channels.

    >>> interaction_rank(lag_operators(**example()))
    3
    """
    turn = 0.9 * torch.tensor([[0.8, -0.6, 0.0], [0.6, 0.8, 0.0], [0.0, 0.0, 0.5]])
    B = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
    C = torch.tensor([[1.0, 0.0, 1.0], [0.0, 1.0, -1.0]])
    return dict(A=turn.double(), B=B.double(), C=C.double(), n=6)
