"""The chunked form of the linear recurrence on a CPU, with its own backward pass.

Within a chunk the outputs are a masked product, as in attention; between chunks only the state is
handed on. Everything else is the same for all chunks and done for several at a time: as many as
make `SLAB` numbers, so that what is worked on stays in a core's cache. In the names of
`linear_recurrence_decay`, S being the state before a chunk and S' the one after:

    out = scores v + read S            S' = total S + write^T v

    d_S = total d_S' + read^T d_out                         chunks from the last to the first
    d_v = scores^T d_out + write d_S'
    d_scores = tril(d_out v^T)         d_read = d_out S^T             d_write = v d_S'^T
    d_log_decay_t = sum_{i >= t} d_G_i + sum_c S'_c d_S'_c       i in the chunk, c value channels

The last line needs no derivative of the decay factors: ``G_i`` stands beside ``q_i`` and, with a
minus, beside ``k_i``, so ``d_G_i = q_i d_q_i - k_i d_k_i`` (Yang et al., Gated Linear Attention,
arXiv 2312.06635). The states before each chunk are kept for the backward pass, all else is
computed again.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from .linear_recurrence_decay import ChunkDecay, NoDecay, plain_width

CHUNK = 64
SLAB = 1 << 16  # numbers of an array that are worked on at a time


def chunked(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, state: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """``(out, final state)``; heads flattened, ``q (N, L, K)``, ``state (N, K, V)``."""
    if log_decay is not None and log_decay.dim() == 2:
        log_decay = log_decay[..., None]
    return _Chunked.apply(q, k, v, log_decay, state, scale)


class _Chunked(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, log_decay, state, scale):
        out, final = _rows_like(v), _rows_like(state)
        chunk = min(CHUNK, 1 << (q.shape[1] - 1).bit_length())
        count = -(-q.shape[1] // chunk)
        keep = any(ctx.needs_input_grad)
        width = plain_width(log_decay, chunk) if log_decay is not None else chunk
        states = state.new_empty(len(q), count + 1, *state.shape[1:]) if keep else None
        for heads, slabs in _work(q, chunk):
            running = state[heads]
            for rows, chunks in slabs:
                parts = [_cut(x, heads, rows, chunk, state) for x in (q, k, v, log_decay)]
                if keep:
                    around = states[heads, chunks.start : chunks.stop + 1]
                else:
                    size = len(running), chunks.stop - chunks.start + 1, *state.shape[1:]
                    around = state.new_empty(size)
                around[:, 0] = running
                _put(out, _forward(*parts, around, scale, width), heads, rows)
                running = around[:, -1]
            final[heads] = running
        ctx.save_for_backward(q, k, v, log_decay, states)
        ctx.scale, ctx.chunk, ctx.width = scale, chunk, width
        return out, final

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, d_out, d_final):
        q, k, v, log_decay, states = ctx.saved_tensors
        inputs = q, k, v, log_decay
        grads = [None if x is None else _rows_like(x) for x in inputs]
        d_state = _rows_like(d_final)
        for heads, slabs in _work(q, ctx.chunk):
            running = d_final[heads]
            for rows, chunks in reversed(list(slabs)):
                parts = [_cut(x, heads, rows, ctx.chunk, states) for x in (*inputs, d_out)]
                around = states[heads, chunks.start : chunks.stop + 1]
                *results, running = _backward(*parts, around, running, ctx.scale, ctx.width)
                for grad, result in zip(grads, results, strict=True):
                    if grad is not None:
                        _put(grad, result, heads, rows)
            d_state[heads] = running
        return *grads, d_state, None


def _forward(q, k, v, log_decay, states, scale, width) -> Tensor:
    """Chunks ``q (heads * chunks, C, K)`` -> out.

    ``states (heads, chunks + 1, K, V)`` holds the state before the first chunk; the others are
    filled in.
    """
    here = _decay(q, k, log_decay, width)
    added = torch.bmm(here.write.mT, v).unflatten(0, (len(states), -1))
    totals = here.total.unflatten(0, (len(states), -1)).unbind(1)
    steps = states.unbind(1)
    for before, after, new, total in zip(steps, steps[1:], added.unbind(1), totals):
        torch.addcmul(new, total, before, out=after)
    out = torch.bmm(here.scores, v)
    return out.baddbmm_(here.read, states[:, :-1].flatten(0, 1), beta=scale, alpha=scale)


def _backward(
    q, k, v, log_decay, d_out, around, d_state, scale, width
) -> tuple[Tensor | None, ...]:
    """Gradients of the chunks' inputs and of the state before the first of them.

    ``around``: the states before each chunk and after the last; ``d_state``: of the one after.
    """
    d_out = d_out * scale
    here = _decay(q, k, log_decay, width, keep=True)
    read_out = torch.bmm(here.read.mT, d_out).unflatten(0, (len(around), -1)).unbind(1)
    totals = here.total.unflatten(0, (len(around), -1)).unbind(1)
    d_states = torch.empty_like(around, memory_format=torch.contiguous_format)
    d_states[:, -1] = d_state
    steps = d_states.unbind(1)
    for c in reversed(range(len(totals))):
        torch.addcmul(read_out[c], totals[c], steps[c + 1], out=steps[c])
    d_afters, d_state = d_states[:, 1:], steps[0]
    d_after = d_afters.flatten(0, 1)
    d_v = torch.bmm(here.scores.mT, d_out).baddbmm_(here.write, d_after)
    d_scores = torch.bmm(d_out, v.mT).tril_()
    d_read = torch.bmm(d_out, around[:, :-1].flatten(0, 1).mT)
    d_q, d_k, d_sum = here.pull(d_scores, d_read, torch.bmm(v, d_after.mT))
    if d_sum is None:
        return d_q, d_k, d_v, None, d_state
    ends = (around[:, 1:] * d_afters).sum(-1).flatten(0, 1)[:, None]
    ends = ends if ends.shape == d_sum[:, :1].shape else ends.sum(-1, keepdim=True)
    later = q.new_ones(q.shape[1], q.shape[1]).triu_().expand(len(q), -1, -1)
    d_decay = torch.baddbmm(ends, later, d_sum)
    return d_q, d_k, d_v, d_decay, d_state


def _decay(q, k, log_decay, width, keep=False) -> ChunkDecay | NoDecay:
    if log_decay is None:
        return NoDecay(q, k)
    return ChunkDecay(q, k, log_decay, width, keep)


def _rows_like(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _work(q: Tensor, chunk: int) -> Iterator[tuple[slice, list[tuple[slice, slice]]]]:
    """Heads, and for each group of them stretches of rows with the numbers of their chunks.

    Either several heads at their whole length or parts of one head: both are rows without gaps.
    """
    N, L, K = q.shape
    count = -(-L // chunk)
    group = max(1, SLAB // (count * chunk * K))
    each = count if group > 1 else max(1, SLAB // (chunk * K))
    slabs = [
        (slice(at * chunk, min((at + each) * chunk, L)), slice(at, min(at + each, count)))
        for at in range(0, count, each)
    ]
    for first in range(0, N, group):
        yield slice(first, min(first + group, N)), slabs


def _cut(x: Tensor | None, heads: slice, rows: slice, chunk: int, like: Tensor) -> Tensor | None:
    """A stretch of ``x (N, L, ...)`` in chunks ``(heads * chunks, chunk, ...)``, zeros behind."""
    if x is None:
        return None
    x = x[heads, rows].to(like.dtype)
    if missing := -x.shape[1] % chunk:
        x = F.pad(x, (0, 0) * (x.dim() - 2) + (0, missing))
    return x.reshape(-1, chunk, *x.shape[2:])


def _put(target: Tensor, chunks: Tensor, heads: slice, rows: slice) -> None:
    place = target[heads, rows]
    place.copy_(chunks.reshape(len(place), -1, *target.shape[2:])[:, : place.shape[1]])
