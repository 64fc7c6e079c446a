"""A small decoder seen as a model of bytes, through the shipped tokenizer."""

from __future__ import annotations

import pytest

from corelib.models.cache import DenseCache
from corelib.models.decoder import Decoder, DecoderConfig
from corelib.models.tokenizer import load_tokenizer
from corelib.tokenization.byte_exact import ByteView
from corelib.tokenization.shared import WORDS


@pytest.fixture(scope="session")
def shipped_view():
    """``shipped_view(model, new_cache)``: a view of ``model``."""

    def view(model, new_cache=DenseCache):
        tokenizer = load_tokenizer()
        options = dict(start=[tokenizer.doc], end=tokenizer.doc, boundary=WORDS)
        return ByteView(model, tokenizer, new_cache=new_cache, **options)

    return view


@pytest.fixture(scope="module")
def decoder():
    config = DecoderConfig(width=32, layers=2, heads=2, kv_heads=1, head_width=16, hidden=48)
    return Decoder(config).double().eval()


@pytest.fixture(scope="module")
def views(decoder, shipped_view):
    """With a KV cache and without."""
    return shipped_view(decoder), shipped_view(decoder, None)
