"""Small models of transformers, for the tests of the adapters to it."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture
def random_model():
    """``random_model(family, seed=0, **options)``: float64, attention by their ``sdpa``.

    Weights of deviation 0.2: attention far from uniform, and text that does not repeat one token.
    """
    transformers = pytest.importorskip("transformers")

    def make(family, seed=0, **options):
        torch.manual_seed(seed)
        config = getattr(transformers, f"{family}Config")(
            vocab_size=60, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=128,
            bos_token_id=None, eos_token_id=None, pad_token_id=0, initializer_range=0.2,
            attn_implementation="sdpa", **options,
        )  # fmt: skip
        return getattr(transformers, f"{family}ForCausalLM")(config).double().eval()

    return make
