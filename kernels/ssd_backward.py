"""The gradients of `ssd`.

`_chunk_states` and `_combine` from the end give the gradient of the state after each chunk; then

    d_c: `_outputs` backwards in time (b, a, d_out)
    d_a: `_shared_gradients` in time (d_out, c, b)   d_b: the same backwards in time (c, d_out, a)

where `_shared_gradients` adds up the heads of a group, so that no head has a gradient of ``a`` or
``b`` of its own in memory. With ``S`` the state after a chunk and ``G`` its gradient, the log-decay
of a step has the gradient ``<S, G> + sum (a . d_a - b . d_b)``, summed from the step to the end of
its chunk: no difference of sums over the whole length is ever taken.
"""

from __future__ import annotations

import torch
from torch import Tensor

from corelib.kernels._shared import jit, load_tile, padded, store_tile, tl
from corelib.kernels.gates.specialisation import Specialisation
from corelib.kernels.ssd import Launches, in_chunks, one_head, specialisation

__all__ = ["gradients"]

HEADS = 4  # of a group, added up by one program


@jit
def _shared_gradients(
    a, b, c, mine, high, low, states, out, products, L, R, chunks, K: tl.constexpr,
    V: tl.constexpr, REVERSE: tl.constexpr, PRECISION: tl.constexpr, TILE: tl.constexpr,
    CHUNK: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    """``out (parts, N / R, L, K)``: a tile of one group, added up over ``HEADS`` of its heads.

    ``a, b (N, L, V)`` and ``c (N / R, L, K)``: the outputs are as wide as the keys. ``products
    (N, L)``: of each head's gradient with ``mine (N / R, L, K)``, what it is the gradient of.
    """
    group = tl.program_id(0).to(tl.int64)
    tile = tl.program_id(1)
    part = tl.program_id(2)
    rows = tile * TILE + tl.arange(0, TILE)
    total = tl.zeros([TILE, BLOCK_K], tl.float32)
    for n in range(part * HEADS, tl.minimum((part + 1) * HEADS, R)):
        head = group * R + n
        place = states + (head * chunks + tile // (CHUNK // TILE)) * K * V
        state = tl.trans(load_tile(place, tile * 0, K, V, BLOCK_K, V, BLOCK_V, True))
        here = one_head(
            a + head * L * V, b + head * L * V, c + group * L * K, high + head * L, low + head * L,
            state, tile, L, K, V, K, REVERSE, PRECISION, TILE, CHUNK, BLOCK_V, BLOCK_K,
        )  # fmt: skip
        total += here
        keys = load_tile(mine + group * L * K, tile * TILE, L, K, TILE, K, BLOCK_K, True)
        tl.store(products + head * L + rows, tl.sum(here * keys, 1), mask=rows < L)
    out += (part * tl.num_programs(0) + group) * L * K
    store_tile(out, total, tile * TILE, L, K, TILE, K, BLOCK_K)


def gradients(values, log_decay, B, C, states, final, d_out, d_final, chunk) -> tuple[Tensor, ...]:
    """Of ``values, log_decay, B, C`` and the first state; heads lie as in `Launches`.

    ``states (N, chunks, K, V)`` stand before the chunks, ``final`` after the last.
    """
    run = Launches(log_decay, chunk, values, B)
    d_out, d_final = d_out.contiguous(), d_final.contiguous()
    grads, d_state = run.states(C, d_out, d_final, reverse=True)
    d_values = run.outputs(B, C, d_out, grads, reverse=True)
    d_C, reading = _shared(run, d_out, values, B, C, states)
    d_B, writing = _shared(run, values, d_out, C, B, grads, reverse=True)
    after = torch.cat([states[:, 1:], final[:, None]], 1)
    ends = (after * grads).sum((2, 3))
    changes = in_chunks((reading - writing).double(), chunk)
    later = changes.flip(2).cumsum(2).flip(2) + ends[..., None]
    d_decay = later.flatten(1)[:, : run.L].to(log_decay.dtype)
    return d_values, d_decay, d_B, d_C, d_state


def _shared(
    run: Launches, a: Tensor, b: Tensor, c: Tensor, mine: Tensor, states: Tensor, *,
    reverse: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The gradient of ``mine``, and its product with ``mine`` for each head ``(N, L)``."""
    parts = -(-run.heads // HEADS)
    out = states.new_empty(parts, *mine.shape)
    products = states.new_empty(run.N, run.L)
    run.tiled(
        _shared_gradients, (run.groups, run.tiles, parts), c, reverse,
        a, b, c, mine, run.high, run.low, states, out, products,
        HEADS=HEADS, BLOCK_V=padded(run.V),
    )  # fmt: skip
    return out.sum(0).to(mine.dtype), products


def _row(name: str, K: int, reverse: bool) -> Specialisation:
    signature = dict.fromkeys(("a", "b", "c", "mine"), f"*{name}")
    signature |= dict.fromkeys(("states", "out", "products"), "*fp32")
    constants = dict(HEADS=HEADS, BLOCK_V=64)
    return specialisation("_shared_gradients", name, K, 64, reverse, signature, **constants)


SPECIALISATIONS = [
    _row(name, K, reverse) for name, K in (("bf16", 128), ("fp32", 64)) for reverse in (False, True)
]
SPECIALISATIONS += [_row("bf16", 64, False)]
