"""RAT: recurrence inside chunks, attention across chunks (arXiv 2507.04416).

Idea: between attention, which keeps every key, and a recurrent network, which keeps one state, lies
a dial: the length of a chunk. Inside a chunk a gated average runs along; what it holds at the
chunk's end stands for the chunk, and softmax attention reads the ends.

    k'_t = g_t * k'_{t-1} + (1 - g_t) * k_t        v' likewise, same g; zero before each chunk
    out_t = softmax(q_t . [k'_end of every chunk before, k'_t] / sqrt(D)) [v'_end ..., v'_t]

One chunk of the whole length: the average alone, an RNN. Chunks of 1 with ``g = 0``: attention.

| here          | paper              | what                                                       |
|:--------------|:-------------------|:-----------------------------------------------------------|
| q, k, v, g    | q, k, v, g         | (B, H, L, D), (B, G, L, D), (B, H, L, D), (B, H, L, D)     |
| chunk         | L                  | tokens in a chunk, 16                                      |
| averages      | k tilde, v tilde   | `gated_average.chunk_scan` of k and of v                   |
| ends_k/v      | K, V tilde, -1     | (B, H, C, D): averages at the ends of C finished chunks    |

Exact: `rat_attention`, `rat_step` and the reference compute the same function at every length.
``T / chunk`` queries, one of each chunk and all at the same place in it, see the ends in causal
order; so places become the query heads of one key head, and plain causal attention with grouped
heads does it: no mask is written down. Its log-sum-exp lets the token's own average in afterwards.
Cost: ``4 D (L / chunk)`` operations a token and head at most, three more for the average; memory
linear in L; the cache holds C + 1 keys and values, one more every ``chunk`` tokens.

From the released code, where it says more than the paper: the gates of the *average* have a bias,
log U(1, chunk - 1); q and k are made for 2 groups of heads and shared, but gates are per head, so
the averaged keys are not; positions (RoPE) are chunk numbers, of the ends and of the query, so that
the own average needs none; scans run in float32. A chunk of 1 in the released layer still weighs
its key and value with 1 - g: attention proper needs ``g = 0``. There heads take the groups in turn
(head h reads group h mod 2), here in runs as everywhere in this library: an order of heads. Left
out: the norm in front and the residual, which belong to the block; `rat_hybrid` has both.
Kernels: `corelib.kernels.diagonal_scan` and `corelib.kernels.flash_attention`.
Oracle: the two sums written out in the tests; the paper's ends of the dial.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from corelib.primitives import attention, merge_partials, rope_frequencies, rope_half_split

from .gated_average import check_chunk, chunk_scan, scan_heads  # noqa: F401

Heads, Row = Float[Tensor, "B H L D"], Float[Tensor, "B H D"]
Shared = Float[Tensor, "B G L D"]
Frequencies = Float[Tensor, " pairs"]
CHUNK = 16


class RATState(NamedTuple):
    """Ends of finished chunks ``(B, H, C, D)``, turned if there are positions; the averages
    ``(B, H, D)`` of the running chunk, not turned; and how many tokens there were."""

    ends_k: Tensor
    ends_v: Tensor
    k: Tensor
    v: Tensor
    position: int


def rat_attention(
    q: Heads,
    k: Shared,
    v: Heads,
    g: Heads,
    chunk: int = CHUNK,
    *,
    frequencies: Frequencies | None = None,
    scale: float | None = None,
    state: RATState | None = None,
) -> tuple[Heads, RATState]:
    """All tokens of a stretch at once; ``(out, state)``.

    Args:
        g: share of the average that stays, between 0 and 1, for each channel.
        frequencies: RoPE's, turned by chunk numbers; None: no positions.
        state: what an earlier call returned, to go on from there.

    Raises ValueError or TypeError for shapes, dtypes or sizes that do not fit.
    """
    state = _start(q, k, v, g, chunk, state)
    if not q.shape[2]:
        return v.clone(), state
    position, start = state.position, state.position % chunk
    averages = [scan_heads(g, x, chunk, h, start) for x, h in ((k, state.k), (v, state.v))]
    own_k, own_v = (x.to(q.dtype) for x in averages)
    first = position // chunk
    ends_k, ends_v = (x[:, :, chunk - 1 - start :: chunk] for x in (own_k, own_v))
    ends_k = torch.cat([state.ends_k, _turn(ends_k, first, frequencies)], 2)
    ends_v = torch.cat([state.ends_v, ends_v], 2)
    last = (position + q.shape[2] - 1) // chunk  # number of the last chunk begun
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    own = (q * averages[0]).sum(-1, keepdim=True) * scale
    out = own_v
    if last:
        q, own, own_v = (_by_place(x, chunk, start) for x in (q, own, own_v))
        seen = (x[:, :, :last].flatten(0, 1)[:, None] for x in (ends_k, ends_v))
        partial = attention(
            _turn(q, first, frequencies), *seen, causal=True, scale=scale, return_lse=True
        )
        out = merge_partials(*partial, own_v, own[..., 0])[0]
        out = out.unflatten(0, v.shape[:2]).transpose(2, 3).flatten(2, 3)
        out = out[:, :, start : start + v.shape[2]]
    after = (x[:, :, -1] for x in averages)
    return out, RATState(ends_k, ends_v, *after, position + v.shape[2])


def rat_step(
    q: Row,
    k: Float[Tensor, "B G D"],
    v: Row,
    g: Row,
    state: RATState,
    chunk: int = CHUNK,
    *,
    frequencies: Frequencies | None = None,
    scale: float | None = None,
) -> tuple[Row, RATState]:
    """One token: a step of the average, then one softmax over ``C + 1`` keys."""
    _start(*(x[:, :, None] for x in (q, k, v, g)), chunk, state)
    number, place = divmod(state.position, chunk)
    k, g = k.repeat_interleave(q.shape[1] // k.shape[1], 1).to(state.k.dtype), g.to(state.k.dtype)
    new = [(1 - g) * x + (g * h if place else 0) for x, h in ((k, state.k), (v, state.v))]
    own_k, own_v = (x[:, :, None].to(q.dtype) for x in new)
    turned = _turn(own_k, number, frequencies)
    keys, values = torch.cat([state.ends_k, turned], 2), torch.cat([state.ends_v, own_v], 2)
    query = _turn(q[:, :, None], number, frequencies)
    out = attention(query, keys, values, causal=True, scale=scale)[:, :, 0]
    ends = (keys, values) if place == chunk - 1 else state[:2]
    return out, RATState(*ends, *new, state.position + 1)


def rat_reference(q, k, v, g, chunk=CHUNK, *, frequencies=None, scale=None, state=None):
    """`rat_attention`, token after token."""
    state = _start(q, k, v, g, chunk, state)
    outs = [v[:, :, :0]]
    for t in range(q.shape[2]):
        row = (x[:, :, t] for x in (q, k, v, g))
        out, state = rat_step(*row, state, chunk, frequencies=frequencies, scale=scale)
        outs.append(out[:, :, None])
    return torch.cat(outs, 2), state


class RAT(nn.Module):
    """The layer on ``(B, L, C)``; a sequence mixer, see `contracts`. ``groups`` of heads share
    queries and keys: what that saves pays for the two gates."""

    def __init__(self, C: int, heads: int, *, chunk: int = CHUNK, groups: int = 2):
        super().__init__()
        check_chunk(chunk)
        if heads < 1 or C % (2 * heads):
            raise ValueError(f"heads: expected C = {C} in shares of even width, got {heads}")
        if groups < 1 or heads % groups:
            raise ValueError(f"groups: expected a divisor of {heads} heads, got {groups}")
        self.heads, self.chunk, width = heads, chunk, C // heads
        self.sizes = [C, C, C, groups * width, groups * width]
        self.enter = nn.Linear(C, sum(self.sizes), bias=False)
        self.out = nn.Linear(C, C, bias=False)
        low, high = 1.0, max(1.0, chunk - 1.0)
        self.gate_bias = nn.Parameter(torch.empty(C).uniform_(low, high).log())
        self.frequencies = rope_frequencies(width)

    def init_state(self, batch: int) -> RATState:
        """No chunk yet."""
        like = self.out.weight.new_zeros(batch, self.heads, 0, len(self.out.weight) // self.heads)
        return _start(like, like, like, like, self.chunk, None)

    def forward(
        self, x: Float[Tensor, "B L C"], state: RATState | None = None
    ) -> tuple[Float[Tensor, "B L C"], RATState]:
        """``(y, state)`` over a stretch of tokens."""
        z, *qkvg = self._project(x)
        options = dict(frequencies=self.frequencies, state=state)
        mixed, state = rat_attention(*qkvg, self.chunk, **options)
        return self.out(z.sigmoid() * mixed.transpose(1, 2).flatten(2)), state

    def step(
        self, x_t: Float[Tensor, "B C"], state: RATState
    ) -> tuple[Float[Tensor, "B C"], RATState]:
        """One token."""
        z, *qkvg = self._project(x_t[:, None])
        row = (x[:, :, 0] for x in qkvg)
        mixed, state = rat_step(*row, state, self.chunk, frequencies=self.frequencies)
        return self.out(z[:, 0].sigmoid() * mixed.flatten(1)), state

    def _project(self, x: Tensor) -> tuple[Tensor, ...]:
        z, v, g, q, k = self.enter(x).split(self.sizes, -1)
        g = torch.sigmoid(g + self.gate_bias)
        width = z.shape[-1] // self.heads
        q, k, v, g = (y.unflatten(-1, (-1, width)).transpose(1, 2) for y in (q, k, v, g))
        return z, q.repeat_interleave(self.heads // q.shape[1], 1), k, v, g


def _by_place(x: Tensor, chunk: int, start: int) -> Tensor:
    """``(B, H, L, D) -> (B H, chunk, chunks, D)``: tokens at one place of their chunks together."""
    around = start, -(start + x.shape[2]) % chunk
    x = F.pad(x, (0, 0, *around)) if any(around) else x
    return x.unflatten(2, (-1, chunk)).transpose(2, 3).flatten(0, 1)


def _turn(x: Tensor, first: int, frequencies: Tensor | None) -> Tensor:
    """RoPE of positions ``first, first + 1 ...`` along the third axis."""
    if frequencies is None:
        return x
    positions = torch.arange(first, first + x.shape[2], device=x.device)
    return rope_half_split(x, positions, frequencies.to(x.device))


def _start(q, k, v, g, chunk: int, state: RATState | None) -> RATState:
    """The state to start from; checks what callers can get wrong."""
    check_chunk(chunk)
    if q.dim() != 4 or not q.shape == v.shape == g.shape:
        shapes = [tuple(x.shape) for x in (q, v, g)]
        raise ValueError(f"q, v, g: expected one shape (B, H, L, D), got {shapes}")
    B, H, L, D = q.shape
    if k.dim() != 4 or (k.shape[0], *k.shape[2:]) != (B, L, D) or H % max(1, k.shape[1]):
        raise ValueError(f"k: expected ({B}, a divisor of {H}, {L}, {D}), got {tuple(k.shape)}")
    if state is None:
        none, zero = q.new_zeros(B, H, 0, D), q.new_zeros(B, H, D)
        zero = zero.to(torch.promote_types(q.dtype, torch.float32))
        return RATState(none, none, zero, zero, 0)
    wanted = [(B, H, state.position // chunk, D)] * 2 + [(B, H, D)] * 2
    if [tuple(x.shape) for x in state[:4]] != wanted:
        got = [tuple(x.shape) for x in state[:4]]
        raise ValueError(f"state: expected shapes {wanted} in chunks of {chunk}, got {got}")
    return state


def example() -> dict:
    """Two heads, eleven tokens, chunks of four: the last one has three.

    >>> out, state = rat_attention(**example())
    >>> out.shape, state.ends_k.shape
    (torch.Size([1, 2, 11, 4]), torch.Size([1, 2, 2, 4]))
    """
    generator = torch.Generator().manual_seed(0)
    q, k, v, g = torch.randn(4, 1, 2, 11, 4, generator=generator)
    return dict(q=q, k=k[:, :1], v=v, g=g.sigmoid(), chunk=4)
