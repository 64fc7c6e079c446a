"""The two kinds of language model: decoders (next token) and encoders (hidden tokens)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from ..data.text import CORPORA, documents
from . import evaluate
from .decoder import Decoder, DecoderConfig
from .encoder import Encoder
from .guidance import guided_hidden
from .mixture import masked_batch, text_rows, token_stream, training_batch
from .ngram import WittenBell
from .recipes import Recipe, Stage
from .tokenizer import load_tokenizer

NATS_TO_BITS = 1 / 0.6931471805599453


def step_generator(recipe: Recipe, step: int) -> torch.Generator:
    """The randomness of step number ``step`` of ``recipe``."""
    return torch.Generator().manual_seed(recipe.seed * 1_000_003 + step)


def weighted_loss(
    model,
    ids: Int[Tensor, "B L"],
    targets: Int[Tensor, "B L"],
    weights: Float[Tensor, "B L"],
    guidance: float = 0.0,
) -> Float[Tensor, ""]:
    """Mean cross-entropy in nats, by ``weights``, and ``guidance`` times that of two heads.

    Matrices are multiplied in bfloat16. The guide is that of `guidance.guided_hidden`.
    """
    guide = 0.0
    with torch.autocast(ids.device.type, dtype=torch.bfloat16):
        if guidance:
            x, guide = guided_hidden(model, ids, targets, weights > 0)
        else:
            x = model.hidden(ids)
        logits = x[weights > 0] @ model.embed_tokens.weight.T
    nats = F.cross_entropy(logits.float(), targets[weights > 0], reduction="none")
    known = weights[weights > 0]
    return (nats * known).sum() / known.sum() + guidance * guide


class TextKind:
    """What both have in common."""

    config = DecoderConfig
    model: type[Decoder]
    data = (
        "the train split of `corelib.data` (Shakespeare and Python source; see its README),\n"
        "  byte-pair encoding of `corelib/models/tokenizer.json`"
    )
    limits = (
        "a small model of few texts; it speaks in the manner of what it read and knows\n  nothing."
    )

    def build(self, config, seed: int | None) -> nn.Module:
        """An untrained model; ``config`` is an instance of the kind's own class."""
        return self.model(config, seed=seed)

    def loss(self, model, batch, stage: Stage) -> Tensor:
        return weighted_loss(model, *batch, stage.guidance)

    def shape(self, config: DecoderConfig) -> str:
        return (
            f"{config.layers} layers, width {config.width}, {config.heads} query and "
            f"{config.kv_heads} key/value heads of {config.head_width}; RoPE, RMSNorm, SwiGLU, "
            f"tied\nembeddings; vocabulary {config.vocab}, context {config.context}"
        )


class DecoderKind(TextKind):
    """Next-token prediction of text and retrieval tasks."""

    model = Decoder
    unit = "bits per byte"
    data = TextKind.data + (
        "; with passkey, MQAR and\n  repetition tasks among it (`corelib/models/recipes.py`)"
    )

    def batch(self, recipe: Recipe, step: int) -> tuple[Tensor, ...]:
        stage, generator = recipe.stage_at(step), step_generator(recipe, step)
        stream = token_stream("train")
        return training_batch(stage.mixture, stream, stage.rows, stage.length, generator)

    @torch.no_grad()
    def held_out(self, model, rows: int = 24, length: int = 512) -> float:
        generator = torch.Generator().manual_seed(0)
        ids, targets = text_rows(token_stream("valid"), rows, length, generator)
        nats = float(weighted_loss(model, ids, targets, torch.ones(ids.shape)))
        return nats * NATS_TO_BITS / (load_tokenizer().bytes_of(targets) / targets.numel())

    def figures(self, model) -> dict[str, float]:
        """The bars of a decoder, all on works it never saw."""
        tokenizer, test = load_tokenizer(), token_stream("test")
        found = text_figures(model)
        for length in (512, 1024, 2048):
            found[f"passkey accuracy at {length} tokens"] = evaluate.passkey_accuracy(
                model, tokenizer, test, length=length, trials=200
            )
        for pairs in (8, 32):
            found[f"MQAR accuracy, {pairs} pairs"] = mqar_accuracy(model, tokenizer, pairs)
        gain, error = evaluate.gain_of_context(model, test, rows=256, scored=128)
        found["nats a token saved by context 1900 over 512"] = gain
        found["its standard error"] = error
        stripes, copied = evaluate.induction_scores(model, vocab=tokenizer.n_plain)
        found["strongest induction head"] = float(stripes.max())
        found["copied right on repeated random tokens"] = copied
        return found


class EncoderKind(TextKind):
    """Masked-token prediction of text."""

    model = Encoder
    unit = "bits per hidden token"

    def batch(self, recipe: Recipe, step: int) -> tuple[Tensor, ...]:
        stage, generator = recipe.stage_at(step), step_generator(recipe, step)
        return masked_batch(token_stream("train"), stage.rows, stage.length, generator)

    @torch.no_grad()
    def held_out(self, model, rows: int = 24, length: int = 512) -> float:
        generator = torch.Generator().manual_seed(0)
        batch = masked_batch(token_stream("valid"), rows, length, generator)
        return float(weighted_loss(model, *batch)) * NATS_TO_BITS

    @torch.no_grad()
    def figures(self, model) -> dict[str, float]:
        """How often a hidden token of a held-out work is the first choice, and its nats."""
        generator = torch.Generator().manual_seed(0)
        ids, targets, weights = masked_batch(token_stream("test"), 32, 512, generator)
        hidden = weights > 0
        logits = model(ids)[hidden]
        return {
            "hidden tokens right": float((logits.argmax(-1) == targets[hidden]).float().mean()),
            "nats a hidden token": float(F.cross_entropy(logits, targets[hidden])),
        }


def text_figures(model) -> dict[str, float]:
    """Bits per byte on the held-out works, beside the order-5 Witten-Bell byte n-gram."""
    tokenizer, found = load_tokenizer(), {}
    train = [t.encode() for c in CORPORA for t in documents(c, "train").values()]
    ngram = WittenBell(5).fit(train)
    for corpus in CORPORA:
        texts = list(documents(corpus, "test").values())
        size = sum(len(t.encode()) for t in texts)
        found[f"bits per byte, {corpus}"] = evaluate.bits_per_byte(model, texts, tokenizer)
        found[f"bits per byte, {corpus}, order-5 n-gram"] = (
            sum(ngram.bits(t.encode()) for t in texts) / size
        )
    return found


def mqar_accuracy(model, tokenizer, pairs: int) -> float:
    """Share of answers right in 32 rows of 512 ids with ``pairs`` pairs."""
    generator = torch.Generator().manual_seed(0)  # every number of pairs from the same start
    batch = evaluate.synthetic.mqar(
        32, 512, vocab=tokenizer.n_plain, pairs=pairs, ask=tokenizer.ask, generator=generator
    )
    return evaluate.answer_accuracy(model, batch)
