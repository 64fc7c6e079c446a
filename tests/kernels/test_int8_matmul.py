"""Int8 products and the rotation into int8, interpreted, against integers and float64."""

from __future__ import annotations

import pathlib

import pytest
import torch

from corelib.kernels.gates.interpreter import load_file
from corelib.primitives.hadamard import hadamard
from corelib.primitives.quantise import int8_matmul_reference

shared = load_file(str(pathlib.Path(__file__).with_name("shared.py")))
RUN = "corelib.kernels.gates.cases:forward_backward"
MODULE = "corelib.kernels.int8_matmul"
MATMUL, ROTATE = f"{MODULE}:int8_matmul", f"{MODULE}:hadamard_quantise"


def integers(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-128, 128, shape, generator=generator, dtype=torch.int8)


def rows(count, n, dtype=torch.float32):
    return torch.randn(count, n, generator=torch.Generator().manual_seed(n)).to(dtype)


SIZES = [(1, 1, 1), (3, 70, 5), (65, 2, 100), (64, 64, 64), (2, 3, 300), (5, 4, 0)]


@pytest.mark.parametrize("sizes", SIZES)
def test_product_is_exact(interpreter, sizes):
    M, N, K = sizes
    a, b = integers(M, K), integers(N, K, seed=1)
    (out,), _ = interpreter.call(RUN, MATMUL, (a, b))
    assert out.dtype == torch.int32
    assert torch.equal(out, int8_matmul_reference(a, b))


def test_largest_sums(interpreter):
    a = torch.full((2, 1000), -128, dtype=torch.int8)
    assert interpreter.call(MATMUL, a, a).tolist() == [[128 * 128 * 1000] * 2] * 2


def test_strides(interpreter):
    a, b = integers(9, 7).T, integers(9, 4, seed=1).T
    assert torch.equal(interpreter.call(MATMUL, a, b), int8_matmul_reference(a, b))


@pytest.mark.parametrize("sizes", [(0, 3, 4), (3, 0, 4)])
def test_nothing_to_do(interpreter, sizes):
    M, N, K = sizes
    assert interpreter.call(MATMUL, integers(M, K), integers(N, K)).shape == (M, N)


def expected(x, scale):
    """In float64, and where it lies so near a half that float32 may round either way."""
    steps = x.double() @ hadamard(x.shape[1]).T / x.shape[1] ** 0.5 / scale
    return steps.round().clamp(-128, 127), ((steps % 1) - 0.5).abs() < 1e-3


def agrees(x, scale, out):
    wanted, undecided = expected(x, scale)
    assert out.dtype == torch.int8
    off = (out.double() - wanted).abs()
    assert (off[~undecided] == 0).all() and (off <= 1).all()
    return wanted


@pytest.mark.parametrize("n", [1, 8, 12, 16, 24, 96, 256, 1536])
def test_rotation(interpreter, n):
    x, scale = rows(5, n), 0.02
    (out,), _ = interpreter.call(RUN, ROTATE, (x, scale))
    agrees(x, scale, out)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_clipping_and_types(interpreter, dtype):
    x, scale = rows(3, 20, dtype), 0.004
    wanted = agrees(x, scale, interpreter.call(ROTATE, x, scale))
    assert (wanted == 127).any() and (wanted == -128).any()


def test_halves_to_even(interpreter):
    """n = 4: a row's sum over 2; every step of a half is on purpose."""
    x = torch.zeros(6, 4)
    x[:, 0] = torch.tensor([1.0, 3.0, 5.0, -1.0, -3.0, 7.0])
    found = interpreter.call(ROTATE, x, 1.0)
    assert found[:, 0].tolist() == [0, 2, 2, 0, -2, 4]


def test_outliers_keep_their_bits(interpreter):
    """Numbers 10,000 times larger than most, clipped and not."""
    x = rows(4, 256)
    x[:, 3] *= 1e4
    for scale in (x.abs().max().item() / 16 / 100, 1.0):
        agrees(x, scale, interpreter.call(ROTATE, x, scale))


def test_of_no_rows_and_strides(interpreter):
    assert interpreter.call(ROTATE, rows(0, 16), 1.0).shape == (0, 16)
    x = rows(16, 5).T
    agrees(x, 0.02, interpreter.call(ROTATE, x, 0.02))


@pytest.mark.counted
def test_moves_the_bytes_that_it_says(interpreter):
    from corelib.kernels.int8_matmul import forward_bytes, hadamard_bytes
    from corelib.measure import count_io

    count = count_io(MATMUL, integers(70, 100), integers(65, 100))
    assert count.bytes_moved == forward_bytes(70, 65, 100)
    assert count_io(ROTATE, rows(5, 96), 0.1).bytes_moved == hadamard_bytes(5, 96)
    assert count_io(ROTATE, rows(5, 96).half(), 0.1).bytes_moved == hadamard_bytes(
        5, 96, itemsize=2
    )


def test_splits():
    from corelib.kernels.int8_matmul import split

    assert split(5120) == (64, 80) and split(512) == (16, 32) and split(12) == (1, 12)
    with pytest.raises(ValueError, match="x: expected rows of at most 8192 numbers"):
        split(16384)


BAD = {
    "shape": ("int8_matmul", lambda a, x: (a, a[:, :2]), "a, b: expected .M, K., .N, K."),
    "dtype": ("int8_matmul", lambda a, x: (a, a.int()), "b: expected int8, got torch.int32"),
    "axes": ("hadamard_quantise", lambda a, x: (x[0], 1.0), "x: expected .rows, n."),
    "double": ("hadamard_quantise", lambda a, x: (x.double(), 1.0), "x: expected float16, bf"),
    "scale": ("hadamard_quantise", lambda a, x: (x, 0.0), "scale: expected more than 0"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_named(interpreter, case):
    name, change, message = BAD[case]
    args = change(integers(4, 4), rows(4, 4))
    error = TypeError if case in ("dtype", "double") else ValueError
    shared.assert_refused_where_it_runs(interpreter, f"{MODULE}:{name}", args, error, message)


def test_the_device_is_named():
    shared.assert_wants_cuda(MATMUL, (integers(1, 1), integers(1, 1)))


def check():
    """What every mutant of the kernels has to get past."""
    from corelib.kernels.gates.cases import poisoned
    from corelib.kernels.int8_matmul import hadamard_quantise, int8_matmul

    a, b = integers(70, 100), integers(65, 100, seed=1)
    with poisoned():
        assert torch.equal(int8_matmul(a, b), int8_matmul_reference(a, b))
        for x in (rows(5, 24), rows(5, 96)):
            agrees(x, 0.02, hadamard_quantise(x, 0.02))


@pytest.mark.slow
def test_mutants_are_caught():
    """A sample; ``limit=None`` runs all of them."""
    assert shared.survivors("int8_matmul", f"{__file__}:check", limit=8) == []
