"""A recurrence of pictures: by a scan, by a loop, and pixel by pixel."""

from __future__ import annotations

import doctest

import pytest
import torch
import torch.nn.functional as F

from corelib.measure.races.scans import ConvLSTM
from corelib.state_space import convs5
from corelib.state_space.convs5 import (
    ConvS5Block,
    ConvS5Layer,
    conv_scan_dense,
    join_kernels,
    join_steps,
    torus_conv,
)
from corelib.state_space.s5 import s5_reference

EXACT = dict(atol=1e-11, rtol=1e-9)


def rand(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def layer(make=ConvS5Layer, channels=2, state_size=6, **options):
    torch.manual_seed(0)
    return make(channels, state_size, step_min=0.05, step_max=0.5, **options).double()


def loop(mixer, x, state):
    """The equations, one frame after the other, in complex convolutions."""
    decay, enter, C = mixer.discrete()
    half, outputs = mixer.kernel // 2, []
    for u in x.unbind(1):
        u = F.pad(u, (half,) * 4, mode="circular" if mixer.torus else "constant")
        state = decay[:, None, None] * state + F.conv2d(u.to(enter.dtype), enter)
        around = [half] * 4
        real, imag = (
            F.pad(part, around, mode="circular" if mixer.torus else "constant")
            for part in (state.real, state.imag)
        )
        seen = F.conv2d(torch.complex(real, imag), C)
        outputs.append(2 * seen.real + F.conv2d(u, mixer.D.weight))
    return torch.stack(outputs, 1), state


def test_doctest():
    failures, tests = doctest.testmod(convs5)
    assert tests and not failures


@pytest.mark.parametrize(
    ("L", "kernel", "torus"), [(1, 3, False), (7, 3, True), (20, 3, False), (5, 1, False)]
)
def test_equals_the_loop_with_gradients(L, kernel, torus):
    mixer, x = layer(kernel=kernel, torus=torus), rand(2, L, 2, 4, 5).requires_grad_()
    state = rand(2, 3, 4, 5, seed=1, dtype=torch.complex128).requires_grad_()
    got, after = mixer(x, state)
    wanted, last = loop(mixer, x, state)
    torch.testing.assert_close(got, wanted, **EXACT)
    torch.testing.assert_close(after, last, **EXACT)
    leaves = [x, state, *mixer.parameters()]
    weights = torch.linspace(-1, 2, got.numel(), dtype=torch.float64).view_as(got)
    for a, b in zip(
        torch.autograd.grad((got * weights).sum(), leaves),
        torch.autograd.grad((wanted * weights).sum(), leaves),
        strict=True,
    ):
        torch.testing.assert_close(a, b, **EXACT)


def test_an_s5_on_the_neighbourhood_of_every_pixel():
    """The states are those of S5 on patches; C then sums what the neighbours' states say."""
    mixer, x = layer(), rand(2, 6, 2, 4, 5)
    decay, enter, C = mixer.discrete()
    patches = F.unfold(x.flatten(0, 1), 3, padding=1).unflatten(0, (2, 6))  # (B, L, C 9, H W)
    pixels = patches.permute(0, 3, 1, 2).flatten(0, 1)
    outputs = torch.einsum("cpij->ijcp", C).flatten(0, 2)  # what each pixel tells each neighbour
    told, last = s5_reference(pixels, decay, enter.flatten(1), outputs)
    told = told.view(2, 4, 5, 6, 3, 3, 2).permute(0, 3, 6, 4, 5, 1, 2)  # (B, L, C, i, j, H, W)
    wide = x.new_zeros(2, 6, 2, 6, 7)
    for i in range(3):
        for j in range(3):
            wide[..., 2 - i : 6 - i, 2 - j : 7 - j] += told[..., i, j, :, :]
    direct = F.conv2d(x.flatten(0, 1), mixer.D.weight, padding=1).view_as(x)
    got, state = mixer(x)
    torch.testing.assert_close(got, wide[..., 1:5, 1:6] + direct, **EXACT)
    state = state.permute(0, 2, 3, 1).flatten(0, 2)
    torch.testing.assert_close(state, last, **EXACT)


@pytest.mark.parametrize("make", [ConvS5Layer, ConvS5Block])
def test_pieces_and_steps(make):
    mixer, x = layer(make), rand(2, 9, 2, 4, 5)
    with torch.no_grad():
        whole, after = mixer(x)
        first, state = mixer(x[:, :4])
        second, state = mixer(x[:, 4:8], state)
        last, state = mixer.step(x[:, 8], state)
        torch.testing.assert_close(torch.cat([first, second, last[:, None]], 1), whole, **EXACT)
        torch.testing.assert_close(state, after, **EXACT)
        state = mixer.init_state(2, 4, 5)
        torch.testing.assert_close(mixer.step(x[:, 0], state)[0], whole[:, 0], **EXACT)


def test_no_frame_sees_a_later_one():
    mixer, x = layer(ConvS5Block), rand(1, 6, 2, 4, 4).requires_grad_()
    reached = torch.autograd.grad(mixer(x)[0][:, 3].sum() + mixer(x)[0][:, 3].std(), x)[0]
    assert not reached[:, 4:].any() and reached[:, :4].flatten(2).any(2).all()


def test_moving_the_film_moves_the_answer():
    mixer, x = layer(torus=True), rand(1, 5, 2, 6, 6)
    moved = mixer(x.roll((2, -1), (3, 4)))[0]
    torch.testing.assert_close(moved, mixer(x)[0].roll((2, -1), (3, 4)), **EXACT)
    edges = layer(torus=False)
    assert not torch.allclose(edges(x.roll(2, 3))[0], edges(x)[0].roll(2, 3))


def test_the_convlstm_that_it_is_raced_against():
    """Inputs of all frames in one convolution: the published cell, frame after frame."""
    torch.manual_seed(0)
    cell, x = ConvLSTM(2, 3).double(), rand(2, 4, 2, 4, 5)
    h, c = cell.init_state(2, 4, 5)
    weight = torch.cat([cell.enter.weight, cell.own.weight], 1)
    for u in x.unbind(1):
        gates = F.conv2d(torch.cat([u, h], 1), weight, cell.enter.bias, padding=1)
        i, f, o, g = gates.chunk(4, 1)
        c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
        h = torch.sigmoid(o) * torch.tanh(c)
    got, (last, memory) = cell(x)
    torch.testing.assert_close(last, h, **EXACT)
    torch.testing.assert_close(memory, c, **EXACT)
    torch.testing.assert_close(got[:, -1], cell.leave(h), **EXACT)
    first, state = cell(x[:, :3])
    torch.testing.assert_close(cell.step(x[:, 3], state)[0], got[:, 3], **EXACT)


# --- the dense scan -------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [1, 3, 5])
def test_dense_scan(k):
    """Equal to the loop; the joined kernel has the side 1 + t (k - 1), and does t steps at once."""
    kernels, x = 0.4 * rand(6, 2, 2, k, k), rand(6, 2, 5, 4, seed=1)
    found, state = conv_scan_dense(kernels, x), torch.zeros_like(x[0])
    free = start = rand(2, 5, 4, seed=2)
    for t in range(6):
        state = torus_conv(kernels[t], state) + x[t]
        free = torus_conv(kernels[t], free)
        torch.testing.assert_close(found[t][1], state, **EXACT)
        assert found[t][0].shape[-1] == 1 + (t + 1) * (k - 1)
        torch.testing.assert_close(torus_conv(found[t][0], start), free, **EXACT)


def test_the_operator_is_associative():
    steps = [(rand(2, 2, 3, 3, seed=i), rand(2, 5, 4, seed=9 + i)) for i in range(3)]
    left = join_steps(join_steps(*steps[:2]), steps[2])
    right = join_steps(steps[0], join_steps(*steps[1:]))
    for one, other in zip(left, right):
        torch.testing.assert_close(one, other, **EXACT)


def test_torus_convolution_is_torchs():
    kernel, x = rand(3, 2, 3, 3), rand(2, 5, 4, seed=1)
    wanted = F.conv2d(F.pad(x[None], (1,) * 4, mode="circular"), kernel)[0]
    torch.testing.assert_close(torus_conv(kernel, x), wanted, **EXACT)
    assert join_kernels(kernel.mT[:, :, :1, :1], rand(2, 3, 5, 5)).shape == (2, 2, 5, 5)


def test_one_pixel_is_the_diagonal_scan():
    """A dense 1 x 1 kernel, diagonalised: the same states in other coordinates."""
    V = torch.linalg.qr(rand(3, 3, dtype=torch.complex128))[0]
    decay = 0.9 * torch.exp(1j * torch.tensor([0.3, 1.0, 2.0], dtype=torch.float64))
    A = (V * decay) @ V.mH
    x = rand(7, 3, 4, 4, dtype=torch.complex128)
    dense = torch.stack(
        [h for _, h in conv_scan_dense(A[:, :, None, None].expand(7, 3, 3, 1, 1), x)]
    )
    turned = torch.einsum("pq,lqhw->lphw", V.mH, x).flatten(1)[None]
    h = convs5.diagonal_scan(decay.repeat_interleave(16), turned)[0].view(7, 3, 4, 4)
    torch.testing.assert_close(torch.einsum("pq,lqhw->lphw", V, h), dense, **EXACT)


@pytest.mark.no_shape_checks
def test_wrong_arguments():
    mixer = layer()
    with pytest.raises(
        ValueError, match=r"x: expected \(B, L, 2, H, W\), got shape \(2, 2, 4, 5\)"
    ):
        mixer(rand(2, 2, 4, 5))
    with pytest.raises(ValueError, match=r"x: expected \(B, 2, H, W\), got shape \(2, 3, 4, 5\)"):
        mixer.step(rand(2, 3, 4, 5), mixer.init_state(2, 4, 5))
    with pytest.raises(TypeError, match="x: expected the layer's dtype, torch.float64"):
        mixer(rand(1, 2, 2, 4, 5).float())
    with pytest.raises(ValueError, match="kernel: expected an odd side, got 2"):
        ConvS5Layer(2, 4, 2)
    with pytest.raises(ValueError, match="channels: expected at least 1, got 0"):
        ConvS5Layer(0, 4)
    with pytest.raises(ValueError, match="kernels: expected an odd side, got 2"):
        conv_scan_dense(rand(3, 1, 1, 2, 2), rand(3, 1, 4, 4))
