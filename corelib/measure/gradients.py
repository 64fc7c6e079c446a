"""A contestant that runs forward and backward, so that races compare and time gradients too."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves


def forward_backward(fn: Callable[..., Any], *tensors: Tensor) -> Callable[[], tuple]:
    """A function without arguments that returns ``(output, gradients)``.

    ``fn`` is called with leaf copies of ``tensors`` that require gradients; each call goes
    backward from the first tensor of its output, with the same random gradient for every
    contestant of that shape, and returns the gradients of all ``tensors`` (zeros where unused).

    Raises:
        TypeError: a tensor that cannot have a gradient, named by its position.
    """
    for i, tensor in enumerate(tensors):
        if not (tensor.is_floating_point() or tensor.is_complex()):
            raise TypeError(f"tensor {i} must be floating point, got {tensor.dtype}")
    leaves = [tensor.detach().clone().requires_grad_() for tensor in tensors]
    seeds: list[Tensor] = []

    def run() -> tuple:
        output = fn(*leaves)
        first = next(leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor))
        if not seeds:
            generator = torch.Generator().manual_seed(0)
            seed = torch.randn(first.shape, generator=generator, dtype=torch.float64)
            seeds.append(seed.to(first.device, first.dtype))
        grads = torch.autograd.grad(first, leaves, seeds[0], materialize_grads=True)
        return first.detach(), grads

    return run
