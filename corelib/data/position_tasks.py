"""Two tasks that need to know where a token stands, from tokens that do not say so.

From "Your Transformer May Not be as Powerful as You Expect" (arXiv 2205.13401, section 5.1; its
released code draws 128 tokens from 1,000 or 10,000). They are for models that read in both
directions and are given no absolute positions: ``targets[b, i]`` is what to say *at* position i.
"""

from __future__ import annotations

import torch

from .synthetic import TaskBatch


def position_identification(
    batch: int, length: int, *, vocab: int, generator: torch.Generator
) -> TaskBatch:
    """Random tokens; say at every position which one it is, ``0 .. length - 1``.

    With ``vocab=1`` all tokens are the same, and nothing but positions tells them apart.
    """
    ids = _tokens(batch, length, vocab, generator)
    return TaskBatch(ids, torch.arange(length).expand(batch, length).clone())


def even_token_prediction(
    batch: int, length: int, *, vocab: int, generator: torch.Generator, filler: int | None = None
) -> TaskBatch:
    """Say every second token: at position i the token at ``2 i + 1``, and past the middle `filler`.

    Counted from one these are the tokens at even places. ``filler``: an id that no token has,
    ``vocab`` if None.
    """
    filler = vocab if filler is None else filler
    if 0 <= filler < vocab:
        raise ValueError(f"filler: expected an id outside 0 .. {vocab - 1}, got {filler}")
    ids = _tokens(batch, length, vocab, generator)
    targets = torch.full_like(ids, filler)
    targets[:, : length // 2] = ids[:, 1::2]
    return TaskBatch(ids, targets)


def _tokens(batch: int, length: int, vocab: int, generator: torch.Generator) -> torch.Tensor:
    for name, value in (("batch", batch), ("length", length), ("vocab", vocab)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{name}: expected a whole number of at least 1, got {value!r}")
    return torch.randint(0, vocab, (batch, length), generator=generator)
