"""What the language models are trained on: real text, with retrieval tasks among it."""

from __future__ import annotations

import dataclasses
import functools

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ..data import synthetic
from ..data.synthetic import IGNORE, TaskBatch
from ..data.text import CORPORA, documents
from .tokenizer import Tokenizer, load_tokenizer


@functools.cache
def token_stream(split: str, corpus: str | None = None) -> Int[Tensor, " N"]:
    """All documents of a split as one run of ids, each behind a ``<|doc|>``."""
    tokenizer = load_tokenizer()
    ids: list[int] = []
    for name in CORPORA if corpus is None else (corpus,):
        for text in documents(name, split).values():
            ids += [tokenizer.doc, *tokenizer.encode(text)]
    return torch.tensor(ids)


@dataclasses.dataclass(frozen=True)
class Mixture:
    """Shares of the rows of a batch (the rest is text), and the weight of a known answer.

    A token of text counts 1 in the loss. Random ids that nothing can predict count 0, and so
    does the first round of a repeated stretch.
    """

    passkey: float = 0.08
    mqar: float = 0.08
    repeats: float = 0.04
    repeated_text: float = 0.25  # of the repeats: real text instead of random ids
    most_keys: int = 3  # hidden in one pass-key row, and asked for
    fewest_digits: int = 10  # different ones in a number: this many to 10
    answer_weight: float = 4.0


def text_rows(
    stream: Int[Tensor, " N"], rows: int, length: int, generator: torch.Generator
) -> TaskBatch:
    """Random stretches of ``stream``; the target of a position is the token behind it."""
    start = torch.randint(0, len(stream) - length, (rows,), generator=generator)
    full = stream[start[:, None] + torch.arange(length + 1)]
    return TaskBatch(full[:, :-1], full[:, 1:])


def _log_uniform(low: int, high: int, generator: torch.Generator) -> int:
    """A size between ``low`` and ``high``, small ones (the easy ones) more often."""
    draw = float(torch.rand(1, generator=generator))
    return round(low * (high / low) ** draw)


def _passkey_rows(
    stream, tokenizer: Tokenizer, rows, length, generator, mixture: Mixture
) -> TaskBatch:
    keys = int(torch.randint(1, mixture.most_keys + 1, (1,), generator=generator))
    symbols = 10
    if mixture.fewest_digits < 10:
        symbols = int(torch.randint(mixture.fewest_digits, 11, (1,), generator=generator))
    return synthetic.passkey(
        rows,
        length,
        haystack=stream,
        encode=tokenizer.encode,
        generator=generator,
        keys=keys,
        symbols=symbols,
    )


def _mqar_rows(tokenizer: Tokenizer, rows, length, generator) -> TaskBatch:
    pairs = _log_uniform(2, min(64, length // 4), generator)
    return synthetic.mqar(
        rows, length, vocab=tokenizer.n_plain, pairs=pairs, ask=tokenizer.ask, generator=generator
    )


def _repeat_rows(tokenizer: Tokenizer, rows, length, generator, stream, share) -> TaskBatch:
    period = _log_uniform(4, length // 2, generator)
    task = synthetic.induction(
        rows, length, vocab=tokenizer.n_plain, period=period, generator=generator
    )
    real = torch.rand(rows, generator=generator) < share
    text = text_rows(stream, rows, period, generator).ids.repeat(1, length // period + 2)
    text = text[:, : length + 1]
    ids = torch.where(real[:, None], text[:, :-1], task.ids)
    targets = torch.where(real[:, None], text[:, 1:], task.targets)
    return TaskBatch(ids, torch.where(task.targets == IGNORE, IGNORE, targets))


def training_batch(
    mixture: Mixture,
    stream: Int[Tensor, " N"],
    rows: int,
    length: int,
    generator: torch.Generator,
) -> tuple[Int[Tensor, "B L"], Int[Tensor, "B L"], Float[Tensor, "B L"]]:
    """``ids, targets, weights`` of ``rows`` sequences, each kind in its share on average."""
    tokenizer = load_tokenizer()
    draw = torch.rand(rows, generator=generator)
    shares = torch.tensor([mixture.passkey, mixture.mqar, mixture.repeats]).cumsum(0)
    n_pass, n_mqar, n_rep = (
        int(((draw < high) & (draw >= low)).sum())
        for low, high in zip([0.0, *shares[:-1]], shares, strict=True)
    )
    n_text = rows - n_pass - n_mqar - n_rep
    parts = []
    if n_text:
        batch = text_rows(stream, n_text, length, generator)
        parts.append((*batch, torch.ones(n_text, length)))
    if n_pass:
        batch = _passkey_rows(stream, tokenizer, n_pass, length, generator, mixture)
        following = torch.cat([batch.ids[:, 1:], batch.targets[:, -1:]], 1)
        parts.append((batch.ids, following, _weights(batch.targets, mixture.answer_weight, 1.0)))
    if n_mqar:
        batch = _mqar_rows(tokenizer, n_mqar, length, generator)
        weights = _weights(batch.targets, mixture.answer_weight, 0.0)
        parts.append((batch.ids, batch.targets.clamp(min=0), weights))
    if n_rep:
        batch = _repeat_rows(tokenizer, n_rep, length, generator, stream, mixture.repeated_text)
        weights = _weights(batch.targets, 1.0, 0.0)
        parts.append((batch.ids, batch.targets.clamp(min=0), weights))
    return tuple(torch.cat(column) for column in zip(*parts, strict=True))


def _weights(targets: Tensor, known: float, other: float) -> Tensor:
    return torch.where(targets == IGNORE, other, known)


def masked_batch(
    stream: Int[Tensor, " N"], rows: int, length: int, generator: torch.Generator, rate: float = 0.2
) -> tuple[Int[Tensor, "B L"], Int[Tensor, "B L"], Float[Tensor, "B L"]]:
    """Text with ``rate`` of its tokens hidden, for a masked language model.

    Of the chosen tokens 80 % become ``<|mask|>``, 10 % a random token, 10 % stay (BERT's recipe,
    Devlin et al., arXiv 1810.04805, section 3.1, at a higher rate); only they are scored.
    """
    tokenizer = load_tokenizer()
    start = torch.randint(0, len(stream) - length, (rows,), generator=generator)
    targets = stream[start[:, None] + torch.arange(length)]
    chosen = torch.rand(targets.shape, generator=generator) < rate
    how = torch.rand(targets.shape, generator=generator)
    noise = torch.randint(0, tokenizer.n_plain, targets.shape, generator=generator)
    ids = torch.where(chosen & (how < 0.8), tokenizer.mask, targets)
    ids = torch.where(chosen & (how >= 0.9), noise, ids)
    return ids, targets, chosen.float()
