"""Sequence mixers by their class of matrix, as Hydra's paper compares them (arXiv 2407.09941, 2).

A mixer is ``y = M v``. A class is two functions of the same parameters: its matrix, written out,
and the fast product, where there is one. Parameters stand by position, ``(B, H, L, numbers)``, and
that makes the paper's distinction a question of where they come from:

    aligned    p_i = W x_i             of the input; made for any length
    free       p                       learned, the same for every input, for one length only

A class is *sequence aligned* when the first ``i`` rows and columns of ``M`` need the first ``i``
positions' parameters alone, and their number does not depend on L. Then a token can bring its own,
and a longer input only adds rows and columns (of attention that holds but for each row's sum).

| class          | M_ij                                     | numbers a position | product  |
|:---------------|:-----------------------------------------|:-------------------|:---------|
| dense          | p_ij                                     | L                  | L^2      |
| attention      | softmax over j of q_i . k_j              | 2 N                | L^2      |
| toeplitz       | p_(i-j); above the diagonal p'_(j-i)     | 2                  | L log L  |
| low rank       | q_i . k_j                                | 2 N                | L N      |
| cauchy         | sum_n 1 / (1 + e^q_in + e^k_jn)          | 2 N                | L^2 here |
| vandermonde    | sum_n cos(q_in j) - cos(k_jn i)          | 2 N                | L^2 here |
| butterfly      | a product of log2 L sparse factors       | 2 log2 L           | L log L  |
| semiseparable  | Mamba-2's, `corelib.state_space.hydra`   | 1 + 2 N            | L N      |
| quasiseparable | Hydra's, with B and C of each side's own | 3 + 4 N            | L N      |

Dense and butterfly cannot be aligned. As released, mixers are scaled by ``(L N)^-1/2`` and added to
the input, and Cauchy's and Vandermonde's are real sums over N; their fast products are not built
here. Ours: the butterfly (cut from the next power of two), and ``A = -1`` in the separable two,
whose steps make up for it. Oracle: ``matrix(p) @ v``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from ..primitives import attention, ssd_chunked, two_sided_fft_conv
from .hydra import Scan, quasiseparable, quasiseparable_matrix, semiseparable_matrix

Parameters = Float[Tensor, "B H L numbers"]
Matrices = Float[Tensor, "B H L L"]
Heads = Float[Tensor, "B H L V"]


@dataclass(frozen=True)
class MatrixClass:
    """``matrix(p) -> (B, H, L, L)``, ``product(p, v) == matrix(p) @ v``; ``numbers(N, L)``."""

    matrix: Callable[[Tensor], Tensor]
    product: Callable[[Tensor, Tensor], Tensor]
    numbers: Callable[[int, int], int]
    can_align: bool = True


def _dense_product(matrix: Callable[[Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    """For classes whose matrix is written down before it is used."""
    return lambda p, v: matrix(p) @ v


def dense_matrix(p: Parameters) -> Matrices:
    return p


def attention_matrix(p: Parameters) -> Matrices:
    q, k = p.chunk(2, -1)
    return torch.softmax(q @ k.mT * q.shape[-1] ** -0.5, -1)


def attention_product(p: Parameters, v: Heads) -> Heads:
    return attention(*p.chunk(2, -1), v, causal=False)


def toeplitz_matrix(p: Parameters) -> Matrices:
    at = torch.arange(p.shape[2], device=p.device)
    lag = at[:, None] - at
    return torch.where(lag >= 0, p[..., lag.abs(), 0], p[..., lag.abs(), 1])


def toeplitz_product(p: Parameters, v: Heads) -> Heads:
    """A convolution with taps on both sides; each row of the batch has its own."""
    taps = p.flatten(0, 1)[:, None].expand(-1, v.shape[3], -1, -1)  # (B H, V, L, 2)
    past, future = taps[..., 0], F.pad(taps[..., 1:, 1], (0, 1))  # one tap at least
    y = two_sided_fft_conv(v.mT.flatten(0, 1), past, future)
    return y.unflatten(0, v.shape[:2]).mT


def low_rank_matrix(p: Parameters) -> Matrices:
    q, k = p.chunk(2, -1)
    return q @ k.mT


def low_rank_product(p: Parameters, v: Heads) -> Heads:
    q, k = p.chunk(2, -1)
    return q @ (k.mT @ v)


def cauchy_matrix(p: Parameters) -> Matrices:
    q, k = p.exp().chunk(2, -1)
    return (1 / (1 + q[..., :, None, :] + k[..., None, :, :])).sum(-1)


def vandermonde_matrix(p: Parameters) -> Matrices:
    q, k = p.chunk(2, -1)
    place = torch.arange(p.shape[2], dtype=p.dtype, device=p.device)
    rows = torch.cos(q[..., :, None, :] * place[:, None]).sum(-1)
    return rows - torch.cos(k[..., None, :, :] * place[:, None, None]).sum(-1)


def butterfly_product(p: Parameters, v: Heads) -> Heads:
    """``log2 L`` factors; in factor ``s`` position ``i`` meets the one ``2^s`` places across.

    ``p_i`` holds, factor by factor, what position ``i`` takes of itself and of the other.
    """
    L, factors = v.shape[2], p.shape[-1] // 2
    if 2**factors < L:
        raise ValueError(f"p: expected {2 * (L - 1).bit_length()} numbers, got {p.shape[-1]}")
    y, p = (F.pad(x, (0, 0, 0, 2**factors - L)) for x in (v, p))
    for s in range(factors):
        pairs = y.unflatten(2, (-1, 2, 2**s))
        own, other = p[..., 2 * s, None], p[..., 2 * s + 1, None]
        y = own * y + other * pairs.flip(3).flatten(2, 4)
    return y[:, :, :L]


def butterfly_matrix(p: Parameters) -> Matrices:
    L = p.shape[2]
    return butterfly_product(
        p, torch.eye(L, dtype=p.dtype, device=p.device).expand(*p.shape[:2], L, L)
    )


def _scan(p: Tensor) -> Scan:
    """Step, B and C of one side, and ``A = -1``; every head is a group of its own."""
    dt, (B, C) = F.softplus(p[..., 0]), p[..., 1:].chunk(2, -1)
    return Scan(dt, -p.new_ones(p.shape[1]), B, C)


def semiseparable_mixer(p: Parameters) -> Matrices:
    return semiseparable_matrix(_scan(p))


def semiseparable_product(p: Parameters, v: Heads) -> Heads:
    dt, A, B, C = _scan(p)
    return ssd_chunked(v, dt, A, B, C)


def _both_scans(p: Tensor) -> tuple[Scan, Scan, Tensor]:
    past, future = p[..., 1:].chunk(2, -1)
    return _scan(past), _scan(future), p[..., 0]


def quasiseparable_mixer(p: Parameters) -> Matrices:
    return quasiseparable_matrix(*_both_scans(p))


def quasiseparable_product(p: Parameters, v: Heads) -> Heads:
    return quasiseparable(v, *_both_scans(p))


CLASSES: dict[str, MatrixClass] = {
    "dense": MatrixClass(dense_matrix, _dense_product(dense_matrix), lambda N, L: L, False),
    "attention": MatrixClass(attention_matrix, attention_product, lambda N, L: 2 * N),
    "toeplitz": MatrixClass(toeplitz_matrix, toeplitz_product, lambda N, L: 2),
    "low rank": MatrixClass(low_rank_matrix, low_rank_product, lambda N, L: 2 * N),
    "cauchy": MatrixClass(cauchy_matrix, _dense_product(cauchy_matrix), lambda N, L: 2 * N),
    "vandermonde": MatrixClass(
        vandermonde_matrix, _dense_product(vandermonde_matrix), lambda N, L: 2 * N
    ),
    "butterfly": MatrixClass(
        butterfly_matrix, butterfly_product, lambda N, L: 2 * (L - 1).bit_length(), False
    ),
    "semiseparable": MatrixClass(
        semiseparable_mixer, semiseparable_product, lambda N, L: 1 + 2 * N
    ),
    "quasiseparable": MatrixClass(
        quasiseparable_mixer, quasiseparable_product, lambda N, L: 3 + 4 * N
    ),
}


class MatrixMixer(nn.Module):
    """``x + W_out(M v)`` with ``v = W_in x``, ``(B, L, C) -> (B, L, C)``: one layer, any class.

    Args:
        kind: of `CLASSES`. width: C. heads: H, which divides C. state: N.
        length: L, to which free parameters belong; aligned ones only take their scale from it.
        aligned: parameters are made of the input, position by position.
    """

    def __init__(
        self,
        kind: str,
        width: int,
        *,
        aligned: bool,
        length: int,
        heads: int = 4,
        state: int = 8,
    ):
        super().__init__()
        if kind not in CLASSES:
            raise ValueError(f"kind: expected one of {', '.join(CLASSES)}, got {kind!r}")
        self.kind = CLASSES[kind]
        if aligned and not self.kind.can_align:
            raise ValueError(f"aligned: a {kind} matrix has no parameters of single positions")
        if width % heads:
            raise ValueError(f"heads: expected a number that divides {width}, got {heads}")
        self.heads, numbers = heads, self.kind.numbers(state, length)
        self.scale = 1.0 if kind == "attention" else (length * state) ** -0.5
        self.values = nn.Linear(width, width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.free, self.of_input = None, None
        if aligned:
            self.of_input = nn.Linear(width, heads * numbers)
        else:
            self.free = nn.Parameter(torch.randn(1, heads, length, numbers))

    def parameters_at(self, x: Float[Tensor, "B L C"]) -> Parameters:
        """``p (B, H, L, numbers)``: of this input, or the learned ones for all."""
        if self.of_input is not None:
            return self.of_input(x).unflatten(2, (self.heads, -1)).transpose(1, 2)
        if x.shape[1] != self.free.shape[2]:
            raise ValueError(f"x: expected length {self.free.shape[2]}, got {x.shape[1]}")
        return self.free.expand(len(x), -1, -1, -1)

    def forward(self, x: Float[Tensor, "B L C"]) -> Float[Tensor, "B L C"]:
        v = self.values(x).unflatten(2, (self.heads, -1)).transpose(1, 2)
        y = self.scale * self.kind.product(self.parameters_at(x), v)
        return x + self.out(y.transpose(1, 2).flatten(2))

    def matrix(self, x: Float[Tensor, "B L C"]) -> Matrices:
        """What each head multiplies its values by."""
        return self.scale * self.kind.matrix(self.parameters_at(x))


def example(kind: str, length: int = 6, state: int = 2) -> dict:
    """Random parameters of one head and values of width 1.

    >>> example("low rank")["p"].shape
    torch.Size([1, 1, 6, 4])
    """
    g = torch.Generator().manual_seed(0)
    numbers = CLASSES[kind].numbers(state, length)
    p, v = (torch.randn(1, 1, length, n, generator=g, dtype=torch.float64) for n in (numbers, 1))
    return dict(p=p, v=v)
