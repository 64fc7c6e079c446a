"""Mixture of memories: packed against token by token, and each memory against its base layer."""

from __future__ import annotations

import doctest

import pytest
import torch
import torch.nn.functional as F

from corelib.linear_time import mom
from corelib.linear_time.mom import (
    GatedDelta,
    GatedLinear,
    Linear,
    MoM,
    example,
    gather_back,
    plan_memories,
    routed_recurrence,
    routed_recurrence_reference,
    scatter_to_memories,
)
from corelib.primitives import linear_recurrence
from corelib.testing import assert_same, conformance

EXACT = dict(atol=1e-10, rtol=1e-10)
KINDS = ["plain", "scalar", "vector", "delta"]


def random_inputs(kind="delta", B=2, L=41, n=2, M=4, H=2, K=3, V=5):
    """Arguments of `routed_recurrence` by name; two tokens go nowhere, memory 3 is never chosen."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    def uniform(*shape):
        return torch.rand(*shape, generator=generator, dtype=torch.float64)

    experts = uniform(B, L, M - 1).argsort(-1)[..., :n]
    experts[0, :2] = -1
    given = dict(q=normal(B, L, H, K), k=F.normalize(normal(B, L, n, H, K), dim=-1))
    given |= dict(v=normal(B, L, n, H, V), experts=experts, weights=uniform(B, L, n))
    given["state"] = normal(M, B, H, K, V)
    if kind != "plain":
        given["log_decay"] = -uniform(*((B, L, n, H, K) if kind == "vector" else (B, L, n, H)))
    if kind == "delta":
        given["beta"] = uniform(B, L, n, H)
    return given


def with_gradients(form, given):
    leaves = [x.requires_grad_() for x in given.values() if x.is_floating_point()]
    out, state = form(**given)
    total = out.sin().sum() + state.cos().sum()
    return [out, state, *torch.autograd.grad(total, leaves, materialize_grads=True)]


@pytest.mark.parametrize("kind", KINDS)
def test_packed_equals_token_by_token_with_gradients(kind):
    results = [
        with_gradients(form, random_inputs(kind))
        for form in (routed_recurrence, routed_recurrence_reference)
    ]
    for got, wanted in zip(*results, strict=True):
        torch.testing.assert_close(got, wanted, **EXACT)


@pytest.mark.parametrize("sizes", [dict(L=1), dict(B=1, n=1), dict(L=0), dict(L=150, n=3, M=8)])
def test_other_sizes(sizes):
    given = random_inputs(**sizes)
    for a, b in zip(routed_recurrence(**given), routed_recurrence_reference(**given), strict=True):
        torch.testing.assert_close(a, b, **EXACT)


def test_uneven_memories():
    """One memory takes nearly everything: padding would be most of the work, and is not."""
    given = random_inputs(L=200, n=1, M=4)
    given["experts"] = (torch.arange(200) % 50 == 0).long().expand(2, 200)[..., None].clone()
    for a, b in zip(routed_recurrence(**given), routed_recurrence_reference(**given), strict=True):
        torch.testing.assert_close(a, b, **EXACT)


def test_one_memory_is_the_recurrence_itself():
    given = random_inputs(n=1, M=2)
    given["experts"] = torch.zeros_like(given["experts"])
    given["weights"] = torch.ones_like(given["weights"])
    out, state = routed_recurrence(**given)
    heads = {n: given[n][:, :, 0].transpose(1, 2) for n in ("k", "v", "log_decay", "beta")}
    wanted, last = linear_recurrence(
        given["q"].transpose(1, 2), **heads, state=given["state"][0], return_state=True
    )
    torch.testing.assert_close(out, wanted.transpose(1, 2), **EXACT)
    torch.testing.assert_close(state[0], last, **EXACT)
    assert torch.equal(state[1], given["state"][1])


def test_each_memory_is_fla_on_its_own_tokens(fla_naive):
    run = fla_naive("gated_delta_rule", "naive_recurrent_gated_delta_rule")
    given = {
        n: x.float() if x.is_floating_point() else x for n, x in random_inputs("delta").items()
    }
    out, state = routed_recurrence(**given)
    wanted = torch.zeros_like(out)
    for m, b in ((m, b) for m in range(4) for b in range(2)):
        t, j = (given["experts"][b] == m).nonzero(as_tuple=True)
        if not len(t):
            assert torch.equal(state[m, b], given["state"][m, b])
            continue
        own = {n: given[n][b, t, j][None] for n in ("k", "v", "beta")}
        o, last = run(
            given["q"][b, t][None], **own, g=given["log_decay"][b, t, j][None],
            initial_state=given["state"][m, b][None], output_final_state=True,
        )  # fmt: skip
        wanted[b].index_add_(0, t, given["weights"][b, t, j, None, None] * o[0])
        torch.testing.assert_close(state[m, b], last[0], atol=2e-5, rtol=2e-5)
    torch.testing.assert_close(out, wanted, atol=2e-5, rtol=2e-5)


def test_a_memory_sees_nothing_of_tokens_sent_elsewhere():
    """Other tokens may change at will, NaN included: the state stays the same to the last bit."""
    given = random_inputs("delta", n=1)
    _, before = routed_recurrence(**given)
    away = given["experts"][..., 0] != 1
    for name, x in given.items():
        if name not in ("state", "experts"):
            x[away] = torch.nan if name in ("q", "weights") else -1.7
    given["log_decay"][away] = -5.0
    _, after = routed_recurrence(**given)
    assert torch.equal(after[1], before[1]) and not torch.equal(after[0], before[0])


def test_scatter_and_gather_by_hand():
    experts = torch.tensor([[[1, 0], [0, 2], [2, 1]]])
    plan = plan_memories(experts, 3)
    assert plan.cu_seqlens.tolist() == [0, 2, 4, 6]
    x = torch.tensor([[[1.0], [2.0], [3.0]]])
    assert scatter_to_memories(x, plan).flatten().tolist() == [1, 2, 1, 3, 2, 3]
    rows = torch.tensor([10.0, 20, 30, 40, 50, 60])[:, None]
    weights = torch.tensor([[[0.5, 0.5], [1.0, 0.0], [0.25, 0.75]]])
    assert gather_back(rows, plan, weights).flatten().tolist() == [20, 20, 45]


def layer(rule=GatedDelta, **options):
    torch.manual_seed(0)
    options = dict(memories=3, choices=2, heads=2, key_width=3, value_width=4, rule=rule) | options
    return MoM(6, **options).double()


def tokens(L=11, B=2):
    return torch.randn(B, L, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


MIXERS = [
    dict(rule=GatedDelta), dict(rule=GatedLinear), dict(rule=Linear, memories=5),
    dict(rule=GatedDelta, choices=1, shared=False),
]  # fmt: skip


@pytest.mark.parametrize("options", MIXERS)
def test_the_layer_is_a_sequence_mixer(options):
    conformance(layer(**options), tokens(6))


def base_layer(mixer, x):
    """Gated DeltaNet, written down; several memories' answers are added without weights."""
    out = 0
    for write in mixer.write:
        written, step, strength = (x @ write).split([14, 2, 2], -1)
        channels = torch.cat([mixer.q(x), written], -1).mT
        mixed = F.conv1d(F.pad(channels, (3, 0)), mixer.conv[:, None], groups=len(mixer.conv)).mT
        q, k, v = F.silu(mixed).split([6, 6, 8], -1)
        q, k, v = (part.unflatten(-1, (2, -1)).transpose(1, 2) for part in (q, k, v))
        log_decay = -mixer.rule.A_log.exp() * torch.log1p((step + mixer.rule.dt_bias).exp())
        q, k = (part / part.norm(dim=-1, keepdim=True) for part in (q, k))
        options = dict(log_decay=log_decay.mT, beta=torch.sigmoid(strength).mT, form="reference")
        out = out + linear_recurrence(q, k, v, **options).transpose(1, 2)
    out = out / (out.square().mean(-1, keepdim=True) + 1e-5).sqrt() * mixer.norm
    return (out.flatten(2) * F.silu(mixer.gate(x))) @ mixer.out.weight.T


@pytest.mark.parametrize("shared", [False, True])
def test_one_memory_is_the_base_layer_and_a_shared_one_adds_to_it(shared):
    mixer, x = layer(memories=1, choices=1, shared=shared), tokens(37)
    torch.testing.assert_close(mixer(x)[0], base_layer(mixer, x), **EXACT)


@pytest.mark.parametrize("side", ["left", "right", "between"])
def test_masked_tokens_touch_no_state(side):
    """A state that is carried over padding comes out as it went in, and the rest as without."""
    mixer, first, x = layer(), tokens(8), tokens(10)
    _, carried = mixer(first)
    mask = torch.ones(2, 14, dtype=torch.bool)
    mask[:, {"left": [0, 1, 2, 3], "right": [10, 11, 12, 13], "between": [3, 4, 8, 13]}[side]] = 0
    padded = torch.full((2, 14, 6), 1e3, dtype=torch.float64)
    padded[mask] = x.flatten(0, 1)
    y, state = mixer(padded, carried, mask)
    wanted, after = mixer(x, carried)
    torch.testing.assert_close(y[mask], wanted.flatten(0, 1), **EXACT)
    assert_same(state, after)
    y, same = mixer(padded, carried, torch.zeros_like(mask))
    assert not y.any() and all(torch.equal(a, b) for a, b in zip(same, carried, strict=True))


def test_memories_that_are_not_chosen_stay_as_they_are():
    mixer, x = layer(), tokens(1)
    _, before = mixer(tokens(12))
    experts, _ = mixer.route(x)
    _, after = mixer.step(x[:, 0], before)
    for b, m in ((b, m) for b in range(2) for m in range(4)):
        same = torch.equal(after.memory[m, b], before.memory[m, b])
        assert same == (m not in experts[b, 0].tolist())
        same = torch.equal(after.inputs[m, b], before.inputs[m, b])
        assert same == (m not in experts[b, 0].tolist())


def test_the_state_does_not_grow():
    mixer = layer()
    sizes = {sum(x.nbytes for x in mixer(tokens(n))[1]) for n in (1, 30)}
    assert sizes == {4 * 2 * 2 * 3 * 4 * 8 + 4 * 2 * 20 * 3 * 8}


def test_the_balance_loss_moves_the_router():
    mixer = layer(memories=4, choices=1)
    with torch.no_grad():
        mixer.router.weight[0] += 1.0
    x = tokens(50).abs()
    before = mixer.balance_loss(x)
    (grad,) = torch.autograd.grad(before, mixer.router.weight)
    with torch.no_grad():
        mixer.router.weight -= grad
    assert before > 1.5 and mixer.balance_loss(x) < before


def test_example_runs():
    assert not doctest.testmod(mom).failed
    given = example()
    assert given["mixer"](given["x"])[0].isfinite().all()


BAD = {
    "q": (lambda a: a | dict(q=a["q"][:, :3]), "q: expected shape"),
    "k": (lambda a: a | dict(k=a["k"][:, :, :1]), "k: expected shape"),
    "v": (lambda a: a | dict(v=a["v"][:1]), "v: expected shape"),
    "weights": (lambda a: a | dict(weights=a["weights"][..., :1]), "weights: expected shape"),
    "state": (lambda a: a | dict(state=a["state"][:, :, :, :2]), "state: expected shape"),
    "experts": (lambda a: a | dict(experts=a["experts"] + 3), "experts: expected -1 to 3"),
}


@pytest.mark.no_shape_checks
@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_named(case):
    change, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        routed_recurrence(**change(random_inputs()))


@pytest.mark.no_shape_checks
def test_bad_sizes_are_named():
    with pytest.raises(ValueError, match="choices: expected 1 to 3"):
        layer(choices=4)
