"""FreeDave makes the static decoder's tokens, in the static decoder's order, in fewer calls."""

from __future__ import annotations

import pytest
import torch

from corelib.diffusion import policies, tabular
from corelib.diffusion.freedave import (
    example,
    freedave_decode,
    make_drafts,
    static_step,
    verify_drafts,
)
from corelib.diffusion.reader import Reader
from corelib.diffusion.shared import MaskedDiffusion
from corelib.models.decoder import DecoderConfig
from corelib.models.masked_diffusion import MaskedDiffusionLM

MASK = 11
SIZES = dict(vocab=12, width=16, heads=2, kv_heads=1, head_width=8, hidden=24)


def gen(seed=0):
    return torch.Generator().manual_seed(seed)


def small_net(sharp=4.0, layers=2, seed=0):
    net = MaskedDiffusionLM(DecoderConfig(layers=layers, **SIZES), seed=seed).double()
    for p in net.parameters():
        if p.dim() == 2:
            p.data *= sharp
    return net.requires_grad_(False)


def prompt(length=4, seed=0):
    return torch.randint(0, MASK, (1, length), generator=gen(seed))


def both(net, given, gen_len, draft_steps, mask_id=MASK, layout="batch", **options):
    static = MaskedDiffusion(net, mask_id).decode(given, gen_len, **options)
    free = freedave_decode(
        net,
        given,
        gen_len,
        mask_id=mask_id,
        draft_steps=draft_steps,
        layout=layout,
        **options,
    )
    assert free.tokens.equal(static.tokens), (free.tokens, static.tokens)
    assert free.step_map.equal(static.step_map)
    assert free.nfe <= static.nfe
    return static, free


OPTIONS = {
    "one slot a step": {},
    "two slots a step": dict(steps=3),
    "blocks": dict(block_len=3),
    "blocks, cached": dict(block_len=3, cache="prefix"),
    "blocks, uneven quotas": dict(block_len=4, steps=5),
    "margin": dict(policy=policies.margin),
    "entropy": dict(policy=policies.neg_entropy, block_len=5),
    "left to right": dict(policy=policies.left_to_right, cache="prefix"),
    "threshold": dict(policy=policies.threshold(0.3)),
    "threshold, blocks": dict(policy=policies.threshold(0.2), block_len=4, cache="prefix"),
    "entropy bound": dict(policy=policies.entropy_bound(1.0), block_len=3),
}


@pytest.mark.parametrize("name", OPTIONS)
def test_tokens_and_order_are_those_of_the_static_decoder(name):
    for draft_steps in (1, 4):
        net = small_net(seed=draft_steps)
        static, free = both(net, prompt(), 6, draft_steps, **OPTIONS[name])
        if draft_steps == 1:
            assert free.nfe == static.nfe and free.call_map.equal(static.step_map)


@pytest.mark.parametrize("options", [{}, dict(block_len=3, cache="prefix")])
def test_the_tree_makes_what_the_batch_makes(options):
    net = small_net()
    _, batch = both(net, prompt(), 5, 3, **options)
    _, tree = both(net, prompt(), 5, 3, layout="tree", **options)
    assert batch.nfe == tree.nfe and batch.fed == tree.fed
    assert batch.call_map.equal(tree.call_map)


@pytest.mark.parametrize("cache", ["none", "prefix"])
def test_tree_laws_equal_batch_laws(cache):
    reader, ids = Reader(small_net(layers=3), MASK, cache), prompt(9)
    ids[:, 5:] = MASK
    reader.laws(ids, 5, 9)
    drafts = ids.repeat(3, 1)
    drafts[1, 6], drafts[2, 5:8] = 1, 2
    batch, tree = (reader.draft_laws(drafts, 5, 9, layout) for layout in ("batch", "tree"))
    torch.testing.assert_close(tree, batch, rtol=0, atol=1e-10)
    assert not torch.allclose(batch[0], batch[1])
    alone = reader.draft_laws(drafts[1:2], 5, 9, "batch")
    torch.testing.assert_close(batch[1:2], alone, rtol=0, atol=1e-12)


def test_a_net_that_never_changes_its_mind_needs_two_calls():
    class Stubborn:
        def __call__(self, ids):
            law = torch.randn(1, ids.shape[1], 12, generator=gen(3), dtype=torch.float64)
            return law.expand(len(ids), -1, -1)

    static, free = both(Stubborn(), prompt(), 8, 8)
    assert static.nfe == 8 and free.nfe == 2
    assert free.call_map.flatten().bincount().tolist() == [1, 7]
    _, four = both(Stubborn(), prompt(), 8, 4)
    assert four.nfe == 3 and four.call_map.flatten().bincount().tolist() == [1, 4, 3]


def test_calls_never_rise_with_more_drafts_of_an_exact_net():
    data = example()
    net, mask_id = data["net"], data["mask_id"]
    calls = [both(net, data["prompt"], 6, D, mask_id=mask_id)[1].nfe for D in (1, 2, 3, 6)]
    assert calls == sorted(calls, reverse=True) and calls[0] == 6 and calls[-1] < 6


def test_random_laws_of_short_texts():
    for seed in range(6):
        weights = torch.randn(3, 3, 3, 3, generator=gen(seed), dtype=torch.float64).mul(2).exp()
        net = tabular.TabularDenoiser(weights / weights.sum())
        given = torch.zeros(1, 0, dtype=torch.long)
        both(net, given, 4, 1 + seed % 4, mask_id=3, steps=[2, 3, 4][seed % 3])


def test_every_call_takes_a_step_and_fed_counts_the_drafts():
    net = small_net()
    static, free = both(net, prompt(), 6, 3)
    steps = free.call_map.flatten().bincount(minlength=free.nfe)
    assert len(steps) == free.nfe and (steps >= 1).all() and steps.sum() == 6
    assert static.fed == 10 * static.nfe
    assert 10 * free.nfe <= free.fed <= 10 * (1 + 3 * (free.nfe - 1))


def test_one_slot_and_none():
    net = small_net()
    static, free = both(net, prompt(), 1, 4)
    assert static.nfe == free.nfe == 1  # a lone slot needs no second call
    assert both(net, prompt(), 0, 4)[1].nfe == 0


def test_drafts_fill_in_and_verification_counts_the_leading_ones():
    net, ids = small_net(), prompt(7)
    ids[:, 3:] = MASK
    law = Reader(net, MASK).laws(ids, 3, 7)
    drafts = make_drafts(ids, law, 3, [2, 1, 1, 1], mask_id=MASK)
    assert (drafts == MASK).sum(1).tolist() == [2, 1, 0]
    assert drafts[:1].equal(static_step(ids, law, 3, 2, mask_id=MASK))
    sure = law.amax(-1)[0].argsort(descending=True) + 3
    assert (drafts[0, sure[:2]] != MASK).all() and drafts[1, sure[2]] != MASK
    wrong = drafts.clone()
    wrong[2, 0] += 1
    assert verify_drafts(drafts, drafts[1:]) == 2
    assert verify_drafts(drafts, wrong[1:]) == 1
    assert verify_drafts(drafts, wrong[2:]) == 0
    assert verify_drafts(drafts[:1], drafts[1:]) == 0


@pytest.mark.no_shape_checks
def test_errors_name_the_argument():
    net, given = small_net(), prompt()
    with pytest.raises(ValueError, match="prompt: expected one row"):
        freedave_decode(net, given.repeat(2, 1), 4, mask_id=MASK)
    with pytest.raises(ValueError, match="draft_steps: expected at least 1, got 0"):
        freedave_decode(net, given, 4, mask_id=MASK, draft_steps=0)
    with pytest.raises(ValueError, match="layout: expected one of"):
        freedave_decode(net, given, 4, mask_id=MASK, layout="row")
    with pytest.raises(TypeError, match="tree"):
        freedave_decode(example()["net"], given[:, :0], 6, mask_id=2, layout="tree")
