"""Decoding over 1,024 listed keys of a long cache, on this machine.

All contestants compute the same, so results are compared first. Attention over the whole cache
computes something else: it is raced unchecked, as what a list is meant to save.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from ...primitives import gather_decode
from ..race import race
from ..scaling import sweep
from . import Row, register, rows

H, G, D = 8, 2, 64


def _inputs(S: int, n: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = (1, H, 1, D), (1, G, S, D), (1, G, S, D)
    q, k, v = (torch.randn(shape, generator=generator) for shape in shapes)
    lists = [torch.randperm(S, generator=generator)[:n] for _ in range(G)]
    return [q, k, v, torch.stack(lists)[None]]


def _by_gather(q: Tensor, k: Tensor, v: Tensor, indices: Tensor) -> Tensor:
    """The obvious code: `torch.gather` the rows, then PyTorch's attention."""
    rows_of = indices[..., None].expand(-1, -1, -1, D)
    k, v = k.gather(2, rows_of), v.gather(2, rows_of)
    return F.scaled_dot_product_attention(q, k, v, enable_gqa=True)


def _by_indexing(q: Tensor, k: Tensor, v: Tensor, indices: Tensor) -> Tensor:
    heads = torch.arange(G)[:, None]
    k, v = k[0, heads, indices[0]][None], v[0, heads, indices[0]][None]
    return F.scaled_dot_product_attention(q, k, v, enable_gqa=True)


def _by_mask(q: Tensor, k: Tensor, v: Tensor, indices: Tensor) -> Tensor:
    """Nothing is gathered: all keys are read under a mask."""
    mask = torch.zeros(1, G, k.shape[2], dtype=torch.bool).scatter_(2, indices, True)
    mask = mask.repeat_interleave(H // G, 1)[:, :, None]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)


@register("gather-decode", "one query over 1,024 listed keys of a cache")
def gather_decode_race(quick: bool) -> Iterator[Row]:
    lengths, n = ((512, 1024), 128) if quick else ((4096, 8192, 16384, 32768, 65536), 1024)

    def contestants(S: int) -> dict[str, Callable]:
        inputs = _inputs(S, n)
        forms = {
            "corelib": gather_decode,
            "torch, gather": _by_gather,
            "torch, indexing": _by_indexing,
            "torch, mask": _by_mask,
        }
        return {name: lambda form=form: form(*inputs) for name, form in forms.items()}

    shape = f"B1 H{H} G{G} D{D} n{n} float32"
    traffic = 2 * G * n * D * 4
    with torch.no_grad():
        result = sweep(lengths, contestants)
        yield from rows(result, what="decode over a list", shape=shape, traffic=lambda _: traffic)
        q, k, v, indices = _inputs(lengths[-1], n)
        dense = {
            "corelib": lambda: gather_decode(q, k, v, indices),
            "torch, all keys": lambda: F.scaled_dot_product_attention(q, k, v, enable_gqa=True),
        }
        what = "decode over a list, against all keys"
        yield from rows(race(dense, check=None), what=what, shape=f"{shape} S{lengths[-1]}")
