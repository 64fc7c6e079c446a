"""Tiny models whose greedy text does not repeat itself."""

from __future__ import annotations

import pytest
import torch

from corelib.models.decoder import Decoder, DecoderConfig

SIZES = dict(vocab=20, width=16, layers=2, heads=2, kv_heads=1, head_width=8, hidden=24)


@pytest.fixture
def tiny():
    """``tiny(seed, kind)``: float64, 20 ids, frozen.

    Five times the usual weights: at the usual ones an untrained model repeats one token, and a test
    of greedy decoding would test nothing.
    """

    @torch.no_grad()
    def build(seed=0, kind=Decoder):
        model = kind(DecoderConfig(**SIZES, qkv_bias=kind is Decoder), seed=seed).double()
        for name, weight in model.named_parameters():
            if weight.dim() == 2 and "embed" not in name:
                weight *= 5
        return model.eval().requires_grad_(False)

    return build
