"""What a decay does inside one chunk of a linear recurrence, and how gradients come back.

Chunks are ``q, k (N, C, K)``, N of them side by side. With ``G_i`` the sum of the chunk's first
``i`` log-decays (its own included), the recurrence needs four things of a chunk:

    scores_ij = sum_c q_ic k_jc exp(G_ic - G_jc)   for j <= i, else 0     (N, C, C)
    read_i    = q_i exp(G_i)                       queries of the state before the chunk
    write_j   = k_j exp(G_C - G_j)                 keys into the state after the chunk
    total     = exp(G_C)                           what is left of the state

A decay for each channel cannot be pulled out of the sum over channels. Splitting it into
``exp(G_i)`` and ``exp(-G_j)`` makes scores a matrix product, and overflows; writing all
``exp(G_i - G_j)`` out costs ``C x C x K`` numbers. `ChunkDecay` halves the chunk: between the
right and the left half the factor splits at the boundary m, ``exp(G_i - G_m) exp(G_m - G_j)``, both
at most 1, and each half is done in the same way. It stops halving at blocks so short that a plain
split at the block's start stays below ``exp(LARGEST)``; strong decays go down to single steps,
where no positive number is exponentiated at all. The factors of the levels are running products.
One decay for all channels goes the same way while a whole chunk is such a block; a stronger one is
written out, `StrongHeadDecay`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .decay_exp import decay_exp_

LARGEST = 64.0  # exp(64), about 1e28, leaves float32 ten powers of ten for the numbers themselves
RUN = 8  # rows that are summed within runs
BY_HAND = 2  # blocks up to this wide are multiplied element by element: products cost more calls


class ChunkDecay:
    """A decay for each channel, ``log_decay (N, C, K)``, or one for all, ``(N, C, 1)``.

    C is a power of two.

    Within a block of ``width``, F its first step: ``read_i = q_i exp(G_i - G_{F-1})``, at most
    ``q_i``, and ``plain_j = k_j / exp(G_j - G_{F-1})``, at most ``exp(LARGEST) k_j``. A block of
    one step multiplies ``q`` and ``k`` as they are, and its decay may be 0.
    """

    def __init__(self, q: Tensor, k: Tensor, log_decay: Tensor, width: int, keep: bool = False):
        """``width`` of the blocks that are not halved (`plain_width`); ``keep`` for `pull`."""
        (N, C, K), blocks = q.shape, q.shape[1] // width
        g, queries, keys = (x.reshape(N * blocks, width, -1) for x in (log_decay, q, k))
        if width == 1:
            factor = decay_exp_(g.clone())
            pair, read, write = (queries, keys), queries * factor, keys.clone()
        else:
            factor = sums_until_(g.clone()).exp_()
            pair = read, write = queries * factor, keys / factor
        if blocks == 1 < width:
            self.scores = torch.bmm(read, write.mT).tril_()
        else:
            self.scores = q.new_zeros(N, C, C)
            own = _outer(*(x.view(N, blocks, width, K) for x in pair)).tril_()
            _blocks(self.scores, width, 1).copy_(own)
        total = factor[:, -1:].clone()
        if keep:
            self.q, self.k, self.factor, self.pair, self.width = q, k, factor, pair, width
            if width > 1:
                read, write = read.clone() if blocks > 1 else read, write * total
        elif width > 1:
            write *= total  # in place: only `pull` wants the plain keys
        self.read, self.write = read.view(N, C, K), write.view(N, C, K)
        self.levels = self._halve(total.view(N, blocks, -1), width, keep)

    def _halve(self, total: Tensor, width: int, keep: bool) -> list[tuple[Tensor, ...]]:
        """From pairs of neighbouring blocks to blocks of twice the width, up to the chunk."""
        levels = []
        while width < self.read.shape[1]:
            right, left = _halves(self.read, width)[1], _halves(self.write, width)[0]
            total_left, total_right = total.unflatten(1, (-1, 2)).unbind(2)
            if keep:
                levels.append((right.clone(), left.clone(), total_left, total_right))
            _blocks(self.scores, width, 2).copy_(_outer(right, left))
            right *= total_left[:, :, None]
            left *= total_right[:, :, None]
            total = total_left * total_right
            width *= 2
        self.total = total.mT  # (N, K, 1) or (N, 1, 1)
        return levels

    def pull(self, d_scores: Tensor, d_read: Tensor, d_write: Tensor) -> Tensor:
        """``d_G``, without what flows through ``total``.

        Makes ``d_read`` into ``d_q`` and ``d_write`` into ``d_k``; spoils ``d_scores`` and itself.
        """
        N, width = len(d_read), d_read.shape[1]
        for right_was, left_was, total_left, total_right in reversed(self.levels):
            width //= 2
            block = _blocks(d_scores, width, 2)
            right, left = _halves(d_read, width)[1], _halves(d_write, width)[0]
            right *= total_left[:, :, None]
            left *= total_right[:, :, None]
            right += _product(block, left_was)
            left += _product(block.mT, right_was)
        block = _blocks(d_scores, width, 1)
        queries, keys = (x.unflatten(0, (N, -1)) for x in self.pair)
        d_q, d_k = (x.view(self.pair[0].shape) for x in (d_read, d_write))
        if width == 1:
            d_q *= self.factor
        else:
            d_k *= self.factor[:, -1:]
        d_q += _product(block, keys).flatten(0, 1)
        d_k += _product(block.mT, queries).flatten(0, 1)
        if width > 1:
            d_q *= self.factor
            d_k /= self.factor
        d_sum = (self.q * d_read).sub_(self.k * d_write)
        return d_sum if self.factor.shape[2] > 1 else d_sum.sum(-1, keepdim=True)


class StrongHeadDecay:
    """One decay for all channels, ``log_decay (N, C, 1)``, however strong.

    It stands before the sum over channels: ``q k^T`` times one number a pair. Each sum between two
    steps is added up by itself, so that nothing cancels. Offers what `ChunkDecay` does.
    """

    def __init__(self, q: Tensor, k: Tensor, log_decay: Tensor):
        self.q, self.k = q, k
        between = log_decay.expand(-1, -1, q.shape[1]).tril(-1).cumsum(1)
        self.factor = decay_exp_(between)  # right below the diagonal; above it, scores are cut off
        self.scores = torch.bmm(q, k.mT).mul_(self.factor).tril_()
        self.from_start = decay_exp_(log_decay.cumsum(1))
        self.to_end = self.factor[:, -1, :, None]
        self.read, self.write = q * self.from_start, k * self.to_end
        self.total = self.from_start[:, -1:]

    def pull(self, d_scores: Tensor, d_read: Tensor, d_write: Tensor) -> Tensor:
        """As `ChunkDecay.pull`."""
        d_products = d_scores.mul_(self.factor)
        d_q = d_read.mul_(self.from_start).baddbmm_(d_products, self.k)
        d_k = d_write.mul_(self.to_end).baddbmm_(d_products.mT, self.q)
        return (self.q * d_q).sub_(self.k * d_k).sum(-1, keepdim=True)


class NoDecay:
    """Plain linear attention, with what `ChunkDecay` offers."""

    def __init__(self, q: Tensor, k: Tensor):
        self.read, self.write, self.scores = q, k, torch.bmm(q, k.mT).tril_()
        self.total = q.new_ones(len(q), 1, 1)

    def pull(self, d_scores: Tensor, d_read: Tensor, d_write: Tensor) -> None:
        """As `ChunkDecay.pull`; there is no ``d_G``."""
        d_read.baddbmm_(d_scores, self.write)
        d_write.baddbmm_(d_scores.mT, self.read)


def plain_width(log_decay: Tensor, chunk: int) -> int:
    """The widest blocks in which no factor passes ``exp(LARGEST)``, by the strongest decay."""
    strongest = -log_decay.amin().item() if log_decay.numel() else 0.0
    width = chunk
    while width > 1 and not width * strongest <= LARGEST:
        width //= 2
    return width


def sums_until_(x: Tensor) -> Tensor:
    """``x (N, C, K)``, C a power of two, becomes the sums of each row and all before it."""
    return _sums_(x, 1)


def sums_from_(x: Tensor) -> Tensor:
    """``x (N, C, K)``, C a power of two, becomes the sums of each row and all after it."""
    return _sums_(x, -1)


def _sums_(x: Tensor, way: int) -> Tensor:
    """Within runs of rows and then from run to run, for many at a time.

    `torch.cumsum` along an axis that is not the last adds number by number: half as fast.
    """
    N, C, K = x.shape
    runs = x.view(N, -1, min(RUN, C), K)
    rows = runs.unbind(2)[::way]
    for before, after in zip(rows, rows[1:]):
        after += before
    ends = rows[-1].unbind(1)[::way]
    for before, after in zip(ends, ends[1:]):
        after += before
    if way > 0:
        runs[:, 1:, :-1] += runs[:, :-1, -1:]
    else:
        runs[:, :-1, 1:] += runs[:, 1:, :1]
    return x


def _halves(x: Tensor, width: int) -> tuple[Tensor, ...]:
    """Left and right blocks ``(N, pairs, width, K)`` of every pair, as views."""
    return x.unflatten(1, (-1, 2, width)).unbind(2)


def _blocks(square: Tensor, width: int, every: int) -> Tensor:
    """Blocks ``(N, blocks, width, width)`` of ``(N, C, C)``, as a view.

    ``every=1``: all on the diagonal; 2: of each pair of these, the block below the diagonal.
    """
    N, C, _ = square.shape
    stride = (C * C, every * width * (C + 1), C, 1)
    start = square.storage_offset() + (every - 1) * width * C
    return square.as_strided((N, C // (every * width), width, width), stride, start)


def _outer(a: Tensor, b: Tensor) -> Tensor:
    """``a @ b.mT`` of ``(N, pairs, width, K)``."""
    if a.shape[2] > BY_HAND:
        return torch.bmm(a.flatten(0, 1), b.flatten(0, 1).mT).unflatten(0, a.shape[:2])
    if a.shape[2] == 1:
        return (a * b).sum(-1, keepdim=True)
    return (a[..., :, None, :] * b[..., None, :, :]).sum(-1)


def _product(weights: Tensor, x: Tensor) -> Tensor:
    """``weights @ x``, ``(N, pairs, width, width)`` times ``(N, pairs, width, K)``."""
    width = x.shape[2]
    if width > BY_HAND:
        return torch.bmm(weights.flatten(0, 1), x.flatten(0, 1)).unflatten(0, x.shape[:2])
    out = weights[..., :1] * x[:, :, :1]
    for j in range(1, width):
        out = torch.addcmul(out, weights[..., j : j + 1], x[:, :, j : j + 1])
    return out
