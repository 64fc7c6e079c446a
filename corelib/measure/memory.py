"""Counted memory: the most bytes that live tensors held while a function ran."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def peak_memory(fn: Callable[[], Any], *, device: str = "cpu") -> int:
    """The most bytes that tensors made while ``fn()`` ran held at one time.

    What existed before does not count, the result does until ``fn`` returns. On a CPU tensors are
    counted as PyTorch's operations make and drop them, those that autograd saves included; scratch
    space inside a single operation is not seen, and code under ``torch.compile`` runs uncompiled.
    With ``device="cuda"`` it is the allocator's peak.

    Raises:
        ValueError: an unknown device, or ``"cuda"`` on a machine without one.
    """
    if device == "cpu":
        with _LiveStorages() as live:
            fn()
        return live.peak
    if not device.startswith("cuda") or not torch.cuda.is_available():
        raise ValueError(f"device must be 'cpu' or an available 'cuda' device, got {device!r}")
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    fn()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


class _LiveStorages(TorchDispatchMode):
    """Adds up the storages that operations make, until nothing refers to them any more.

    Views share one storage, which counts once. A storage that an operation was *given* without
    anybody having made it under this mode existed before, and only its growth counts.
    """

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self.counted: dict[int, int] = {}  # address of a live storage -> bytes counted for it
        self.before: dict[int, int] = {}  # address -> bytes it had before we saw it
        self.alive: dict[int, weakref.ref] = {}

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Saves the import of torch's compiler (seconds): nothing here is compiled."""
        return False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self._see(tree_leaves((args, kwargs or {})), existed=True)
        out = func(*args, **(kwargs or {}))
        self._see(tree_leaves(out), existed=False)  # out= tensors, which may have grown, as well
        self.peak = max(self.peak, self.now)
        return out

    def _see(self, values: list, *, existed: bool) -> None:
        for value in values:
            if not isinstance(value, Tensor) or value.layout != torch.strided:
                continue
            storage = value.untyped_storage()
            key, size = storage._cdata, storage.nbytes()
            if key not in self.alive:
                self.alive[key] = weakref.ref(storage, lambda _, key=key: self._gone(key))
                self.before[key], self.counted[key] = size if existed else 0, 0
            self._count(key, max(0, size - self.before[key]))

    def _count(self, key: int, size: int) -> None:
        self.now += size - self.counted[key]
        self.counted[key] = size

    def _gone(self, key: int) -> None:
        self._count(key, 0)
        del self.alive[key], self.before[key], self.counted[key]
