"""The lineage is sound data, and no line of it is contradicted by its layer."""

from __future__ import annotations

import dataclasses
import doctest

import pytest
import torch

from corelib.catalog import methods
from corelib.measure import probes
from corelib.state_space import s4_survey
from corelib.state_space.s4_survey import (
    DECIDES,
    LAYERS,
    LINEAGE,
    MATRICES,
    ORDERS,
    disagreements,
    examine,
    lineage_graph,
    make_layer,
)

WIDTH, STATE = 4, 8
LTI = ("LSSL", "S4", "S4D", "S5")
# the loop of the RNN takes long to count, and is a straight line from the first step
LENGTHS = {"RNN": (8, 16, 24, 32, 48)}


@pytest.fixture(scope="module")
def reports():
    """Every row that has a layer, measured."""
    options = {n: dict(lengths=LENGTHS[n]) if n in LENGTHS else {} for n in LAYERS}
    return {n: examine(make_layer(n, WIDTH, STATE), WIDTH, **options[n]) for n in LAYERS}


def background(L=24):
    generator = torch.Generator().manual_seed(3)
    return torch.randn(1, L, WIDTH, generator=generator, dtype=torch.float64)


def run(mixer):
    return lambda x: mixer(x)[0].detach()


def test_doctest():
    failures, tests = doctest.testmod(s4_survey)
    assert tests and not failures


# --- the data -------------------------------------------------------------------------------------


@pytest.mark.parametrize("row", LINEAGE.values(), ids=list(LINEAGE))
def test_a_row_holds_known_words(row):
    assert row.matrix in MATRICES and row.decides in DECIDES and row.order in ORDERS
    assert row.discretisation in ("bilinear", "zero-order hold", "Euler", "none")
    assert row.training in ("convolution", "scan", "chunks", "loop", "pairs")
    assert row.attention in ("none", "some", "all")
    assert row.layer == "" or row.layer in LAYERS
    assert set(row.rows) <= {method.slug for method in methods()}
    assert [paper.slug for paper in row.papers()] == list(row.rows)
    assert all(LINEAGE[parent].year <= row.year for parent in row.parents)
    assert row.paper[:2] >= str(row.year)[2:] and len(row.paper) in (9, 10)


def test_every_layer_stands_for_a_row():
    assert {row.layer for row in LINEAGE.values() if row.layer} == set(LAYERS)
    named = {"S4", "S5", "Mamba", "Jamba", "RNN", "Transformer"}  # by the survey's abstract
    assert named <= set(LINEAGE)


def test_the_graph_has_no_circle_and_two_roots():
    edges = lineage_graph()
    order = list(LINEAGE)
    assert all(order.index(edge.parent) < order.index(edge.child) for edge in edges)
    assert {"RNN", "Transformer"} == set(LINEAGE) - {edge.child for edge in edges}


def test_edges_say_what_changed():
    changes = {(edge.parent, edge.child): edge.changes for edge in lineage_graph()}
    assert changes["S4D", "S5"]["mimo"] == (False, True)
    assert changes["S4D", "H3"] == {"decides": ("nothing", "gates")}
    assert changes["Mamba", "Mamba-2"]["matrix"] == ("diagonal", "scalar")
    assert set(changes["LSSL", "S4"]) == {"matrix", "step"}
    assert changes["DSS", "S4D"] == {}  # the softmax over the kernel has no column


# --- the layers against the table -----------------------------------------------------------------


@pytest.mark.parametrize("name", LAYERS)
def test_measured_as_claimed(name, reports):
    assert disagreements(LINEAGE[name], reports[name], STATE) == []


def test_a_wrong_row_is_contradicted(reports):
    """Every column that is held against a measurement can fail."""
    row, report = LINEAGE["S4D"], reports["S4D"]
    for change, words in [
        (dict(decides="gates"), "decides gates, but varies by"),
        (dict(state="L"), "a state of L a channel, but"),
        (dict(order="L^2"), "the work grows as L"),
        (dict(matrix="scalar"), "scalar, but 2 states act"),
        (dict(matrix="nonlinear"), "nonlinear, but 2 states act"),
        (dict(matrix="none"), "none, but 2 states act"),
    ]:
        (line,) = disagreements(dataclasses.replace(row, **change), report, STATE)
        assert words in line
    broken = dataclasses.replace(report, conforms="row 1 alone: differs")
    assert disagreements(row, broken, STATE) == ["S4D: row 1 alone: differs"]


@pytest.mark.parametrize("name", LTI)
def test_convolution_is_recurrence(name):
    """The response to an impulse, taken by steps, convolved with the input: the layer itself."""
    mixer, x = make_layer(name, WIDTH, STATE), background(12)
    state, taps = mixer.init_state(WIDTH), []
    with torch.no_grad():
        for t in range(12):
            impulse = torch.eye(WIDTH, dtype=torch.float64) * (t == 0)
            y, state = mixer.step(impulse, state)
            taps.append(y.T)  # (out, in)
        taps = torch.stack(taps)
        wanted = [
            torch.einsum("toi,ti->o", taps[: t + 1].flip(0), x[0, : t + 1]) for t in range(12)
        ]
        torch.testing.assert_close(mixer(x)[0][0], torch.stack(wanted), atol=1e-10, rtol=1e-10)


def test_lti_layers_have_one_response_and_the_others_do_not(reports):
    for name, report in reports.items():
        assert report.lti == (name in LTI), name
        assert report.lti or report.variation > 0.05, name


@pytest.mark.parametrize("name", LTI)
def test_lti_layers_are_shift_equivariant(name):
    assert probes.shift_gap(run(make_layer(name, WIDTH, STATE)), background(), 7) < 1e-12


def test_a_selective_layer_is_shift_equivariant_too_if_silence_stays_silence():
    """Why `variation` is the test: delaying the whole input does not find the selection."""
    mixer = make_layer("Mamba", WIDTH, STATE)
    assert probes.shift_gap(run(mixer), background(), 7) > 1e-6  # the convolution's bias speaks
    mixer.conv1d.bias.data.zero_()
    assert probes.shift_gap(run(mixer), background(), 7) < 1e-12
    assert probes.variation(run(mixer), background(), 7) > 0.05


def test_attention_is_not():
    assert probes.shift_gap(run(make_layer("Transformer", WIDTH, STATE)), background(), 7) > 0.05


def test_exponents_and_states(reports):
    """Scan and loop 1, FFT 1 and a logarithm, attention towards 2; only attention's state grows."""
    exponents = {name: report.exponent for name, report in reports.items()}
    for name in ("RNN", "S5", "Mamba-2"):
        assert exponents[name] == pytest.approx(1, abs=0.03)
    for name in ("S4D", "H3"):
        assert 1.05 < exponents[name] < 1.2
    assert exponents["Transformer"] > 1.85 > 1.5 < exponents["Jamba"]
    grows = {name for name, report in reports.items() if report.state_grows}
    assert grows == {"Transformer", "Jamba"}
    sizes = reports["Transformer"].state
    assert all(size == 2 * 2 * 8 * n for n, size in sizes.items())  # k and v, 2 wide, float64


def test_layers_have_the_state_they_are_asked_for(reports):
    for name in (*LTI, "RNN"):
        assert set(reports[name].state.values()) == {WIDTH * STATE * 8}
    with_inputs = {"H3": 3 * WIDTH, "Mamba": 3 * WIDTH, "Mamba-2": 3 * (WIDTH + 2 * STATE)}
    for name, extra in with_inputs.items():
        assert set(reports[name].state.values()) == {(WIDTH * STATE + extra) * 8}


@pytest.mark.no_shape_checks
def test_an_unknown_layer_is_named():
    with pytest.raises(ValueError, match="name: expected one of RNN, .*, got 'S6'"):
        make_layer("S6")
