"""SGConv: the kernel against numpy's interpolation, the layer against sums as they stand."""

from __future__ import annotations

import doctest
import math

import numpy
import pytest
import torch
from scipy import signal

from corelib.linear_time import sgconv
from corelib.linear_time.sgconv import (
    SGConv,
    example,
    piece_count,
    sgconv_kernel,
    sgconv_kernel_reference,
    sgconv_kernel_sum,
)
from corelib.linear_time.shared import TwoSided
from corelib.primitives import direct_conv_reference, fft_conv
from corelib.testing import causality_probe, conformance

EXACT = dict(atol=1e-10, rtol=1e-10)
double = torch.float64


def random_pieces(count=4, C=3, k0=5):
    return torch.randn(count, C, k0, generator=torch.Generator().manual_seed(0)).double()


def stretched(row, factor):
    """A row of taps, ``factor`` times as long, by numpy."""
    places = (numpy.arange(factor * len(row)) + 0.5) / factor - 0.5
    return numpy.interp(places, numpy.arange(len(row)), row)


def random_layer(channels=3, l_max=20, k0=4, **options):
    torch.manual_seed(0)
    layer = SGConv(channels, l_max, k0=k0, **options).double()
    x = torch.randn(2, 13, channels, dtype=double)
    return layer, x


@pytest.mark.parametrize("decay", [1.0, 2.0, 1.5])
def test_kernel_is_numpys_interpolation_piece_by_piece(decay):
    pieces = random_pieces()
    kernel = sgconv_kernel(pieces, 40, decay)
    for c in range(3):
        rows = [
            decay ** (3 - i) * stretched(piece[c].numpy(), 2 ** max(0, i - 1))
            for i, piece in enumerate(pieces)
        ]
        torch.testing.assert_close(kernel[c], torch.from_numpy(numpy.concatenate(rows)), **EXACT)


@pytest.mark.parametrize("k0", [1, 2, 5])
@pytest.mark.parametrize("L", [1, 2, 5, 6, 10, 11, 17, 39, 40, 60])
def test_kernel_equals_its_reference_at_every_length(L, k0):
    pieces, decay = random_pieces(k0=k0), torch.tensor([2.0, 1.0, 3.0], dtype=double)
    wanted = sgconv_kernel_reference(pieces, L, decay)
    assert wanted.shape == (3, L)
    torch.testing.assert_close(sgconv_kernel(pieces, L, decay), wanted, **EXACT)
    # cropping is cropping: the pieces that are left out or cut short change no tap before
    whole = sgconv_kernel(pieces, 100, decay)[:, :L]
    torch.testing.assert_close(sgconv_kernel(pieces, L, decay), whole, **EXACT)


@pytest.mark.parametrize("L", [1, 7, 40, 50])
def test_sum_form_by_numpy(L):
    pieces, wanted = random_pieces(), torch.zeros(3, 100, dtype=double)
    for i, piece in enumerate(pieces):
        for c in range(3):
            row = 2.0 ** (3 - i) * stretched(piece[c].numpy(), 2**i)
            wanted[c, : len(row)] += torch.from_numpy(row)
    torch.testing.assert_close(sgconv_kernel_sum(pieces, L), wanted[:, :L], **EXACT)


@pytest.mark.parametrize("form", [sgconv_kernel, sgconv_kernel_reference, sgconv_kernel_sum])
def test_kernel_gradients(form):
    pieces = random_pieces(count=3, C=2, k0=3).requires_grad_()
    assert torch.autograd.gradcheck(lambda p: form(p, 10, 2.0), pieces)


@pytest.mark.parametrize("k0", [1, 4, 64])
@pytest.mark.parametrize("L", [1, 3, 64, 65, 1000, 4096])
def test_pieces_reach_over_the_length_and_no_piece_is_idle(L, k0):
    count = piece_count(L, k0)
    assert count == max(1, 1 + math.ceil(math.log2(L / k0)))
    assert k0 * 2 ** (count - 1) >= L and (count == 1 or k0 * 2 ** (count - 2) < L)


def test_parameters_grow_by_one_piece_a_doubling():
    sizes = [SGConv(3, 8 * 2**n, k0=8).pieces.numel() for n in range(5)]
    assert sizes == [3 * 8 * (n + 1) for n in range(5)]


@pytest.mark.parametrize("decay", [2.0, 1.0])
def test_later_pieces_are_smaller_before_the_norm(decay):
    torch.manual_seed(0)
    layer = SGConv(200, 512, k0=16, decay=decay).double()
    kernel = layer.kernel(512) * layer.norm
    edges = [0, 16, 32, 64, 128, 256, 512]
    rms = torch.stack([kernel[:, a:b].square().mean().sqrt() for a, b in zip(edges, edges[1:])])
    ratios = rms[1:] / rms[:-1]
    if decay == 2.0:
        assert (ratios < 0.6).all()
    else:  # nothing but what interpolation takes: at most 1 - sqrt(5/8) in all
        assert (rms / rms[0] > math.sqrt(5 / 8) - 0.02).all() and (rms / rms[0] < 1.02).all()


def test_the_norm_is_one_at_the_start_and_stays():
    layer, x = random_layer(l_max=30)
    torch.testing.assert_close(
        layer.kernel(1000).norm(dim=1), torch.ones(3).double(), atol=1e-6, rtol=0
    )
    assert layer.taps == 32 and layer.kernel(1000).shape == (3, 32)
    before = layer.norm.clone()
    with torch.no_grad():
        layer.pieces.mul_(3)
        layer(x)
    assert torch.equal(layer.norm, before)
    torch.testing.assert_close(
        layer.kernel(32).norm(dim=1), 3 * torch.ones(3).double(), atol=1e-6, rtol=0
    )


@pytest.mark.parametrize("L", [1, 13, 32, 45])
def test_layer_by_hand(L):
    """Longer than the kernel too: what lies further back is not seen."""
    layer, _ = random_layer(l_max=30)
    x = torch.randn(2, L, 3, dtype=double)
    kernel, wanted = layer.kernel(32).detach().numpy(), torch.zeros(2, L, 3, dtype=double)
    for b in range(2):
        for c in range(3):
            wanted[b, :, c] = torch.from_numpy(
                signal.fftconvolve(x[b, :, c].numpy(), kernel[c])[:L]
            )
    wanted = torch.nn.functional.gelu(wanted + layer.skip * x) @ layer.out.weight.T + layer.out.bias
    torch.testing.assert_close(layer(x)[0], wanted, **EXACT)


def test_fft_convolution_is_the_direct_one():
    layer, x = random_layer()
    u, kernel = x.transpose(1, 2), layer.kernel(13)
    torch.testing.assert_close(fft_conv(u, kernel), direct_conv_reference(u, kernel), **EXACT)


@pytest.mark.parametrize("l_max", [1, 6, 20])
def test_the_layer_is_a_sequence_mixer(l_max):
    """With a kernel shorter than the sequence as well: the state stops growing."""
    layer, x = random_layer(l_max=l_max, k0=3, decay=torch.tensor([1.0, 2.0, 3.0]))
    conformance(layer, x, leak=1e-12)


def test_the_state_is_what_the_kernel_reaches():
    layer, x = random_layer(l_max=6, k0=3)
    assert layer.taps == 6
    state, sizes = layer.init_state(2), []
    for x_t in x.unbind(1):
        _, state = layer.step(x_t, state)
        sizes.append(state.inputs.shape[-1])
    assert sizes[:6] == [1, 2, 3, 4, 5, 5] and max(sizes) == 5
    assert torch.equal(state.inputs, x[:, -5:].transpose(1, 2))
    assert torch.equal(layer(x)[1].inputs, state.inputs)
    y, same = layer(x[:, :0], state)
    assert y.shape == (2, 0, 3) and torch.equal(same.inputs, state.inputs)


def test_a_stretch_after_a_step_takes_new_parameters():
    layer, x = random_layer()
    _, state = layer.step(x[:, 0], layer.init_state(2))
    with torch.no_grad():
        layer.pieces.mul_(2)
        y, state = layer(x[:, 1:5], state)
        last, _ = layer.step(x[:, 5], state)
        torch.testing.assert_close(torch.cat([y, last[:, None]], 1), layer(x)[0][:, 1:6], **EXACT)


def test_both_directions_as_released():
    torch.manual_seed(0)
    layer = TwoSided(SGConv, 3, 9, k0=2).double()
    x, past, future = torch.randn(2, 9, 3, dtype=double), layer.past, layer.future
    u, L = x.transpose(1, 2), 9
    pad = torch.nn.functional.pad
    kernel = pad(past.kernel(L), (0, L)) + pad(future.kernel(L).flip(-1), (L, 0))
    spectrum = torch.fft.rfft(u, n=2 * L) * torch.fft.rfft(kernel, n=2 * L)
    y = torch.fft.irfft(spectrum, n=2 * L)[..., :L].transpose(1, 2) + past.skip * x
    torch.testing.assert_close(layer(x), past.mix(y), **EXACT)
    assert (causality_probe(layer, x) > 1e-9).all(), "everything sees everything"
    names = {name for name, _ in layer.named_parameters()}
    assert "future.pieces" in names and not {"future.skip", "future.out.weight"} & names
    assert layer(x[:, :0]).shape == (2, 0, 3)


def test_half_precision_stays_close():
    layer, x = random_layer()
    wanted = layer(x)[0]
    got = layer.bfloat16()(x.bfloat16())[0]
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got.double(), wanted, atol=5e-2, rtol=5e-2)


def test_example_runs():
    assert not doctest.testmod(sgconv).failed
    wanted = sgconv_kernel_reference(**example())
    torch.testing.assert_close(sgconv_kernel(**example()), wanted)


BAD = {
    "pieces": (lambda a: a | dict(pieces=a["pieces"][0]), r"pieces: expected \(count, C, k0\)"),
    "L": (lambda a: a | dict(L=0), "L: expected a whole number"),
    "decay": (lambda a: a | dict(decay=-1.0), "decay: expected numbers above 0"),
    "decays": (
        lambda a: a | dict(decay=torch.ones(3)),
        r"decay: expected a number or shape \(2,\)",
    ),
}


@pytest.mark.no_shape_checks
@pytest.mark.parametrize("form", [sgconv_kernel, sgconv_kernel_reference, sgconv_kernel_sum])
@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_named(case, form):
    change, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        form(**change(example()))


@pytest.mark.no_shape_checks
def test_bad_layers_are_named():
    for arguments, message in (
        (dict(channels=0, l_max=4), "channels: expected"),
        (dict(channels=2, l_max=0), "L: expected"),
        (dict(channels=2, l_max=4, k0=0), "k0: expected"),
    ):
        with pytest.raises(ValueError, match=message):
            SGConv(**arguments)
    layer = SGConv(2, 4, k0=2)
    with pytest.raises(ValueError, match=r"x: expected \(B, L, 2\)"):
        layer(torch.zeros(1, 4, 3))
    with pytest.raises(TypeError, match="x: expected the layer's dtype"):
        layer.step(torch.zeros(1, 2, dtype=double), layer.init_state(1))
