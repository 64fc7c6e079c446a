"""Decoding on this machine: LeanAttention's CPU form against PyTorch's attention.

On a CPU the gain is not the schedule's (one thread cannot idle) but that of reading each key once
for all query heads of its group, and, with ragged requests, of reading no padding. The schedule's
own gain is a matter of processors: `modelled` rows, from tile counts, say what it is on GPUs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from ...foundations.lean_attention import (
    fa2_schedule,
    fixed_split_schedule,
    lean_decode,
    modelled_decode_time,
    stream_k_schedule,
)
from ..hardware import A100, H100
from ..race import race
from ..scaling import sweep
from . import Row, register, rows

H, G, D, TILE, RESIDENT = 8, 2, 64, 256, 2


def _cache(B: int, S: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = (B, H, 1, D), (B, G, S, D), (B, G, S, D)
    return [torch.randn(shape, generator=generator) for shape in shapes]


def _torch(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)


def _torch_packed(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """As an expert would call it: the query heads of a group as rows of one head."""
    packed = q.view(q.shape[0], G, H // G, D)
    return F.scaled_dot_product_attention(packed, k, v, attn_mask=mask).view(q.shape)


@register("lean-decode", "one query over a cache of n keys, eight query heads on two key heads")
def lean_decode_over_length(quick: bool) -> Iterator[Row]:
    lengths = (256, 512) if quick else (1024, 4096, 16384, 65536, 131072)

    def contestants(n: int) -> dict[str, Callable]:
        q, k, v = _cache(1, n)
        return {
            "corelib": lambda: lean_decode(q, k, v),
            "torch": lambda: _torch(q, k, v),
            "torch, packed by hand": lambda: _torch_packed(q, k, v),
        }

    shape = f"B1 H{H} G{G} D{D} float32"
    yield from rows(
        sweep(lengths, contestants), what="decode", shape=shape, traffic=lambda n: 2 * G * n * D * 4
    )


@register("lean-decode-ragged", "eight requests of unequal lengths; PyTorch pads and masks")
def lean_decode_ragged(quick: bool) -> Iterator[Row]:
    S = 512 if quick else 16384
    for name, shares in {
        "all equal": [1.0] * 8,
        "evenly spread": [(b + 1) / 8 for b in range(8)],
        "one long": [1.0] + [1 / 16] * 7,
    }.items():
        q, k, v = _cache(8, S)
        lengths = torch.tensor([int(S * share) for share in shares])
        mask = (torch.arange(S) < lengths[:, None])[:, None, None]
        result = race(
            {
                "corelib": lambda q=q, k=k, v=v, n=lengths: lean_decode(q, k, v, n),
                "torch": lambda q=q, k=k, v=v, m=mask: _torch(q, k, v, m),
                "torch, packed by hand": lambda q=q, k=k, v=v, m=mask: _torch_packed(q, k, v, m),
            }
        )
        shape = f"B8 H{H} G{G} D{D} S{S} float32, {name}"
        held = int(lengths.sum())
        yield from rows(result, what="ragged decode", shape=shape, traffic=2 * G * held * D * 4)


@register("lean-decode-modelled", "LeanAttention on GPUs, modelled from tile counts (not measured)")
def lean_decode_modelled(quick: bool) -> Iterator[Row]:
    lengths = (4096,) if quick else (1024, 8192, 65536, 524288)
    for device in (A100, H100):
        processors = device.sms * RESIDENT
        for n in lengths:
            work = dict(lengths=[n], heads=32, tile=TILE)
            schedules = {
                "corelib": stream_k_schedule(**work, programs=processors),
                "FlashDecoding, 8 splits": fixed_split_schedule(**work, splits=8),
                "FlashAttention-2": fa2_schedule(**work),
            }
            seconds = {
                name: modelled_decode_time(
                    schedule, device, tile=TILE, rows=1, D=D, resident=RESIDENT
                )
                for name, schedule in schedules.items()
            }
            for name, modelled in seconds.items():
                yield Row(
                    what="modelled",
                    shape=f"B1 H32 G32 D{D} n{n} float16 on {device.name}",
                    contestant=name,
                    seconds=modelled,
                    ratio=modelled / seconds["corelib"],
                    note="modelled from tile counts, not measured",
                )
