"""Many Toeplitz products at once, summed over features: what a relative bias makes of a kernel.

    out_a = sum_f q_f * (M (k_f * w_a))                      M_ij = lags_(j - i)

That is ``(q^T k * M) w`` without the ``L x L`` square: a feature ``f`` and a channel ``a`` need one
convolution, in ``O(L log L)``. All ``m A`` of them together would hold ``m A L`` numbers, so they
are taken a slab of features at a time and added up. The backward pass makes each slab again:

    d_q_f = sum_a d_out_a * (M (k_f * w_a))
    back_fa = M^T (q_f * d_out_a)     d_k_f = sum_a w_a * back_fa     d_w_a = sum_f k_f * back_fa
    d_lags_d = sum_fa sum_i (q_f * d_out_a)_i (k_f * w_a)_(i + d)

Two transforms for each pair of f and a, four more in the backward pass; none is kept. Grouped
heads share the transforms of ``k_f w_a``. Not differentiable twice. Oracle: the square.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from ._checks import check_same_kind
from .toeplitz import circulant_ring

SLAB = 1 << 19  # numbers that are transformed at a time


def toeplitz_bank(
    q: Float[Tensor, "B H m L"],
    k: Float[Tensor, "B G m L"],
    w: Float[Tensor, "B G A L"],
    lags: Float[Tensor, "H T"],
    *,
    causal: bool,
) -> Float[Tensor, "B H A L"]:
    """The sums of this module; ``causal``: M without what is above its diagonal.

    Head ``h`` of ``q`` reads group ``h // (H // G)``. ``lags`` as in `toeplitz`. float32, float64.
    Raises ValueError or TypeError for dtypes, heads or lengths that do not fit.
    """
    check_same_kind(q=q, k=k, w=w, lags=lags)
    if k.shape[1] == 0 or q.shape[1] % k.shape[1]:
        raise ValueError(f"k: expected groups that divide q's {q.shape[1]} heads: {k.shape[1]}")
    return _Bank.apply(q, k, w, circulant_ring(lags, q.shape[-1], causal=causal))


class _Bank(torch.autograd.Function):
    """``out_a = sum_f q_f * (ring o (k_f * w_a))``, o around the circle."""

    @staticmethod
    def forward(ctx, q, k, w, ring):
        ctx.save_for_backward(q, k, w, ring)
        q, spectrum = _group(q, ring, k.shape[1])
        out, sending = torch.zeros_like(q[:, :, :, :1] * w[:, :, None]), _Padded(ring)
        for at in _slabs(q, w):
            sent = sending.spectra(k[:, :, at, None], w[:, :, None])
            out += _moved(sent, spectrum, ring, w).mul_(q[:, :, :, at, None]).sum(3)
        return out.flatten(1, 2)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, d_out):
        q, k, w, ring = ctx.saved_tensors
        L, circle = w.shape[-1], ring.shape[-1]
        q, spectrum = _group(q, ring, k.shape[1])
        d_q, d_k, d_w = torch.empty_like(q), torch.empty_like(k), torch.zeros_like(w)
        d_out = d_out.unflatten(1, q.shape[1:3])
        sending, returning, d_spectrum = _Padded(ring), _Padded(ring), 0
        for at in _slabs(q, w):
            sent = sending.spectra(k[:, :, at, None], w[:, :, None])
            d_q[:, :, :, at] = _moved(sent, spectrum, ring, w).mul_(d_out[:, :, :, None]).sum(4)
            back = returning.spectra(q[:, :, :, at, None], d_out[:, :, :, None])
            d_spectrum = d_spectrum + (back * sent[:, :, None].conj()).sum((0, 3, 4))
            home = (back.mul_(spectrum.conj())).sum(2)  # over the heads of a group
            home = torch.fft.irfft(home, n=circle)[..., :L]
            d_k[:, :, at] = (home * w[:, :, None]).sum(3)
            d_w += (home * k[:, :, at, None]).sum(2)
        d_ring = torch.fft.irfft(d_spectrum, n=circle).flatten(0, 1)
        return d_q.flatten(1, 2), d_k, d_w, d_ring


class _Padded:
    """Spectra of products, through one buffer whose zeros up to the circle are written once."""

    def __init__(self, ring: Tensor):
        self.circle, self.buffer = ring.shape[-1], ring.new_zeros(0)

    def spectra(self, a: Tensor, b: Tensor) -> Tensor:
        """Of ``a * b (..., L)`` with zeros behind it."""
        *shape, L = torch.broadcast_shapes(a.shape, b.shape)
        if self.buffer.shape[:-1] != tuple(shape):
            self.buffer = self.buffer.new_zeros(*shape, self.circle)
        torch.mul(a, b, out=self.buffer[..., :L])
        return torch.fft.rfft(self.buffer)


def _group(q: Tensor, ring: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """``q (B, G, R, m, L)`` and the ring's spectrum ``(G, R, 1, 1, circle / 2 + 1)``."""
    spectrum = torch.fft.rfft(ring).unflatten(0, (groups, -1))[:, :, None, None]
    return q.unflatten(1, (groups, -1)), spectrum


def _moved(sent: Tensor, spectrum: Tensor, ring: Tensor, w: Tensor) -> Tensor:
    """``M (k_f * w_a)`` for each head, ``(B, G, R, f, A, L)``."""
    return torch.fft.irfft(sent[:, :, None] * spectrum, n=ring.shape[-1])[..., : w.shape[-1]]


def _slabs(q: Tensor, w: Tensor) -> list[slice]:
    """Slices of the features, all of one size but the last; a slab has about `SLAB` numbers."""
    features, one = q.shape[3], q[:, :, :, 0].numel() * w.shape[2]
    size = max(1, SLAB // max(1, one))
    return [slice(start, start + size) for start in range(0, features, size)]
