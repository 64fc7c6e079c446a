"""Operations, counted: a cost that does not depend on the machine or on who else is using it.

`count_work` watches PyTorch's own operators. Matrix products, convolutions and attention count
their multiplications and additions, a Fourier transform of ``n`` numbers ``5 n log2 n``, everything
else one operation for each number that it returns; views are free. All pairs of an attention count,
also those that a mask hides. Right in how it grows, rough in its constants: meant for exponents.
(``torch.utils.flop_counter`` leaves out transforms, scans and attention on a CPU.)
"""

from __future__ import annotations

import math
from collections.abc import Callable

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

#: Products by name: the argument whose last axis is summed over.
PRODUCTS = {"mm": 0, "bmm": 0, "mv": 0, "dot": 0, "addmm": 1, "baddbmm": 1, "addmv": 1}


class _Counter(TorchDispatchMode):
    total = 0

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # saves the import of torch's compiler

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        name = func._overloadpacket.__name__
        if not func.is_view and name != "_unsafe_view":
            self.total += _operations(name, args, out)
        return out


def _operations(name: str, args: tuple, out) -> int:
    tensors = [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
    made = sum(leaf.numel() for leaf in tensors)
    if name in PRODUCTS:
        return 2 * made * args[PRODUCTS[name]].shape[-1]
    if name == "convolution":
        return 2 * made * args[1].shape[1:].numel()
    if "scaled_dot_product" in name:
        q, k, v = args[:3]
        return 2 * q.shape[:-1].numel() * k.shape[-2] * (q.shape[-1] + v.shape[-1])
    if name.startswith("_fft"):
        around = max(max(leaf.shape) for leaf in (*tensors, args[0]))
        return round(5 * max(made, args[0].numel()) * math.log2(max(2, around)))
    return made


def count_work(run: Callable[[], object]) -> int:
    """Operations of one call of ``run``."""
    with _Counter() as counter:
        run()
    return counter.total
