"""Mamba and Mamba-2 as language models, on the text and the tasks of the decoders."""

from __future__ import annotations

import torch

from ..data import synthetic
from . import evaluate
from .mixture import token_stream
from .recurrent import RecurrentConfig, RecurrentLM
from .text_kinds import DecoderKind, mqar_accuracy, text_figures
from .tokenizer import load_tokenizer

PUBLISHED = {"mamba": "Mamba", "mamba2": "Mamba-2"}


class RecurrentKind(DecoderKind):
    """Next-token prediction of text and retrieval tasks, without attention."""

    config = RecurrentConfig
    model = RecurrentLM

    def figures(self, model) -> dict[str, float]:
        """Those of a decoder, less what is measured of attention weights."""
        tokenizer, test = load_tokenizer(), token_stream("test")
        found = text_figures(model)
        for length in (512, 1024, 2048):
            found[f"passkey accuracy at {length} tokens"] = evaluate.passkey_accuracy(
                model, tokenizer, test, length=length, trials=100
            )
        for pairs in (8, 32):
            found[f"MQAR accuracy, {pairs} pairs"] = mqar_accuracy(model, tokenizer, pairs)
        gain, error = evaluate.gain_of_context(model, test, rows=128, scored=128)
        found["nats a token saved by context 1900 over 512"] = gain
        found["its standard error"] = error
        batch = synthetic.induction(
            8,
            128,
            vocab=tokenizer.n_plain,
            period=64,
            generator=torch.Generator().manual_seed(0),
        )
        copied = (model(batch.ids).argmax(-1) == batch.targets)[:, 64:]
        found["copied right on repeated random tokens"] = float(copied.float().mean())
        return found

    def shape(self, config: RecurrentConfig) -> str:
        heads = config.expand * config.width // config.head_width
        split = f" in {heads} heads of {config.head_width}" if config.mixer == "mamba2" else ""
        return (
            f"{PUBLISHED[config.mixer]}: {config.layers} layers, width {config.width}, inner width "
            f"{config.expand * config.width}{split},\nstate {config.state}, convolution "
            f"{config.conv}; RMSNorm, tied embeddings; vocabulary {config.vocab}, longest sequence "
            f"{config.context}"
        )
