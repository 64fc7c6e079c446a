"""Quamba: exact before rounding, exact integers, and better where there are outliers."""

import doctest

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from corelib.primitives.hadamard import hadamard, rotate
from corelib.primitives.quantise import Int8Linear, QuantObserver, dequantise, quantise
from corelib.state_space import quamba
from corelib.state_space.mamba import MambaBlock
from corelib.state_space.quamba import (
    POINTS,
    QuantMamba,
    activations,
    calibrate,
    quantise_mixers,
    weight_bytes,
)


def rand(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@pytest.fixture(scope="module")
def block():
    torch.manual_seed(0)
    return MambaBlock(12, state=4)


def test_doctest():
    failures, tests = doctest.testmod(quamba)
    assert tests and not failures


@pytest.mark.parametrize("n", [16, 24, 40])
def test_the_rotation_is_exact_without_rounding(n):
    y, W = rand(5, n, dtype=torch.float64), rand(3, n, seed=1, dtype=torch.float64)
    torch.testing.assert_close(rotate(y) @ rotate(W).T, y @ W.T, atol=1e-13, rtol=1e-13)
    torch.testing.assert_close(rotate(y), y @ hadamard(n).T / n**0.5, atol=1e-13, rtol=0)
    torch.testing.assert_close(rotate(y).norm(dim=-1), y.norm(dim=-1), atol=1e-12, rtol=0)


def test_one_outlier_channel():
    """The card's numbers: 80 times larger, n = 256; 13.6 % error becomes 1.6 %."""
    y, W = rand(512, 256), rand(64, 256, seed=1)
    y[:, 17] *= 80.0
    errors = []
    for a, b in ((y, W), (rotate(y), rotate(W))):
        observer = QuantObserver()
        observer.observe(a)
        found = Int8Linear.of(b, observer.scale)(quantise(a, observer.scale))
        # an outlier's own product hides what became of all others: their error over their norm
        others = y.clone()
        others[:, 17] = 0
        errors.append(((found - y @ W.T).norm() / (others @ W.T).norm()).item())
    assert errors[0] > 5 * errors[1]


def test_activations_are_the_blocks_own(block):
    x = rand(2, 7, 12)
    found, state = activations(block, x)
    wanted, wanted_state = block(x)
    assert tuple(found) == POINTS
    torch.testing.assert_close(block.out_proj(found["y"]), wanted, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(state, wanted_state)


@pytest.mark.parametrize("rotated", [False, True])
def test_equals_a_simulation_in_floating_point(block, rotated):
    """Every tensor rounded to its grid by hand, every product in float64."""
    x = rand(1, 9, 12)
    scales = calibrate(block, [x], percentile=99.0, rotated=rotated)
    quantised = QuantMamba(block, scales, rotated=rotated)
    got, _ = quantised(x)

    def grid(value, scale=None):
        scale = scale or value.abs().max().item() / 127
        return (value / scale).round().clamp(-128, 127).double() * scale

    weights = {name: grid(p.detach()) for name, p in block.named_parameters() if "bias" not in name}
    W_out = block.out_proj.weight.detach()
    weights["out_proj.weight"] = grid(rotate(W_out) if rotated else W_out)

    def at(name, value):
        return grid(value.float(), scales[name])

    inner, z = (at("input", x) @ weights["in_proj.weight"].T).chunk(2, 2)
    padded = F.pad(at("x", inner).mT, (3, 0))
    bias = block.conv1d.bias.detach().double()
    mixed = F.conv1d(padded, weights["conv1d.weight"], bias, groups=24)
    u = at("u", F.silu(mixed).mT)
    rank, B, C = (u @ weights["x_proj.weight"].T).split([1, 4, 4], 2)
    dt = at("dt", at("rank", rank) @ weights["dt_proj.weight"].T)
    parts = dict(u=u, dt=dt, B=at("B", B), C=at("C", C), z=at("z", z))
    dt_bias = block.dt_proj.bias.detach().double()
    y, _ = quamba._scan(
        parts, weights["A_log"], weights["D"], dt_bias, torch.zeros(1, 24, 4).double()
    )
    y = at("y", rotate(y) if rotated else y)
    wanted = y @ weights["out_proj.weight"].T
    # a number within rounding of a half may fall to either side: most agree to six digits
    off = (got - wanted).abs()
    assert (
        off.median() < 1e-5 and off.max() < 4 * scales["y"] * quantised.out_proj.weight_scale * 128
    )


def test_close_to_the_float_block(block):
    x = rand(4, 32, 12)
    quantised = QuantMamba(block, calibrate(block, [x]))
    wanted, _ = block(x)
    error = (quantised(x)[0] - wanted).norm() / wanted.norm()
    assert 0.001 < error < 0.1


def test_whole_in_pieces_and_step_by_step(block):
    """Equal, but where the float scan rounds a half another way; and nothing looks ahead."""
    x = rand(2, 9, 12)
    mixer = QuantMamba(block, calibrate(block, [x]))
    whole, last = mixer(x)
    pieces, state = [], None
    for part in (x[:, :4], x[:, 4:4], x[:, 4:7]):
        y, state = mixer(part, state)
        pieces.append(y)
    for t in (7, 8):
        y, state = mixer.step(x[:, t], state)
        pieces.append(y[:, None])
    off = (torch.cat(pieces, 1) - whole).abs()
    assert off.median() < 1e-6 and off.max() < 0.05 * whole.abs().max()
    torch.testing.assert_close(state.scan, last.scan, atol=0.01, rtol=0.05)
    changed = x.clone()
    changed[:, 5] = -changed[:, 5]
    moved, step = (mixer(changed)[0] - whole).abs(), 0.05 * whole.abs().max()
    assert moved[:, :5].max() < step and moved[:, 5].max() > 4 * step


def with_outliers():
    """Two channels of the scan's output 60 times larger: through D alone, so nothing else moves."""
    torch.manual_seed(1)
    block = MambaBlock(16, state=4)
    with torch.no_grad():
        block.D[:2] *= 60.0
        block.out_proj.weight[:, :2] /= 60.0
    return block


def test_rotating_helps_where_channels_stick_out():
    block, x = with_outliers(), rand(4, 64, 16)
    wanted, _ = block(x)
    error = {}
    for rotated in (False, True):
        scales = calibrate(block, [x], percentile=None, rotated=rotated)
        found, _ = QuantMamba(block, scales, rotated=rotated)(x)
        error[rotated] = ((found - wanted).norm() / wanted.norm()).item()
    assert error[True] < 0.6 * error[False]


def test_percentile_serves_the_many():
    """One huge value in the calibration sample; all others keep their steps."""
    torch.manual_seed(0)
    block, x = MambaBlock(12, state=4), rand(4, 64, 12)
    spoilt = x.clone()
    spoilt[0, 5] *= 1000.0
    narrow = calibrate(block, [spoilt], percentile=99.0)["u"]
    wide = calibrate(block, [spoilt], percentile=None)["u"]
    assert narrow < calibrate(block, [x], percentile=None)["u"] * 1.2 < wide / 20


def test_weights_are_four_times_smaller(block):
    quantised = QuantMamba(block, calibrate(block, [rand(1, 4, 12)]))
    kept_in_float = 4 * 2 * 24
    assert weight_bytes(quantised) == (weight_bytes(block) - kept_in_float) // 4 + kept_in_float
    dtypes = {name: b.dtype for name, b in quantised.named_buffers()}
    assert all(d == torch.int8 for name, d in dtypes.items() if "bias" not in name)


class Stack(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(MambaBlock(8, state=2) for _ in range(2))

    def forward(self, x):
        for layer in self.layers:
            x = x + layer(x)[0]
        return x


def test_a_whole_model():
    torch.manual_seed(0)
    model, batches = Stack(), [rand(2, 8, 8, seed=s) for s in range(2)]
    with torch.no_grad():
        wanted = model(batches[0])
        by_hand = calibrate(model.layers[1], [x + model.layers[0](x)[0] for x in batches])
    quantise_mixers(model, batches)
    assert all(isinstance(layer, QuantMamba) for layer in model.layers)
    assert model.layers[1].scales == pytest.approx(by_hand)
    assert 0 < (model(batches[0]) - wanted).norm() / wanted.norm() < 0.1
    assert not any(p.requires_grad for p in model.parameters())


def test_rounding_keeps_what_is_on_the_grid(block):
    quantised = QuantMamba(block, calibrate(block, [rand(1, 4, 12)]))
    value = dequantise(torch.tensor([[-128, 3, 127]], dtype=torch.int8), quantised.scales["B"])
    assert torch.equal(quantised._round("B", value), value)


@pytest.mark.no_shape_checks
def test_bad_input_is_named(block):
    with pytest.raises(ValueError, match="samples: expected at least one"):
        calibrate(block, [])
    with pytest.raises(ValueError, match="scales: expected all of"):
        QuantMamba(block, {"u": 1.0})
    with pytest.raises(ValueError, match="model: expected at least one MambaBlock"):
        quantise_mixers(nn.Linear(2, 2), [])
