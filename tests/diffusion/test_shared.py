"""The engine: the bound is the mean over orders, decoding commits once, the cache is exact."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from corelib.decoding.enumeration import exact_law, total_variation
from corelib.diffusion import policies, tabular
from corelib.diffusion.shared import (
    Decode,
    MaskedDiffusion,
    blocks_of,
    hide,
    hide_in_time,
    quotas,
    weighted_nats,
)
from corelib.models.decoder import DecoderConfig, sampler
from corelib.models.masked_diffusion import MaskedDiffusionLM, TwoWayCache

MASK = 11
SIZES = dict(vocab=12, width=16, heads=2, kv_heads=1, head_width=8, hidden=24)


def gen(seed=0):
    return torch.Generator().manual_seed(seed)


def small_net(layers=2, seed=0):
    """A net that contradicts itself: nothing makes its conditionals those of one joint law."""
    net = MaskedDiffusionLM(DecoderConfig(layers=layers, **SIZES), seed=seed).double()
    for p in net.parameters():
        if p.dim() == 2:
            p.data *= 4
    return net.requires_grad_(False)


def random_joint(length, vocab, seed=0):
    weights = torch.randn((vocab,) * length, generator=gen(seed), dtype=torch.float64).exp()
    return weights / weights.sum()


# --- the bound ------------------------------------------------------------------------------------


@pytest.mark.parametrize("length, vocab", [(1, 2), (2, 3), (4, 2), (5, 2)])
def test_the_bound_of_an_exact_net_is_the_code_length(length, vocab):
    net = tabular.TabularDenoiser(random_joint(length, vocab))
    some = net.texts[:: max(len(net.texts) // 7, 1)]
    bound = tabular.exact_bound(net, some, net.mask_id)
    torch.testing.assert_close(bound, -net.log_prob(some), rtol=0, atol=1e-10)
    assert tabular.order_nats(net, some, net.mask_id, range(length)[::-1]).allclose(bound)


@pytest.mark.parametrize("length", [1, 2, 4])
def test_the_bound_of_any_net_is_the_mean_over_all_orders(length):
    net = small_net()
    x0 = torch.randint(0, MASK, (3, length), generator=gen(1))
    bound = tabular.exact_bound(net, x0, MASK)
    mean = tabular.mean_order_nats(net, x0, MASK)
    torch.testing.assert_close(bound, mean, rtol=0, atol=1e-10)
    if length > 1:
        forward = tabular.order_nats(net, x0, MASK, range(length))
        assert (forward - mean).abs().max() > 1e-3  # single orders differ


def test_hiding_by_number_has_the_law_of_hiding_in_time():
    """Sets of size m come with probability 1/n each size, and weigh so that both means agree."""
    x0 = torch.arange(4).expand(4000, 4)
    by_number, in_time = hide(x0, MASK, gen()), hide_in_time(x0, MASK, gen())
    size = (by_number.ids == MASK).sum(1)
    assert size.bincount(minlength=5).tolist() == [0, 1000, 1000, 1000, 1000]
    for noised in (by_number, in_time):
        assert ((noised.weights > 0) == (noised.ids == MASK)).all()
        assert noised.weights.sum(1).mean().item() == pytest.approx(1.0, abs=0.1)
    net = tabular.example(4)
    text = torch.tensor([[0, 1, 1, 0]])
    exact = tabular.exact_bound(net, text, net.mask_id).item() / 4
    for how in (hide, hide_in_time):
        noised = how(text.expand(4000, 4), net.mask_id, gen(1))
        nats = weighted_nats(net(noised.ids), text.expand(4000, 4), noised.weights, net.mask_id)
        assert nats.mean().item() == pytest.approx(exact, abs=4 * nats.std().item() / 4000**0.5)


def test_only_free_tokens_are_hidden_and_the_loss_is_per_free_token():
    x0 = torch.randint(0, MASK, (6, 9), generator=gen())
    free = torch.arange(9) >= torch.arange(6)[:, None] + 2
    noised = hide(x0, MASK, gen(1), free=free)
    hidden = noised.ids == MASK
    assert hidden.any(1).all() and not (hidden & ~free).any()
    assert noised.ids[~hidden].equal(x0[~hidden])
    torch.testing.assert_close(noised.weights.sum(1), torch.ones(6))
    alone = torch.arange(9).expand(6, 9) == 4
    loss = MaskedDiffusion(small_net(), MASK).loss(x0, gen(2), free=alone)
    logits = small_net()(x0.masked_fill(alone, MASK))
    nats = weighted_nats(logits, x0, alone.double(), MASK).mean()
    torch.testing.assert_close(loss, nats)


def test_gradients_of_the_loss():
    net = small_net().requires_grad_(True)
    x0 = torch.randint(0, MASK, (2, 5), generator=gen())
    MaskedDiffusion(net, MASK).loss(x0, gen(3)).backward()
    grad = net.layers[0].mlp.up_proj.weight.grad[0, 0].item()
    weight, step = net.layers[0].mlp.up_proj.weight.data, 1e-6
    values = []
    for sign in (1, -1):
        weight[0, 0] += sign * step
        values.append(MaskedDiffusion(net, MASK).loss(x0, gen(3)).item())
        weight[0, 0] -= sign * step
    assert grad == pytest.approx((values[0] - values[1]) / 2 / step, rel=1e-4, abs=1e-9)


# --- decoding -------------------------------------------------------------------------------------


def empty(rows=1):
    return torch.zeros(rows, 0, dtype=torch.long)


@pytest.mark.parametrize("order", ["left_to_right", "random"])
def test_one_slot_a_step_samples_the_exact_joint(order):
    net = tabular.TabularDenoiser(random_joint(3, 2, seed=3))

    def decoder(chooser):
        policy = (
            policies.left_to_right if order == "left_to_right" else policies.RandomOrder(chooser)
        )
        engine = MaskedDiffusion(net, net.mask_id)
        return engine.decode(empty(), 3, policy=policy, chooser=chooser).tokens

    truth = {
        tuple(t): p for t, p in zip(net.texts.tolist(), net.joint.flatten().tolist(), strict=True)
    }
    assert total_variation(exact_law(decoder), truth) < 1e-12


def test_two_slots_in_one_step_sample_the_product_of_marginals():
    net = tabular.example(2)

    def decoder(chooser):
        return MaskedDiffusion(net, net.mask_id).decode(empty(), 2, steps=1, chooser=chooser).tokens

    law = exact_law(decoder)
    assert all(p == pytest.approx(0.25) for p in law.values()) and len(law) == 4


def all_policies():
    made = {"random": policies.RandomOrder(sampler(0))}
    made |= {n: policies.make_policy(n) for n in policies.POLICIES if n != "random"}
    return made


class Watching:
    """A net that keeps what it was given."""

    def __init__(self, net):
        self.net, self.seen = net, []

    def __call__(self, ids):
        self.seen.append(ids.clone())
        return self.net(ids)


@pytest.mark.parametrize("name", policies.POLICIES)
@pytest.mark.parametrize("block_len", [1, 3, 7, None])
def test_committed_slots_never_change_and_step_map_says_when(name, block_len):
    net = Watching(small_net())
    prompt = torch.randint(0, MASK, (3, 4), generator=gen())
    steps = None if block_len == 1 else 4
    made = MaskedDiffusion(net, MASK).decode(
        prompt, 7, steps=steps, block_len=block_len, policy=all_policies()[name]
    )
    assert made.nfe == len(net.seen) and made.fed == 11 * made.nfe
    assert made.tokens[:, :4].equal(prompt) and not (made.tokens == MASK).any()
    for call, ids in enumerate(net.seen):
        open_ = ids == MASK
        assert ids[~open_].equal(made.tokens[~open_])
        assert open_[:, 4:].equal(made.step_map >= call)
    block = torch.arange(7) // (block_len or 7)
    for a, b in itertools.pairwise(range(int(block[-1]) + 1)):
        assert made.step_map[:, block == a].max() < made.step_map[:, block == b].min()


def test_blocks_of_one_are_left_to_right():
    net, prompt = small_net(), torch.randint(0, MASK, (2, 3), generator=gen())
    engine = MaskedDiffusion(net, MASK)
    one = engine.decode(prompt, 6, block_len=1)
    ordered = engine.decode(prompt, 6, policy=policies.left_to_right)
    assert one.tokens.equal(ordered.tokens) and one.step_map.equal(ordered.step_map)
    assert one.step_map.equal(torch.arange(6).expand(2, 6))


def test_rows_of_a_batch_do_not_disturb_each_other():
    net, prompt = small_net(), torch.randint(0, MASK, (4, 3), generator=gen(5))
    engine = MaskedDiffusion(net, MASK)
    for policy in (policies.max_prob, policies.threshold(0.5)):
        together = engine.decode(prompt, 5, policy=policy)
        alone = [engine.decode(row[None], 5, policy=policy) for row in prompt]
        assert together.tokens.equal(torch.cat([a.tokens for a in alone]))
        assert together.nfe == max(a.nfe for a in alone)


def test_nothing_to_make_and_no_prompt():
    net = tabular.example(3)
    engine = MaskedDiffusion(net, net.mask_id)
    none = engine.decode(torch.tensor([[0, 1, 1]]), 0)
    assert none.tokens.tolist() == [[0, 1, 1]] and none.nfe == 0 and none.step_map.shape == (1, 0)
    assert engine.decode(empty(2), 3).tokens.shape == (2, 3)


def test_the_mask_itself_is_never_written():
    class Eager:
        def __call__(self, ids):
            return torch.full((*ids.shape, 12), -5.0).index_fill(2, torch.tensor(MASK), 50.0)

    assert (MaskedDiffusion(Eager(), MASK).decode(empty(), 4).tokens == 0).all()


def test_quotas_and_blocks_share_out_everything():
    assert quotas(7, 3) == [3, 2, 2] and quotas(4, 4) == [1, 1, 1, 1]
    for gen_len, steps, block_len in [(10, 10, 3), (10, 4, 3), (7, 7, None), (9, 5, 2), (1, 1, 5)]:
        made = blocks_of(torch.zeros(1, 2), gen_len, steps, block_len)
        plans = [plan for _, _, plan in made]
        assert sum(map(len, plans)) == steps and sum(map(sum, plans)) == gen_len
        assert made[0][0] == 2 and made[-1][1] == 2 + gen_len
        assert min(map(min, plans)) >= 1


# --- the cache ------------------------------------------------------------------------------------


class BlockCausal(TwoWayCache):
    """Makes any net block-causal: keys of later blocks are hidden. Blocks of 3 behind 4 ids."""

    def attend(self, layer, q, *, scale=None):
        k, v = self.layers[layer]
        block = (torch.arange(k.shape[2]) - 4).div(3, rounding_mode="floor").clamp(min=-1)
        hidden = block[-q.shape[2] :, None] < block
        k, v = (t.repeat_interleave(q.shape[1] // k.shape[1], 1) for t in (k, v))
        scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
        return scores.masked_fill(hidden, -torch.inf).softmax(-1) @ v


class BlockCausalLM(MaskedDiffusionLM):
    """Without the shift, which would let the last token of a prefix look into the block."""

    lookback = 0

    @staticmethod
    def new_cache():
        return BlockCausal()

    def hidden(self, ids, cache=None):
        return super(MaskedDiffusionLM, self).hidden(ids, BlockCausal() if cache is None else cache)


def decode_both(net, **options) -> tuple[Decode, Decode]:
    prompt = torch.randint(0, MASK, (2, 4), generator=gen(7))
    engine = MaskedDiffusion(net, MASK)
    return tuple(
        engine.decode(prompt, 8, block_len=3, cache=c, **options) for c in ("none", "prefix")
    )


def test_the_prefix_cache_is_exact_where_the_prefix_cannot_look_ahead():
    causal = BlockCausalLM(DecoderConfig(layers=3, **SIZES), seed=1).double().requires_grad_(False)
    for net in (causal, small_net(layers=1)):
        plain, cached = decode_both(net)
        assert plain.tokens.equal(cached.tokens) and plain.step_map.equal(cached.step_map)
        assert plain.nfe == cached.nfe and cached.fed < plain.fed


def test_the_laws_behind_a_cache_equal_those_without():
    net = BlockCausalLM(DecoderConfig(layers=2, **SIZES), seed=2).double().requires_grad_(False)
    ids, cache = torch.randint(0, MASK, (1, 10), generator=gen()), net.new_cache()
    whole = net(ids, cache)
    cache.crop(7)
    torch.testing.assert_close(net(ids[:, 7:], cache), whole[:, 7:], rtol=0, atol=1e-12)


def test_the_first_call_of_each_block_reads_everything():
    _, cached = decode_both(small_net())
    full = 3 * 12  # three blocks of 3, 3, 2 behind 4 ids
    rest = 2 * (12 - 3) + 2 * (12 - 6) + 1 * (12 - 9)  # the shift reads one position more
    assert cached.nfe == 8 and cached.fed == full + rest


# --- policies -------------------------------------------------------------------------------------


def view(sure, quota=1):
    """A block whose slots have these probabilities for token 0 of three."""
    sure = torch.tensor([sure], dtype=torch.float64)
    rest = (1 - sure) / 2
    law = torch.stack([sure, rest, rest], -1)
    open_ = torch.ones(sure.shape, dtype=torch.bool)
    return policies.View(open_, law, torch.zeros(sure.shape, dtype=torch.long), quota)


def taken(name, seen, **options):
    return policies.make_policy(name, **options)(seen)[0].nonzero()[:, 0].tolist()


def test_what_each_policy_takes():
    seen = view([0.5, 0.95, 0.91, 0.6])
    assert taken("max_prob", seen) == taken("margin", seen) == taken("neg_entropy", seen) == [1]
    assert taken("left_to_right", view([0.5, 0.95, 0.9], 2)) == [0, 1]
    assert taken("threshold", seen, tau=0.9) == [1, 2] and taken("threshold", seen, tau=1.0) == [1]
    assert taken("threshold", seen, tau=0.0) == [0, 1, 2, 3]
    assert taken("factor", seen, f=1.0) == [1, 2]  # 3 * 0.09 < 1, but 4 * 0.4 > 1
    assert taken("factor", seen, f=0.01) == [1]
    h = [
        math.log(3) * 0 - sum(p * math.log(p) for p in (s, (1 - s) / 2, (1 - s) / 2))
        for s in (0.95, 0.91)
    ]
    assert taken("entropy_bound", seen, g=0.0) == [1]
    assert taken("entropy_bound", seen, g=h[0] + 1e-9) == [1, 2]
    assert taken("entropy_bound", seen, g=sum(h) + 1e-9) == [1, 2, 3]


def test_equal_scores_go_to_the_leftmost_and_closed_slots_are_left_alone():
    seen = view([0.7] * 4, 2)
    seen.open[0, 0] = False
    for name in ("max_prob", "margin", "neg_entropy", "left_to_right"):
        assert taken(name, seen) == [1, 2]
    for name in ("threshold", "factor", "entropy_bound"):
        assert not policies.make_policy(name)(seen)[0, 0]


def test_greedy_factor_finds_the_most_likely_combination():
    """Fast-dLLM's theorem: where (k + 1) (1 - p_k) < 1, the product's mode is the joint's mode."""
    for seed in range(40):
        sharp = random_joint(3, 2, seed) ** 6
        net = tabular.TabularDenoiser(sharp / sharp.sum())
        made = MaskedDiffusion(net, net.mask_id).decode(empty(), 3, policy=policies.factor(1.0))
        if made.nfe == 1:
            assert made.tokens[0].tolist() == net.texts[net.joint.argmax()].tolist()


# --- errors ---------------------------------------------------------------------------------------


@pytest.mark.no_shape_checks
def test_errors_name_the_argument():
    net = small_net()
    engine, prompt = MaskedDiffusion(net, MASK), torch.zeros(1, 2, dtype=torch.long)
    for options, word in [
        (dict(steps=9), "steps: expected 1 .* to 4"),
        (dict(block_len=0), "block_len: expected at least 1"),
        (dict(steps=1, block_len=2), "steps: expected 2"),
        (dict(cache="both"), "cache: expected one of"),
        (dict(policy=lambda seen: torch.zeros_like(seen.open)), "policy: expected at least one"),
    ]:
        with pytest.raises(ValueError, match=word):
            engine.decode(prompt, 4, **options)
    with pytest.raises(ValueError, match="prompt: expected .B, P."):
        engine.decode(prompt[0], 4)
    with pytest.raises(ValueError, match="gen_len"):
        engine.decode(prompt, -1)
    with pytest.raises(TypeError, match="new_cache"):
        MaskedDiffusion(tabular.example(), 2).decode(empty(), 3, cache="prefix")
    with pytest.raises(ValueError, match="free: expected at least one"):
        hide(prompt, MASK, gen(), free=prompt > 0)
    with pytest.raises(ValueError, match="mask_id"):
        MaskedDiffusion(net, -1)
    with pytest.raises(ValueError, match="name: expected one of random"):
        policies.make_policy("best")
    for name, options in [
        ("threshold", {"tau": 2.0}),
        ("factor", {"f": 0.0}),
        ("entropy_bound", {"g": -1.0}),
    ]:
        with pytest.raises(ValueError, match=f"{next(iter(options))}: expected"):
            policies.make_policy(name, **options)
    with pytest.raises(ValueError, match="joint: expected .vocab"):
        tabular.TabularDenoiser(torch.ones(2, 3))
    with pytest.raises(ValueError, match="sum to 1"):
        tabular.TabularDenoiser(torch.ones(2, 2))
