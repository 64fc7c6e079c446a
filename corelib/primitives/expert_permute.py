"""Routing to experts: choose some for each token, sort the tokens by expert, multiply, sort back.

    weights, experts = the k largest of softmax(logits), the weights divided by their sum
    rows[i] = x[order[i] // k]                      one packed row, expert after expert
    out[n] = sum_j weights[n, j] * rows[place[n, j]]

Mixtures of experts send tokens to feed-forward networks (Shazeer et al., arXiv 1701.06538; Switch,
arXiv 2101.03961), a mixture of memories sends them to recurrent states (MoM, arXiv 2502.13685).
Sorting keeps the order of time within an expert. A choice of -1 goes nowhere: padding, or a token
that found its expert full.

Cost: one sort of ``N k`` numbers, and each row read and written once in either direction. On a GPU
`permute`, `unpermute` and `grouped_matmul` are the kernels in `corelib.kernels.expert_permute`; on
a CPU picking rows and one product for each expert. All are differentiable.
Oracle: loops over tokens.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ._checks import check_same_kind
from .take_rows import take_rows
from .varlen import _lengths, cumulative_lengths

_IN_KERNEL = (torch.float16, torch.bfloat16, torch.float32)


class Routing(NamedTuple):
    """Where each token goes."""

    experts: Int[Tensor, "... k"]
    weights: Float[Tensor, "... k"]  # of the chosen, sum 1
    probabilities: Float[Tensor, "... E"]  # of all


class Permutation(NamedTuple):
    """Rows sorted by expert, and the way back."""

    order: Int[Tensor, " rows"]  # the choice (token * k + j) that each row is of
    place: Int[Tensor, "N k"]  # the row of each choice, -1 where it goes nowhere
    cu_seqlens: Int[Tensor, " ends"]  # expert e: rows cu_seqlens[e] to cu_seqlens[e + 1]


def route_topk(logits: Float[Tensor, "... E"], k: int) -> Routing:
    """The ``k`` most probable experts, best first, their probabilities scaled to sum 1.

    With ``k = 1`` the weight is always 1 and the router learns from the balance loss only.
    """
    if isinstance(k, bool) or not isinstance(k, int) or not 1 <= k <= logits.shape[-1]:
        raise ValueError(f"k: expected 1 to {logits.shape[-1]} experts, got {k!r}")
    wide = torch.promote_types(logits.dtype, torch.float32)
    probabilities = torch.softmax(logits.to(wide), -1)
    weights, experts = probabilities.topk(k, -1)
    weights = weights / weights.sum(-1, keepdim=True)
    return Routing(experts, weights.to(logits.dtype), probabilities)


def load_balance_loss(
    probabilities: Float[Tensor, "... E"], experts: Int[Tensor, "... k"]
) -> Float[Tensor, ""]:
    """Switch's loss: ``E * sum_e (share of the choices) * (mean probability)``, at balance 1.

    Choices of -1 and their tokens do not count. (Where others count tokens in the place of
    choices, transformers among them, the value is ``k`` times this.)
    """
    E = probabilities.shape[-1]
    experts, probabilities = experts.flatten(0, -2), probabilities.flatten(0, -2)
    real = (experts >= 0).any(-1)
    share = torch.bincount(experts[experts >= 0], minlength=E).to(probabilities.dtype)
    share = share / share.sum().clamp_min(1)
    mean = (probabilities * real[:, None]).sum(0) / real.sum().clamp_min(1)
    return E * (share * mean).sum()


def sort_by_expert(experts: Int[Tensor, "N k"], n_experts: int) -> Permutation:
    """The permutation that puts expert 0's rows first, each expert's in the order of tokens."""
    if experts.dim() != 2 or experts.dtype not in (torch.int32, torch.int64):
        got = f"{experts.dtype} of shape {tuple(experts.shape)}"
        raise ValueError(f"experts: expected integers (N, k), got {got}")
    if experts.numel() and (experts.max() >= n_experts or experts.min() < -1):
        raise ValueError(f"experts: expected -1 to {n_experts - 1}, got {experts.unique()}")
    flat = experts.flatten().long()
    nowhere = flat < 0
    lengths = torch.bincount(flat.masked_fill(nowhere, n_experts), minlength=n_experts + 1)
    cu_seqlens = cumulative_lengths(lengths[:n_experts])
    order = flat.masked_fill(nowhere, n_experts).argsort(stable=True)[: int(cu_seqlens[-1])]
    place = torch.full_like(flat, -1)
    place[order] = torch.arange(len(order), device=flat.device)
    return Permutation(order, place.view_as(experts), cu_seqlens)


def permute(x: Float[Tensor, "N C"], plan: Permutation) -> Float[Tensor, "rows C"]:
    """Each token's row once for each of its experts, sorted by expert."""
    _check_rows("x", x, len(plan.place))
    if x.is_cuda and x.dtype in _IN_KERNEL:
        from corelib.kernels.expert_permute import permute as kernel

        return kernel(x, plan.order, plan.place)
    return take_rows(x, plan.order // max(1, plan.place.shape[1]), plan.place)


def unpermute(
    rows: Float[Tensor, "rows C"],
    plan: Permutation,
    weights: Float[Tensor, "N k"] | None = None,
) -> Float[Tensor, "N C"]:
    """The sum of each token's rows, weighted; zeros for a token that went nowhere."""
    _check_rows("rows", rows, len(plan.order))
    if weights is not None and weights.shape != plan.place.shape:
        wanted, got = tuple(plan.place.shape), tuple(weights.shape)
        raise ValueError(f"weights: expected shape {wanted}, got {got}")
    if rows.is_cuda and rows.dtype in _IN_KERNEL:
        from corelib.kernels.expert_permute import unpermute as kernel

        return kernel(rows, plan.order, plan.place, weights)
    back = take_rows(rows, plan.place.flatten(), plan.order[:, None])
    back = back.unflatten(0, plan.place.shape)
    if weights is None:
        return back.sum(1)
    return torch.einsum("nkc,nk->nc", back, weights.to(back.dtype))


def grouped_matmul(
    rows: Float[Tensor, "rows I"],
    weights: Float[Tensor, "E I O"],
    cu_seqlens: Int[Tensor, " ends"],
) -> Float[Tensor, "rows O"]:
    """Each expert's rows times its own matrix."""
    check_same_kind(rows=rows, weights=weights)
    _check_rows("rows", rows, len(rows))
    if weights.dim() != 3 or weights.shape[:2] != (len(cu_seqlens) - 1, rows.shape[1]):
        wanted, got = f"({len(cu_seqlens) - 1}, {rows.shape[1]}, O)", tuple(weights.shape)
        raise ValueError(f"weights: expected shape {wanted}, got {got}")
    if rows.is_cuda and rows.dtype in _IN_KERNEL:
        from corelib.kernels.expert_permute import grouped_matmul as kernel

        return kernel(rows, weights, cu_seqlens)
    lengths = _lengths(cu_seqlens, "cu_seqlens", total=len(rows)).tolist()
    return torch.cat([part @ w for part, w in zip(rows.split(lengths), weights, strict=True)])


def _check_rows(name: str, x: Tensor, count: int) -> None:
    if x.dim() != 2 or len(x) != count:
        raise ValueError(f"{name}: expected shape ({count}, C), got {tuple(x.shape)}")
