"""State space duality, the scan of Mamba-2, all chunks at once: forward and backward.

    S_t = exp(g_t) S_{t-1} + b_t c_t^T          out_t = S_t^T a_t

for every head, where heads share ``a`` and ``b`` in groups (arXiv 2405.21060, section 6; here
``a = C``, ``b = B``, ``c = dt x``, ``g = dt A``). `linear_recurrence` walks over chunks with the
state in registers, as many programs as heads and blocks of values; here the length is a grid axis
too, in three launches:

1. `_chunk_states`: what each chunk adds to the state, a product of matrices;
2. `_combine`: the state before each chunk, one pass over these sums (nothing else is sequential);
3. `_outputs`: for a tile of steps, the state before its chunk and the masked product
   ``(a b^T o decays) c`` with the tiles of its chunk up to itself.

Backward (`ssd_backward`) runs the first two from the end for the gradients of the states.

Decays stand in exponents as differences of running sums within a chunk, never positive. The sums
are added up in float64 and passed as two float32 numbers, so that a reset costs no digits behind
it. Products of half-precision inputs take decayed factors rounded to the inputs' type; sums and
states are float32.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from corelib.kernels._shared import (
    check_device,
    is_interpreted,
    jit,
    load_tile,
    padded,
    precision,
    store_tile,
    tl,
)
from corelib.kernels.gates.specialisation import Specialisation

__all__ = ["CHUNK", "forward_bytes", "ssd", "widest"]

CHUNK = 256  # steps between two stored states
COMBINED = 512  # numbers of a state that a program of `_combine` takes through all chunks
RESET = -1e4  # smaller log-decays count as this: the exponential is 0 either way


@jit
def _chunk_states(
    b, c, high, low, out, L, R, chunks, K: tl.constexpr, V: tl.constexpr, REVERSE: tl.constexpr,
    PRECISION: tl.constexpr, TILE: tl.constexpr, CHUNK: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
):  # fmt: skip
    """``out (N, chunks, K, V)``: the sum of ``b_t c_t^T``, decayed up to the chunk's end.

    ``REVERSE``: decayed down to its start instead. ``R`` heads of ``c`` share one ``b``.
    """
    head = tl.program_id(0).to(tl.int64)
    chunk = tl.program_id(1)
    first_v = tl.program_id(2) * BLOCK_V
    b += head // R * L * K
    c += head * L * V + first_v
    high += head * L
    low += head * L
    first = chunk * CHUNK
    end = tl.minimum(first + CHUNK, L)
    rows = tl.arange(0, TILE)
    state = tl.zeros([BLOCK_K, BLOCK_V], tl.float32)
    for n in range(0, tl.cdiv(end - first, TILE)):
        at = first + n * TILE
        steps = at + rows
        upper = tl.load(high + steps, mask=steps < L, other=0.0)
        lower = tl.load(low + steps, mask=steps < L, other=0.0)
        if REVERSE:
            through = upper + lower
        else:
            through = (tl.load(high + end - 1) - upper) + (tl.load(low + end - 1) - lower)
        writes = load_tile(b, at, L, K, TILE, K, BLOCK_K, True)
        values = load_tile(c, at, L, V, TILE, V - first_v, BLOCK_V, True)
        writes = (writes * tl.exp(tl.minimum(through, 0.0))[:, None]).to(writes.dtype)
        state = tl.dot(tl.trans(writes), values, state, input_precision=PRECISION)
    out += (head * chunks + chunk) * K * V + first_v
    store_tile(out, state, chunk * 0, K, V, BLOCK_K, V - first_v, BLOCK_V)


@jit
def _combine(
    states, totals, initial, final, chunks, SIZE: tl.constexpr, REVERSE: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """In ``states (N, chunks, SIZE)``, what a chunk adds becomes the state that stands before it.

    ``REVERSE``: from the last chunk to the first, the state that stands after it.
    """
    head = tl.program_id(0).to(tl.int64)
    numbers = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = numbers < SIZE
    state = tl.load(initial + head * SIZE + numbers, mask=inside, other=0.0)
    for step in range(0, chunks):
        chunk = head * chunks + step
        if REVERSE:
            chunk = head * chunks + chunks - 1 - step
        place = states + chunk * SIZE + numbers
        added = tl.load(place, mask=inside, other=0.0)
        tl.store(place, state, mask=inside)
        state = tl.load(totals + chunk) * state + added
    tl.store(final + head * SIZE + numbers, state, mask=inside)


@jit
def one_head(
    a, b, c, high, low, state, tile, L, columns, K: tl.constexpr, V: tl.constexpr,
    REVERSE: tl.constexpr, PRECISION: tl.constexpr, TILE: tl.constexpr, CHUNK: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Outputs ``(TILE, BLOCK_V)`` of one head, from ``state`` and the chunk's tiles before.

    ``a, b (L, K)``, ``c (L, V)`` of which ``columns`` are left. ``REVERSE``: from the tiles after,
    and the state after the chunk.
    """
    rows = tl.arange(0, TILE)
    steps = tile * TILE + rows
    upper = tl.load(high + steps, mask=steps < L, other=0.0)
    lower = tl.load(low + steps, mask=steps < L, other=0.0)
    reads = load_tile(a, tile * TILE, L, K, TILE, K, BLOCK_K, True)
    chunk = tile // (CHUNK // TILE)
    if REVERSE:
        end = tl.minimum((chunk + 1) * CHUNK, L)
        since = (tl.load(high + end - 1) - upper) + (tl.load(low + end - 1) - lower)
        start, stop = tile, tl.cdiv(end, TILE)
    else:
        since = upper + lower
        start, stop = chunk * (CHUNK // TILE), tile + 1
    here = tl.dot(reads, state.to(reads.dtype), input_precision=PRECISION)
    here *= tl.exp(tl.minimum(since, 0.0))[:, None]
    for n in range(0, stop - start):
        at = (start + n) * TILE
        others = at + rows
        upper_there = tl.load(high + others, mask=others < L, other=0.0)
        lower_there = tl.load(low + others, mask=others < L, other=0.0)
        between = upper[:, None] - upper_there[None, :]
        between += lower[:, None] - lower_there[None, :]
        order = steps[:, None] - others[None, :]
        if REVERSE:
            between, order = -between, -order
        writes = load_tile(b, at, L, K, TILE, K, BLOCK_K, True)
        values = load_tile(c, at, L, V, TILE, columns, BLOCK_V, True)
        scores = tl.dot(reads, tl.trans(writes), input_precision=PRECISION)
        scores = tl.where(order >= 0, scores * tl.exp(tl.minimum(between, 0.0)), 0.0)
        here = tl.dot(scores.to(values.dtype), values, here, input_precision=PRECISION)
    return here


@jit
def _outputs(
    a, b, c, high, low, states, out, L, R, chunks, K: tl.constexpr, V: tl.constexpr,
    REVERSE: tl.constexpr, PRECISION: tl.constexpr, TILE: tl.constexpr, CHUNK: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """``out (N, L, V)`` of ``c (N, L, V)``, with ``a, b (N / R, L, K)``: a tile of one head."""
    head = tl.program_id(0).to(tl.int64)
    tile = tl.program_id(1)
    first_v = tl.program_id(2) * BLOCK_V
    columns = V - first_v
    shared = head // R * L * K
    own = head * L * V + first_v
    states += (head * chunks + tile // (CHUNK // TILE)) * K * V + first_v
    state = load_tile(states, tile * 0, K, V, BLOCK_K, columns, BLOCK_V, True)
    here = one_head(
        a + shared, b + shared, c + own, high + head * L, low + head * L, state, tile, L, columns,
        K, V, REVERSE, PRECISION, TILE, CHUNK, BLOCK_K, BLOCK_V,
    )  # fmt: skip
    store_tile(out + own, here, tile * TILE, L, V, TILE, columns, BLOCK_V)


class Blocks(NamedTuple):
    """How a kernel is launched: steps of a tile, value channels at a time, warps, stages."""

    tile: int
    block_v: int
    num_warps: int
    num_stages: int


#: (bytes of a number, keys padded to at least 64, AMD?) -> how a kernel is launched.
BLOCKS = {
    (2, 64, False): Blocks(64, 64, 8, 2),
    (2, 128, False): Blocks(64, 64, 8, 2),
    (4, 64, False): Blocks(16, 32, 4, 1),
    (2, 64, True): Blocks(64, 64, 4, 1),
    (2, 128, True): Blocks(32, 64, 8, 1),
    (4, 64, True): Blocks(32, 32, 4, 1),
}


def blocks_for(K: int, dtype: torch.dtype, target: str | None = None) -> Blocks:
    """The row of the table for keys of this width, on a compile target or here."""
    amd = torch.version.hip is not None if target is None else target.startswith("gfx")
    return BLOCKS[dtype.itemsize, max(64, padded(K)), amd]


def widest(dtype: torch.dtype) -> tuple[int, int]:
    """The widest keys and the widest values that the kernel takes."""
    return (64 if dtype == torch.float32 else 128), 64


def ssd(
    values: Tensor, log_decay: Tensor, B: Tensor, C: Tensor, state: Tensor, *, chunk: int = CHUNK
) -> tuple[Tensor, Tensor]:
    """``(y (B, H, L, V), last state (B, H, K, V))``; differentiable once in everything.

    Args:
        values: ``dt x``, ``(B, H, L, V)``, float16, bfloat16 or float32, up to 64 wide.
        log_decay: ``dt A``, ``(B, H, L)``, at most 0, float32.
        B, C: ``(B, G, L, K)`` in the dtype of values, up to 128 wide, in float32 up to 64; G
            divides H.
        state: before the first step, ``(B, H, K, V)``, float32.
        chunk: steps between stored states, a multiple of the tile; it changes no result.

    Raises:
        ValueError, TypeError: shapes, widths, dtypes or devices that do not fit.
        ImportError: Triton is missing.
    """
    _check(values, log_decay, B, C, state, chunk)
    check_device("ssd", _outputs, values, B, C)
    if 0 in values.shape[:3]:
        return torch.zeros_like(values), state.clone()
    flat = (x.flatten(0, 1).contiguous() for x in (values, log_decay, B, C, state))
    y, last = _Ssd.apply(*flat, chunk)
    return y.view(values.shape), last.view(state.shape)


class _Ssd(torch.autograd.Function):
    @staticmethod
    def forward(ctx, values, log_decay, B, C, state, chunk):
        run = Launches(log_decay, chunk, values, B)
        states, final = run.states(B, values, state)
        ctx.save_for_backward(values, log_decay, B, C, states, final)
        ctx.chunk = chunk
        return run.outputs(C, B, values, states), final

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, d_out, d_final):
        from corelib.kernels.ssd_backward import gradients

        return *gradients(*ctx.saved_tensors, d_out, d_final, ctx.chunk), None


def in_chunks(x: Tensor, chunk: int) -> Tensor:
    """``(N, L)`` as ``(N, chunks, chunk)``, zeros at the end."""
    return F.pad(x, (0, -x.shape[1] % chunk)).unflatten(1, (-1, chunk))


class Launches:
    """The launches over one sequence; heads lie as ``(N, L, ...)``, groups as ``(N / R, ...)``."""

    def __init__(self, log_decay: Tensor, chunk: int, values: Tensor, B: Tensor):
        (self.N, self.L, self.V), self.K = values.shape, B.shape[2]
        self.groups, self.heads, self.chunk = len(B), self.N // len(B), chunk
        self.blocks = blocks_for(self.K, values.dtype)
        self.tiles, self.chunks = -(-self.L // self.blocks.tile), -(-self.L // chunk)
        sums = in_chunks(log_decay.double().clamp(min=RESET), chunk).cumsum(2)
        self.totals = sums[..., -1].exp().float().contiguous()
        sums = sums.flatten(1)[:, : self.L]
        self.high = sums.float().contiguous()
        self.low = (sums - self.high).float()

    def states(self, b, c, initial, *, reverse=False) -> tuple[Tensor, Tensor]:
        """The states before each chunk (``reverse``: after) ``(N, chunks, K, V)``, and the last."""
        states = initial.new_empty(self.N, self.chunks, self.K, self.V)
        grid = self.N, self.chunks, -(-self.V // self.blocks.block_v)
        self.tiled(_chunk_states, grid, c, reverse, b, c, self.high, self.low, states)
        final, size = torch.empty_like(initial), self.K * self.V
        with _device(c):
            _combine[self.N, -(-size // COMBINED)](
                states, self.totals, initial, final, self.chunks,
                SIZE=size, REVERSE=reverse, BLOCK=COMBINED,
            )  # fmt: skip
        return states, final

    def outputs(self, a, b, c, states, *, reverse=False) -> Tensor:
        out = torch.empty_like(c)
        grid = self.N, self.tiles, -(-self.V // self.blocks.block_v)
        self.tiled(_outputs, grid, c, reverse, a, b, c, self.high, self.low, states, out)
        return out

    def tiled(self, kernel, grid, like, reverse, *tensors, **constants) -> None:
        options: dict[str, Any] = dict(BLOCK_V=self.blocks.block_v) | constants
        if not is_interpreted(kernel):
            options |= dict(num_warps=self.blocks.num_warps, num_stages=self.blocks.num_stages)
        with _device(like):
            kernel[grid](
                *tensors, self.L, self.heads, self.chunks, K=self.K, V=self.V, REVERSE=reverse,
                PRECISION=precision(like.dtype), TILE=self.blocks.tile, CHUNK=self.chunk,
                BLOCK_K=padded(self.K), **options,
            )  # fmt: skip


def _device(x: Tensor):
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


def forward_bytes(
    batch: int, H: int, G: int, L: int, K: int, V: int, *, chunk: int = CHUNK, itemsize: int = 4
) -> int:
    """Bytes that the forward pass moves, with what it reads again.

    A head's program for a block of value channels reads keys, values and decays once for the
    chunk's state; then, for every tile, the state, its queries, and keys, values and decays of the
    chunk's tiles up to itself. Heads do not share what they read of a group (the cache does).
    """
    tile, block_v, *_ = blocks_for(K, torch.float32 if itemsize == 4 else torch.float16)
    chunks, programs = -(-L // chunk), -(-V // block_v)
    tiles, per = -(-L // tile), chunk // tile
    stops = [min((n + 1) * tile, L) - n // per * chunk for n in range(tiles)]  # from chunk's start
    once = L * (programs * K + V) * itemsize + programs * 8 * (L + tiles)
    combined = 4 * chunks * (3 * K * V + -(-K * V // COMBINED)) + 2 * 4 * K * V
    again = sum(stops)
    outputs = tiles * 4 * K * V + (programs * K * (L + again) + V * (again + L)) * itemsize
    return batch * H * (once + combined + outputs + programs * 8 * (L + again))


def _check(values, log_decay, B, C, state, chunk) -> None:
    for name, x in dict(values=values, B=B, C=C).items():
        if not isinstance(x, Tensor) or x.dim() != 4:
            got = tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
            raise ValueError(f"{name}: expected 4 axes, got {got}")
        if x.dtype not in (torch.float16, torch.bfloat16, torch.float32) or x.dtype != values.dtype:
            raise TypeError(f"{name}: expected float16, bfloat16 or float32 as values: {x.dtype}")
        most = widest(x.dtype)[name == "values"]
        if not 1 <= x.shape[3] <= most:
            wanted = f"a width of 1 to {most} in {x.dtype}"
            raise ValueError(f"{name}: expected {wanted}, got {x.shape[3]}")
    (batch, H, L, V), (G, K) = values.shape, (B.shape[1], B.shape[3])
    if G == 0 or H % G:
        raise ValueError(f"B: expected a number of groups that divides {H} heads, got {G}")
    wanted = dict(log_decay=(batch, H, L), B=(batch, G, L, K), C=(batch, G, L, K))
    wanted["state"] = (batch, H, K, V)
    for name, x in dict(log_decay=log_decay, B=B, C=C, state=state).items():
        if tuple(x.shape) != wanted[name]:
            raise ValueError(f"{name}: expected shape {wanted[name]}, got {tuple(x.shape)}")
    for name, x in dict(log_decay=log_decay, state=state).items():
        if x.dtype != torch.float32:
            raise TypeError(f"{name}: expected float32, got {x.dtype}")
    tile = blocks_for(K, values.dtype).tile
    if chunk < tile or chunk % tile:
        raise ValueError(f"chunk: expected a multiple of {tile}, got {chunk}")


def specialisation(
    kernel: str, name: str, K: int, V: int, reverse: bool, signature: dict, **constants: Any
) -> Specialisation:
    """A row of one of the tiled kernels, launched as `Launches.tiled` does on each target."""
    dtype = torch.float32 if name == "fp32" else torch.bfloat16
    signature = signature | {"high": "*fp32", "low": "*fp32"}
    options = {t: blocks_for(K, dtype, t) for t in ("sm_80", "gfx942")}
    here = {
        target: dict(
            num_warps=blocks.num_warps,
            num_stages=blocks.num_stages,
            constexprs={"TILE": blocks.tile, "PRECISION": precision(dtype, target)},
        )
        for target, blocks in options.items()
    }
    common = {"K": K, "V": V, "REVERSE": reverse, "CHUNK": CHUNK, "BLOCK_K": padded(K)}
    common |= {"BLOCK_V": options["sm_80"].block_v} | here["sm_80"].pop("constexprs") | constants
    return Specialisation(
        kernel=kernel,
        label=f"{name} K={K} V={V}" + (", backwards in time" if reverse else ""),
        direction="backward" if reverse or kernel == "_shared_gradients" else "forward",
        signature=signature | dict.fromkeys(("L", "R", "chunks"), "i32"),
        constexprs=common,
        overrides={"gfx942": here["gfx942"]},
        **here["sm_80"],
    )


def _row(kernel: str, name: str, K: int, V: int, reverse: bool) -> Specialisation:
    if kernel == "_combine":
        signature = dict.fromkeys(("states", "totals", "initial", "final"), "*fp32")
        constants = {"SIZE": K * V, "REVERSE": reverse, "BLOCK": COMBINED}
        direction = "backward" if reverse else "forward"
        signature["chunks"] = "i32"
        return Specialisation(kernel, f"{K} x {V}", direction, signature, constants)
    signature = dict.fromkeys(("b", "c"), f"*{name}") | {"out": "*fp32"}
    if kernel == "_outputs":
        signature |= {"a": f"*{name}", "states": "*fp32", "out": f"*{name}"}
    return specialisation(kernel, name, K, V, reverse, signature)


#: What is compiled for every target; the launcher takes its blocks from the same table.
SPECIALISATIONS = [
    _row(kernel, name, K, 64, reverse)
    for kernel in ("_chunk_states", "_outputs", "_combine")
    for reverse in (False, True)
    for name, K in (("bf16", 128), ("fp32", 64))
]
SPECIALISATIONS += [_row("_outputs", "bf16", 64, 64, False)]
