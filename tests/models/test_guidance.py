"""The guide of two heads: where they should look, and that following it lowers it."""

import torch

from corelib.models.decoder import Decoder, DecoderConfig
from corelib.models.guidance import copying_sources, guided_hidden

CONFIG = DecoderConfig(
    vocab=16, width=16, layers=2, heads=2, kv_heads=1, head_width=8, hidden=24, qkv_bias=True
)
IDS = torch.tensor([[3, 5, 7, 3, 5, 9, 3]])
NEXT = torch.tensor([[5, 7, 3, 5, 9, 3, 5]])


def test_sources_are_what_followed_earlier_copies():
    found = copying_sources(IDS, NEXT).nonzero().tolist()
    # position 3 reads 3 and should say 5: 5 stands at 1, behind the 3 at 0; and so at 6 (at 1, 4)
    assert found == [[0, 3, 1], [0, 6, 1], [0, 6, 4]]


def test_sources_by_brute_force():
    ids = torch.randint(0, 4, (3, 20), generator=torch.Generator().manual_seed(0))
    targets = torch.cat([ids[:, 1:], ids[:, :1]], 1)
    found = copying_sources(ids, targets)
    for b in range(3):
        for t in range(20):
            for s in range(20):
                right = 0 < s <= t and ids[b, s - 1] == ids[b, t] and ids[b, s] == targets[b, t]
                assert bool(found[b, t, s]) == right


def test_hidden_is_the_models_own_and_the_guide_can_be_followed():
    model = Decoder(CONFIG, seed=0)
    scored = torch.ones_like(IDS, dtype=torch.bool)
    x, before = guided_hidden(model, IDS, NEXT, scored)
    torch.testing.assert_close(x, model.hidden(IDS))
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(60):
        optimizer.zero_grad()
        guide = guided_hidden(model, IDS, NEXT, scored)[1]
        guide.backward()
        optimizer.step()
    assert guide.item() < 0.2 < before.item()


def test_without_anything_to_copy_only_the_step_back_counts():
    model, ids = Decoder(CONFIG, seed=0), torch.arange(7)[None]
    nothing = torch.zeros_like(ids, dtype=torch.bool)
    x, guide = guided_hidden(model, ids, ids + 1, nothing)
    assert 0 < guide.item() < 50
