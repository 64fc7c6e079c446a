"""`auto_fact` on a model of Hugging Face's: its transposed linear layers and its tied head."""

from __future__ import annotations

import pytest
import torch

from corelib.linear_time.greenformers import LED, auto_fact

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.method("greenformers")


def test_gpt2():
    config = transformers.GPT2Config(vocab_size=50, n_embd=24, n_layer=2, n_head=2, n_positions=32)
    torch.manual_seed(0)
    model = transformers.GPT2LMHeadModel(config).double().eval()
    whole = auto_fact(model, 1000, even_if_larger=True)
    assert sum(isinstance(layer, LED) for layer in whole.modules()) == 8  # its Conv1D layers
    assert whole.lm_head.weight is whole.transformer.wte.weight
    ids = torch.randint(0, 50, (2, 9))
    with torch.no_grad():
        torch.testing.assert_close(whole(ids).logits, model(ids).logits, atol=1e-9, rtol=1e-8)
    assert auto_fact(model, 4).num_parameters() < model.num_parameters()
