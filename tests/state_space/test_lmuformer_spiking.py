"""The spiking model: spikes, causality, the stream."""

import doctest

import pytest
import torch

from corelib.primitives.spiking_scan import spiking_scan_reference
from corelib.state_space import lmuformer_spiking
from corelib.state_space.lmuformer_spiking import (
    LIF,
    SpikingLMU,
    SpikingLMUFormer,
    example,
    firing_rates,
)
from corelib.testing import assert_same, conformance

pytestmark = pytest.mark.method("lmuformer")
LEAK = 1e-11


def rand(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def model(depth=1):
    """With batch norms that let neurons fire."""
    torch.manual_seed(0)
    made = SpikingLMUFormer(3, 4, 6, depth=depth, theta=7.0, gain=2.0).double()
    with torch.no_grad():
        for layer in made.modules():
            if isinstance(layer, torch.nn.BatchNorm1d):
                layer.momentum = 1.0
        made(2 * rand(8, 12, 3))
    return made.eval()


def test_doctest():
    failures, tests = doctest.testmod(lmuformer_spiking)
    assert tests and not failures


@pytest.mark.parametrize("make", [lambda: LIF(4, tau=3.0, threshold=0.3), lambda: SpikingLMU(4)])
def test_conformance(make):
    torch.manual_seed(2)
    mixer = make().double()
    for layer in mixer.modules():
        if isinstance(layer, LIF):
            layer.threshold = 0.1  # some neurons of every layer fire
    conformance(mixer, 3 * rand(2, 9, 4), leak=LEAK)


def test_conformance_of_the_block():
    given = example()
    conformance(given["mixer"], given["x"], leak=LEAK)


def test_spikes_are_zeros_and_ones_everywhere():
    made, seen = model(depth=2), []
    for layer in made.modules():
        if isinstance(layer, LIF):
            layer.register_forward_hook(lambda layer, given, result: seen.append(result[0]))
    made(2 * rand(2, 12, 3))
    assert len(seen) == 4 + 2 * 6 + 1
    for spikes in seen:
        assert ((spikes == 0) | (spikes == 1)).all()
    assert 0 < torch.cat([s.flatten() for s in seen]).mean() < 1


def test_neurons_are_the_loops():
    x = rand(2, 9, 4)
    got, end = LIF(4, tau=3.0, threshold=0.4)(x)
    wanted = spiking_scan_reference(x, tau=3.0, threshold=0.4)
    assert torch.equal(got, wanted[0])
    assert_same(end, wanted[1])


def test_the_future_changes_no_earlier_spike():
    made, x = model(), 2 * rand(1, 12, 3)
    later = x.clone()
    later[:, 7:] += 3
    with torch.no_grad():
        before, after = made.prefix_logits(x), made.prefix_logits(later)
    assert_same(before[:, :7], after[:, :7])
    assert not torch.equal(before[:, 7:], after[:, 7:])


def test_model_as_a_stream():
    made, x = model(depth=2), 2 * rand(2, 12, 3)
    with torch.no_grad():
        whole, state = made.prefix_logits(x), made.init_state(2)
        for t, x_t in enumerate(x.unbind(1)):
            logits, state = made.step(x_t, state)
            assert_same(logits, whole[:, t], what=f"position {t}")
        assert_same(made(x), whole[:, -1])


def test_every_parameter_learns():
    made = model().train()
    loss = made(2 * rand(4, 12, 3)).square().mean()
    for gradient in torch.autograd.grad(loss, list(made.parameters())):
        assert gradient.isfinite().all()


def test_a_larger_gain_makes_neurons_fire_more_often():
    rates = []
    for gain in (1.0, 2.0):
        torch.manual_seed(0)
        made = SpikingLMUFormer(3, 4, 6, theta=7.0, gain=gain).double()
        found = firing_rates(made, 2 * rand(8, 12, 3))
        rates.append(sum(found.values()) / len(found))
    assert 0.02 < rates[0] < 0.1 and rates[1] > 2 * rates[0]


def test_firing_rates():
    made, x = model(), 2 * rand(2, 12, 3)
    rates = firing_rates(made, x)
    assert len(rates) == 11 and all(0 <= rate <= 1 for rate in rates.values())
    assert firing_rates(LIF(3), torch.full((1, 4, 3), 9.0)) == {"": 1.0}
    assert not any(layer._forward_hooks for layer in made.modules())
