"""The linear recurrence on this machine: chunked against step by step, compiled and fla's.

Compiled contestants are what a user would write from the papers. ``split``: decays as ``exp(G)``
and ``exp(-G)`` within chunks of 64, which overflows from a log-decay of about -1.4 a step on; the
decays here are mild enough for it. ``any decay`` never overflows, as corelib does not: one decay a
head is written out for all pairs of a chunk (Mamba-2's listing), one for each channel for the pairs
of 16 steps and split at the boundaries of these (the two levels of Gated Linear Attention).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from ...linear_time.lightning2 import decay_slopes, lightning_attn, lightning_block
from ...primitives import attention, linear_recurrence
from ..gradients import forward_backward
from ..race import Missing, race
from ..scaling import sweep
from . import Row, peer, register, rows

H, K, V = 4, 64, 64
SHAPE = f"B1 H{H} K{K} V{V} float32"


def _inputs(L: int, vector: bool) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, H, L, n, generator=generator) for n in (K, K, V))
    decay = -torch.rand((1, H, L, K) if vector else (1, H, L), generator=generator)
    return [q, k / K**0.5, v, decay]


def _form(form: str) -> Callable[..., Tensor]:
    return lambda q, k, v, log_decay: linear_recurrence(q, k, v, log_decay=log_decay, form=form)


def _split(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, chunk: int = 64) -> Tensor:
    """The textbook's chunked form, for lengths that are a multiple of the chunk."""
    q, k, v, sums = _in_chunks(q, k, v, log_decay, chunk)
    scores = (q * sums.exp()) @ (k * (-sums).exp()).mT
    return _over_chunks(scores.tril(), q, k, v, sums)


def _any_decay(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, chunk: int = 64) -> Tensor:
    """The same without ``exp(-G)``, for one decay a head."""
    q, k, v, sums = _in_chunks(q, k, v, log_decay, chunk)
    above = torch.ones(chunk, chunk, dtype=torch.bool).triu(1)
    between = (sums - sums.mT).masked_fill(above, float("-inf"))
    return _over_chunks(q @ k.mT * between.exp(), q, k, v, sums)


def _any_channel_decay(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, chunk: int = 64, block: int = 16
) -> Tensor:
    """The same for a decay for each channel, in two levels."""
    q, k, v, sums = _in_chunks(q, k, v, log_decay, chunk)
    above, rows = torch.ones(block, block, dtype=torch.bool).triu(1)[..., None], []
    for at in range(0, chunk, block):
        qs, ks, own = (x[..., at : at + block, :] for x in (q, k, sums))
        earlier, past = (x[..., :at, :] for x in (k, sums))
        between = own[..., :, None, :] - own[..., None, :, :]
        between = between.masked_fill(above, float("-inf")).exp()
        row = (qs[..., :, None, :] * ks[..., None, :, :] * between).sum(-1)
        if at:
            edge = past[..., -1:, :]
            outer = (qs * (own - edge).exp()) @ (earlier * (edge - past).exp()).mT
            row = torch.cat([outer, row], -1)
        rows.append(F.pad(row, (0, chunk - block - at)))
    return _over_chunks(torch.cat(rows, -2), q, k, v, sums)


def _in_chunks(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, chunk: int) -> list[Tensor]:
    if log_decay.dim() == 3:
        log_decay = log_decay[..., None]
    q, k, v, g = (x.unflatten(2, (-1, chunk)) for x in (q * K**-0.5, k, v, log_decay))
    return [q, k, v, g.cumsum(-2)]


def _over_chunks(scores: Tensor, q: Tensor, k: Tensor, v: Tensor, sums: Tensor) -> Tensor:
    read, total = q * sums.exp(), sums[..., -1:, :]
    added = (k * (total - sums).exp()).mT @ v
    state, states = torch.zeros_like(added[:, :, 0]), []
    for c in range(q.shape[2]):
        states.append(state)
        state = total[:, :, c].exp().mT * state + added[:, :, c]
    return (scores @ v + read @ torch.stack(states, 2)).flatten(2, 3)


def _compiled(by_hand: Callable, *inputs: Tensor) -> Callable | Missing:
    try:
        run = torch.compile(by_hand, dynamic=False)
        run(*inputs)
    except Exception as problem:  # no C++ compiler, an older PyTorch, another processor
        return Missing(f"does not compile here ({type(problem).__name__})")
    return run


def _fla(vector: bool) -> Callable | Missing:
    """fla's naive reference: of GLA step by step, of a scalar decay in chunks."""
    module = peer("fla.ops.gla.naive" if vector else "fla.ops.simple_gla.naive")
    if isinstance(module, Missing):
        return module
    name = "naive_recurrent_gla" if vector else "naive_chunk_simple_gla"
    run = getattr(module, name)
    return lambda *x: run(*(y.transpose(1, 2) for y in x))[0].transpose(1, 2)


def _contestants(inputs: list[Tensor], vector: bool) -> dict[str, Callable | Missing]:
    any_decay = _any_channel_decay if vector else _any_decay
    return {
        "corelib": _form("chunked"),
        "step by step": _form("recurrent"),
        "compiled by hand, split": _compiled(_split, *inputs),
        "compiled by hand, any decay": _compiled(any_decay, *inputs),
        "fla naive": _fla(vector),
    }


def _race(vector: bool, quick: bool) -> Iterator[Row]:
    inputs = _inputs(256 if quick else 2048, vector)
    contestants = _contestants(inputs, vector)
    shape = f"{SHAPE} L{inputs[0].shape[2]}"

    def bound(make: Callable) -> dict:
        return {n: f if isinstance(f, Missing) else make(f) for n, f in contestants.items()}

    with torch.no_grad():
        forward = bound(lambda f: lambda: f(*inputs))
        yield from rows(race(forward, repeats=9), what="forward", shape=shape)
    both = bound(lambda f: forward_backward(f, *inputs))
    yield from rows(race(both, repeats=9), what="forward + backward", shape=shape)


@register("linear-recurrence-vector", "linear recurrence with a decay for each channel")
def linear_recurrence_vector(quick: bool) -> Iterator[Row]:
    yield from _race(True, quick)
    lengths = (128, 256) if quick else (512, 1024, 2048, 4096, 8192)

    def alone(L: int) -> dict[str, Callable]:
        inputs = _inputs(L, True)
        return {"corelib": lambda: _form("chunked")(*inputs)}

    yield from rows(sweep(lengths, alone), what="growth with the length", shape=SHAPE)


@register("linear-recurrence-scalar", "linear recurrence with a decay for each head")
def linear_recurrence_scalar(quick: bool) -> Iterator[Row]:
    yield from _race(False, quick)


@register("lightning2", "Lightning Attention-2 against softmax attention over the length")
def lightning2(quick: bool) -> Iterator[Row]:
    lengths = (128, 256) if quick else (512, 1024, 2048, 4096, 8192)
    slopes = decay_slopes(H, layer=0, layers=12)

    def same(L: int) -> dict[str, Callable]:
        q, k, v, _ = _inputs(L, False)
        return {
            "corelib": lambda: lightning_attn(q, k, v, slopes)[0],
            "the paper's blocks, written plainly": lambda: lightning_block(q, k, v, slopes)[0],
        }

    def other(L: int) -> dict[str, Callable]:
        q, k, v, _ = _inputs(L, False)
        return {
            "corelib": lambda: lightning_attn(q, k, v, slopes)[0],
            "softmax attention": lambda: attention(q, k, v, causal=True),
        }

    with torch.no_grad():
        yield from rows(sweep(lengths, same), what="forward", shape=SHAPE)
        softmax = sweep(lengths, other, check=None)
        yield from rows(softmax, what="forward, against another function", shape=SHAPE)
