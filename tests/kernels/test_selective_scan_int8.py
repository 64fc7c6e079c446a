"""The int8 selective scan, interpreted, against the float loop on dequantised inputs."""

from __future__ import annotations

import pathlib

import pytest
import torch

from corelib.kernels.gates.interpreter import load_file
from corelib.primitives import selective_scan_reference
from corelib.testing import assert_same

shared = load_file(str(pathlib.Path(__file__).with_name("shared.py")))
RUN = "corelib.kernels.gates.cases:forward_backward"
TARGET = "corelib.kernels.selective_scan_int8:int8_selective_scan"
SCALES = dict(u=0.02, dt=0.03, B=0.015, C=0.01, z=0.025)
NAMES = ("u", "dt", "A", "B", "C", "D", "z", "dt_bias", "state")


def inputs(batch, D, L, N):
    generator = torch.Generator().manual_seed(L)

    def integers(*shape):
        return torch.randint(-128, 128, shape, generator=generator, dtype=torch.int8)

    def rand(*shape):
        return torch.randn(shape, generator=generator)

    wide, mixing = (batch, D, L), (batch, N, L)
    found = dict(u=integers(*wide), dt=integers(*wide), A=-rand(D, N).abs(), B=integers(*mixing))
    found |= dict(C=integers(*mixing), D=rand(D), z=integers(*wide), dt_bias=rand(D))
    return [*found.values(), rand(batch, D, N)]


def expected(given):
    """In float64, of the numbers that the integers stand for."""
    found = dict(zip(NAMES, given))
    for name, x in found.items():
        found[name] = x.double() * SCALES.get(name, 1.0) if x.dtype == torch.int8 else x.double()
    order = [found[name] for name in ("u", "dt", "A", "B", "C", "D", "z")]
    return selective_scan_reference(
        *order, dt_bias=found["dt_bias"], dt_softplus=True, state=found["state"], return_state=True
    )


def agrees(given, y, last):
    for got, want in zip((y, last), expected(given)):
        assert got.dtype == torch.float32
        assert_same(got, want, tolerance=2e-5)


SIZES = [(1, 1, 1, 1), (2, 3, 63, 1), (1, 4, 64, 2), (1, 5, 100, 1), (1, 2, 0, 2), (0, 2, 5, 2)]


@pytest.mark.parametrize("sizes", SIZES)
def test_output_and_state(interpreter, sizes):
    given = inputs(*sizes)
    (y, last), _ = interpreter.call(RUN, TARGET, (*given, SCALES))
    agrees(given, y, last)


def test_large_steps_and_strides(interpreter):
    """A step of 130 (softplus would overflow as exp), and every argument a view."""
    given = inputs(1, 3, 9, 2)
    given[7] = given[7] + torch.tensor([130.0, 0.0, -130.0])
    views = [x.mT.contiguous().mT if x.dim() > 1 else x for x in given]
    agrees(given, *interpreter.call(TARGET, *views, SCALES))


@pytest.mark.counted
def test_moves_a_quarter_of_the_inputs(interpreter):
    from corelib.kernels.selective_scan_int8 import forward_bytes
    from corelib.measure import count_io

    sizes = (1, 5, 70, 2)
    assert count_io(TARGET, *inputs(*sizes), SCALES).bytes_moved == forward_bytes(*sizes)


def test_quambas_own_scan(interpreter, monkeypatch):
    """On the integers that meet inside the int8 block, against what it does on a CPU."""
    from corelib.state_space.quamba import QuantMamba, example

    given, on_cpu, met = example(), QuantMamba._scan, []

    def kept(self, ints, state):
        met.append((ints, state, on_cpu(self, ints, state)))
        return met[0][2]

    monkeypatch.setattr(QuantMamba, "_scan", kept)
    mixer = given["mixer"]
    mixer(given["x"])
    ints, state, (wanted, wanted_state) = met[0]
    u, dt, B, C, z = (ints[name].mT for name in ("u", "dt", "B", "C", "z"))
    A, D = -mixer._float("A_log").exp(), mixer._float("D")
    y, last = interpreter.call(TARGET, u, dt, A, B, C, D, z, mixer.dt_bias, state, mixer.scales)
    torch.testing.assert_close(y.mT, wanted, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(last, wanted_state, atol=1e-6, rtol=1e-5)


def test_launcher_uses_declared_tiles():
    from corelib.kernels.selective_scan_int8 import SPECIALISATIONS, TILE

    for x in SPECIALISATIONS:
        assert (x.constexprs["BLOCK_D"], x.constexprs["BLOCK_T"]) == TILE[:2]


BAD = {
    "axes": (0, lambda u: u[0], "u, A: expected shapes"),
    "states": (2, lambda A: A[:, :3], "A: .*power of two, got 3"),
    "B": (3, lambda B: B.mT, "B: expected shape"),
    "dtype": (4, lambda C: C.float(), "C: expected torch.int8"),
    "float": (5, lambda D: D.double(), "D: expected torch.float32"),
    "scales": (9, lambda scales: {"u": 1.0}, "scales: expected all of"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_named(interpreter, case):
    place, change, message = BAD[case]
    given = [*inputs(1, 2, 5, 4), SCALES]
    given[place] = change(given[place])
    error = TypeError if case in ("dtype", "float") else ValueError
    shared.assert_refused_where_it_runs(interpreter, TARGET, given, error, message)


def check():
    """What every mutant of the kernel has to get past."""
    from corelib.kernels.gates.cases import poisoned
    from corelib.kernels.selective_scan_int8 import int8_selective_scan

    given = inputs(2, 5, 70, 2)
    with poisoned():
        agrees(given, *int8_selective_scan(*given, SCALES))


@pytest.mark.slow
def test_mutants_are_caught():
    """A sample; ``limit=None`` runs all of them."""
    assert shared.survivors("selective_scan_int8", f"{__file__}:check", limit=6) == []
