"""The paradigms as data, the minimal cells, and the table of what was measured."""

from __future__ import annotations

import doctest

import pytest
import torch

from corelib.catalog import methods
from corelib.primitives import diagonal_scan
from corelib.state_space import mamba360
from corelib.state_space.mamba360 import (
    LAYERS,
    NAMES,
    PARADIGMS,
    S4ND,
    examine,
    make_layer,
    survey_table,
)
from corelib.state_space.mamba360_layers import GSS, HGRN, LRU, LiquidS4
from corelib.state_space.s4d import S4D
from corelib.testing import conformance

EXACT = dict(atol=1e-10, rtol=1e-10)


def rand(*shape, seed=1):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def made(layer, *sizes, **options):
    torch.manual_seed(0)
    return layer(*sizes, **options).double()


def test_doctest():
    failures, tests = doctest.testmod(mamba360)
    assert tests and not failures


# --- the data -------------------------------------------------------------------------------------


def test_the_survey_is_sound_data():
    members = [member for group in PARADIGMS.values() for member in group]
    assert list(mamba360.TAXONOMY.values()) == members
    assert tuple(PARADIGMS) == NAMES and all(len(group) >= 3 for group in PARADIGMS.values())
    assert len({m.name for m in members}) == len(members) >= 17
    slugs = {method.slug for method in methods()}
    for m in members:
        assert m.layer == "" or m.layer in LAYERS | {"S4ND": S4ND}
        assert set(m.rows) <= slugs and [paper.slug for paper in m.papers()] == list(m.rows)
        assert m.idea and len(m.paper) == 10 and m.paper[:2] == str(m.year)[2:]
    built = {m.paradigm for m in members if m.layer}
    assert built == set(NAMES)


def test_the_models_of_the_abstract_are_in_it():
    named = {"S4", "S4ND", "HiPPO", "Hyena", "DSS", "GSS", "LRU", "Liquid-S4", "Mamba"}
    assert named <= {m.name for group in PARADIGMS.values() for m in group}


def test_the_table_joins_what_is_said_with_what_is_measured():
    reports = {name: examine(make_layer(name), 4, length=12, lengths=(4, 5, 6, 7, 8))
               for name in ("LRU", "GSS")}  # fmt: skip
    rows = {row["model"]: row for row in survey_table(reports)}
    assert len(rows) == sum(map(len, PARADIGMS.values()))
    assert len({tuple(row) for row in rows.values()}) == 1  # the same columns everywhere
    assert rows["LRU"]["response varies by"] == "0"
    assert rows["GSS"]["response varies by"].endswith("%")
    assert rows["Hyena"]["response varies by"] == "–"
    assert rows["H3"]["paradigm"] == "structural (arguable)"
    assert "081" not in rows["LRU"]["built on here"] and "063 s4" in rows["S4"]["built on here"]


# --- the cells ------------------------------------------------------------------------------------

CELLS = {
    "lru": (LRU, 4, 8),
    "hgrn": (HGRN, 4, 6),
    "gss": (GSS, 4, 6),
    "liquid 2": (LiquidS4, 4, 6),
}


@pytest.mark.parametrize("name", CELLS)
def test_conformance(name):
    layer, *sizes = CELLS[name]
    conformance(made(layer, *sizes), rand(2, 9, 4), leak=1e-12)


def test_conformance_of_a_third_order():
    conformance(made(LiquidS4, 3, 4, order=3, step_min=0.1), rand(2, 9, 3), leak=1e-12)


@pytest.mark.parametrize(("r_min", "r_max"), [(0.0, 0.1), (0.5, 0.6), (0.9, 0.95), (0.98, 0.99)])
def test_lru_keeps_white_noise_at_variance_one(r_min, r_max):
    """In closed form for every state, and on a stretch of noise on average."""
    layer = made(LRU, 8, 128, r_min=r_min, r_max=r_max)
    decay = layer.decay().abs()
    assert r_min <= decay.min() and decay.max() <= r_max
    summed = layer.log_gamma.exp().square() / (1 - decay.square())  # sum of gamma^2 decay^(2 t)
    torch.testing.assert_close(
        summed, torch.ones_like(summed), atol=1e-4, rtol=0
    )  # drawn in float32
    with torch.no_grad():
        h = layer.states(rand(2, 1500, 8))[:, 500:]
    entering = layer.B.square().sum((1, 2))  # near 1 by the draw of B
    assert (h.abs().square().mean((0, 1)) / entering).mean().item() == pytest.approx(1, abs=0.1)
    assert entering.mean().item() == pytest.approx(1, abs=0.2)


def test_lru_without_gamma_grows_with_the_memory():
    layer = made(LRU, 8, 64, r_min=0.98, r_max=0.99)
    layer.log_gamma.data.zero_()
    with torch.no_grad():
        assert layer.states(rand(1, 1000, 8))[:, 500:].abs().square().mean() > 10


def test_lru_written_out():
    layer, x = made(LRU, 3, 6), rand(2, 9, 3)
    B, C = torch.view_as_complex(layer.B), torch.view_as_complex(layer.C)
    h, wanted = layer.init_state(2), []
    for x_t in x.unbind(1):
        h = layer.decay() * h + layer.log_gamma.exp() * (x_t.to(B.dtype) @ B.T)
        wanted.append((h @ C.T).real + layer.skip * x_t)
    torch.testing.assert_close(layer(x)[0], torch.stack(wanted, 1), **EXACT)


def test_hgrn_written_out():
    layer, x = made(HGRN, 3, 5, lower=0.3), rand(2, 9, 3)
    h, wanted = layer.init_state(2), []
    for x_t in x.unbind(1):
        forget, candidate, gate = layer.enter(x_t).chunk(3, -1)
        f = 0.3 + 0.7 * torch.sigmoid(forget)
        h = f * h + (1 - f) * torch.nn.functional.silu(candidate)
        wanted.append(layer.out(h * torch.sigmoid(gate)))
    torch.testing.assert_close(layer(x)[0], torch.stack(wanted, 1), atol=1e-7, rtol=1e-7)


def test_gss_with_a_gate_of_one_is_its_system():
    layer, x = made(GSS, 3, 4), rand(2, 11, 3)
    low, high = torch.tensor([1.0, 2.0], dtype=torch.float64)
    for _ in range(80):  # the bias at which gelu is 1
        middle = (low + high) / 2
        low, high = (middle, high) if torch.nn.functional.gelu(middle) < 1 else (low, middle)
    layer.gate.weight.data.zero_()
    layer.gate.bias.data.fill_(low.item())
    layer.out.weight.data.copy_(torch.eye(3))
    layer.out.bias.data.zero_()
    entered = torch.nn.functional.gelu(layer.enter(x))
    torch.testing.assert_close(layer(x)[0], layer.memory(entered)[0], **EXACT)
    layer.gate.bias.data.fill_(0.3)
    assert (layer(x)[0] - layer.memory(entered)[0]).abs().max() > 0.01


def test_liquid_of_order_one_is_s4d():
    liquid, plain, x = made(LiquidS4, 3, 6, order=1), made(S4D, 3, 6), rand(2, 13, 3)
    torch.testing.assert_close(liquid(x)[0], plain(x)[0], **EXACT)
    assert (made(LiquidS4, 3, 6)(x)[0] - plain(x)[0]).abs().max() > 0.01


def test_liquid_written_out():
    """The recurrence with its products, as a scan over all poles."""
    layer, x = made(LiquidS4, 3, 6, order=3, step_min=0.5, step_max=1.0), rand(2, 13, 3)
    _, decay, enter, C = layer.discrete()
    padded = torch.cat([torch.zeros(2, 2, 3, dtype=torch.float64), x], 1)
    one, two, three = padded[:, 2:], padded[:, 1:-1], padded[:, :-2]
    products = [one, one * two, one * two * three]
    entered = sum(enter**p * u[..., None] for p, u in enumerate(products, 1))
    h = diagonal_scan(decay.flatten(), entered.flatten(2)).unflatten(2, decay.shape)
    wanted = 2 * (C * h).real.sum(-1) + layer.skip * x
    torch.testing.assert_close(layer(x)[0], wanted, **EXACT)
    alone = 2 * (C * enter * h.new_ones(1)).real.sum(-1) + layer.skip
    assert (layer(x[:, :1])[0] - alone * x[:, :1]).abs().max() < 1e-10  # nothing to multiply with


def test_s4nd_is_the_outer_product_of_its_axes():
    layer = made(S4ND, 3, 4)
    kernel = layer.kernel(5, 7)
    rows, columns = layer.axes[0].kernel(5), layer.axes[1].kernel(7)
    torch.testing.assert_close(kernel, rows[:, :, None] * columns[:, None], **EXACT)
    impulse = torch.zeros(1, 5, 7, 3, dtype=torch.float64)
    impulse[:, 0, 0] = 1
    response = layer(impulse)[0].movedim(-1, 0) - layer.skip[:, None, None] * impulse[0, ..., 0]
    torch.testing.assert_close(response, kernel, **EXACT)


def test_s4nd_equals_torchs_convolution():
    layer, x = made(S4ND, 2, 4), rand(2, 5, 6, 2)
    kernel = layer.kernel(5, 6)
    padded = torch.nn.functional.pad(x.movedim(-1, 1), (5, 0, 4, 0))
    wanted = torch.nn.functional.conv2d(padded, kernel[:, None].flip(2, 3), groups=2)
    torch.testing.assert_close(layer(x), wanted.movedim(1, -1) + layer.skip * x, **EXACT)


def test_s4nd_in_one_and_three_dimensions():
    line, plain, x = made(S4ND, 3, 4, dims=1), made(S4D, 3, 4), rand(2, 9, 3)
    plain.skip.data.copy_(line.skip.data)
    torch.testing.assert_close(line(x), plain(x)[0], **EXACT)
    cube = made(S4ND, 2, 4, dims=3)
    assert cube(rand(1, 2, 3, 4, 2)).shape == (1, 2, 3, 4, 2)
    assert cube.kernel(2, 3, 4).shape == (2, 2, 3, 4)


@pytest.mark.no_shape_checks
@pytest.mark.parametrize(
    ("run", "message"),
    [
        (lambda: LRU(3, 5), "state_size: expected an even size"),
        (lambda: LRU(3, 4, r_max=1.0), "r_min, r_max: expected 0 <= r_min"),
        (lambda: HGRN(3, 4, lower=0), "lower: expected more than 0"),
        (lambda: LiquidS4(3, 4, order=0), "order: expected at least 1"),
        (lambda: S4ND(3, 4, dims=0), "dims: expected at least 1"),
        (lambda: made(S4ND, 3, 4)(rand(1, 5, 3)), "x: expected a grid of 2 axes"),
        (lambda: make_layer("RWKV"), "name: expected one of RNN, .*, got 'RWKV'"),
    ],
)
def test_bad_input_is_named(run, message):
    with pytest.raises(ValueError, match=message):
        run()
