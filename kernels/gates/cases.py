"""What gate 1 runs inside the worker: a kernel function with its gradients, on poisoned memory.

>>> out, grads = interpreter.call(
...     "corelib.kernels.gates.cases:forward_backward",
...     "corelib.kernels.flash_attention:flash_attention", (q, k, v), {"causal": True}, (d_out,),
... )
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

from corelib.kernels.gates.interpreter import interpreting, resolve

_ALLOCATORS = [
    (torch, "empty"),
    (torch, "empty_like"),
    (torch, "empty_strided"),
    (torch.Tensor, "new_empty"),
]


def forward_backward(
    target: str,
    args: Sequence[Any],
    kwargs: Mapping[str, Any] | None = None,
    grad_outs: Sequence[Tensor | None] | None = None,
    *,
    poison: bool = True,
) -> tuple[tuple[Tensor, ...], tuple[Tensor | None, ...]]:
    """Run an autograd-capable function and its backward.

    Args:
        target: ``"package.module:function"``; it returns a tensor or a tuple of tensors.
        args, kwargs: its arguments; every floating tensor among them gets a gradient.
        grad_outs: a gradient for each output, ``None`` for one that is not used. Without
            ``grad_outs``, nothing is differentiated.
        poison: fill the buffers that are allocated meanwhile with NaN (see `poisoned`).

    Returns:
        ``(outputs, grads)``: the outputs as a tuple, and one gradient for each floating tensor, in
        the order of ``args``, then of ``kwargs`` (``None`` where it has no influence; empty
        without ``grad_outs``).

    Interpreted, every access is also checked by `gates.memory.memory_check`.
    """
    leaves: list[Tensor] = []

    def prepared(value: Any) -> Any:
        if isinstance(value, Tensor) and value.is_floating_point() and grad_outs is not None:
            value = value.detach().requires_grad_()
            leaves.append(value)
        return value

    call_args = [prepared(value) for value in args]
    call_kwargs = {name: prepared(value) for name, value in (kwargs or {}).items()}
    with poisoned() if poison else nullcontext(), _checked():
        outputs = resolve(target)(*call_args, **call_kwargs)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        grads = () if grad_outs is None else _gradients(outputs, leaves, grad_outs)
    return outputs, grads


def _gradients(
    outputs: tuple[Tensor, ...], leaves: list[Tensor], grad_outs: Sequence[Tensor | None]
) -> tuple[Tensor | None, ...]:
    if len(grad_outs) != len(outputs):
        raise ValueError(f"grad_outs: expected {len(outputs)} entries, got {len(grad_outs)}")
    used = [(out, grad) for out, grad in zip(outputs, grad_outs, strict=True) if grad is not None]
    return torch.autograd.grad(
        [out for out, _ in used], leaves, [grad for _, grad in used], allow_unused=True
    )


def _checked():
    if not interpreting():
        return nullcontext()
    from corelib.kernels.gates.memory import memory_check

    return memory_check()


@contextmanager
def poisoned() -> Iterator[None]:
    """While open, uninitialised buffers hold NaN (integers: their smallest value).

    What a kernel forgets to write is then seen, instead of being a zero by good luck.
    """
    originals = [(owner, name, getattr(owner, name)) for owner, name in _ALLOCATORS]

    def filling(allocate):
        def allocate_filled(*args, **kwargs):
            tensor = allocate(*args, **kwargs)
            if tensor.is_floating_point() or tensor.is_complex():
                return tensor.fill_(float("nan"))
            return tensor.fill_(True if tensor.dtype == torch.bool else _smallest(tensor.dtype))

        return allocate_filled

    try:
        for owner, name, allocate in originals:
            setattr(owner, name, filling(allocate))
        yield
    finally:
        for owner, name, allocate in originals:
            setattr(owner, name, allocate)


def _smallest(dtype: torch.dtype) -> int:
    info = torch.iinfo(dtype)
    return info.min if info.min < 0 else info.max
