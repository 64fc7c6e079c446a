"""Out-of-bounds accesses and races between programs, found by address while interpreting.

The interpreter reads and writes wherever a pointer points, and runs programs one after another: a
forgotten mask may return plausible neighbours, and two programs that write one cell look fine.
`memory_check` looks at the addresses instead. While it is open, a kernel raises `KernelMemoryError`

* when an active lane touches memory outside the storages of the kernel's tensor arguments, or
* when a program writes or reads a cell that another program of the same launch has written
  (atomics are exempt; a program that writes what an earlier one has *read* is not found).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from corelib.kernels.gates.observe import Observer, observed


class KernelMemoryError(RuntimeError):
    """A kernel touched memory that is not its own, or raced with itself."""


@contextmanager
def memory_check() -> Iterator[None]:
    """While open, every access of an interpreted kernel is checked (see the module)."""
    with observed(_Checker()):
        yield


class _Checker(Observer):
    def launch(self, tensors: list) -> None:
        import numpy as np

        storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
        self.starts = np.array(sorted(storages), dtype=np.uint64)
        self.ends = self.starts + np.array([storages[s] for s in sorted(storages)], dtype=np.uint64)
        self.writers: dict[int, Any] = {}

    def load(self, addresses, itemsize):
        for storage, offsets in self._located("reads", addresses, itemsize):
            if storage in self.writers:
                self._refuse_race("reads", self.writers[storage][offsets])

    def store(self, addresses, itemsize):
        import numpy as np

        for storage, offsets in self._located("writes", addresses, itemsize):
            if storage not in self.writers:
                size = int(self.ends[storage] - self.starts[storage])
                self.writers[storage] = np.full(size, -1, dtype=np.int32)
            writers = self.writers[storage]
            self._refuse_race("writes", writers[offsets])
            writers[offsets] = _program()[0]

    def atomic(self, addresses, itemsize):
        for _ in self._located("updates", addresses, itemsize):
            pass

    def _located(self, verb: str, addresses: Any, itemsize: int) -> Iterator[tuple[int, Any]]:
        """``(storage number, byte offsets)`` of the accesses, storage by storage."""
        if addresses.size == 0:
            return
        import numpy as np

        low, high = addresses.min(), addresses.max()
        first = int(np.searchsorted(self.starts, low, side="right")) - 1
        last = int(np.searchsorted(self.starts, high, side="right")) - 1
        if first == last >= 0 and high + np.uint64(itemsize) <= self.ends[first]:  # the usual case
            yield first, addresses - self.starts[first]
            return
        index = np.searchsorted(self.starts, addresses, side="right").astype(np.int64) - 1
        outside = (index < 0) | (addresses + np.uint64(itemsize) > self.ends[index])
        if outside.any():
            raise KernelMemoryError(
                f"program {_program()[1]} {verb} {int(outside.sum())} of {addresses.size} elements "
                "outside every tensor that the kernel was given"
            )
        for storage in np.unique(index):
            yield int(storage), addresses[index == storage] - self.starts[storage]

    def _refuse_race(self, verb: str, writers: Any) -> None:
        number, place = _program()
        if ((writers != -1) & (writers != number)).any():
            raise KernelMemoryError(
                f"race: program {place} {verb} a cell that another program of this launch wrote"
            )


def _program() -> tuple[int, tuple[int, int, int]]:
    """This program's number and its place in the grid."""
    from triton.runtime.interpreter import interpreter_builder

    x, y, z = interpreter_builder.grid_idx
    _, rows, columns = interpreter_builder.grid_dim
    return (x * rows + y) * columns + z, (x, y, z)
