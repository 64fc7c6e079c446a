"""What a masked-diffusion model has learnt: its bound, filling in, saying a passage again.

Everything on fixed stretches of works that no model was trained on.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ..data.text import CORPORA, documents
from ..diffusion.shared import MaskedDiffusion
from . import evaluate, zoo
from .masked_diffusion import bound_bits, text_windows
from .mixture import token_stream
from .ngram import WittenBell
from .text_kinds import NATS_TO_BITS
from .tokenizer import load_tokenizer


def diffusion_figures(model) -> dict[str, float]:
    """For the model card: bits per byte, hidden tokens found, passages said again."""
    found: dict[str, float] = {}
    ngram = WittenBell(5).fit(t.encode() for c in CORPORA for t in documents(c, "train").values())
    for corpus in CORPORA:
        stream = token_stream("test", corpus)
        found[f"bits per byte, {corpus}, a bound"] = bound_bits(model, stream, rows=48, draws=2)
        windows = text_windows(stream, 48, 512)
        if "text_lm" in zoo.names():
            found[f"bits per byte, {corpus}, text_lm"] = decoder_bits(zoo.load("text_lm"), windows)
        found[f"bits per byte, {corpus}, order-5 n-gram"] = ngram_bits(ngram, windows)
    windows = text_windows(token_stream("test"), 32, 512)
    for share in (0.2, 0.5, 0.8):
        found[f"right of {share:.0%} hidden tokens"] = filled_in(model, windows, share)
    prompts, answers = copying(token_stream("test"), rows=32)
    mask_id = load_tokenizer().mask
    made = MaskedDiffusion(model, mask_id).decode(prompts, answers.shape[1], block_len=8)
    same = made.tokens[:, prompts.shape[1] :] == answers
    found["copied right, block of 8, one a step"] = float(same.float().mean())
    return found


@torch.no_grad()
def decoder_bits(model, ids: Int[Tensor, "B L"]) -> float:
    """Bits per byte of a decoder on rows whose first token is given."""
    nats = sum(float(evaluate.token_nats(model, part).sum()) for part in ids.split(16))
    return nats * NATS_TO_BITS / load_tokenizer().bytes_of(ids[:, 1:])


def ngram_bits(ngram: WittenBell, ids: Int[Tensor, "B L"]) -> float:
    """The same for bytes: those of the first token are context only."""
    tokenizer, bits = load_tokenizer(), 0.0
    for row in ids:
        given = len(tokenizer.decode_bytes(row[:1].tolist()))
        probs = ngram.probabilities(tokenizer.decode_bytes(row.tolist()))
        bits -= float(torch.from_numpy(probs[given:]).log2().sum())
    return bits / tokenizer.bytes_of(ids[:, 1:])


@torch.no_grad()
def filled_in(model, ids: Int[Tensor, "B L"], share: float, seed: int = 0) -> float:
    """How often a hidden token is the first choice when ``share`` of them are hidden at random."""
    generator = torch.Generator().manual_seed(seed)
    mask_id, right = load_tokenizer().mask, []
    for part in ids.split(8):
        hidden = torch.rand(part.shape, generator=generator) < share
        hidden[:, 0] = False
        said = model(part.masked_fill(hidden, mask_id)).argmax(-1)
        right.append((said == part)[hidden])
    return float(torch.cat(right).float().mean())


def copying(
    stream: Int[Tensor, " N"], rows: int, *, passage: int = 48, given: int = 16
) -> tuple[Int[Tensor, "B P"], Int[Tensor, "B A"]]:
    """Prompts that say a passage and begin it again, and how it goes on: a task with answers."""
    if not 0 < given < passage:
        raise ValueError(f"given: expected 1 to {passage - 1}, got {given}")
    text = text_windows(stream, rows, passage)
    return torch.cat([text, text[:, :given]], 1), text[:, given:]


@torch.no_grad()
def judged(judge, ids: Int[Tensor, "B L"], start: int) -> Float[Tensor, " B"]:
    """Bits per token that another model spends on ``ids[:, start:]``, row by row."""
    return evaluate.token_nats(judge, ids)[:, start - 1 :].mean(1) * NATS_TO_BITS
