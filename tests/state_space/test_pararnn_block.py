"""ParaRNN's layers and block: parallel, step by step, and against the loop over the sequence."""

import doctest

import pytest
import torch

from corelib.state_space import pararnn_block
from corelib.state_space.pararnn import GRU, LSTM, sequential_rnn
from corelib.state_space.pararnn_block import ParaGRU, ParaLSTM, ParaRNN, ParaRNNBlock
from corelib.testing import conformance

EXACT = dict(atol=1e-10, rtol=1e-10)
CELLS = pytest.mark.parametrize("cell", [GRU, LSTM], ids=lambda cell: cell.name)


def tokens(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).double()


def test_doctest():
    failures, tests = doctest.testmod(pararnn_block)
    assert tests and not failures


@pytest.mark.parametrize("layer", [ParaGRU, ParaLSTM])
def test_layers_conform(layer):
    torch.manual_seed(0)
    conformance(layer(3, iterations=10).double(), tokens(2, 9, 3))


@CELLS
def test_blocks_conform(cell):
    torch.manual_seed(0)
    conformance(ParaRNNBlock(3, cell, iterations=10).double(), tokens(2, 9, 3))


def test_layers_keep_their_weights_in_bounds():
    mixer = ParaGRU(3, bound=0.2)
    mixer.own.data.fill_(5.0)
    assert mixer.weights().max() == 0.2


@CELLS
def test_a_block_equals_itself_on_the_loop(cell, monkeypatch):
    """Outputs and every gradient, whichever way its states are found."""
    torch.manual_seed(0)
    mixer, x = ParaRNNBlock(4, cell, expand=1, iterations=10).double(), tokens(2, 11, 4)
    leaves = [x.requires_grad_(), *mixer.parameters()]

    def run():
        y, _ = mixer(x)
        return y, torch.autograd.grad(y, leaves, tokens(*y.shape, seed=1))

    y, gradients = run()
    monkeypatch.setattr(
        pararnn_block,
        "newton_rnn",
        lambda cell, x, weights, state, iterations: sequential_rnn(cell, x, weights, state),
    )
    wanted, wanted_gradients = run()
    torch.testing.assert_close(y, wanted, **EXACT)
    for got, want in zip(gradients, wanted_gradients):
        assert want.abs().max() > 0
        torch.testing.assert_close(got, want, **EXACT)


def test_a_block_by_its_formulas():
    """Each half written out, with the convolution as a sum over taps."""
    torch.manual_seed(0)
    mixer, x = ParaRNNBlock(4, expand=1, conv=3).double(), tokens(1, 6, 4)
    wide = mixer.norm(x) @ mixer.in_proj.weight.T
    u, z = wide[..., :4], wide[..., 4:]
    taps, padded = mixer.conv1d.weight[:, 0], torch.cat([torch.zeros(1, 2, 4).double(), u], 1)
    u = mixer.conv1d.bias + sum(taps[:, i] * padded[:, i : i + 6] for i in range(3))
    gates = mixer.rnn.enter(u * torch.sigmoid(u)).unflatten(-1, (3, 4))
    h = sequential_rnn(GRU, gates, mixer.rnn.weights()) * z * torch.sigmoid(z)
    h = h / (h.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    y = x + h @ mixer.out_proj.weight.T
    gate, value = (mixer.mlp_norm(y) @ mixer.mlp_in.weight.T).chunk(2, -1)
    y = y + (gate * torch.sigmoid(gate) * value) @ mixer.mlp_out.weight.T
    torch.testing.assert_close(mixer(x)[0], y, atol=1e-6, rtol=1e-6)  # three rounds of Newton


@CELLS
def test_an_empty_stretch(cell):
    mixer, state = ParaRNN(4, cell).double(), tokens(2, 4, *cell.tail)
    y, after = mixer(tokens(2, 0, 4), state)
    assert y.shape == (2, 0, 4) and torch.equal(after, state)
    block = ParaRNNBlock(4, cell).double()
    _, held = block(tokens(2, 3, 4))
    y, after = block(tokens(2, 0, 4), held)
    assert y.shape == (2, 0, 4) and all(map(torch.equal, after, held))


@pytest.mark.no_shape_checks
def test_bad_layers_are_named():
    for make, message in [
        (lambda: ParaGRU(0), "channels: expected at least 1, got 0"),
        (lambda: ParaGRU(2, bound=0.0), "bound: expected more than 0, got 0"),
        (lambda: ParaRNNBlock(0), "width: expected at least 1, got 0"),
        (lambda: ParaRNNBlock(2, conv=0), "conv: expected at least 1, got 0"),
        (lambda: ParaRNNBlock(2, expand=0), "expand: expected at least 1, got 0"),
    ]:
        with pytest.raises(ValueError, match=message):
            make()
