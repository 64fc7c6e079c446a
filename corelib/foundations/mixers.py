"""Token mixers in one template: ``y = P(x) v``, each in the form that one would run.

Every function takes what it needs of queries and keys, and values ``v (B, H, L, V)``, and is linear
in the values. None builds its ``P (L, L)`` unless the paper does; `corelib.measure.structure`
finds it. They are plain PyTorch, meant to be compared, not to break records: the families of this
library hold the methods themselves. Sources: Linformer arXiv 2006.04768, linear attention
2006.16236, Performer 2009.14794, FNet 2105.03824, MLP-Mixer 2105.01601, PoolFormer 2111.11418,
Sparse Transformer 1904.10509, S4D 2206.11893, gated linear attention 2312.06635.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from jaxtyping import Complex, Float
from torch import Tensor

from corelib.primitives import attention

from .shared import check_counts

Heads = Float[Tensor, "B H L D"]
Values = Float[Tensor, "B H L V"]
FeatureMap = Callable[[Tensor], Tensor]


def strided_attention(q: Heads, k: Heads, v: Values, *, stride: int) -> Values:
    """Softmax attention among positions whose distance is a multiple of ``stride``: O(L^2/stride).

    One attention for each remainder; the other half of Sparse Transformer's pair of patterns.
    """
    check_counts(stride=stride)
    parts = [
        attention(q[:, :, r::stride], k[:, :, r::stride], v[:, :, r::stride], causal=False)
        for r in range(min(stride, v.shape[2]))
    ]
    out = torch.empty_like(v)
    for r, part in enumerate(parts):
        out[:, :, r::stride] = part
    return out


def low_rank_attention(q: Heads, k: Heads, v: Values, projection: Float[Tensor, "R L"]) -> Values:
    """Linformer: ``softmax(q (E k)^T) (E v)`` with ``E (R, L)``, learned. Rank ``R``, O(L R)."""
    if projection.shape[1] != v.shape[2]:
        raise ValueError(f"projection: expected (R, {v.shape[2]}), got {tuple(projection.shape)}")
    return attention(q, projection @ k, projection @ v, causal=False)


def elu_features(x: Float[Tensor, "... D"]) -> Float[Tensor, "... D"]:
    """``elu(x) + 1``: positive, as wide as the head."""
    return F.elu(x) + 1


def positive_random_features(directions: Float[Tensor, "R D"]) -> FeatureMap:
    """Performer's ``exp(w . x - |x|^2 / 2)``: on average over ``w ~ N(0, 1)`` a product of two
    feature vectors is ``exp(x . y)``. ``x`` takes half of the softmax's scale."""

    def features(x: Tensor) -> Tensor:
        x = x * x.shape[-1] ** -0.25
        return torch.exp(x @ directions.T - (x * x).sum(-1, keepdim=True) / 2)

    return features


def kernel_attention(q: Heads, k: Heads, v: Values, features: FeatureMap = elu_features) -> Values:
    """``phi(q_i) . phi(k_j)`` in the softmax's place, all positions: sums first, O(L)."""
    q, k = features(q), features(k)
    total = k.sum(2)[..., None]
    return q @ (k.mT @ v) / (q @ total)


def causal_kernel_attention(
    q: Heads, k: Heads, v: Values, features: FeatureMap = elu_features
) -> Values:
    """`kernel_attention` over the past only: a recurrence, normalised by a second one."""
    q, k, ones = features(q), features(k), torch.ones_like(v[..., :1])
    always = q.new_zeros(q.shape[:-1])
    return decayed_attention(q, k, v, always) / decayed_attention(q, k, ones, always)


def decayed_attention(
    q: Heads, k: Heads, v: Values, log_decay: Float[Tensor, "B H L"], chunk: int = 64
) -> Values:
    """``S_t = a_t S_(t-1) + k_t v_t^T``, ``y_t = q_t S_t``, with ``a = exp(log_decay) <= 1``.

    A gated linear attention, or a selective state space with one decay per head. Chunk by chunk:
    inside a chunk with a small matrix, across chunks through the state ``(B, H, D, V)``. O(L).
    """
    state = q.new_zeros(*q.shape[:2], q.shape[3], v.shape[3])
    pieces = []
    for start in range(0, v.shape[2], chunk):
        here = slice(start, start + chunk)
        since = log_decay[:, :, here].cumsum(-1)  # of the decay, from the chunk's start
        gap = (since[..., :, None] - since[..., None, :]).tril()
        inside = ((q[:, :, here] @ k[:, :, here].mT) * gap.exp()).tril() @ v[:, :, here]
        pieces.append(inside + since.exp()[..., None] * (q[:, :, here] @ state))
        left = (since[..., -1:] - since).exp()[..., None] * k[:, :, here]
        state = since[..., -1].exp()[..., None, None] * state + left.mT @ v[:, :, here]
    return torch.cat(pieces, 2)


def long_convolution(v: Values, kernel: Float[Tensor, "H L"]) -> Values:
    """``y_i = sum_(j <= i) c_(i-j) v_j``, a kernel ``c`` as long as the input: FFT, O(L log L)."""
    L = v.shape[2]
    if kernel.shape != (v.shape[1], L):
        raise ValueError(f"kernel: expected {(v.shape[1], L)}, got {tuple(kernel.shape)}")
    spectrum = torch.fft.rfft(kernel, 2 * L)[..., None] * torch.fft.rfft(v, 2 * L, dim=2)
    return torch.fft.irfft(spectrum, 2 * L, dim=2)[:, :, :L]


def state_space_kernel(
    decay: Float[Tensor, "H N"], weight: Float[Tensor, "H N"], length: int
) -> Float[Tensor, "H L"]:
    """``c_t = sum_n weight_n decay_n^t``: a diagonal state space of size ``N`` as a convolution."""
    powers = decay[..., None] ** torch.arange(length, device=decay.device)
    return (weight[..., None] * powers).sum(1)


def short_convolution(v: Values, taps: Float[Tensor, "H W"]) -> Values:
    """``y_i = sum_(t < W) taps_t v_(i-t)``: a band of ``W`` diagonals, O(L W)."""
    W, L = taps.shape[1], v.shape[2]
    padded = F.pad(v, (0, 0, W - 1, 0))
    return sum(taps[:, t, None, None] * padded[:, :, W - 1 - t : W - 1 - t + L] for t in range(W))


def pooling(v: Values, *, window: int) -> Values:
    """PoolFormer: the mean of the neighbours with ``|i - j| < window`` that exist. O(L)."""
    check_counts(window=window)
    L = v.shape[2]
    sums = F.pad(v.cumsum(2), (0, 0, 1, 0))
    i = torch.arange(L, device=v.device)
    first, stop = (i - window + 1).clamp(min=0), (i + window).clamp(max=L)
    return (sums[:, :, stop] - sums[:, :, first]) / (stop - first)[:, None]


def fourier(v: Values) -> Complex[Tensor, "B H L V"]:
    """The discrete Fourier transform along the sequence: FNet's mixing, O(L log L)."""
    return torch.fft.fft(v, dim=2)


def fnet(x: Float[Tensor, "B L C"]) -> Float[Tensor, "B L C"]:
    """FNet's layer: ``Re(F x G)`` with the DFT along positions (``F``) and channels (``G``)."""
    return torch.fft.fft2(x).real


def learned_mixing(v: Values, matrix: Float[Tensor, "H L L"]) -> Values:
    """MLP-Mixer: ``P`` itself is a parameter, for one fixed length. O(L^2)."""
    return matrix @ v
