"""A linear recurrence with many states, each token sent to some of them: what MoM computes.

    S^m_t = decay_t S^m_{t-1} + k^m_t (...)        for the memories m that token t is sent to
    S^m_t = S^m_{t-1}                              for all others
    out_t = sum_m weight^m_t scale S^m_t^T q_t

`routed_recurrence_reference` is that, token by token. `routed_recurrence` sorts the tokens by
memory into packed sequences, runs one chunked recurrence over all of them, and puts the outputs
back.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from corelib.primitives import linear_recurrence_varlen
from corelib.primitives.expert_permute import Permutation, permute, sort_by_expert, unpermute
from corelib.primitives.take_rows import take_rows

Experts = Int[Tensor, "B L n"]
Weights = Float[Tensor, "B L n"]
Decay = Float[Tensor, "B L n H"] | Float[Tensor, "B L n H K"]
Memories = Float[Tensor, "M B H K V"]


def plan_memories(experts: Experts, memories: int) -> Permutation:
    """The packed row of each choice: memory after memory, batch row after batch row, in time.

    Sequence ``m * B + b`` of ``cu_seqlens (M B + 1,)`` is what batch row ``b`` sends to memory
    ``m``. A choice of -1 is left out.
    """
    B, L, n = experts.shape
    if experts.numel() and (experts.max() >= memories or experts.min() < -1):
        raise ValueError(f"experts: expected -1 to {memories - 1}, got {experts.unique()}")
    row = torch.arange(B, device=experts.device)[:, None, None]
    sequence = torch.where(experts < 0, -1, experts * B + row)
    return sort_by_expert(sequence.reshape(B * L, n), memories * B)


def scatter_to_memories(x: Float[Tensor, "B L C"], plan: Permutation) -> Float[Tensor, "rows C"]:
    """Each token once for each memory that it is sent to, packed."""
    return permute(x.flatten(0, 1), plan)


def gather_back(
    rows: Float[Tensor, "rows C"], plan: Permutation, weights: Weights
) -> Float[Tensor, "B L C"]:
    """The weighted sum of what a token's memories answered; zeros where it was sent nowhere."""
    return unpermute(rows, plan, weights.flatten(0, 1)).unflatten(0, weights.shape[:2])


def routed_recurrence_reference(
    q: Float[Tensor, "B L H K"],
    k: Float[Tensor, "B L n H K"],
    v: Float[Tensor, "B L n H V"],
    experts: Experts,
    weights: Weights,
    state: Memories,
    *,
    log_decay: Decay | None = None,
    beta: Float[Tensor, "B L n H"] | None = None,
    scale: float | None = None,
) -> tuple[Float[Tensor, "B L H V"], Memories]:
    """Token by token, choice by choice: the equations of the module."""
    B, L, n = experts.shape
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    states = [[state[m, b] for b in range(B)] for m in range(len(state))]
    out = []
    for b, t in ((b, t) for b in range(B) for t in range(L)):
        answer = torch.zeros_like(v[b, t, 0])
        for j, m in enumerate(experts[b, t].tolist()):
            if m < 0:
                continue
            S, value = states[m][b], v[b, t, j]
            if log_decay is not None:
                S = log_decay[b, t, j].exp().reshape(S.shape[0], -1, 1) * S
            if beta is not None:
                held = torch.einsum("hk,hkv->hv", k[b, t, j], S)
                value = beta[b, t, j, :, None] * (value - held)
            S = states[m][b] = S + torch.einsum("hk,hv->hkv", k[b, t, j], value)
            answer = answer + weights[b, t, j] * scale * torch.einsum("hk,hkv->hv", q[b, t], S)
        out.append(answer)
    state = torch.stack([torch.stack(row) for row in states])
    return (torch.stack(out).unflatten(0, (B, L)) if out else torch.zeros_like(v[:, :, 0])), state


def routed_recurrence(
    q: Float[Tensor, "B L H K"],
    k: Float[Tensor, "B L n H K"],
    v: Float[Tensor, "B L n H V"],
    experts: Experts,
    weights: Weights,
    state: Memories,
    *,
    log_decay: Decay | None = None,
    beta: Float[Tensor, "B L n H"] | None = None,
    scale: float | None = None,
) -> tuple[Float[Tensor, "B L H V"], Memories]:
    """``(out, state)``: each memory's tokens packed, one chunked recurrence over all of them.

    Args:
        k, v, log_decay, beta: of each choice, as in `linear_recurrence`.
        experts: memories that each token is sent to, all different; -1 is nowhere.
        state: before the first token; its first axis says how many memories there are.

    Raises ValueError or TypeError for shapes, dtypes or memories that do not fit.
    """
    _check(q, k, v, experts, weights, state)
    plan = plan_memories(experts, len(state))
    rows = {"k": k, "v": v, "log_decay": log_decay, "beta": beta}
    rows = {name: _choices(x, plan) for name, x in rows.items() if x is not None}
    queries = scatter_to_memories(q.flatten(2), plan).unflatten(1, q.shape[2:])
    out, after = linear_recurrence_varlen(
        queries, **rows, cu_seqlens=plan.cu_seqlens, state=state.flatten(0, 1), scale=scale,
        return_state=True,
    )  # fmt: skip
    mixed = gather_back(out.flatten(1), plan, weights).unflatten(2, v.shape[3:])
    return mixed, after.view(state.shape)


def _choices(x: Tensor, plan: Permutation) -> Tensor:
    """What is given for each choice ``(B, L, n, ...)`` as packed rows."""
    return take_rows(x.flatten(0, 2), plan.order, plan.place.view(-1, 1))


def _check(q, k, v, experts, weights, state) -> None:
    B, L, n = experts.shape
    H, K, V = *q.shape[2:], v.shape[-1]
    wanted = {
        "q": (q, (B, L, H, K)),
        "k": (k, (B, L, n, H, K)),
        "v": (v, (B, L, n, H, V)),
        "weights": (weights, (B, L, n)),
        "state": (state, (len(state), B, H, K, V)),
    }
    for name, (x, shape) in wanted.items():
        if tuple(x.shape) != shape:
            raise ValueError(f"{name}: expected shape {shape}, got {tuple(x.shape)}")
