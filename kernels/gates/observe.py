"""See every memory access, dot and launch of the kernels that this process interprets.

The byte counter (`corelib.measure.io_meter`) and the memory check (`gates.memory`) are two
observers. Triton's interpreter sends every kind of load through one method of its builder (plain,
masked, block pointers, tensor descriptors) and every store through another, so three small wrappers
see all of it. Written against Triton 3.7.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from corelib.kernels.gates.interpreter import interpreting


class Observer:
    """Override what you want to see. ``addresses`` holds the active lanes' only, flattened."""

    def launch(self, tensors: list) -> None:
        """A kernel starts; ``tensors`` are all tensors among its arguments."""

    def load(self, addresses: Any, itemsize: int) -> None:
        """One load instruction of one program."""

    def store(self, addresses: Any, itemsize: int) -> None:
        """One store instruction of one program."""

    def atomic(self, addresses: Any, itemsize: int) -> None:
        """One atomic instruction of one program."""

    def dot(self, flops: int) -> None:
        """One ``tl.dot``; a multiplication and an addition count as two operations."""


@contextmanager
def observed(observer: Observer) -> Iterator[Observer]:
    """While open, ``observer`` is told what interpreted kernels do.

    Raises:
        RuntimeError: this process does not interpret Triton kernels.
    """
    if not interpreting():
        raise RuntimeError(
            "kernels can be observed only in a process that interprets them: call through "
            "corelib.measure.count_io, or set TRITON_INTERPRET=1 before the process starts"
        )
    from triton.runtime.interpreter import GridExecutor, InterpreterBuilder

    wrappers = _builder_wrappers(observer, InterpreterBuilder)
    originals = {name: getattr(InterpreterBuilder, name) for name in wrappers}
    call = GridExecutor.__call__

    def launch(self, *args, **kwargs):
        observer.launch(list(_tensors((args, kwargs))))
        return call(self, *args, **kwargs)

    try:
        GridExecutor.__call__ = launch
        for name, wrapper in wrappers.items():
            setattr(InterpreterBuilder, name, wrapper)
        yield observer
    finally:
        GridExecutor.__call__ = call
        for name, original in originals.items():
            setattr(InterpreterBuilder, name, original)


def _builder_wrappers(observer: Observer, builder: Any) -> dict[str, Any]:
    load, store = builder.create_masked_load, builder.create_masked_store
    rmw, cas, dot = builder.create_atomic_rmw, builder.create_atomic_cas, builder.create_dot

    def create_masked_load(self, ptrs, mask, *rest, **named):
        observer.load(_active(ptrs, mask), _itemsize(ptrs))
        return load(self, ptrs, mask, *rest, **named)

    def create_masked_store(self, ptrs, value, mask, *rest, **named):
        observer.store(_active(ptrs, mask), _itemsize(ptrs))
        return store(self, ptrs, value, mask, *rest, **named)

    def create_atomic_rmw(self, op, ptrs, value, mask, *rest):
        observer.atomic(_active(ptrs, mask), _itemsize(ptrs))
        return rmw(self, op, ptrs, value, mask, *rest)

    def create_atomic_cas(self, ptrs, *rest):
        observer.atomic(ptrs.data.reshape(-1), _itemsize(ptrs))
        return cas(self, ptrs, *rest)

    def create_dot(self, a, b, *rest):
        observer.dot(2 * a.data.size * b.data.shape[-1])
        return dot(self, a, b, *rest)

    return {
        wrapper.__name__: wrapper
        for wrapper in (
            create_masked_load,
            create_masked_store,
            create_atomic_rmw,
            create_atomic_cas,
            create_dot,
        )
    }


def _active(ptrs: Any, mask: Any) -> Any:
    import numpy as np

    mask = mask if isinstance(mask, np.ndarray) else mask.data  # block pointers pass bare arrays
    return ptrs.data[np.broadcast_to(mask, ptrs.data.shape).astype(bool)]


def _itemsize(ptrs: Any) -> int:
    return max(1, ptrs.get_element_ty().primitive_bitwidth // 8)


def _tensors(value: Any) -> Iterator[Any]:
    if hasattr(value, "untyped_storage"):
        yield value
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors(item)
    elif hasattr(value, "base"):  # a tensor descriptor or a reinterpreted tensor
        yield from _tensors(value.base)
