"""Keys rebuilt from a low-rank factor, interpreted, against products and RoPE in float64."""

from __future__ import annotations

import math
import pathlib

import pytest
import torch

from corelib.kernels.gates.interpreter import load_file
from corelib.primitives import rope_frequencies
from corelib.serving.low_rank import KeyFactors, rebuild_keys

shared = load_file(str(pathlib.Path(__file__).with_name("shared.py")))
KERNEL = "corelib.kernels.low_rank_keys:low_rank_keys"
RUN = "corelib.kernels.gates.cases:forward_backward"


def random_inputs(B, G, S, R, D, n, dtype=torch.float32, seed=0):
    """``left, right, positions, frequencies``; rows of ``left`` that nobody wants are NaN."""
    generator = torch.Generator().manual_seed(seed)
    left = torch.randn(B, S, R, generator=generator).to(dtype)
    right = torch.randn(B, G, R, D, generator=generator).to(dtype)
    positions = torch.randint(-1, S, (B, G, n), generator=generator)
    wanted = torch.zeros(B, S + 1, dtype=torch.bool)
    wanted.scatter_(1, positions.flatten(1).masked_fill(positions.flatten(1) < 0, S), True)
    left[~wanted[:, :S]] = torch.nan
    return left, right, positions, rope_frequencies(D)


def expected(left, right, positions, frequencies):
    factors = KeyFactors(left.double().nan_to_num(), right.double())
    return rebuild_keys(factors, positions, frequencies)


def assert_rebuilds(interpreter, inputs, tolerance=1e-6):
    """Relative to the largest key, with NaN in the buffer and every access checked."""
    (got,), _ = interpreter.call(RUN, KERNEL, inputs)
    wanted = expected(*inputs)
    assert got.dtype == inputs[0].dtype and got.shape == wanted.shape
    torch.testing.assert_close(
        got.double(), wanted, atol=tolerance * float(wanted.abs().max()), rtol=0
    )


CASES = {
    "one": dict(B=1, G=1, S=1, R=1, D=2, n=1),
    "odd sizes": dict(B=2, G=3, S=70, R=33, D=22, n=63),
    "several blocks": dict(B=2, G=2, S=150, R=64, D=16, n=100),
    "wide": dict(B=1, G=1, S=40, R=20, D=128, n=33),
}


@pytest.mark.parametrize("case", CASES)
def test_equals_gather_multiply_rotate(interpreter, case):
    assert_rebuilds(interpreter, random_inputs(**CASES[case]))


def test_half_precision_and_short_integers(interpreter):
    left, right, positions, frequencies = random_inputs(1, 2, 50, 24, 16, 40, dtype=torch.float16)
    assert_rebuilds(interpreter, (left, right, positions.int(), frequencies), tolerance=1e-3)


def test_angles_are_exact_far_out(interpreter):
    """A key of ones at position 1,000,000 shows the cosine and sine of a million radians."""
    S, D = 1_000_001, 8
    left, right = torch.zeros(1, S, 1), torch.ones(1, 1, 1, D)
    left[0, [1, 999_983, S - 1]] = 1.0
    right[..., D // 2 :] = 0.0
    positions = torch.tensor([[[S - 1, 999_983, 1]]])
    got = interpreter.call(KERNEL, left, right, positions, rope_frequencies(D))[0, 0]
    for row, place in zip(got, (S - 1, 999_983, 1), strict=True):
        for pair, frequency in enumerate(rope_frequencies(D).tolist()):
            angle = math.remainder(place * frequency, 2 * math.pi)
            assert row[pair].item() == pytest.approx(math.cos(angle), abs=2e-6)
            assert row[D // 2 + pair].item() == pytest.approx(math.sin(angle), abs=2e-6)


def test_the_sine_all_around(interpreter):
    """Four turns in 500 steps: first channel 1, second 0, become the cosine and the sine."""
    positions = torch.arange(500)[None, None]
    right = torch.tensor([1.0, 0.0]).view(1, 1, 1, 2)
    frequencies = torch.tensor([0.05], dtype=torch.float64)
    got = interpreter.call(KERNEL, torch.ones(1, 500, 1), right, positions, frequencies)
    angles = 0.05 * positions[0, 0].double()
    wanted = torch.stack([angles.cos(), angles.sin()], -1)
    torch.testing.assert_close(got[0, 0].double(), wanted, atol=4e-7, rtol=0)


def test_any_layout_and_positions_beyond_the_factor(interpreter):
    left, right, positions, frequencies = random_inputs(2, 2, 40, 16, 16, 20)
    wanted = expected(left, right, positions, frequencies)
    room = torch.cat([left, torch.full_like(left, torch.nan)], 1)[:, :40]
    apart = right.transpose(1, 2).contiguous().transpose(1, 2)
    longer = torch.cat([positions, torch.full_like(positions, 40)], 2)
    got = interpreter.call(KERNEL, room, apart, longer, frequencies)
    torch.testing.assert_close(got[:, :, :20].double(), wanted, atol=2e-5, rtol=0)
    assert not got[:, :, 20:].any()


def test_nothing_to_do(interpreter):
    left, right, positions, frequencies = random_inputs(1, 2, 10, 4, 8, 6)
    assert interpreter.call(KERNEL, left, right, positions[..., :0], frequencies).shape[2] == 0
    got = interpreter.call(KERNEL, left[:, :0], right, torch.full((1, 2, 3), -1), frequencies)
    assert got.shape == (1, 2, 3, 8) and not got.any()


@pytest.mark.counted
def test_reads_each_row_of_the_factor_once(interpreter):
    from corelib.kernels.low_rank_keys import low_rank_bytes
    from corelib.measure import count_io

    for S in (80, 800):
        inputs = random_inputs(2, 2, S, 48, 32, 96)
        count = count_io(KERNEL, *inputs)
        listed = int((inputs[2] >= 0).sum())
        assert count.bytes_moved == low_rank_bytes(listed, 2, 2, 96, 48, 32, itemsize=4)


BAD = {
    "kind": (lambda x: (x[0].double(), *x[1:]), TypeError, "left: expected float16, bfloat16"),
    "factors": (lambda x: (x[0][..., :3], *x[1:]), ValueError, r"right: expected \(1, G, 3, D\)"),
    "axes": (lambda x: (x[0][0], *x[1:]), ValueError, r"left: expected \(B, S, R\), got"),
    "width": (lambda x: (x[0], x[1][..., :7], *x[2:]), ValueError, "an even width of 2 to 256"),
    "positions": (lambda x: (*x[:2], x[2][0], x[3]), ValueError, r"positions: expected \(1, 2, n"),
    "kind of positions": (lambda x: (*x[:2], x[2].float(), x[3]), TypeError, "positions: expected"),
    "frequencies": (lambda x: (*x[:3], x[3][:2]), ValueError, r"frequencies: expected \(4,\)"),
    "gradients": (lambda x: (x[0].requires_grad_(), *x[1:]), ValueError, "no backward pass"),
    "device": (lambda x: x, ValueError, "expected CUDA tensors"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_named(case):
    change, error, message = BAD[case]
    args = change(random_inputs(1, 2, 10, 4, 8, 6))
    shared.assert_refused(KERNEL, args, error, message)


def check():
    """What every mutant of the kernel has to get past."""
    from corelib.kernels.gates.cases import poisoned
    from corelib.kernels.low_rank_keys import low_rank_keys

    for sizes in (dict(B=2, G=2, S=70, R=33, D=22, n=37), dict(B=1, G=1, S=9, R=2, D=4, n=3)):
        left, right, positions, frequencies = random_inputs(**sizes)
        positions[..., -1] = sizes["S"]
        with poisoned():
            got = low_rank_keys(left, right, positions, frequencies)
        positions[..., -1] = -1
        wanted = expected(left, right, positions, frequencies)
        torch.testing.assert_close(got.double(), wanted, atol=5e-6, rtol=1e-5)


EQUIVALENT = {
    "_sine: turns > 0.25 -> (turns) >= (0.25)": "a quarter turn folds to itself",
    "_sine: turns < -0.25 -> (turns) <= (-0.25)": "a quarter turn folds to itself",
}


@pytest.mark.slow
def test_mutants_are_caught():
    """A sample; ``limit=None`` runs all of them."""
    check = f"{__file__}:check"
    assert shared.survivors("low_rank_keys", check, limit=10, equivalent=EQUIVALENT) == []
