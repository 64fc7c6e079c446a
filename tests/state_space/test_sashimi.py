"""SaShiMi: causal across tiers, one model in parallel and step by step, stable by its form."""

import doctest

import pytest
import torch

from corelib.state_space import sashimi
from corelib.state_space.pooling import DownPool, Pooled, UpPool
from corelib.state_space.s4 import S4Block
from corelib.state_space.sashimi import (
    SaShiMi,
    Tier,
    TwoSidedTier,
    example,
    runs_per_sample,
)
from corelib.testing import causality_probe, conformance

EXACT = dict(atol=1e-10, rtol=1e-10)
SMALL = dict(blocks=1, state_size=4, length=12)


def rand(*shape, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, dtype=torch.float64, generator=generator)


def small_model(levels=11, pools=(2, 2)):
    torch.manual_seed(0)
    return SaShiMi(levels, 4, pools, **SMALL).double()


def codes(*shape, levels=11):
    return torch.randint(levels, shape, generator=torch.Generator().manual_seed(2))


def loop(x):
    """A mixer without rounding across positions: what reaches where is then exact."""
    return Pooled(Running(2 * x.shape[-1]), x.shape[-1], 3, 2).double()


class Running(torch.nn.Module):
    """``y[t] = w (x[0] + ... + x[t])``, the smallest sequence mixer."""

    def __init__(self, channels):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.linspace(0.5, 1.5, channels))

    def forward(self, x, state=None):
        state = x.new_zeros(x.shape[0], x.shape[2]) if state is None else state
        total = x.cumsum(1) + state[:, None]
        return total * self.weight, total[:, -1]

    def step(self, x_t, state):
        return (state + x_t) * self.weight, state + x_t

    def init_state(self, batch):
        return self.weight.new_zeros(batch, len(self.weight))


def test_doctest():
    failures, tests = doctest.testmod(sashimi)
    assert tests and not failures


def test_down_and_up_by_hand():
    torch.manual_seed(0)
    down, up, x = DownPool(2, 3, 2).double(), UpPool(2, 3, 2).double(), rand(1, 6, 2)
    z = down(x)
    wanted = down.linear.weight @ x[0, 3:].flatten() + down.linear.bias
    torch.testing.assert_close(z[0, 1], wanted, **EXACT)
    y = up(z)
    assert y.shape == x.shape and not y[:, :3].any()
    wanted = (up.linear.weight @ z[0, 0] + up.linear.bias).view(3, 2)
    torch.testing.assert_close(y[0, 3:], wanted, **EXACT)
    torch.testing.assert_close(up.spread(z)[:, :3], y[:, 3:], **EXACT)


@pytest.mark.parametrize("L", [1, 2, 3, 7, 12])
def test_pooled_is_down_inner_up_on_the_padded_sequence(L):
    torch.manual_seed(0)
    x = rand(2, L, 2)
    layer = loop(x)
    padded = torch.nn.functional.pad(x, (0, 0, 0, -L % 3))
    wanted = layer.up(layer.inner(layer.down(padded))[0])[:, :L]
    torch.testing.assert_close(layer(x)[0], wanted, **EXACT)


@pytest.mark.parametrize("pool", [1, 2, 3])
def test_conformance_of_pooling(pool):
    torch.manual_seed(0)
    conformance(Pooled(Running(4), 2, pool, 2).double(), rand(2, 11, 2))


@pytest.mark.parametrize("pools", [(), (3,)])
def test_conformance_of_tiers(pools):
    torch.manual_seed(0)
    conformance(Tier(2, pools, **SMALL).double(), rand(2, 8, 2), tolerance=1e-6, leak=1e-10)


def test_conformance_of_the_example():
    given = example()
    conformance(given["mixer"], given["x"], tolerance=1e-6, leak=1e-10)


def test_jacobian_to_later_inputs_is_exactly_zero_and_the_shift_is_why():
    """The must-hold, where no FFT rounds: exactly 0 with the shift, not without."""
    torch.manual_seed(0)
    x = rand(1, 12, 2)
    layer = loop(x)
    influence = causality_probe(lambda x: layer(x)[0], x)
    assert (influence.triu(1) == 0).all() and (influence[3:, 0] > 0).all()
    dropped = causality_probe(lambda x: layer.up.spread(layer.inner(layer.down(x))[0]), x)
    assert (dropped[0, 1:3] > 0).all() and (dropped[0, 3:] == 0).all()


def test_jacobian_of_the_whole_model_stepped_is_exactly_zero():
    """Through S4 itself, in its recurrent form, which has no FFT to round."""
    model = small_model()
    mixer, x = model.body, rand(1, 7, 4)

    def stepped(x):
        state, outputs = mixer.init_state(1), []
        for x_t in x.unbind(1):
            y, state = mixer.step(x_t, state)
            outputs.append(y)
        return torch.stack(outputs, 1)

    influence = causality_probe(stepped, x)
    assert (influence.triu(1) == 0).all() and (influence.diagonal() > 0).all()
    torch.testing.assert_close(
        influence, causality_probe(lambda x: mixer(x)[0], x), atol=1e-8, rtol=0
    )


def test_dropping_the_shift_of_the_whole_model_lets_the_future_in(monkeypatch):
    def leaking(self, x, state=None):
        return self.up.spread(self.inner(self.down(x))[0]), None

    mixer, x = small_model().body, rand(1, 8, 4)
    assert causality_probe(lambda x: mixer(x)[0], x).triu(1).max() < 1e-10
    monkeypatch.setattr(Pooled, "forward", leaking)
    assert causality_probe(lambda x: mixer(x)[0], x).triu(1).max() > 1e-3


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_step_equals_parallel(dtype):
    """The must-hold: to 1e-5, in float32 too."""
    model, ids = small_model().to(dtype), codes(2, 23)
    whole, _ = model(ids)
    state, logits = model.init_state(2), []
    for ids_t in ids.unbind(1):
        y, state = model.step(ids_t, state)
        logits.append(y)
    tolerance = 1e-5 if dtype == torch.float32 else 1e-9
    torch.testing.assert_close(torch.stack(logits, 1), whole, atol=tolerance, rtol=tolerance)


def test_generate_equals_reading_everything_again():
    model, prompt = small_model(), codes(2, 5)
    made = model.generate(prompt, 6, chooser=lambda probs: probs.argmax(-1))
    ids = prompt
    for _ in range(6):
        ids = torch.cat([ids, model(ids)[0][:, -1:].argmax(-1)], 1)
    assert torch.equal(made, ids[:, 5:])


def test_generate_asks_the_chooser_for_every_code():
    seen = []

    def chooser(probs):
        seen.append(probs)
        return torch.full(probs.shape[:-1], len(seen))

    made = small_model().generate(codes(2, 3), 4, chooser=chooser)
    assert made.tolist() == [[1, 2, 3, 4]] * 2
    for probs in seen:
        torch.testing.assert_close(probs.sum(-1), torch.ones(2, dtype=torch.float64))


def test_a_tier_of_stride_p_runs_every_p_steps(monkeypatch):
    model, runs = small_model(pools=(2, 3)), []
    step = S4Block.step
    monkeypatch.setattr(
        S4Block, "step", lambda self, x, state: runs.append(x.shape[-1]) or step(self, x, state)
    )
    state = model.init_state(1)
    for ids_t in codes(12, 1):
        _, state = model.step(ids_t, state)
    assert [runs.count(width) for width in (4, 8, 16)] == [12, 6, 2]
    assert runs_per_sample((2, 3)) == [1, 1 / 2, 1 / 6]


def test_sizes_of_the_paper():
    torch.manual_seed(0)
    model = SaShiMi(blocks=1, state_size=4, length=64)
    widths = [m.channels for m in model.modules() if type(m).__name__ == "S4"]
    assert sorted(widths) == [64, 128, 256]
    assert model(codes(1, 3, levels=256))[0].shape == (1, 3, 256)
    pooled = [m for m in model.modules() if isinstance(m, DownPool)]
    assert [tuple(m.linear.weight.shape) for m in pooled] == [(128, 256), (256, 512)]


@pytest.mark.parametrize("L", [1, 7])
def test_two_sides_see_everything(L):
    torch.manual_seed(0)
    tier = TwoSidedTier(2, (2,), **SMALL).double()
    x = rand(1, L, 2)
    influence = causality_probe(tier, x)
    assert (influence > 0).all()
    grads = torch.autograd.grad(tier(x).square().sum(), list(tier.parameters()), allow_unused=True)
    assert all(grad is not None for grad in grads)


def test_two_sides_turned_around():
    """Past and future swapped in every layer, and pooling mirrored: the mirrored output."""
    torch.manual_seed(0)
    tier, x = TwoSidedTier(2, (), **SMALL).double(), rand(1, 9, 2)
    y = tier(x)
    mixer = tier.blocks[0].mix.mixer
    with torch.no_grad():
        kernels = mixer.past.kernel(9), mixer.future.kernel(9)
    wanted = torch.zeros_like(x)
    z = tier.blocks[0].mix.norm(x)
    for t in range(9):
        for s in range(9):
            tap = kernels[0][:, t - s] if s <= t else kernels[1][:, s - t - 1]
            wanted[:, t] = wanted[:, t] + tap * z[:, s]
    wanted = x + tier.blocks[0].mix.gated(wanted + mixer.past.skip * z)
    wanted = x + wanted + tier.blocks[0].feed(wanted)
    torch.testing.assert_close(y, wanted, **EXACT)


@pytest.mark.no_shape_checks
@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: DownPool(2, 0), "pool: expected at least 1, got 0"),
        (lambda: DownPool(2, 3)(torch.zeros(1, 4, 2)), "x: expected a length divisible by 3"),
        (lambda: Tier(2, (), blocks=0), "blocks: expected at least 1, got 0"),
        (lambda: small_model()(codes(3)), r"ids: expected \(B, L\), got shape \(3,\)"),
        (
            lambda: small_model().generate(codes(1, 0), 3, chooser=None),
            "prompt, count: expected at least one code each, got 0 and 3",
        ),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
