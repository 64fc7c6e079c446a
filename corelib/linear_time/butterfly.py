"""FlashButterfly: a long convolution in three passes, and one whose transform is learned.

The second half of "Simple Hardware-Efficient Long Convolutions" (arXiv 2302.06646, section 4); the
first, squashed kernels, is `long_conv`. Idea: split the circle of ``N = rows m`` points once. With
``B = W (F_rows (x) I_m)``, a transform over the rows and the twiddles ``W``,

    conv(u, kernel) = B^-1 blockdiag(conv_0 ... conv_(rows-1)) B u              (`butterfly_conv`)

where ``conv_k1`` is a circular convolution of only ``m`` points with row ``k1`` of ``B kernel``.
So a sequence that is too long for the chip takes three passes over main memory: a butterfly, many
short convolutions, each short enough to be fused into one kernel, and a butterfly back. A plain
FFT of that length takes a pass for each of its steps, and there are two FFTs.

`LearnedButterflyConv` writes the inner transforms as matrices as well (``m`` by ``m``, one for each
row) and makes all of them parameters. They start as the DFT, where the layer is the convolution;
once they have moved it is a general linear map of the same cost, neither causal nor the same at
every position.

| here    | paper | what                                                        |
|:--------|:------|:------------------------------------------------------------|
| rows, m | l, m  | rows and columns of the circle, ``N = rows m``              |
| outer   | B     | ``F_rows``, ``(rows, rows)``                                |
| inner   | F_m   | transforms of the rows, ``(rows, m, m)``                    |

Exact: `butterfly_conv` is the convolution for every ``rows``; real input needs only the rows
``0 ... rows / 2`` (the others are their conjugates). Our reconstruction: the paper says that the
coefficients are learned, not how they are tied; here each row has its own inner matrix, forward
and inverse are separate, and the kernel is transformed with the fixed DFT. On a GPU the middle pass
is the kernel `corelib.kernels.monarch_fft_conv`, where rows of ``m`` points fit on the chip.
Cost: ``O(N (rows + log m))``; learned ``O(N (rows + m))``. Oracle: ``torch.fft`` and `fft_conv`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from corelib.primitives.fft_conv import _check, fast_length
from corelib.primitives.monarch_transform import (
    dft_matrix,
    first_product,
    last_product,
    twiddles,
)

Inputs = Float[Tensor, "*batch_and_channels L"]
Taps = Float[Tensor, "*channels K"]


def butterfly_conv(u: Inputs, kernel: Taps, rows: int) -> Inputs:
    """Causal convolution in three passes, the circle cut into ``rows``.

    Channels as in `corelib.primitives.fft_conv`, whose errors it raises; half precision is
    computed in float32.
    """
    _check(u, kernel=kernel)
    if isinstance(rows, bool) or not isinstance(rows, int) or rows < 1:
        raise ValueError(f"rows: expected a whole number of at least 1, got {rows!r}")
    if u.numel() == 0:
        return u.clone()
    L, taps, kept = u.shape[-1], kernel[..., : u.shape[-1]], rows // 2 + 1
    m = fast_length(-(-(L + taps.shape[-1] - 1) // rows))
    wide = torch.promote_types(u.dtype, torch.float32)
    inputs, filters = (first_product(x.to(wide), rows, m, kept) for x in (u, taps))
    filters = torch.fft.fft(filters)
    short = _on_chip(inputs, filters) if u.is_cuda else None
    if short is None:
        short = torch.fft.ifft(torch.fft.fft(inputs) * filters)
    # a row that stands for its conjugate as well counts twice
    count = [2.0 if 0 < 2 * row < rows else 1.0 for row in range(kept)]
    count = torch.tensor(count, dtype=wide, device=u.device)[:, None] / rows
    return last_product(short * count, rows, L).to(u.dtype)


def _on_chip(inputs: Tensor, spectra: Tensor) -> Tensor | None:
    """The middle pass by the kernel, real and imaginary parts as two rows; None where ``m`` does
    not fit."""
    from corelib.kernels._monarch_tables import SIDES, circle_for, plan_of

    m, H = inputs.shape[-1], spectra.shape[:-1].numel()
    if m not in SIDES or circle_for(m, inputs.real.dtype) != m:
        return None
    from corelib.kernels.monarch_fft_conv import convolve

    N1, N2 = SIDES[m]
    grid = spectra.reshape(H, N2, N1).mT
    grid = torch.stack([grid.real, grid.imag], 1)
    z = inputs.reshape(-1, H, m)
    parts = torch.stack([z.real, z.imag], 1).flatten(0, 1)
    every = tuple(range(N1)), tuple(range(N2))
    y = convolve(parts, grid, None, None, plan_of(m, m), *every).unflatten(0, (-1, 2))
    return torch.complex(y[:, 0], y[:, 1]).view(inputs.shape)


class LearnedButterflyConv(nn.Module):
    """``u (B, C, L)`` with ``kernel (C, K)``: a convolution whose transforms are parameters.

    Args:
        N: points, at least ``L + K - 1`` of what it will be called with.
        rows: a divisor of ``N``. Channels share the transforms.
        dtype: of the parameters, real and imaginary parts; None: torch's default.
    """

    def __init__(self, N: int, rows: int, dtype: torch.dtype | None = None):
        super().__init__()
        if not (isinstance(N, int) and isinstance(rows, int)) or N < 1 or rows < 1 or N % rows:
            raise ValueError(f"rows: expected a divisor of N = {N}, got {rows!r}")
        self.rows, self.m = rows, N // rows
        kind = (dtype or torch.get_default_dtype()).to_complex()
        outer, inner = (dft_matrix(n, kind, torch.device("cpu")) for n in (rows, self.m))
        inner = inner.expand(rows, -1, -1)
        tables = dict(
            outer=outer,
            inner=inner,
            inner_back=inner.conj() / self.m,
            outer_back=outer.conj() / rows,
        )
        for name, table in tables.items():
            pairs = torch.view_as_real(table.resolve_conj()).clone()
            self.register_parameter(name, nn.Parameter(pairs))

    def forward(
        self, u: Float[Tensor, "B C L"], kernel: Float[Tensor, "C K"]
    ) -> Float[Tensor, "B C L"]:
        """At the start the causal convolution of `fft_conv`."""
        _check(u, kernel=kernel)
        m, L, taps = self.m, u.shape[-1], kernel[..., : u.shape[-1]]
        N, needed = self.rows * m, L + taps.shape[-1] - 1
        if needed > N:
            raise ValueError(f"u: expected L + K - 1 of at most N = {N}, got {needed}")
        outer, inner, inner_back, outer_back = map(
            torch.view_as_complex, (self.outer, self.inner, self.inner_back, self.outer_back)
        )
        turn = twiddles(self.rows, m, outer.dtype, u.device)
        x = F.pad(u, (0, N - L)).unflatten(-1, (self.rows, m)).to(outer.dtype)
        spectrum = torch.einsum("...rn,rnk->...rk", (outer @ x) * turn, inner)
        # the kernel's by the fixed DFT: [k1, k2] is frequency k1 + rows k2
        filters = torch.fft.fft(taps, n=N).unflatten(-1, (m, self.rows)).mT
        y = torch.einsum("...rk,rkn->...rn", spectrum * filters, inner_back) * turn.conj()
        return (outer_back @ y).real.flatten(-2)[..., :L]


def example() -> dict:
    """Two channels, eleven steps, four rows.

    >>> butterfly_conv(**example()).shape
    torch.Size([1, 2, 11])
    """
    generator = torch.Generator().manual_seed(0)
    u, kernel = torch.randn(1, 2, 11, generator=generator), torch.randn(2, 5, generator=generator)
    return dict(u=u, kernel=kernel, rows=4)
