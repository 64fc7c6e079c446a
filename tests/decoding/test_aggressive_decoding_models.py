"""Aggressive decoding on trained models."""

from __future__ import annotations

import pytest
import torch

from corelib.decoding.aggressive_decoding import (
    BlockNAT,
    block_draft,
    input_guided_decode,
)
from corelib.models import zoo
from corelib.models.cache import DenseCache
from corelib.models.decoder import generate
from corelib.models.encoder import Encoder
from corelib.models.tokenizer import load_tokenizer

pytestmark = pytest.mark.method("aggressive_decoding")


def plain(model, ids, new, eos=None):
    tokens = generate(model, ids, new)[0, ids.shape[1] :].tolist()
    return tokens[: tokens.index(eos) + 1] if eos in tokens else tokens


def some_ids(n, seed=0):
    return torch.randint(0, 20, (1, n), generator=torch.Generator().manual_seed(seed))


def test_block_nat_learns_a_block_given_a_prefix(tiny):
    nat = BlockNAT(Encoder(tiny().config, seed=3).double(), 4, mask=19)
    prompt, target = some_ids(3).repeat(5, 1), some_ids(9, seed=2).repeat(5, 1)
    optimizer = torch.optim.Adam(nat.parameters(), lr=2e-2)
    for step in range(40):
        optimizer.zero_grad()
        loss = nat.loss(prompt, target, start=5 * (step % 2))
        loss.backward()
        optimizer.step()
    tokens = [*prompt[0].tolist(), *target[0, :5].tolist()]
    assert block_draft(nat)(tokens, 3, 9).tokens == target[0, 5:9].tolist()
    ignored = target.masked_fill(torch.arange(9) >= 6, -1)
    alone = torch.nn.functional.cross_entropy(
        nat(torch.cat([prompt, target[:, :5]], 1))[:, 0], target[:, 5]
    )
    torch.testing.assert_close(nat.loss(prompt, ignored, start=5), alone)


# --- real models ----------------------------------------------------------------------------------


@pytest.mark.skipif("text_lm" not in zoo.names(), reason="text_lm is not in the zoo")
def test_text_lm_decodes_the_same():
    """With its own text as the guess, with two tokens of it changed, and with nonsense."""
    model = zoo.load("text_lm", dtype=torch.float64)
    ids = torch.tensor([load_tokenizer().encode("Draw thy tool; here comes two of the house of")])
    expected = plain(model, ids, 24)
    changed = [*expected[:7], 300, *expected[8:15], 301, *expected[16:]]
    calls = []
    for guess in (expected, changed, [7] * 9):
        report = input_guided_decode(model, ids, guess, 24, cache=DenseCache())
        assert report.tokens == expected
        calls.append(report.target_calls)
    assert calls[0] == 1 < calls[1] <= 24 and calls[2] <= 24
