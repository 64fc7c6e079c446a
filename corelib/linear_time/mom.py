"""MoM: a mixture of memories (Du et al., arXiv 2502.13685).

A linear recurrence writes everything into one state, where old and new overwrite each other. MoM
keeps ``M`` independent states and a router that sends each token to ``k`` of them: a state that a
token is not sent to neither takes it in nor fades.

    p = the k largest of softmax(x W_g), divided by their sum
    S^m_t = recurrence(S^m_{t-1}, k^m_t, v^m_t)        for the chosen m;      S^m_t = S^m_{t-1} else
    o_t = sum_m p_m S^m_t^T q_t  (+ S^shared_t^T q_t)  y_t = W_o (norm(o_t) * silu(x_t W_z))

| here              | paper            | shape                                                     |
|:------------------|:-----------------|:----------------------------------------------------------|
| experts, weights  | top-k of the gate | (B, L, k), which memories and how much                   |
| k, v of a choice  | k^m, v^m         | (B, L, k, H, K), (B, L, k, H, V): each memory's own       |
| state             | M^m              | (M, B, H, K, V), the shared memory last                   |
| log_decay, beta   | alpha, beta      | of each choice, by the `rule`                             |

Every memory sees a shorter sequence of its own, so training needs no new scan: sort the tokens by
memory, run the ordinary chunked recurrence over packed sequences, put the outputs back. That is
`routed_recurrence`, and the layer does the same around its projections. The shared memory is one
more, chosen by every token with weight 1. The short convolution before the recurrence runs along
the routed sequence as well, and each memory keeps its own last inputs: so does fla's layer.
`Rule`s are the recurrences: `GatedDelta` (the paper's main one), `GatedLinear` (GLA), `Linear`.

Exact: recurrent, packed and continued forms are one function. A masked token goes nowhere and
changes no state; released code that pads on the left lets padding decay a state that is carried.
Top-k has no gradient of its own: the router learns through the weights, and from `balance_loss`
(Switch's, to be added times 0.01). Left out: one projection for all memories.
Cost: ``k`` (+ 1) times one recurrence, whatever ``M``; state ``M`` (+ 1) times as large.
Oracle: `routed_recurrence_reference`, token by token; the base layer; fla's naive gated delta rule.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from corelib.primitives import linear_recurrence_varlen
from corelib.primitives.expert_permute import grouped_matmul, load_balance_loss, route_topk
from corelib.primitives.short_conv_varlen import causal_short_conv_varlen

from .routed_recurrence import (
    Experts,
    Memories,
    Weights,
    gather_back,
    plan_memories,
    routed_recurrence,
    routed_recurrence_reference,
    scatter_to_memories,
)

__all__ = [
    "GatedDelta",
    "GatedLinear",
    "Linear",
    "MoM",
    "MoMState",
    "Rule",
    "example",
    "gather_back",
    "plan_memories",
    "routed_recurrence",
    "routed_recurrence_reference",
    "scatter_to_memories",
]


class MoMState(NamedTuple):
    """What each memory knows: recent inputs of its convolution, and its state."""

    inputs: Float[Tensor, "M B channels inputs"]
    memory: Memories


class Rule(nn.Module):
    """A recurrence that memories run: how many numbers it wants of a token, and what of them."""

    unit_keys = False  # queries and keys of length 1

    def __init__(self, heads: int, key_width: int):
        super().__init__()
        self.heads, self.key_width, self.wanted = heads, key_width, 0

    def forward(self, extra: Float[Tensor, "rows wanted"]) -> dict[str, Tensor]:
        """``log_decay`` and ``beta`` of `linear_recurrence_varlen`, where there are any."""
        return {}


class Linear(Rule):
    """Plain linear attention: nothing fades, nothing is corrected."""


class GatedLinear(Rule):
    """GLA: a decay for each key channel from 16 numbers, ``log sigmoid / 16`` at first near 0."""

    def __init__(self, heads: int, key_width: int):
        super().__init__(heads, key_width)
        self.wanted = 16
        self.up = nn.Linear(16, heads * key_width)

    def forward(self, extra: Float[Tensor, "rows wanted"]) -> dict[str, Tensor]:
        return {"log_decay": F.logsigmoid(self.up(extra)).unflatten(1, (self.heads, -1)) / 16}


class GatedDelta(Rule):
    """Gated DeltaNet: a decay and a strength of correction for each head, keys of length 1."""

    unit_keys = True

    def __init__(self, heads: int, key_width: int):
        super().__init__(heads, key_width)
        self.wanted = 2 * heads
        self.A_log = nn.Parameter(torch.empty(heads).uniform_(1, 16).log())
        dt = torch.empty(heads).uniform_(-6.9, -2.3).exp()  # 0.001 to 0.1
        self.dt_bias = nn.Parameter(dt + torch.log(-torch.expm1(-dt)))

    def forward(self, extra: Float[Tensor, "rows wanted"]) -> dict[str, Tensor]:
        step, strength = extra.chunk(2, 1)
        log_decay = -self.A_log.exp() * F.softplus(step + self.dt_bias)
        return {"log_decay": log_decay, "beta": torch.sigmoid(strength)}


class MoM(nn.Module):
    """The layer on ``(B, L, C)``; a sequence mixer, see `corelib.contracts`.

    Args:
        width: C. memories: M, not counting the shared one. choices: k, memories a token goes to.
        shared: one more memory that sees every token. heads, key_width, value_width: of a memory.
        rule: the recurrence, a class such as `GatedDelta`. conv: W, steps of the convolution.
    """

    def __init__(
        self,
        width: int,
        *,
        memories: int = 4,
        choices: int = 2,
        shared: bool = True,
        heads: int = 4,
        key_width: int = 64,
        value_width: int = 64,
        rule: type[Rule] = GatedDelta,
        conv: int = 4,
    ):
        super().__init__()
        if not 1 <= choices <= memories:
            raise ValueError(f"choices: expected 1 to {memories} memories, got {choices}")
        self.heads, self.keys, self.values = heads, heads * key_width, heads * value_width
        self.memories, self.choices, self.shared = memories, choices, shared
        self.rule = rule(heads, key_width)
        self.router = nn.Linear(width, memories, bias=False)
        self.q = nn.Linear(width, self.keys, bias=False)
        written = self.keys + self.values + self.rule.wanted
        self.write = nn.Parameter(torch.empty(memories + shared, width, written))
        self.conv = nn.Parameter(torch.empty(2 * self.keys + self.values, conv))
        self.gate = nn.Linear(width, self.values, bias=False)
        self.norm = nn.Parameter(torch.ones(value_width))
        self.out = nn.Linear(self.values, width, bias=False)
        for matrix in (self.router.weight, self.q.weight, self.gate.weight, self.out.weight):
            nn.init.xavier_uniform_(matrix, gain=2**-2.5)
        nn.init.uniform_(self.write, *_symmetric((6 / (width + written)) ** 0.5 * 2**-2.5))
        nn.init.uniform_(self.conv, *_symmetric(conv**-0.5))

    def init_state(self, batch: int) -> MoMState:
        """Empty memories, of one size for ever."""
        M, (channels, conv) = len(self.write), self.conv.shape
        shape = M, batch, self.heads, self.keys // self.heads, self.values // self.heads
        wide = torch.promote_types(self.conv.dtype, torch.float32)
        inputs = self.conv.new_zeros(M, batch, channels, conv - 1)
        return MoMState(inputs, self.conv.new_zeros(shape, dtype=wide))

    def route(
        self, x: Float[Tensor, "B L C"], mask: Bool[Tensor, "B L"] | None = None
    ) -> tuple[Experts, Weights]:
        """``experts, weights`` of each token, the shared memory among them; -1 where masked."""
        experts, weights, _ = route_topk(self.router(x), self.choices)
        if self.shared:
            experts = F.pad(experts, (0, 1), value=self.memories)
            weights = F.pad(weights, (0, 1), value=1.0)
        if mask is not None:
            experts = experts.masked_fill(~mask[..., None], -1)
        return experts, weights

    def balance_loss(self, x: Float[Tensor, "B L C"]) -> Float[Tensor, ""]:
        """1 when the memories share the tokens evenly; to be added to a loss times 0.01."""
        routing = route_topk(self.router(x), self.choices)
        return load_balance_loss(routing.probabilities, routing.experts)

    def forward(
        self,
        x: Float[Tensor, "B L C"],
        state: MoMState | None = None,
        mask: Bool[Tensor, "B L"] | None = None,
    ) -> tuple[Float[Tensor, "B L C"], MoMState]:
        """``(y, state)``; tokens outside ``mask`` write nothing, and zeros stand for their mix."""
        state = self.init_state(len(x)) if state is None else state
        experts, weights = self.route(x, mask)
        plan = plan_memories(experts, len(self.write))
        written = grouped_matmul(
            scatter_to_memories(x, plan), self.write, plan.cu_seqlens[:: len(x)]
        )
        written, extra = written.split([self.keys + self.values, self.rule.wanted], 1)
        mixed, inputs = causal_short_conv_varlen(
            torch.cat([scatter_to_memories(self.q(x), plan), written], 1), self.conv,
            plan.cu_seqlens, state=state.inputs.flatten(0, 1), return_state=True,
        )  # fmt: skip
        parts = F.silu(mixed).split([self.keys, self.keys, self.values], 1)
        q, k, v = (part.unflatten(1, (self.heads, -1)) for part in parts)
        if self.rule.unit_keys:
            q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
        out, memory = linear_recurrence_varlen(
            q, k, v, plan.cu_seqlens, **self.rule(extra), state=state.memory.flatten(0, 1),
            return_state=True,
        )  # fmt: skip
        answer = gather_back(out.flatten(1), plan, weights).unflatten(2, (self.heads, -1))
        answer = F.rms_norm(answer, self.norm.shape, self.norm, 1e-5).flatten(2)
        y = self.out(answer * F.silu(self.gate(x)))
        return y, MoMState(inputs.view(state.inputs.shape), memory.view(state.memory.shape))

    def step(
        self, x_t: Float[Tensor, "B C"], state: MoMState
    ) -> tuple[Float[Tensor, "B C"], MoMState]:
        """One token."""
        y, state = self(x_t[:, None], state)
        return y[:, 0], state


def _symmetric(bound: float) -> tuple[float, float]:
    return -bound, bound


def example() -> dict:
    """A layer of width 6 with three memories and a shared one, and eleven tokens for it.

    >>> given = example()
    >>> given["mixer"](given["x"])[0].shape
    torch.Size([2, 11, 6])
    """
    torch.manual_seed(0)
    options = dict(memories=3, choices=2, heads=2, key_width=3, value_width=4)
    mixer = MoM(6, **options).double()
    return dict(mixer=mixer, x=torch.randn(2, 11, 6, dtype=torch.float64))
