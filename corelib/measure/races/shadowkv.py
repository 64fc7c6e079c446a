"""ShadowKV on this machine, and what its bytes would cost on a GPU.

The times are CPU times, where both tiers are the same memory: they show how the work of a step
grows, not what the link costs. Contestants approximate differently, so nothing is compared; all
hold a budget of 512 tokens but for the two that read everything. The ``modelled`` rows divide
counted bytes by published bandwidths, for the shapes of Llama-3.1-8B; nothing there is measured.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from ...primitives import attention, gather_decode, rope_frequencies, rope_half_split
from ...serving.shadowkv import ShadowKVCache, held_bytes, step_bytes
from ...serving.shared import bound_scores, page_bounds, page_positions, top_pages
from ..hardware import A100
from ..scaling import sweep
from . import Row, register, rows

H, G, D, PAGE = 8, 2, 64, 8
SETTINGS = dict(rank=32, budget=512, chunk=PAGE, outliers=16, local=4)
LINK = 25e9  # bytes a second: what PCIe 4.0 with 16 lanes reaches of its 31.5 GB/s
LLAMA = dict(G=8, D=128)


def prompt_and_walk(S: int) -> list[Tensor]:
    """Keys of rank 32 before RoPE, and a walk of queries, each close to the one before."""
    generator = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    keys = (randn(S, 32) @ randn(32, G * D)).view(1, S, G, D).transpose(1, 2) / 32**0.5
    k = rope_half_split(keys, torch.arange(S), rope_frequencies(D))
    walk = (randn(1, H, 1, D) + 0.2 * randn(32, 1, H, 1, D).cumsum(0)).unbind(0)
    return [k, randn(1, G, S, D), walk]


def shadow_step(k: Tensor, v: Tensor) -> Callable[[Tensor], Tensor]:
    """A cache that holds all tokens but the last packed; give it queries."""
    cache = ShadowKVCache(rope_frequencies(D), **SETTINGS)
    cache.append(0, k[:, :, :-1], v[:, :, :-1])
    cache.attend(0, k.new_zeros(1, H, 1, D))  # the last query of the prompt is enough to pack it
    cache.append(0, k[:, :, -1:], v[:, :, -1:])
    return lambda q: cache.attend(0, q)


def quest_step(k: Tensor, v: Tensor) -> Callable[[Tensor], Tensor]:
    """All on the device; the pages with the largest bounds, and the newest one."""
    bounds, count = page_bounds(k, PAGE), SETTINGS["budget"] // PAGE

    def step(q: Tensor) -> Tensor:
        pages = top_pages(bound_scores(q, *bounds), count, last=1)
        return gather_decode(q, k, v, page_positions(pages, PAGE, k.shape[2]))

    return step


def _offload(k: Tensor, v: Tensor) -> Callable[[Tensor], Tensor]:
    """All on the host, and copied for every step."""
    return lambda q: attention(q, k.clone(), v.clone(), causal=True)


@register("shadowkv-step", "a decode step of ShadowKV, Quest, plain offloading and full attention")
def shadowkv_step(quick: bool) -> Iterator[Row]:
    lengths = (1024, 2048) if quick else (2048, 4096, 8192, 16384, 32768)

    def contestants(S: int) -> dict[str, Callable]:
        k, v, walk = prompt_and_walk(S)
        steps = {
            "corelib": shadow_step(k, v),
            "full attention": lambda q: attention(q, k, v, causal=True),
            "Quest (all on the device)": quest_step(k, v),
            "plain offloading": _offload(k, v),
        }
        queries = {name: itertools.cycle(walk) for name in steps}
        return {
            name: lambda step=step, name=name: step(next(queries[name]))
            for name, step in steps.items()
        }

    with torch.no_grad():
        result = sweep(lengths, contestants, check=None)
        shape = f"B1 H{H} G{G} D{D} budget {SETTINGS['budget']} float32"
        yield from rows(result, what="decode step, CPU", shape=shape)


@register("shadowkv-modelled", "bytes of a step over bandwidths: A100 and PCIe 4.0, not measured")
def shadowkv_modelled(quick: bool) -> Iterator[Row]:
    lengths = (16384,) if quick else (16384, 65536, 131072, 524288)
    for n in lengths:
        for name, seconds in modelled_step(n).items():
            yield Row(
                what="one layer's step, modelled",
                shape=f"B1 G8 D128 n{n} bfloat16 on {A100.name}",
                contestant=name,
                seconds=seconds,
                ratio=seconds / modelled_step(n)["corelib"],
                note="modelled from byte counts, not measured",
            )


def modelled_step(n: int, hit_rate: float = 0.6) -> dict[str, float]:
    """Seconds that one layer's cache traffic takes at least, one request of ``n`` tokens.

    Reading on the device and fetching overlap, so the slower one counts. ``hit_rate``: the share
    of selected chunks still there from the last step (the paper reports about 60 %).
    """
    whole = 2 * LLAMA["G"] * LLAMA["D"] * n * 2
    device, link = step_bytes(n, **LLAMA, hit_rate=hit_rate)
    return {
        "corelib": max(device / A100.bandwidth, link / LINK),
        "corelib, nothing held": step_bytes(n, **LLAMA)[1] / LINK,
        "full attention on the device": whole / A100.bandwidth,
        "plain offloading": whole / LINK,
    }


def modelled_requests(n: int, memory: float = 60e9, layers: int = 32) -> dict[str, int]:
    """How many requests of ``n`` tokens fit into ``memory`` bytes beside the weights."""
    device, _ = held_bytes(n, **LLAMA)
    whole = 2 * LLAMA["G"] * LLAMA["D"] * n * 2
    return {
        "corelib": int(memory // (layers * device)),
        "full attention": int(memory // (layers * whole)),
    }
