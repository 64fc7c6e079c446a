"""Hydra: Bidirectional State Space Models Through Generalized Matrix Mixers (arXiv 2407.09941).

Idea: a sequence layer is a matrix ``M`` times the values; choose the class of matrix, and the layer
follows. Mamba-2's is semiseparable: lower triangular, every block below the diagonal of rank N at
most. What is that for both sides? Quasiseparable: rank N below, rank N above, the diagonal free.

    M = shift(SS(past)) + unshift(mirror(SS(mirrored future))) + diag(d)

    M_ij = c_(i-1) . (a_(j+1) ... a_(i-1)) dt_j b_j             i > j, from ``past``
    M_ij = c_(i+1) . (a_(i+1) ... a_(j-1)) dt_j b_j             i < j, from ``future``
    M_ii = d_i                                                  of its own

with ``a = exp(dt A)``. So it costs two scans of Mamba-2, linear in L, here as one call with twice
the heads. Usually two scans are added, with a skip ``D`` for each head (`added`). Then the diagonal
is ``D + dt_i c_i . b_i`` of both, and what stands beside it already says what it must be.

| here          | paper                    | shape                             |
|:--------------|:-------------------------|:----------------------------------|
| x             | X, input of the mixer    | (B, H, L, V), E = H V = expand C  |
| past, future  | SS forward, SS backward  | `Scan`: dt, A, B, C               |
| diagonal, d   | delta, D + fc_D(x)       | (B, H, L)                         |
| matrix        | M, matrix mixer          | (B, H, L, L)                      |

`future` is given in the sequence's order, its recurrence runs from the end. The layer has the names
and shapes of the released one's parameters: both directions share ``x``, ``A`` and ``dt_bias``,
have ``B``, ``C`` and ``dt`` of their own; a convolution of width 7 looks both ways; the norm comes
before the gate. Exact. Not causal, so no state and no ``step``: ``y`` alone comes back. Left out:
learnable initial states. Oracles: the loop, the matrix, ``corelib.measure.structure``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from ..primitives import ssd_chunked
from .bidirectional import shift, unshift
from .mamba import initial_dt_bias

Heads = Float[Tensor, "B H L V"]
Diagonal = Float[Tensor, "B H L"]
Matrices = Float[Tensor, "B H L L"]


class Scan(NamedTuple):
    """One direction: ``dt (B, H, L)``, ``A (H,)`` negative, ``B``, ``C (B, G, L, N)``."""

    dt: Tensor
    A: Tensor
    B: Tensor
    C: Tensor

    def mirrored(self) -> Scan:
        """The same for the sequence read backwards."""
        return Scan(self.dt.flip(2), self.A, self.B.flip(2), self.C.flip(2))


Mixing = Callable[..., Tensor]


# --- the matrix -----------------------------------------------------------------------------------


def semiseparable_matrix(scan: Scan) -> Matrices:
    """``M_ij = C_i . (a_(j+1) ... a_i) dt_j B_j`` for ``i >= j``: Mamba-2's matrix, ``L^2``."""
    sums = (scan.dt * scan.A[:, None]).cumsum(2)
    ahead = torch.ones(sums.shape[-1], sums.shape[-1], dtype=torch.bool, device=sums.device).triu(1)
    decay = (sums[..., :, None] - sums[..., None, :]).masked_fill(ahead, -torch.inf).exp()
    scores = (scan.C @ scan.B.mT).repeat_interleave(len(scan.A) // scan.B.shape[1], 1)
    return scores * decay * scan.dt[:, :, None]


def quasiseparable_matrix(past: Scan, future: Scan, diagonal: Diagonal) -> Matrices:
    """The matrix ``M`` of this module, written out; ``M @ x`` is `quasiseparable`."""
    below = shift(semiseparable_matrix(past))
    above = unshift(semiseparable_matrix(future.mirrored()).flip(2, 3))
    return below + above + torch.diag_embed(diagonal)


# --- the product ----------------------------------------------------------------------------------


def quasiseparable_reference(x: Heads, past: Scan, future: Scan, diagonal: Diagonal) -> Heads:
    """As `quasiseparable`, position after position: read what was kept, then keep this one too."""
    y = diagonal[..., None] * x
    from_left = _read_then_keep(x, past)
    from_right = _read_then_keep(x.flip(2), future.mirrored()).flip(2)
    return y + from_left + from_right


def _read_then_keep(x: Tensor, scan: Scan) -> Tensor:
    """``y_i = C_(i-1) S_(i-1)``, where ``S_i = a_i S_(i-1) + dt_i B_i x_i``; zeros to start."""
    dt, A, B, C = scan
    B, C = (part.repeat_interleave(x.shape[1] // part.shape[1], 1) for part in (B, C))
    S = x.new_zeros(*x.shape[:2], B.shape[3], x.shape[3])
    ys = []
    for i in range(x.shape[2]):
        ys.append((C[:, :, i - 1, None] @ S)[:, :, 0])  # the first reads zeros, whatever its C
        S = torch.exp(dt[:, :, i] * A)[..., None, None] * S
        S = S + dt[:, :, i, None, None] * B[:, :, i, :, None] * x[:, :, i, None]
    return torch.stack(ys, 2)


def quasiseparable(
    x: Heads, past: Scan, future: Scan, diagonal: Diagonal, *, chunk: int = 64
) -> Heads:
    """``M @ x`` in time linear in L: two scans as one, differentiable in every tensor.

    Args:
        x: values. past, future: the scans; their groups G divide the heads H.
        diagonal: what a position's own value is multiplied by.
        chunk: steps multiplied at once; any number gives the same result.

    Raises:
        ValueError, TypeError: shapes, dtypes or devices that do not fit together.
    """
    _check(x, past, future, diagonal)
    below, above = _scans(x, past, future, chunk)
    return diagonal[..., None] * x + shift(below) + unshift(above)


def added(x: Heads, past: Scan, future: Scan, diagonal: Diagonal, *, chunk: int = 64) -> Heads:
    """The usual alternative, of the same parameters: ``SS(past) x + SS(future) x + d x``.

    Its diagonal is ``d_i + dt_i c_i . b_i`` of both; usually ``d`` is one number for each head.
    """
    _check(x, past, future, diagonal)
    below, above = _scans(x, past, future, chunk)
    return diagonal[..., None] * x + below + above


def multiplied(x: Heads, past: Scan, future: Scan, diagonal: Diagonal, *, chunk: int = 64) -> Heads:
    """``SS(past) x * SS(future) x + d x``: no longer a matrix times x."""
    _check(x, past, future, diagonal)
    below, above = _scans(x, past, future, chunk)
    return diagonal[..., None] * x + below * above


def _scans(x: Tensor, past: Scan, future: Scan, chunk: int) -> tuple[Tensor, Tensor]:
    """Mamba-2's scan of both sides, each in the order of x: one call with twice the heads."""
    dt, A, B, C = (
        torch.cat([one, other], 0 if one.dim() == 1 else 1)
        for one, other in zip(past, future.mirrored(), strict=True)
    )
    both = ssd_chunked(torch.cat([x, x.flip(2)], 1), dt, A, B, C, chunk=chunk)
    below, above = both.chunk(2, 1)
    return below, above.flip(2)


# --- the layer ------------------------------------------------------------------------------------


class Hydra(nn.Module):
    """A mixer that sees both sides: ``(B, L, C) -> (B, L, C)``.

    Args:
        width: C. state: N, for each side. expand: E / C. head_width: V, which divides E.
        groups: G, which divides the heads. conv: an odd width. chunk: steps multiplied at once.
        mixing: `quasiseparable`, or `added` or `multiplied` to compare.
    """

    def __init__(
        self,
        width: int,
        *,
        state: int = 64,
        expand: int = 2,
        head_width: int = 64,
        groups: int = 1,
        conv: int = 7,
        chunk: int = 64,
        mixing: Mixing = quasiseparable,
    ):
        super().__init__()
        inner = expand * width
        if inner % head_width or (inner // head_width) % groups:
            raise ValueError(
                f"head_width, groups: expected a width that divides {inner} into heads that "
                f"{groups} groups divide, got {head_width}"
            )
        if conv % 2 == 0:
            raise ValueError(f"conv: expected an odd width, to look equally far both ways: {conv}")
        heads, self.state, self.groups = inner // head_width, state, groups
        self.chunk, self.mixing = chunk, mixing
        channels = inner + 4 * groups * state
        self.in_proj = nn.Linear(width, inner + channels + 2 * heads, bias=False)
        self.conv1d = nn.Conv1d(channels, channels, conv, groups=channels, padding=conv // 2)
        self.dt_bias = nn.Parameter(initial_dt_bias(heads))
        self.A_log = nn.Parameter(torch.zeros(heads))
        self.D = nn.Parameter(torch.ones(heads))
        self.fc_D = nn.Linear(inner, heads, bias=False)
        self.norm = nn.RMSNorm(inner, eps=1e-5)
        self.out_proj = nn.Linear(inner, width, bias=False)

    def forward(self, x: Float[Tensor, "B L C"]) -> Float[Tensor, "B L C"]:
        parts = self.in_proj(x).to(self.D.dtype)
        with torch.autocast(x.device.type, enabled=False):  # only projections may be narrower
            z, *operands = self._operands(parts)
            y = self.mixing(*operands, chunk=self.chunk)
            y = self.norm(y.transpose(1, 2).flatten(2)) * F.silu(z)
        return self.out_proj(y)

    def matrix(self, x: Float[Tensor, "B L C"]) -> Matrices:
        """The matrix with which each head multiplies its values, given this input."""
        _, _, past, future, diagonal = self._operands(self.in_proj(x).to(self.D.dtype))
        return quasiseparable_matrix(past, future, diagonal)

    def _operands(self, parts: Tensor) -> tuple[Tensor, Tensor, Scan, Scan, Tensor]:
        """Gate ``(B, L, E)``, values, the two scans and the diagonal, from the projection."""
        inner, heads, width = len(self.norm.weight), len(self.D), self.groups * self.state
        z, mixed, dt = parts.split([inner, len(self.conv1d.weight), 2 * heads], 2)
        mixed = F.silu(self.conv1d(mixed.mT)).mT
        x, *mixing = mixed.split([inner, *4 * [width]], 2)
        mixing = [part.unflatten(2, (self.groups, -1)).transpose(1, 2) for part in mixing]
        steps = (F.softplus(part + self.dt_bias).mT for part in dt.chunk(2, 2))
        A, own = -self.A_log.exp(), F.linear(x, self.fc_D.weight, self.D).mT
        past, future = Scan(next(steps), A, *mixing[:2]), Scan(next(steps), A, *mixing[2:])
        return z, x.unflatten(2, (heads, -1)).transpose(1, 2), past, future, own


def example() -> dict:
    """Six positions of one head: one value channel, two states a side, a free diagonal.

    >>> quasiseparable(**example()).shape
    torch.Size([1, 1, 6, 1])
    """
    g = torch.Generator().manual_seed(0)

    def scan() -> Scan:
        B, C = torch.randn(2, 1, 1, 6, 2, generator=g, dtype=torch.float64)
        dt = 0.2 + torch.rand(1, 1, 6, generator=g, dtype=torch.float64)
        return Scan(dt, torch.tensor([-0.5], dtype=torch.float64), B, C)

    x = torch.arange(1.0, 7.0, dtype=torch.float64).view(1, 1, 6, 1)
    diagonal = torch.tensor([1.0, -1, 1, -1, 1, -1], dtype=torch.float64).view(1, 1, 6)
    return dict(x=x, past=scan(), future=scan(), diagonal=diagonal)


def _check(x: Tensor, past: Scan, future: Scan, diagonal: Tensor) -> None:
    """What `ssd_chunked` cannot see: it is given both scans at once."""
    if x.dim() != 4:
        raise ValueError(f"x: expected 4 axes (B, H, L, V), got shape {tuple(x.shape)}")
    batch, H, L, _ = x.shape
    if tuple(diagonal.shape) != (batch, H, L):
        raise ValueError(f"diagonal: expected {(batch, H, L)}, got {tuple(diagonal.shape)}")
    for name, scan in (("past", past), ("future", future)):
        G, N = past.B.shape[1], past.B.shape[-1]
        wanted = (batch, H, L), (H,), (batch, G, L, N), (batch, G, L, N)
        for part, tensor, shape in zip(scan._fields, scan, wanted, strict=True):
            if tuple(tensor.shape) != shape:
                raise ValueError(f"{name}.{part}: expected {shape}, got {tuple(tensor.shape)}")
