"""Count the memory traffic of Triton kernels, on a machine without a GPU.

A GPU kernel's time is often its traffic, and an algorithm's point is often how little of it there
is. Triton's interpreter runs the very kernel; here its loads, stores, atomics and dots are counted.

>>> count = count_io("corelib.kernels.flash_attention:flash_attention", q, k, v, causal=True)
>>> count.bytes_loaded, count.bytes_stored, count.dot_flops

Counted is *logical* traffic: every element that an active lane of a program loads or stores, again
each time it is read again. What a cache would save is not subtracted, sector granularity is not
added; `IOCount.unique_bytes` bounds the traffic from below, as if everything stayed in cache.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any


@dataclass
class IOCount:
    """What a stretch of interpreted kernels did.

    Attributes:
        bytes_loaded, bytes_stored: by active lanes of all programs, repeats counted.
        bytes_atomic: touched by atomic operations (each one reads and writes).
        dot_flops: a multiplication and an addition of a ``tl.dot`` count as two.
        loads, stores, atomics, dots: instructions, one per program and execution.
        launches: kernels launched.
        unique_bytes_loaded, unique_bytes_stored: distinct bytes, repeats not counted; only with
            ``io_meter(unique=True)``, else None.
    """

    bytes_loaded: int = 0
    bytes_stored: int = 0
    bytes_atomic: int = 0
    dot_flops: int = 0
    loads: int = 0
    stores: int = 0
    atomics: int = 0
    dots: int = 0
    launches: int = 0
    unique_bytes_loaded: int | None = None
    unique_bytes_stored: int | None = None

    @property
    def bytes_moved(self) -> int:
        """Loaded, stored, and atomics twice."""
        return self.bytes_loaded + self.bytes_stored + 2 * self.bytes_atomic

    @property
    def unique_bytes(self) -> int | None:
        """Distinct bytes loaded plus distinct bytes stored: what perfect caches would move."""
        if self.unique_bytes_loaded is None or self.unique_bytes_stored is None:
            return None
        return self.unique_bytes_loaded + self.unique_bytes_stored

    @property
    def intensity(self) -> float:
        """Arithmetic intensity: dot operations a byte moved."""
        return self.dot_flops / self.bytes_moved if self.bytes_moved else 0.0


@contextmanager
def io_meter(*, unique: bool = False) -> Iterator[IOCount]:
    """Count what interpreted kernels do while it is open.

    Only a process that interprets Triton kernels can count; any other asks `count_io`.

    Args:
        unique: also count distinct bytes (slower; memory grows with what is touched).

    Raises:
        RuntimeError: this process does not interpret Triton kernels.
    """
    from corelib.kernels.gates.observe import observed

    meter = _meter(unique)
    with observed(meter):
        yield meter.count
    if unique:
        meter.count.unique_bytes_loaded = meter.loaded.total()
        meter.count.unique_bytes_stored = meter.stored.total()


def count_io(target: str, *args: Any, unique: bool = False, **kwargs: Any) -> IOCount:
    """Run ``target`` interpreted, in a worker process, and count what its kernels did.

    Args:
        target: ``"package.module:function"`` or ``"path/to/file.py:function"``.
        args, kwargs: of the function; tensors travel by value.
        unique: as in `io_meter`.

    Raises:
        ImportError: Triton is missing.
        corelib.kernels.gates.interpreter.KernelError: the function raised.
    """
    try:
        import triton  # noqa: F401  (found or not: the worker's own error would be less clear)
    except ImportError:
        raise ImportError("count_io needs Triton's interpreter: pip install triton") from None
    from corelib.kernels.gates.interpreter import shared_interpreter

    return shared_interpreter().call(f"{__name__}:_counted", target, args, kwargs, unique)


def _counted(target: str, args: tuple, kwargs: dict, unique: bool) -> IOCount:
    from corelib.kernels.gates.interpreter import resolve

    function = resolve(target)
    with io_meter(unique=unique) as count:
        function(*args, **kwargs)
    return count


@dataclass
class _Distinct:
    """A set of byte addresses, kept as sorted arrays that are merged now and then."""

    pieces: list = field(default_factory=list)

    def add(self, addresses: Any, itemsize: int) -> None:
        import numpy as np

        every = addresses[:, None] + np.arange(itemsize, dtype=np.uint64)
        self.pieces.append(np.unique(every))
        if len(self.pieces) > 256:
            self.pieces = [np.unique(np.concatenate(self.pieces))]

    def total(self) -> int:
        import numpy as np

        return int(np.unique(np.concatenate(self.pieces)).size) if self.pieces else 0


def _meter(unique: bool) -> Any:
    from corelib.kernels.gates.observe import Observer

    class Meter(Observer):
        def __init__(self):
            self.count, self.loaded, self.stored = IOCount(), _Distinct(), _Distinct()

        def launch(self, tensors):
            self.count.launches += 1

        def load(self, addresses, itemsize):
            self.count.loads += 1
            self.count.bytes_loaded += addresses.size * itemsize
            if unique:
                self.loaded.add(addresses, itemsize)

        def store(self, addresses, itemsize):
            self.count.stores += 1
            self.count.bytes_stored += addresses.size * itemsize
            if unique:
                self.stored.add(addresses, itemsize)

        def atomic(self, addresses, itemsize):
            self.count.atomics += 1
            self.count.bytes_atomic += addresses.size * itemsize

        def dot(self, flops):
            self.count.dots += 1
            self.count.dot_flops += flops

    return Meter()
