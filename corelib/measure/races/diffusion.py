"""Masked-diffusion decoding on this machine: what a call with drafts costs, and what it saves.

`text_dlm` continues a held-out play and held-out code. FreeDave must make the static decoder's
tokens; threshold decoding and the autoregressive `text_lm` (with its cache, the fastest a user
could pick for one text) make others and are raced unchecked. A call on one CPU core costs more the
more it holds, so that fewer calls with more in them need not be faster.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from ...diffusion.freedave import freedave_decode
from ...diffusion.policies import threshold
from ...diffusion.reader import Reader
from ...diffusion.shared import MaskedDiffusion
from ...models import zoo
from ...models.decoder import generate
from ...models.masked_diffusion import text_windows
from ...models.mixture import token_stream
from ...models.tokenizer import load_tokenizer
from ..race import race
from ..scaling import sweep
from . import Row, register, rows

BLOCK = 8
OPTIONS = dict(repeats=3, min_time=0.05)


def prompts() -> dict[str, Tensor]:
    """One of each kind, 64 tokens."""
    kinds = {"play": "shakespeare", "code": "python"}
    return {k: text_windows(token_stream("test", c), 3, 64)[1:2] for k, c in kinds.items()}


def same_if_lossless(result: tuple[Tensor, bool], reference: tuple[Tensor, bool]) -> bool:
    """The tokens of a decoder that says it is lossless are the static decoder's."""
    return not result[1] or result[0].equal(reference[0])


@register("diffusion-decode", "FreeDave against the static decoder and what else makes text")
def diffusion_decode(quick: bool) -> Iterator[Row]:
    net, mask_id, gen_len = zoo.load("text_dlm"), load_tokenizer().mask, 8 if quick else 32
    decoder, engine = zoo.load("text_lm"), MaskedDiffusion(net, mask_id)
    for kind, prompt in list(prompts().items())[: 1 if quick else None]:
        for cache in ("none",) if quick else ("none", "prefix"):
            shared = dict(block_len=BLOCK, cache=cache)

            def free(D: int) -> Callable:
                options = dict(mask_id=mask_id, draft_steps=D, **shared)  # noqa: B023
                return lambda: (freedave_decode(net, prompt, gen_len, **options).tokens, True)  # noqa: B023

            def static(**options) -> Callable:
                lossless = not options
                return lambda: (
                    engine.decode(prompt, gen_len, **options, **shared).tokens,  # noqa: B023
                    lossless,
                )

            contestants = {
                "corelib, static": static(),
                **{f"FreeDave, {D} drafts": free(D) for D in (2, 4, 8)},
                "threshold 0.9": static(policy=threshold(0.9)),
                "text_lm, its cache": lambda: (generate(decoder, prompt, gen_len), False),  # noqa: B023
            }
            result = race(contestants, check=same_if_lossless, **OPTIONS)
            shape = f"B1 P64 N{gen_len} blocks of {BLOCK}, cache {cache}"
            yield from rows(result, what=kind, shape=shape, corelib="corelib, static")


@register("diffusion-call", "one call of the net by the number of drafts in it: batch and tree")
def diffusion_call(quick: bool) -> Iterator[Row]:
    net, mask_id = zoo.load("text_dlm"), load_tokenizer().mask
    ids = torch.nn.functional.pad(prompts()["play"], (0, 32), value=mask_id)

    def contestants(D: int) -> dict[str, Callable]:
        reader = Reader(net, mask_id, "prefix")
        reader.laws(ids, 64, 64 + BLOCK)
        drafts = ids.repeat(D, 1)
        drafts[:, 64:72] = torch.where(torch.arange(8) < torch.arange(D)[:, None], 5, mask_id)
        return {
            name: lambda layout=layout: reader.draft_laws(drafts, 64, 64 + BLOCK, layout)
            for name, layout in (("corelib", "batch"), ("tree", "tree"))
        }

    result = sweep((1, 2) if quick else (1, 2, 4, 8, 16), contestants, tolerance=1e-3, **OPTIONS)
    yield from rows(result, what="drafts behind 63 cached", shape="P64 N32, L drafts:")
