"""What small and fast Mambas are made of, on this machine: integers, rotations, sums as products.

A CPU is neither of the devices that the papers write for. The rows say what their rewrites cost
here: integer products (Quamba) against float32 ones of the same numbers, and running sums as
products (XAMBA) against ``torch.cumsum``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from ...primitives.hadamard import fwht, hadamard
from ...primitives.quantise import int8_matmul
from ...state_space.xamba import cumba
from ..scaling import sweep
from . import Row, register, rows

OPTIONS = dict(repeats=3, min_time=0.05)


@register("int8-matmul", "int8 products with exact int32 sums")
def int8_products(quick: bool) -> Iterator[Row]:
    widths = (32, 64) if quick else (128, 256, 512, 1024, 2048)

    def contestants(K: int) -> dict[str, Callable]:
        generator = torch.Generator().manual_seed(K)
        a, b = (
            torch.randint(-128, 128, (n, K), generator=generator, dtype=torch.int8)
            for n in (64, 512)
        )
        wide, other = a.float(), b.float()
        return {
            "corelib": lambda: int8_matmul(a, b).float(),
            "torch._int_mm": lambda: torch._int_mm(a, b.T).float(),
            "int32 matmul": lambda: (a.int() @ b.int().T).float(),
            "float32, already wide": lambda: wide @ other.T,
        }

    result = sweep(widths, contestants, tolerance=16.0, **OPTIONS)  # float32 rounds above 2^24
    yield from rows(result, what="forward", shape="M64 N512 int8")


@register("hadamard", "a Hadamard rotation, fast and as a dense product")
def rotations(quick: bool) -> Iterator[Row]:
    widths = (16, 64) if quick else (64, 128, 256, 512, 1024)

    def contestants(n: int) -> dict[str, Callable]:
        x, H = torch.randn(256, n), hadamard(n, dtype=torch.float32)
        return {"corelib": lambda: fwht(x), "dense product": lambda: x @ H.T}

    result = sweep(widths, contestants, tolerance=1e-2, **OPTIONS)
    yield from rows(result, what="forward", shape="256 rows float32")


@register("cumsum-as-product", "a running sum as a product with a triangle of ones")
def running_sums(quick: bool) -> Iterator[Row]:
    lengths = (32, 64) if quick else (64, 256, 1024, 2048, 4096)

    def contestants(m: int) -> dict[str, Callable]:
        x = torch.randn(64, m, generator=torch.Generator().manual_seed(0))
        return {
            "corelib": lambda: cumba(x, block=64),
            "one triangle": lambda: cumba(x),
            "torch.cumsum": lambda: x.cumsum(-1),
        }

    result = sweep(lengths, contestants, tolerance=1e-2, **OPTIONS)
    yield from rows(result, what="forward", shape="64 rows float32")
