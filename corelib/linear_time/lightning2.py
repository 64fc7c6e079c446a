"""Lightning Attention-2: linear attention that keeps its promise (arXiv 2401.04658).

Idea: causal linear attention is a matrix product inside a block of tokens and a small state between
blocks; done so, its cost grows with the length and every step of it is a product that hardware
likes. Before, the sum over the past was taken token by token (slow) or as a masked square (not
linear).

    out_t = sum_{j <= t} decay^(t - j) (q_t . k_j) v_j        decay_h = exp(-slopes_h), no softmax

With ``r = 1 .. block`` counting the rows of a block and ``state`` what the blocks before it left:

    out   = ((q k^T) * decay^(r - r'), r' <= r) v + decay^r (q state)          intra + inter
    state = decay^block state + sum_r decay^(block - r) k_r^T v_r

| here        | paper        | what                                                       |
|:------------|:-------------|:-----------------------------------------------------------|
| q, k, v     | Q, K, V      | (B, H, L, K), (B, H, L, K), (B, H, L, V)                   |
| state       | KV           | (B, H, K, V), float32 at least                             |
| slopes      | -ln lambda   | (H,), ALiBi's slopes, smaller in deeper layers             |
| block       | B            | tokens in a block, 64                                      |

Exact: all forms compute the same function, for every block and every length. Left out: the paper's
overlap of copies and products on the chip is Triton's business. The layer follows TransNormerLLM
(arXiv 2307.14995): SiLU on q, k and v, a norm without parameters in place of a denominator, a
sigmoid gate of low rank.
Cost: ``2 block (K + V) + 4 K V`` operations a token, whatever the length; the state is all that
decoding keeps. Kernel: `corelib.kernels.linear_recurrence`, each input read once in each pass.
Oracle: the masked square `lightning_naive`; fla's simple GLA with a constant decay.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from corelib.primitives import linear_recurrence

Q, V = Float[Tensor, "B H L K"], Float[Tensor, "B H L V"]
State = Float[Tensor, "B H K V"]
Slopes = Float[Tensor, " H"]
BLOCK = 64


def lightning_recurrent(
    q: Q, k: Q, v: V, slopes: Slopes, state: State | None = None
) -> tuple[V, State]:
    """Token by token: what decoding does."""
    state = _start(q, k, v, slopes, state)
    decay = torch.exp(-slopes.to(state.dtype))[:, None, None]
    outs = []
    for t in range(q.shape[2]):
        q_t, k_t, v_t = (x[:, :, t].to(state.dtype) for x in (q, k, v))
        state = decay * state + k_t[..., :, None] * v_t[..., None, :]
        outs.append((q_t[..., None, :] @ state)[..., 0, :])
    return (torch.stack(outs, 2).to(v.dtype) if outs else v.clone()), state


def lightning_naive(
    q: Q, k: Q, v: V, slopes: Slopes, state: State | None = None
) -> tuple[V, State]:
    """The whole masked square at once: O(L^2), as the paper's left product."""
    return lightning_block(q, k, v, slopes, state, block=max(1, q.shape[2]))


def lightning_block(
    q: Q, k: Q, v: V, slopes: Slopes, state: State | None = None, *, block: int = BLOCK
) -> tuple[V, State]:
    """The paper's algorithm 1: masked squares inside blocks, the state between them."""
    if isinstance(block, bool) or not isinstance(block, int) or block < 1:
        raise ValueError(f"block: expected a whole number of at least 1, got {block!r}")
    state = _start(q, k, v, slopes, state)
    outs = []
    for q_b, k_b, v_b in zip(*(x.to(state.dtype).split(block, 2) for x in (q, k, v)), strict=True):
        within, since_start, until_end, total = block_decays(slopes.to(state.dtype), q_b.shape[2])
        intra = (q_b @ k_b.mT * within) @ v_b
        inter = since_start * (q_b @ state)
        outs.append(intra + inter)
        state = total * state + (until_end * k_b).mT @ v_b
    return (torch.cat(outs, 2).to(v.dtype) if outs else v.clone()), state


def lightning_attn(q: Q, k: Q, v: V, slopes: Slopes, state: State | None = None) -> tuple[V, State]:
    """Lightning attention, as fast as this device has it; ``(out, state)``.

    Args:
        slopes: of each head, at least 0; see `decay_slopes`. 0 forgets nothing.
        state: what an earlier call returned, to go on from there; None starts from nothing.

    Raises ValueError or TypeError for shapes, dtypes or slopes that do not fit.
    """
    state = _start(q, k, v, slopes, state)
    log_decay = -slopes.to(state.dtype)[:, None].expand(q.shape[:3])
    return linear_recurrence(
        q, k, v, log_decay=log_decay, state=state, scale=1.0, return_state=True
    )


def block_decays(slopes: Slopes, block: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``decay^(r - r')`` for r' <= r, ``decay^r``, ``decay^(block - r)`` and ``decay^block``."""
    r = torch.arange(1, block + 1, dtype=slopes.dtype, device=slopes.device)
    s = slopes[:, None, None]
    within = torch.exp(-s * (r[:, None] - r).clamp_min(0)).tril()
    return (
        within,
        torch.exp(-s * r[:, None]),
        torch.exp(-s * (block - r)[:, None]),
        torch.exp(-s * block),
    )


def decay_slopes(heads: int, layer: int, layers: int) -> Slopes:
    """ALiBi's slopes times ``1 - layer / (layers - 1) + 1e-5``: the last layer hardly forgets.

    ``layer`` counts from 0. Slopes are ``2^(-8/H), 2^(-16/H) ...`` for a power of two; other
    numbers of heads take every second slope of twice as many, as ALiBi's code does.
    """
    if heads < 1 or layers < 1 or not 0 <= layer < layers:
        raise ValueError(f"layer: expected 0 <= layer < layers, got {layer} of {layers}")
    power = 1 << (heads.bit_length() - 1)
    slopes = [2.0 ** (-8 * (i + 1) / power) for i in range(power)]
    slopes += [2.0 ** (-4 * (2 * i + 1) / power) for i in range(heads - power)]
    share = 1 - layer / max(1, layers - 1) + 1e-5
    return torch.tensor(slopes, dtype=torch.float64).mul(share).float()


def block_flops(K: int, V: int, block: int) -> tuple[int, int]:
    """Operations a token, ``(inside the block, through the state)``; squares are counted whole."""
    return 2 * block * (K + V), 4 * K * V


class NormLinearAttention(nn.Module):
    """TransNormerLLM's attention layer on ``(B, L, C)``; a sequence mixer, see `contracts`."""

    def __init__(self, C: int, heads: int, *, layer: int = 0, layers: int = 2):
        super().__init__()
        if heads < 1 or C % heads:
            raise ValueError(f"heads: expected a divisor of C = {C}, got {heads}")
        self.heads, self.width = heads, C // heads
        self.q, self.k, self.v, self.out = (nn.Linear(C, C, bias=False) for _ in range(4))
        self.gate = nn.Sequential(
            nn.Linear(C, self.width, bias=False), nn.Linear(self.width, C, bias=False)
        )
        self.register_buffer("slopes", decay_slopes(heads, layer, layers))
        for linear in (self.q, self.k, self.v, self.out, *self.gate):
            nn.init.xavier_uniform_(linear.weight, gain=2**-2.5)

    def init_state(self, batch: int) -> State:
        """What the layer remembers before the first token: zeros, of one size for ever."""
        dtype = torch.promote_types(self.q.weight.dtype, torch.float32)
        shape = batch, self.heads, self.width, self.width
        return torch.zeros(shape, dtype=dtype, device=self.q.weight.device)

    def forward(
        self, x: Float[Tensor, "B L C"], state: State | None = None
    ) -> tuple[Float[Tensor, "B L C"], State]:
        """``(y, state)`` over a stretch of tokens."""
        q, k, v = (
            F.silu(linear(x)).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for linear in (self.q, self.k, self.v)
        )
        mixed, state = lightning_attn(q, k, v, self.slopes, state)
        mixed = F.rms_norm(mixed.transpose(1, 2).flatten(2), x.shape[-1:])
        return self.out(torch.sigmoid(self.gate(x)) * mixed), state

    def step(self, x_t: Float[Tensor, "B C"], state: State) -> tuple[Float[Tensor, "B C"], State]:
        """One token."""
        y, state = self(x_t[:, None], state)
        return y[:, 0], state


def _start(q, k, v, slopes, state) -> Tensor:
    """The state to start from; checks what `linear_recurrence` does not see."""
    if q.dim() != 4 or k.shape != q.shape or v.shape[:-1] != q.shape[:-1]:
        shapes = [tuple(x.shape) for x in (q, k, v)]
        raise ValueError(
            f"q, k, v: expected (B, H, L, K), the same, and (B, H, L, V), got {shapes}"
        )
    if slopes.shape != q.shape[1:2]:
        raise ValueError(f"slopes: expected shape ({q.shape[1]},), got {tuple(slopes.shape)}")
    if (slopes < 0).any() or not math.isfinite(slopes.sum().item()):
        raise ValueError(f"slopes: expected finite numbers of at least 0, got {slopes.tolist()}")
    shape = (*q.shape[:2], q.shape[3], v.shape[3])
    if state is not None and state.shape != shape:
        raise ValueError(f"state: expected shape {shape}, got {tuple(state.shape)}")
    wide = torch.promote_types(q.dtype, torch.float32)
    return q.new_zeros(shape, dtype=wide) if state is None else state.to(wide)


def example() -> dict:
    """Two heads, eleven tokens, a fast and a slow decay.

    >>> lightning_attn(**example())[0].shape
    torch.Size([1, 2, 11, 3])
    """
    generator = torch.Generator().manual_seed(0)
    shapes = (1, 2, 11, 4), (1, 2, 11, 4), (1, 2, 11, 3)
    q, k, v = (torch.randn(shape, generator=generator) for shape in shapes)
    return dict(q=q, k=k, v=v, slopes=torch.tensor([0.5, 0.01]))
