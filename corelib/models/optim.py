"""Muon for the matrices inside the blocks, AdamW for everything else; AdamW for short trainings.

Muon (Jordan et al., 2024, "Muon: an optimizer for hidden layers in neural networks") replaces a
matrix's momentum ``M = U S V^T`` by about ``U V^T``, found by five Newton-Schulz steps, so that all
directions move equally far. Scaled by ``0.2 * sqrt(max(rows, columns))`` the step has AdamW's
usual size (Liu et al., arXiv 2502.16982, section 2.2), so that both can share one learning rate;
here it is three times as large, with which the small models learn much faster.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.optim.adamw import adamw


def orthogonalise(m: Float[Tensor, "R K"], steps: int = 5) -> Float[Tensor, "R K"]:
    """About the nearest matrix with equal singular values: they end between 0.7 and 1.2.

    The quintic ``a x + b x^3 + c x^5`` acts on the singular values; computed in bfloat16.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    x = m.bfloat16()
    tall = m.shape[0] > m.shape[1]
    x = x.T if tall else x
    x = x / (x.norm() + 1e-7)
    for _ in range(steps):
        gram = x @ x.T
        x = a * x + (b * gram + c * (gram @ gram)) @ x
    return (x.T if tall else x).to(m.dtype)


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalised, with decoupled weight decay; for matrices only."""

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        lr: float,
        momentum: float = 0.95,
        weight_decay: float = 0.1,
    ):
        defaults = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay}
        super().__init__(parameters, defaults)
        for group in self.param_groups:
            for p in group["params"]:
                if p.dim() != 2:
                    raise ValueError(f"parameters: expected matrices, got shape {tuple(p.shape)}")

    @torch.no_grad()
    def step(self, closure=None) -> None:
        for group in self.param_groups:
            for p in (p for p in group["params"] if p.grad is not None):
                average = self.state[p].setdefault("momentum", torch.zeros_like(p))
                average.lerp_(p.grad, 1 - group["momentum"])
                update = orthogonalise(torch.lerp(p.grad, average, group["momentum"]))  # Nesterov
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.add_(update, alpha=-group["lr"] * 0.6 * max(p.shape) ** 0.5)


def make_optimizers(model: nn.Module, lr: float) -> list[torch.optim.Optimizer]:
    """Muon for the blocks' matrices, AdamW for embeddings, norms and tables of decays."""
    matrices, rest = [], []
    for name, p in model.named_parameters():
        is_map = p.dim() == 2 and ".layers." in f".{name}" and not name.endswith("A_log")
        (matrices if is_map else rest).append(p)
    return [Muon(matrices, lr), torch.optim.AdamW(rest, lr, betas=(0.9, 0.95), weight_decay=0.0)]


class FusedAdamW:
    """AdamW for short trainings: one call differentiates, clips, steps and returns the loss.

    ``torch.optim``'s classes import the compiler when the first is made, which takes longer than
    many of this lab's trainings; this one calls the fused function beneath them.

    Args:
        parameters: what is trained, or groups ``{"params": …, "lr": …}`` as for ``torch.optim``.
        lr: the learning rate of a step with ``share = 1``; a group's own ``"lr"`` comes first.
        clip: the largest norm of all gradients together; None does not clip.

    Raises:
        ValueError: nothing to train.
    """

    def __init__(
        self,
        parameters: Iterable[Tensor] | Iterable[dict],
        lr: float,
        *,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        clip: float | None = None,
    ):
        given = list(parameters)
        if not given:
            raise ValueError("parameters: expected at least one tensor or group, got none")
        groups = given if isinstance(given[0], dict) else [{"params": given}]
        self.groups = [(list(group["params"]), group.get("lr", lr)) for group in groups]
        self.parameters = [p for group, _ in self.groups for p in group]
        self.clip = clip
        self._fixed = dict(beta1=betas[0], beta2=betas[1], eps=eps, weight_decay=weight_decay)
        self._averages = [
            ([torch.zeros_like(p) for p in group], [torch.zeros_like(p) for p in group])
            for group, _ in self.groups
        ]
        self._steps = [[torch.zeros(()) for _ in group] for group, _ in self.groups]

    def step(self, loss: Tensor, share: float = 1.0) -> float:
        """Descend ``loss`` (a scalar with a graph) at ``share`` of each rate; the loss's value."""
        gradients = torch.autograd.grad(loss, self.parameters, materialize_grads=True)
        self.apply(gradients, share)
        return loss.item()

    @torch.no_grad()
    def apply(self, gradients: Sequence[Tensor], share: float = 1.0) -> None:
        """One step along ``gradients``, in the order of ``self.parameters``."""
        if self.clip is not None:
            norm = torch.stack([g.norm() for g in gradients]).norm()
            scale = (self.clip / (norm + 1e-6)).clamp(max=1.0)
            gradients = [scale * g for g in gradients]
        # The kernel reads memory as it lies: strides and lazy signs would be lost on it.
        pairs = zip(gradients, self.parameters, strict=True)
        rest = iter([torch.empty_like(p).copy_(g) for g, p in pairs])
        for (group, lr), averages, steps in zip(
            self.groups, self._averages, self._steps, strict=True
        ):
            adamw(
                group, [next(rest) for _ in group], *averages, [], steps, lr=lr * share,
                amsgrad=False, maximize=False, fused=True, **self._fixed,
            )  # fmt: skip


def warm_cosine(step: int, steps: int, warm: float) -> float:
    """The share of the learning rate at ``step``: up for ``warm`` steps, then a cosine to zero."""
    return min((step + 1) / warm, 0.5 + 0.5 * math.cos(math.pi * step / steps))
