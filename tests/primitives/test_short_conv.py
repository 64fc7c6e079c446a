"""The short causal convolution: against numpy's, in pieces, with gradients."""

import numpy
import pytest
import torch

from corelib.primitives import causal_short_conv

EXACT = dict(atol=1e-12, rtol=1e-12)


def random_inputs(L=9, W=4):
    g = torch.Generator().manual_seed(0)
    return [torch.randn(s, generator=g).double() for s in ((2, 3, L), (3, W), (3,))]


@pytest.mark.parametrize("L, W", [(1, 4), (2, 4), (9, 4), (9, 1)])
def test_each_channel_is_filtered(L, W):
    x, weight, bias = random_inputs(L, W)
    y = causal_short_conv(x, weight, bias)
    for b in range(2):
        for c in range(3):
            full = numpy.convolve(x[b, c].numpy(), weight[c].flip(0).numpy())[:L]
            torch.testing.assert_close(y[b, c], torch.from_numpy(full) + bias[c], **EXACT)
    torch.testing.assert_close(causal_short_conv(x, weight), y - bias[:, None], **EXACT)


@pytest.mark.parametrize("W", [1, 2, 4])
def test_pieces_equal_the_whole(W):
    x, weight, bias = random_inputs(11, W)
    whole, last = causal_short_conv(x, weight, bias, return_state=True)
    assert last.shape == (2, 3, W - 1) and torch.equal(last, x[:, :, 11 - (W - 1) :])
    state, parts = torch.zeros(2, 3, W - 1, dtype=torch.float64), []
    for piece in x.split([1, 0, 1, 6, 3], 2):
        y, state = causal_short_conv(piece, weight, bias, state=state, return_state=True)
        parts.append(y)
    torch.testing.assert_close(torch.cat(parts, 2), whole, **EXACT)
    assert torch.equal(state, last)


def test_gradients():
    given = [x.requires_grad_() for x in (*random_inputs(5), torch.randn(2, 3, 3).double())]
    assert torch.autograd.gradcheck(
        lambda x, w, b, s: causal_short_conv(x, w, b, state=s, return_state=True), given
    )


@pytest.mark.no_shape_checks
def test_wrong_arguments():
    x, weight, bias = random_inputs()
    with pytest.raises(ValueError, match=r"x: expected 3 axes"):
        causal_short_conv(x[0], weight)
    with pytest.raises(ValueError, match=r"weight: expected shape \(3, W\), got \(4, 3\)"):
        causal_short_conv(x, weight.mT)
    with pytest.raises(ValueError, match=r"state: expected shape \(2, 3, 3\), got \(2, 3, 4\)"):
        causal_short_conv(x, weight, bias, state=torch.zeros(2, 3, 4).double())
    with pytest.raises(TypeError, match="bias: expected the dtype of x"):
        causal_short_conv(x, weight, bias.float())
