"""Operations, counted: a cost that does not depend on the machine or on who else is using it.

`count_work` watches PyTorch's own operators. Matrix products, convolutions and attention count
their multiplications and additions (by ``torch.utils.flop_counter``), a Fourier transform of ``n``
numbers ``5 n log2 n``, everything else one operation for each number that it returns; views are
free. All pairs of an attention count, also those that a mask hides. Right in how it grows, rough in
its constants: meant for exponents.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class _Counter(TorchDispatchMode):
    total = 0

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # saves the import of torch's compiler

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        from torch.utils.flop_counter import flop_registry

        out = func(*args, **(kwargs or {}))
        packet = func._overloadpacket
        if packet in flop_registry:
            self.total += flop_registry[packet](*args, **(kwargs or {}), out_val=out)
        elif not func.is_view:
            self.total += _numbers(packet.__name__, args, out)
        return out


def _numbers(name: str, args: tuple, out) -> int:
    if "scaled_dot_product" in name:  # those that the flop counter does not know
        q, k, v = args[:3]
        return 2 * q.shape[:-1].numel() * k.shape[-2] * (q.shape[-1] + v.shape[-1])
    tensors = [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
    made = sum(leaf.numel() for leaf in tensors)
    if not name.startswith("_fft"):
        return made
    made = max(made, args[0].numel())
    around = max(max(leaf.shape) for leaf in (*tensors, args[0]))
    return round(5 * made * math.log2(max(2, around)))


def count_work(run: Callable[[], object]) -> int:
    """Operations of one call of ``run``."""
    with _Counter() as counter:
        run()
    return counter.total
