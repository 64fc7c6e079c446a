"""S5: one system for all channels, by a scan, with resets."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from corelib.state_space.s5 import S5Block, S5Layer, S5System, s5_reference
from corelib.state_space.shared import dplr_legs, parameter_groups
from corelib.testing import conformance

pytestmark = pytest.mark.method("s5_rl")
EXACT = dict(atol=1e-12, rtol=1e-10)


def layer(channels=3, state_size=8, **options):
    torch.manual_seed(0)
    return S5Layer(channels, state_size, step_min=0.05, step_max=0.5, **options).double()


def inputs(B=2, L=13, C=3, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(B, L, C, generator=g, dtype=torch.float64), torch.rand(
        B, L, generator=g
    ) < 0.3


@pytest.mark.parametrize("L", [1, 2, 13, 40])
@pytest.mark.parametrize("resetting", [False, True])
def test_equals_the_loop_with_gradients(L, resetting):
    mixer, (x, resets) = layer(), inputs(L=L)
    resets = resets if resetting else None
    x.requires_grad_()
    state = torch.randn(2, 4, dtype=torch.complex128, requires_grad=True)
    decay, enter, C = mixer.discrete()
    wanted, last = s5_reference(x, decay, enter, C, resets=resets, state=state)
    wanted = wanted + mixer.skip * x
    got, after = mixer(x, state, resets)
    torch.testing.assert_close(got, wanted, **EXACT)
    torch.testing.assert_close(after, last, **EXACT)
    weights = torch.linspace(-1, 2, got.numel(), dtype=torch.float64).view_as(got)
    leaves = [x, state, *mixer.parameters()]
    for a, b in zip(
        torch.autograd.grad((got * weights).sum(), leaves, retain_graph=True),
        torch.autograd.grad((wanted * weights).sum(), leaves),
        strict=True,
    ):
        torch.testing.assert_close(a, b, **EXACT)


def test_the_dense_system_in_scipy():
    """The same layer as a real system of N states with many inputs and outputs."""
    signal = pytest.importorskip("scipy.signal")
    mixer, (x, _) = layer(), inputs(B=1, L=20)
    with torch.no_grad():
        decay, enter, C = (y.numpy() for y in mixer.discrete())
        got = mixer(x)[0][0].numpy()
    A = np.diag(np.concatenate([decay, decay.conj()]))
    B, C = np.concatenate([enter, enter.conj()]), np.concatenate([C, C.conj()], 1)
    turn = np.kron([[1, 1], [1j, -1j]], np.eye(4)) / 2  # real and imaginary parts as states
    A, B, C = turn @ A @ np.linalg.inv(turn), turn @ B, C @ np.linalg.inv(turn)
    assert max(np.abs(y.imag).max() for y in (A, B, C)) < 1e-12
    # scipy reads the state before the step: y = C (A x + B u) + D u
    A, B, C = A.real, B.real, C.real
    D = C @ B + np.diag(mixer.skip.detach().numpy())
    _, wanted, _ = signal.dlsim((A, B, C @ A, D, 1.0), x[0].numpy())
    np.testing.assert_allclose(got, wanted, atol=1e-12)


@pytest.mark.parametrize("make", [S5Layer, S5Block])
def test_conformance(make):
    torch.manual_seed(0)
    mixer = make(3, 6, step_min=0.05, step_max=0.5).double()
    conformance(mixer, inputs(L=9)[0])


def test_steps_take_resets_too():
    mixer, (x, resets) = layer(), inputs()
    state, y = mixer.init_state(2), []
    for t in range(x.shape[1]):
        out, state = mixer.step(x[:, t], state, resets[:, t])
        y.append(out)
    whole, after = mixer(x, None, resets)
    torch.testing.assert_close(torch.stack(y, 1), whole, **EXACT)
    torch.testing.assert_close(state, after, **EXACT)


def test_poles_start_at_hippo_n_and_stay_stable():
    system = S5System(16).double()
    poles = torch.complex(-system.log_rate.exp(), system.frequency)
    torch.testing.assert_close(poles, dplr_legs(16).poles, atol=1e-5, rtol=1e-5)
    system.log_rate.data.fill_(3.0)
    system.log_step.data.fill_(1.0)
    assert bool((system.discrete()[0].abs() < 1).all())


def test_the_start_has_the_law_of_turned_gaussians():
    """V* B for a real Gaussian B: a complex Gaussian, circular, of the same variance."""
    torch.manual_seed(0)
    B = torch.view_as_complex(S5Layer(64, 128).B.detach())
    assert 0.9 < 64 * B.abs().square().mean().item() < 1.1
    assert abs(64 * (B * B).mean().item()) < 0.1


def test_an_empty_stretch():
    mixer, (x, _) = layer(), inputs()
    y, state = mixer(x[:, :0])
    assert y.shape == (2, 0, 3) and not state.any()


def test_the_system_learns_slowly():
    groups = parameter_groups(S5Block(3, 6), 1e-2)
    assert len(groups[1]["params"]) == 4 and groups[1]["lr"] == 1e-3


@pytest.mark.no_shape_checks
def test_wrong_arguments():
    mixer, (x, _) = layer(), inputs()
    with pytest.raises(ValueError, match=r"x: expected \(B, L, 3\), got shape \(2, 3\)"):
        mixer(x[:, 0])
    with pytest.raises(ValueError, match=r"x: expected \(B, 3\), got shape \(2, 13, 3\)"):
        mixer.step(x, mixer.init_state(2))
    with pytest.raises(TypeError, match="x: expected the layer's dtype, torch.float64, got"):
        mixer(x.float())
    with pytest.raises(ValueError, match=r"reset: expected booleans of shape \(2, 13\)"):
        mixer(x, None, torch.zeros(2, 12, dtype=torch.bool))
    with pytest.raises(ValueError, match="channels: expected at least 1, got 0"):
        S5Layer(0)
    with pytest.raises(ValueError, match="N: expected an even size"):
        S5Layer(2, 5)
    with pytest.raises(ValueError, match="step_min, step_max: expected 0 < step_min"):
        S5Layer(2, 4, step_min=0.0)
