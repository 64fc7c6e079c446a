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

import functools
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from .decay_exp import decay_exp_
from .linear_recurrence_decay import ChunkDecay, NoDecay, StrongHeadDecay, plain_width, sums_from

CHUNK = 64
TRIANGLE = 18, 72  # so many states are handed on by one product; fewer are as quick in a loop
SLAB = 1 << 19  # numbers of an array that are worked on at a time


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
        chunk = min(CHUNK, 1 << (q.shape[1] - 1).bit_length())
        parts = [_cut(x, chunk, state.dtype) for x in (q, k, v, log_decay)]
        out, final = torch.empty_like(parts[2]), torch.empty_like(state)
        keep, kept = any(ctx.needs_input_grad), []
        for heads, slabs in _work(parts[0], len(q)):
            running = state[heads]
            for at in slabs:
                here = (None if x is None else x[at] for x in (*parts, out))
                states = _forward(*here, running, scale)
                running = states[:, -1]
                if keep:
                    kept.append(states)
            final[heads] = running
        ctx.save_for_backward(q, k, v, log_decay, *kept)
        ctx.scale, ctx.chunk = scale, chunk
        return _join(out, v), final

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, d_out, d_final):
        inputs, states = ctx.saved_tensors[:4], list(ctx.saved_tensors[4:])
        parts = [_cut(x, ctx.chunk, d_final.dtype) for x in (*inputs, d_out)]
        grads = [None if x is None else torch.empty_like(x) for x in parts[:4]]
        d_state = torch.empty_like(d_final)
        for heads, slabs in reversed(list(_work(parts[0], len(d_final)))):
            running = d_final[heads]
            for at in reversed(slabs):
                here = (None if x is None else x[at] for x in (*parts, *grads))
                running = _backward(*here, states.pop(), running, ctx.scale)
            d_state[heads] = running
        joined = [None if x is None else _join(x, y) for x, y in zip(grads, inputs, strict=True)]
        return *joined, d_state, None


def _forward(q, k, v, log_decay, out, state, scale) -> Tensor:
    """Chunks ``q (heads * chunks, C, K)`` and ``state (heads, K, V)``: fills ``out``.

    Returns the states before each chunk and after the last, ``(heads, chunks + 1, K, V)``.
    """
    here = _decay(q, k, log_decay)
    states = state.new_empty(len(state), 1 + len(q) // len(state), *state.shape[1:])
    states[:, 0] = state
    _product_into(states[:, 1:], here.write.mT, v)
    states = _hand_on(states, here.total)
    torch.bmm(here.scores, v, out=out)
    out.baddbmm_(here.read, states[:, :-1].flatten(0, 1), beta=scale, alpha=scale)
    return states


def _backward(q, k, v, log_decay, d_out, d_q, d_k, d_v, d_decay, states, d_state, scale) -> Tensor:
    """Fills the gradients of the inputs; returns that of the state before the first chunk.

    ``states``: of `_forward`; ``d_state``: of the last of them.
    """
    d_out = d_out * scale
    here = _decay(q, k, log_decay, keep=True)
    d_states = torch.empty_like(states)
    d_states[:, -1] = d_state
    _product_into(d_states[:, :-1], here.read.mT, d_out)
    d_states = _hand_on(d_states, here.total, backwards=True)
    d_afters = d_states[:, 1:].flatten(0, 1)
    torch.bmm(here.scores.mT, d_out, out=d_v).baddbmm_(here.write, d_afters)
    torch.bmm(d_out, states[:, :-1].flatten(0, 1).mT, out=d_q)
    torch.bmm(v, d_afters.mT, out=d_k)
    d_sum = here.pull(torch.bmm(d_out, v.mT).tril_(), d_q, d_k)
    if d_sum is not None:
        ends = (states[:, 1:].flatten(0, 1) * d_afters).sum(-1)[:, None]
        ends = ends if ends.shape[2] == d_sum.shape[2] else ends.sum(-1, keepdim=True)
        if d_sum.shape[2] == 1:
            torch.add(sums_from(d_sum), ends, out=d_decay)
        else:
            later = q.new_ones(q.shape[1], q.shape[1]).triu_().expand(len(q), -1, -1)
            torch.baddbmm(ends, later, d_sum, out=d_decay)
    return d_states[:, 0]


def _hand_on(states: Tensor, total: Tensor, backwards: bool = False) -> Tensor:
    """``states (heads, chunks + 1, K, V)``, the first and what each chunk adds, to all states.

    ``total``: what each chunk leaves of a state. Backwards from the last to the first. One number a
    chunk makes it a product with a small triangle; one for each channel a loop.
    """
    heads, count = len(states), states.shape[1]
    totals = total.unflatten(0, (heads, -1))
    if totals.shape[2] == 1 and TRIANGLE[0] <= count <= TRIANGLE[1]:
        between = totals.new_zeros(heads, count, count)
        between[:, 1:] = torch.where(_below(count, totals.device), totals[..., 0].log(), 0.0)
        kept = decay_exp_(between.cumsum(1)).tril_()  # [i, j]: what chunks j to i - 1 leave
        return torch.bmm(kept.mT if backwards else kept, states.flatten(2)).view(states.shape)
    steps, each = states.unbind(1), totals.unbind(1)
    if backwards:
        steps, each = steps[::-1], each[::-1]
    for before, after, left in zip(steps, steps[1:], each):
        after.addcmul_(left, before)
    return states


@functools.cache
def _below(count: int, device: torch.device) -> Tensor:
    """``(count - 1, count)``: whether chunk i stands at or behind state j."""
    return torch.ones(count - 1, count, dtype=torch.bool, device=device).tril()


def _product_into(target: Tensor, a: Tensor, b: Tensor) -> None:
    """``a @ b`` of chunks into ``target (heads, chunks, ...)``."""
    if len(target) == 1:
        torch.bmm(a, b, out=target[0])
    else:
        target.copy_(torch.bmm(a, b).view(target.shape))


def _decay(q, k, log_decay, keep=False) -> ChunkDecay | StrongHeadDecay | NoDecay:
    if log_decay is None:
        return NoDecay(q, k)
    width = plain_width(log_decay, q.shape[1])
    if log_decay.shape[2] == 1 and width < q.shape[1]:
        return StrongHeadDecay(q, k, log_decay)
    return ChunkDecay(q, k, log_decay, width, keep)


def _work(chunks: Tensor, heads: int) -> Iterator[tuple[slice, list[slice]]]:
    """Heads, and for each group of them slabs of chunks: whole heads, or parts of one."""
    count = len(chunks) // heads
    each = max(1, SLAB // (chunks.shape[1] * chunks.shape[2]))  # chunks in a slab
    group = min(heads, max(1, each // count))
    for first in range(0, heads, group):
        last = min(first + group, heads)
        bounds = first * count, last * count
        each = each if group == 1 else bounds[1] - bounds[0]
        slabs = [slice(at, min(at + each, bounds[1])) for at in range(*bounds, each)]
        yield slice(first, last), slabs


def _cut(x: Tensor | None, chunk: int, dtype: torch.dtype) -> Tensor | None:
    """``x (N, L, ...)`` in chunks ``(N * chunks, chunk, ...)``, zeros behind each row's end."""
    if x is None:
        return None
    if missing := -x.shape[1] % chunk:
        x = F.pad(x, (0, 0, 0, missing))
    return x.to(dtype).reshape(-1, chunk, x.shape[2])


def _join(chunks: Tensor, like: Tensor) -> Tensor:
    """What `_cut` has cut: the shape and the dtype of ``like``."""
    N, L, width = like.shape
    return chunks.view(N, -1, width)[:, :L].to(like.dtype).contiguous()
