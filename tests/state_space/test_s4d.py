"""S4D: convolution, recurrence and pieces are one thing, and the one scipy computes."""

import pytest
import torch

from corelib.primitives import diagonal_scan
from corelib.state_space.ptd import ptd_legs
from corelib.state_space.s4d import S4D, Diagonal, s4d_legs, s4d_lin
from corelib.testing import conformance

EXACT = dict(atol=1e-10, rtol=1e-10)


def layer(channels=3, N=8, **options):
    torch.manual_seed(0)
    options = dict(step_min=0.05, step_max=0.5) | options
    return S4D(channels, N, **options).double()


def rand(*shape):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("start", [None, s4d_lin(8), ptd_legs(8, 0.1)])
def test_conformance(start):
    conformance(layer(start=start), rand(2, 9, 3), leak=1e-12)


def test_length_one_and_odd_lengths_in_float32():
    torch.manual_seed(0)
    mixer = S4D(3, 8)
    conformance(mixer, rand(2, 7, 3).float(), tolerance=1e-5, leak=1e-5)


def test_equals_the_scan():
    """Independent of the kernel: the recurrence over all poles at once."""
    mixer, x = layer(), rand(2, 33, 3)
    with torch.no_grad():
        _, decay, enter, C = mixer.discrete()
        entered = (enter * x[..., None]).flatten(2)
        states = diagonal_scan(decay.flatten(), entered).unflatten(2, decay.shape)
        wanted = 2 * (C * states).real.sum(-1) + mixer.skip * x
        got, state = mixer(x)
    torch.testing.assert_close(got, wanted, **EXACT)
    torch.testing.assert_close(state.x, states[:, -1], **EXACT)


def test_equals_scipy():
    """The dense real system of a channel, discretised and run by scipy."""
    signal = pytest.importorskip("scipy.signal")
    mixer, x = layer(channels=1, N=6), rand(1, 25, 1)
    with torch.no_grad():
        poles, B, C = (y[0].detach() for y in mixer.system())
        got = mixer(x)[0][0, :, 0]
        step = mixer.log_step.exp().item()
    a, b = torch.diag(poles.real), torch.diag(poles.imag)
    A = torch.cat([torch.cat([a, -b], 1), torch.cat([b, a], 1)], 0)
    B, C = torch.cat([B.real, B.imag])[:, None], 2 * torch.cat([C.real, -C.imag])[None]
    dense = *(y.numpy() for y in (A, B, C)), [[0.0]]
    A_bar, B_bar, *_ = signal.cont2discrete(dense, step, "zoh")
    # scipy's states are one step behind: its y[t] = C x[t] + D u[t] with x[t + 1] = A_bar x[t] + …
    skip = dense[2] @ B_bar + mixer.skip.item()
    _, wanted, _ = signal.dlsim((A_bar, B_bar, dense[2] @ A_bar, skip, step), x[0].numpy())
    torch.testing.assert_close(got, torch.from_numpy(wanted[:, 0]), **EXACT)


def test_gradients_through_a_carried_state():
    """Training on pieces: the same gradients as on the whole."""
    mixer, x = layer(), rand(2, 12, 3)
    parameters = list(mixer.parameters())
    whole = torch.autograd.grad(mixer(x)[0].square().sum(), parameters)
    first, state = mixer(x[:, :5])
    last, _ = mixer(x[:, 5:], state)
    pieces = torch.autograd.grad(torch.cat([first, last], 1).square().sum(), parameters)
    for got, wanted in zip(pieces, whole):
        torch.testing.assert_close(got, wanted, atol=1e-8, rtol=1e-8)


def test_legs_drops_the_rank_one_part():
    from corelib.state_space.shared import dplr_legs

    start, system = s4d_legs(8), dplr_legs(8)
    assert torch.equal(start.poles, system.poles) and torch.equal(2 * start.B, system.B)
    assert start.basis is None


def test_lin_is_evenly_spaced():
    poles = s4d_lin(8).poles
    torch.testing.assert_close(poles.imag.diff(), torch.full((3,), torch.pi, dtype=torch.float64))


def test_an_empty_stretch():
    mixer = layer()
    y, state = mixer(rand(2, 4, 3))
    y, after = mixer(rand(2, 0, 3), state)
    assert y.shape == (2, 0, 3)
    torch.testing.assert_close(after.x, state.x)


UNSTABLE = Diagonal(torch.zeros(2, dtype=torch.complex128), torch.ones(2, dtype=torch.complex128))


@pytest.mark.no_shape_checks
@pytest.mark.parametrize(
    ("run", "error", "message"),
    [
        (lambda: S4D(0), ValueError, "channels: expected at least 1"),
        (lambda: S4D(1, 4, step_min=0.0), ValueError, "step_min, step_max: expected 0 <"),
        (lambda: S4D(1, start=UNSTABLE), ValueError, "start: expected poles with negative"),
        (lambda: s4d_lin(3), ValueError, "N: expected an even size"),
        (lambda: s4d_legs(3), ValueError, "N: expected an even size"),
        (lambda: layer()(rand(2, 4, 2)), ValueError, r"x: expected \(B, L, 3\)"),
        (lambda: layer()(rand(2, 4, 3).float()), TypeError, "x: expected the layer's dtype"),
        (lambda: layer().step(rand(2, 4, 3), None), ValueError, r"x: expected \(B, 3\)"),
    ],
)
def test_bad_input_is_named(run, error, message):
    with pytest.raises(error, match=message):
        run()
