"""The chunked form of the linear recurrence on a CPU, with its own backward pass.

Within a chunk the outputs are a masked product, as in attention; between chunks only the state is
handed on. Everything else is the same for all chunks and done for several at a time: as many as
make `SLAB` numbers for each thread, so that what is worked on stays in the cores' caches and its
memory is used again. In the names of
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

from .linear_recurrence_decay import ChunkDecay, NoDecay, StrongHeadDecay, plain_width, sums_from_

CHUNK = 64
SLAB = 1 << 18  # numbers of an array that a thread works on at a time


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
                states, running = _forward(*here, running, scale)
                if keep:
                    kept += states, running
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
                after, before = states.pop(), states.pop()
                running = _backward(*here, before, after, running, ctx.scale)
            d_state[heads] = running
        joined = [None if x is None else _join(x, y) for x, y in zip(grads, inputs, strict=True)]
        return *joined, d_state, None


def _forward(q, k, v, log_decay, out, state, scale) -> tuple[Tensor, Tensor]:
    """Chunks ``q (heads * chunks, C, K)`` and ``state (heads, K, V)``: fills ``out``.

    Returns the states before each chunk, ``(heads * chunks, K, V)``, and the one after the last.
    """
    here = _decay(q, k, log_decay)
    torch.bmm(here.scores, v, out=out)
    here.scores = None  # the states take its memory, which is in the cache
    states, after = _hand_on(here.write.mT, v, here.total, state)
    out.baddbmm_(here.read, states, beta=scale, alpha=scale)
    return states, after


def _backward(
    q, k, v, log_decay, d_out, d_q, d_k, d_v, d_decay, states, after, d_state, scale
) -> Tensor:
    """Fills the gradients of the inputs; returns that of the state before the first chunk.

    ``states`` and ``after``: what `_forward` returned; ``d_state``: of ``after``.
    """
    d_out = d_out * scale
    here = _decay(q, k, log_decay, keep=True)
    d_afters, d_first = _hand_on(here.read.mT, d_out, here.total, d_state, backwards=True)
    torch.bmm(here.scores.mT, d_out, out=d_v).baddbmm_(here.write, d_afters)
    torch.bmm(d_out, states.mT, out=d_q)
    torch.bmm(v, d_afters.mT, out=d_k)
    d_sum = here.pull(torch.bmm(d_out, v.mT).tril_(), d_q, d_k)
    if d_sum is not None:
        products = torch.empty_like(states)  # of each state after a chunk with its gradient
        torch.mul(states[1:], d_afters[:-1], out=products[:-1])
        of_heads = products.unflatten(0, (len(after), -1))
        torch.mul(after, d_state, out=of_heads[:, -1])
        ends = products.sum(-1)[:, None]
        ends = ends if ends.shape[2] == d_sum.shape[2] else ends.sum(-1, keepdim=True)
        torch.add(sums_from_(d_sum), ends, out=d_decay)
    return d_first


def _hand_on(
    a: Tensor, b: Tensor, total: Tensor, first: Tensor, backwards: bool = False
) -> tuple[Tensor, Tensor]:
    """The state before each chunk ``(heads * chunks, K, V)``, and the one behind the last.

    ``a @ b``: what each chunk adds; ``total``: what it leaves; ``first``: the state before all.
    Backwards, chunks are walked from the last to the first. The state behind a chunk is the one
    before the next: both are views of the same memory, one place apart.
    """
    memory = first.new_empty(len(a) + 1, *first.shape[1:])
    behind, before = (memory[:-1], memory[1:]) if backwards else (memory[1:], memory[:-1])
    torch.bmm(a, b, out=behind)
    way, heads, state = -1 if backwards else 1, len(first), first
    steps, lefts = (x.unflatten(0, (heads, -1)).unbind(1)[::way] for x in (behind, total))
    for step, left in zip(steps, lefts, strict=True):
        state = step.addcmul_(left, state)
    last = state.clone()  # where it stood, the next head's first state belongs
    before.unflatten(0, (heads, -1))[:, -1 if backwards else 0] = first
    return before, last


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
    slab = SLAB * torch.get_num_threads()
    each = max(1, slab // (chunks.shape[1] * chunks.shape[2]))  # chunks in a slab
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
