"""JRT, Just Read Twice: a small memory needs a second look (arXiv 2407.05483).

Idea: what a recurrent reader must remember depends on the order of its data; repeat the prompt, or
read it once in both directions, and the order no longer matters.

Two ways. *JRT-Prompt* changes the prompt of any model: ``[text, question, text, question]``.
*JRT-RNN* changes the layer: linear attention in which the first ``M`` tokens, the prefix, are also
seen from every place, through keys and values of their own (``k_enc, v_enc``):

    out_i = sum_{j <= i} w(q_i, k_j) v_j + sum_{j < M} w(q_i, k_enc_j) v_enc_j,  over the sum of w
    w(q, k) = taylor(q) . taylor(k) = 1 + s + s^2 / 2,     s = q . k / sqrt(K)

Both sums run through one state: the prefix is written into it first, whole; then the tokens follow
one by one, as in Based (arXiv 2402.18668), which is the same with M = 0. The state has a column for
the sum of w, so ``[v, 1]`` is what is written:

    state = sum_{j < M} taylor(k_enc_j)^T [v_enc_j, 1];    state += taylor(k_t)^T [v_t, 1]
    [above, below] = taylor(q_t) state;                    out_t = above / below

| here         | paper            | what                                                        |
|:-------------|:-----------------|:------------------------------------------------------------|
| q, k, v      | Q, K, V          | (B, H, L, K), the same, (B, H, L, V); K = 16                |
| k_enc, v_enc | K_e, V_e         | (B, H, P, K), (B, H, P, V): the first M of P are the prefix |
| state        | kv- and k-state  | (B, H, F, V + 1), float32 at least                          |
| F            | (1 + d + d^2)    | ``1 + K + K (K + 1) / 2``: each product x_i x_j once        |

Exact: all forms compute one function. ``w >= 1/2``, so that no constant guards the division.
Different: the released code keeps all ``1 + d + d^2`` features and adds 1e-12 below the line. Left
out: masks for padding on the left. The loss is in `jrt_objective`.
Cost: O(L F V) time, the state alone for decoding, whatever M is. Kernels: `feature_maps` writes the
features; `linear_recurrence` takes up to 64 of them in float32 (K <= 9, V <= 63), wider ones go as
products in chunks. Oracle: the masked square `prefix_linear_naive`; fla's naive Based at M = 0.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from corelib.primitives import (
    linear_recurrence,
    symmetric_taylor_features,
    symmetric_taylor_width,
    taylor_kernel,
)
from corelib.primitives._checks import check_same_kind

from .jrt_objective import jrt_loss, mask_prefix

__all__ = [
    "PrefixLinearAttention",
    "based_attention",
    "based_step",
    "example",
    "jrt_loss",
    "jrt_prompt",
    "mask_prefix",
    "prefix_linear_attention",
    "prefix_linear_naive",
    "prefix_linear_recurrent",
    "prefix_state",
]

Q, V = Float[Tensor, "B H L K"], Float[Tensor, "B H L V"]
KEnc, VEnc = Float[Tensor, "B H P K"], Float[Tensor, "B H P V"]
State = Float[Tensor, "B H F W"]


def prefix_linear_naive(
    q: Q, k: Q, v: V, k_enc: KEnc, v_enc: VEnc, M: int | None = None
) -> tuple[V, State]:
    """The masked square at once: O(L (L + M)). For small inputs."""
    k_enc, v_enc = _prefix(q, k, v, k_enc, v_enc, M)
    scale, wide = q.shape[-1] ** -0.5, torch.promote_types(q.dtype, torch.float32)
    queries, keys, values = (x.to(wide) for x in (q, torch.cat([k, k_enc], 2), _ones(v, v_enc)))
    weights = taylor_kernel(scale * (queries @ keys.mT))
    seen = torch.ones(weights.shape[-2:], dtype=torch.bool, device=q.device).tril()
    seen[:, q.shape[2] :] = True  # the prefix is seen from everywhere
    out = torch.where(seen, weights, 0) @ values
    return _divide(out, v), symmetric_taylor_features(keys).mT @ values


def prefix_linear_recurrent(
    q: Q, k: Q, v: V, k_enc: KEnc, v_enc: VEnc, M: int | None = None
) -> tuple[V, State]:
    """The prefix, then token by token: what decoding does."""
    k_enc, v_enc = _prefix(q, k, v, k_enc, v_enc, M)
    state = prefix_state(k_enc, v_enc)
    outs = []
    for q_t, k_t, v_t in zip(*(x.unbind(2) for x in (q, k, v)), strict=True):
        y_t, state = based_step(q_t, k_t, v_t, state)
        outs.append(y_t)
    return (torch.stack(outs, 2) if outs else v.clone()), state


def prefix_linear_attention(
    q: Q, k: Q, v: V, k_enc: KEnc, v_enc: VEnc, M: int | None = None
) -> tuple[V, State]:
    """Prefix linear attention, as fast as this device has it; ``(out, state)``.

    Args:
        k_enc, v_enc: keys and values under which the prefix is seen from every place.
        M: how many of them count, from the first on; None: all. 0 is causal Based attention.

    Raises ValueError or TypeError for shapes, dtypes or an ``M`` that do not fit.
    """
    k_enc, v_enc = _prefix(q, k, v, k_enc, v_enc, M)
    return based_attention(q, k, v, prefix_state(k_enc, v_enc))


def based_attention(q: Q, k: Q, v: V, state: State | None = None) -> tuple[V, State]:
    """Causal linear attention with Taylor features; ``(out, state)``.

    ``state``: what an earlier call or `prefix_state` returned; None starts from nothing.
    """
    _check(q, k, v)
    wide = torch.promote_types(q.dtype, torch.float32)  # features in halves: 150 rough numbers
    f_q, f_k = symmetric_taylor_features(torch.stack([q, k]).to(wide))
    out, state = linear_recurrence(
        f_q, f_k, _ones(v.to(wide)), state=state, scale=1.0, return_state=True
    )
    return _divide(out, v), state


def based_step(
    q_t: Float[Tensor, "B H K"],
    k_t: Float[Tensor, "B H K"],
    v_t: Float[Tensor, "B H V"],
    state: State,
) -> tuple[Float[Tensor, "B H V"], State]:
    """One token: written into the state, then read from it."""
    f_q, f_k = (symmetric_taylor_features(x.to(state.dtype)) for x in (q_t, k_t))
    state = state + f_k[..., :, None] * _ones(v_t).to(state.dtype)[..., None, :]
    return _divide((f_q[..., None, :] @ state)[..., 0, :], v_t), state


def prefix_state(k_enc: KEnc, v_enc: VEnc) -> State:
    """``sum_j taylor(k_enc_j)^T [v_enc_j, 1]``: a prefix, in no order, of one size whatever it is.

    States of several stretches add up.
    """
    wide = torch.promote_types(k_enc.dtype, torch.float32)
    return symmetric_taylor_features(k_enc.to(wide)).mT @ _ones(v_enc).to(wide)


def jrt_prompt(
    text: Int[Tensor, "B N"], question: Int[Tensor, "B S"], *, times: int = 2
) -> Int[Tensor, "B L"]:
    """``[text, question]``, ``times`` times: what any language model can be asked with."""
    if isinstance(times, bool) or not isinstance(times, int) or times < 1:
        raise ValueError(f"times: expected a whole number of at least 1, got {times!r}")
    return torch.cat([text, question], 1).repeat(1, times)


class PrefixLinearAttention(nn.Module):
    """JRT-RNN's layer on ``(B, L, C)``; a sequence mixer, see `contracts`, once the prefix is read.

    ``features``: width of queries and keys, K.
    """

    def __init__(self, C: int, heads: int, *, features: int = 16):
        super().__init__()
        if heads < 1 or C % heads:
            raise ValueError(f"heads: expected a divisor of C = {C}, got {heads}")
        if features < 1:
            raise ValueError(f"features: expected at least 1, got {features}")
        self.heads, self.features, self.width = heads, features, C // heads
        narrow = heads * features
        self.q, self.k, self.k_enc = (nn.Linear(C, narrow, bias=False) for _ in range(3))
        self.v, self.v_enc, self.out = (nn.Linear(C, C, bias=False) for _ in range(3))

    def init_state(self, batch: int) -> State:
        """What the layer remembers before the first token: zeros, of one size for ever."""
        weight = self.q.weight
        dtype = torch.promote_types(weight.dtype, torch.float32)
        shape = batch, self.heads, symmetric_taylor_width(self.features), self.width + 1
        return torch.zeros(shape, dtype=dtype, device=weight.device)

    def forward(
        self, x: Float[Tensor, "B L C"], state: State | None = None, *, prefix: int = 0
    ) -> tuple[Float[Tensor, "B L C"], State]:
        """``(y, state)``; the first ``prefix`` tokens of ``x`` are seen from every place."""
        if not 0 <= prefix <= x.shape[1]:
            raise ValueError(f"prefix: expected 0 to {x.shape[1]}, got {prefix}")
        if prefix:
            k_enc, v_enc = (self._heads(p, x[:, :prefix]) for p in (self.k_enc, self.v_enc))
            seen = prefix_state(k_enc, v_enc)
            state = seen if state is None else state + seen
        mixed, state = based_attention(
            *(self._heads(p, x) for p in (self.q, self.k, self.v)), state
        )
        return self.out(mixed.transpose(1, 2).flatten(2)), state

    def step(self, x_t: Float[Tensor, "B C"], state: State) -> tuple[Float[Tensor, "B C"], State]:
        """One token."""
        q, k, v = (p(x_t).unflatten(-1, (self.heads, -1)) for p in (self.q, self.k, self.v))
        mixed, state = based_step(q, k, v, state)
        return self.out(mixed.flatten(1)), state

    def _heads(self, linear: nn.Linear, x: Tensor) -> Tensor:
        return linear(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)


def _ones(*values: Tensor) -> Tensor:
    """Values one after another, each with a 1 behind it: it sums up the weights."""
    return F.pad(torch.cat(values, -2) if len(values) > 1 else values[0], (0, 1), value=1.0)


def _divide(out: Tensor, v: Tensor) -> Tensor:
    return (out[..., :-1] / out[..., -1:]).to(v.dtype)


def _prefix(q, k, v, k_enc, v_enc, M) -> tuple[Tensor, Tensor]:
    """The first ``M`` of the encoder's keys and values; checks all shapes."""
    _check(q, k, v)
    check_same_kind(q=q, k_enc=k_enc, v_enc=v_enc)
    for name, x, like in (("k_enc", k_enc, k), ("v_enc", v_enc, v)):
        if x.dim() != 4 or x.shape[:2] != like.shape[:2] or x.shape[3] != like.shape[3]:
            B, H, _, width = like.shape
            raise ValueError(f"{name}: expected shape ({B}, {H}, P, {width}), got {tuple(x.shape)}")
    P = k_enc.shape[2]
    if v_enc.shape[2] != P:
        raise ValueError(f"v_enc: expected the length of k_enc, {P}, got {v_enc.shape[2]}")
    if M is not None and (isinstance(M, bool) or not isinstance(M, int) or not 0 <= M <= P):
        raise ValueError(f"M: expected None or 0 to {P}, got {M!r}")
    return k_enc[:, :, :M], v_enc[:, :, :M]


def _check(q, k, v) -> None:
    check_same_kind(q=q, k=k, v=v)
    if q.dim() != 4 or k.shape != q.shape or v.dim() != 4 or v.shape[:-1] != q.shape[:-1]:
        shapes = [tuple(x.shape) for x in (q, k, v)]
        raise ValueError(
            f"q, k, v: expected (B, H, L, K), the same, and (B, H, L, V), got {shapes}"
        )


def example() -> dict:
    """Two heads, eleven tokens, the first four of them the prefix.

    >>> prefix_linear_attention(**example())[0].shape
    torch.Size([1, 2, 11, 3])
    """
    generator = torch.Generator().manual_seed(0)
    shapes = dict(q=(11, 4), k=(11, 4), v=(11, 3), k_enc=(11, 4), v_enc=(11, 3))
    drawn = {n: torch.randn(1, 2, *shape, generator=generator) for n, shape in shapes.items()}
    return drawn | dict(M=4)
