"""The bills of a long context on this machine, and what the formulas predict for them.

The model has the shape of ``text_lm`` (its costs do not depend on its weights) and runs in float32
beside transformers' LLaMA with the same weights. *Modelled* rows come from
`corelib.foundations.longctx_peak` with the rates that `this_machine` reached in its self-test, or
with a data sheet's: nothing of these was measured.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from ...foundations.longctx_peak import (
    decode_seconds,
    four_metrics,
    kv_bytes,
    prefill_flops,
    switch_seconds,
)
from ...foundations.model_shapes import MODELS, ModelSpec, Server
from ...hf import to_transformers
from ...models.cache import DenseCache
from ...models.decoder import Decoder, DecoderConfig
from ..hardware import A100, H100, this_machine
from ..race import Missing
from ..scaling import sweep
from . import Row, peer, register, rows

CONFIG = DecoderConfig()
SPEC = ModelSpec.of(CONFIG, "text_lm", tied=True, itemsize=4, kv_itemsize=4)
SHAPE = f"{CONFIG.layers} layers C{CONFIG.width} H{CONFIG.heads} G{CONFIG.kv_heads} float32"


def _ours() -> Decoder:
    return Decoder(CONFIG).eval().requires_grad_(False)


def _twin(ours: Decoder) -> Any:
    """The same model in transformers."""
    transformers = peer("transformers")
    if isinstance(transformers, Missing):
        return transformers
    return to_transformers(ours).requires_grad_(False)


def _last_logits(model: Decoder, ids: Tensor, cache: DenseCache) -> Tensor:
    return model.hidden(ids, cache)[:, -1] @ model.embed_tokens.weight.T


def _server() -> Server:
    return Server.of(this_machine(), dtype="float32")


def _predicted(what: str, n: int, seconds: float) -> Row:
    return Row(
        what=what,
        shape=f"{SHAPE} L{n}",
        contestant="predicted",
        seconds=seconds,
        note="modelled from this machine's self-test, not measured",
    )


@register("longctx-prefill", "reading a prompt of n tokens: weights' products, then attention's")
def longctx_prefill(quick: bool) -> Iterator[Row]:
    lengths = (64, 128) if quick else (256, 512, 1024, 2048, 4096, 8192)
    ours = _ours()
    twin = _twin(ours)

    def contestants(n: int) -> dict[str, Callable | Missing]:
        ids = torch.arange(n)[None] * 37 % CONFIG.vocab
        theirs = twin
        if not isinstance(twin, Missing):
            theirs = lambda: twin(ids, use_cache=True, logits_to_keep=1).logits[:, -1]  # noqa: E731
        return {"corelib": lambda: _last_logits(ours, ids, DenseCache()), "transformers": theirs}

    with torch.no_grad():
        result = sweep(lengths, contestants, repeats=3)
    flops = lambda n: prefill_flops(SPEC, n)  # noqa: E731
    yield from rows(result, what="prefill", shape=SHAPE, flops=flops)
    for n in lengths:
        yield _predicted("prefill", n, prefill_flops(SPEC, n) / _server().flops)


@register("longctx-decode", "one more token behind n in the cache")
def longctx_decode(quick: bool) -> Iterator[Row]:
    lengths = (64, 128) if quick else (1024, 2048, 4096, 8192, 16384, 32768)
    ours = _ours()
    twin = _twin(ours)
    ids = torch.tensor([[7]])

    def contestants(n: int) -> dict[str, Callable | Missing]:
        held = _random_cache(n)

        def corelib() -> Tensor:
            held.crop(n)  # the token of the last call
            return _last_logits(ours, ids, held)

        if isinstance(twin, Missing):
            return {"corelib": corelib, "transformers": twin}
        cache = peer("transformers").DynamicCache()
        for layer, (k, v) in held.layers.items():
            cache.update(k, v, layer)

        def transformers() -> Tensor:
            cache.crop(n)
            return twin(ids, past_key_values=cache, use_cache=True).logits[:, -1]

        return {"corelib": corelib, "transformers": transformers}

    with torch.no_grad():
        result = sweep(lengths, contestants)
    least = lambda n: 4 * SPEC.parameters + kv_bytes(SPEC, n)  # noqa: E731
    yield from rows(result, what="decode", shape=SHAPE, traffic=least)
    for n in lengths:
        yield _predicted("decode", n, decode_seconds(SPEC, _server(), n, 1))


@register("longctx-switch", "a cache of n tokens to a second place in memory, and one back")
def longctx_switch(quick: bool) -> Iterator[Row]:
    lengths = (64, 128) if quick else (1024, 2048, 4096, 8192, 16384, 32768)

    def contestants(n: int) -> dict[str, Callable]:
        here, there = (
            [t for layer in _random_cache(n).layers.values() for t in layer] for _ in "ab"
        )

        def copy() -> None:
            for a, b in zip(here, there, strict=True):
                b.copy_(a)
                a.copy_(b)

        return {"copy": copy}

    result = sweep(lengths, contestants, check=None)
    traffic = lambda n: 4 * kv_bytes(SPEC, n)  # noqa: E731  (each way: read and written)
    yield from rows(result, what="switch", shape=SHAPE, corelib="copy", traffic=traffic)
    for n in lengths:
        link = this_machine().bandwidth / 2  # a copy reads and writes
        server = Server.of(this_machine(), dtype="float32", host_link=link)
        yield _predicted("switch", n, switch_seconds(SPEC, server, n))


def _random_cache(n: int) -> DenseCache:
    generator = torch.Generator().manual_seed(0)
    cache, shape = DenseCache(), (1, CONFIG.kv_heads, n, CONFIG.head_width)
    for layer in range(CONFIG.layers):
        k, v = (torch.randn(shape, generator=generator) for _ in "kv")
        cache.append(layer, k, v)
    return cache


@register("longctx-modelled", "the four bills of Yi-34B on GPUs, modelled (not measured)")
def longctx_modelled(quick: bool) -> Iterator[Row]:
    model = MODELS["yi-34b-200k"]
    lengths = (4096, 50_000) if quick else (4096, 16_384, 50_000, 200_000, 1_000_000)
    for server in (Server.of(A100), Server.of(A100, 4), Server.of(H100, 4, host_link=40e9)):
        for n in lengths:
            bills = four_metrics(model, server, n)
            for bill in ("prefill", "decode", "switch"):
                yield Row(
                    what=bill,
                    shape=f"{model.name} bfloat16 L{n}",
                    contestant=server.name,
                    seconds=getattr(bills, bill),
                    note=f"modelled from data sheets; {bills.concurrency} users fit",
                )
