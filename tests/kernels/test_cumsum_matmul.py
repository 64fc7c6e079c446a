"""The running sum as products, interpreted, against ``torch.cumsum`` in float64."""

from __future__ import annotations

import pathlib

import pytest
import torch

from corelib.kernels.gates.interpreter import load_file

shared = load_file(str(pathlib.Path(__file__).with_name("shared.py")))
RUN = "corelib.kernels.gates.cases:forward_backward"
TARGET = "corelib.kernels.cumsum_matmul:cumsum_matmul"


def values(B, L, C, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(B, L, C, generator=generator, dtype=torch.float64).to(dtype)


def expected(x, reverse=False):
    x = x.double()
    return x.flip(1).cumsum(1).flip(1) if reverse else x.cumsum(1)


SIZES = [(1, 1, 1), (2, 63, 3), (1, 64, 32), (1, 100, 33), (2, 130, 2)]


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("sizes", SIZES)
def test_sums_and_gradients(interpreter, sizes, reverse):
    x, d_out = values(*sizes), values(*sizes, seed=1)
    options = dict(reverse=reverse)
    (out,), (grad,) = interpreter.call(RUN, TARGET, (x,), options, (d_out,))
    assert out.dtype == grad.dtype == torch.float32
    torch.testing.assert_close(out.double(), expected(x, reverse), atol=2e-5, rtol=0)
    torch.testing.assert_close(grad.double(), expected(d_out, not reverse), atol=2e-5, rtol=0)


def test_half_precision_is_summed_in_float32(interpreter):
    """One added 200 times to 2,048: in float16 each sum would round back."""
    x = torch.ones(1, 200, 1, dtype=torch.float16)
    x[0, 0] = 2048
    out = interpreter.call(TARGET, x)
    assert out.dtype == torch.float16 and out[0, -1].item() == 2248
    random = values(1, 70, 3, torch.float16)
    found = interpreter.call(TARGET, random)
    torch.testing.assert_close(found.double(), expected(random), atol=0, rtol=1e-3)


def test_integers_are_exact(interpreter):
    x = torch.randint(-9, 10, (1, 150, 4), generator=torch.Generator().manual_seed(0)).float()
    assert torch.equal(interpreter.call(TARGET, x), x.cumsum(1))


def along_strides(x):
    from corelib.kernels.cumsum_matmul import cumsum_matmul

    return cumsum_matmul(x.mT.contiguous().mT), cumsum_matmul(x[:, ::2, 1:])


def test_strides(interpreter):
    x = values(2, 9, 5)
    for got, given in zip(interpreter.call(f"{__file__}:along_strides", x), (x, x[:, ::2, 1:])):
        torch.testing.assert_close(got.double(), expected(given), atol=1e-5, rtol=0)


@pytest.mark.parametrize("sizes", [(0, 3, 4), (2, 0, 4), (2, 3, 0)])
def test_nothing_to_do(interpreter, sizes):
    x = values(*sizes)
    (out,), (grad,) = interpreter.call(RUN, TARGET, (x,), None, (x,))
    assert out.shape == grad.shape == sizes


def test_a_running_sum_of_nothing_but_what_came_before(interpreter):
    """NaN at a step reaches later ones only within its own block; earlier blocks stay clean."""
    x = values(1, 130, 1)
    x[0, 64:] = torch.nan
    out = interpreter.call(TARGET, x)
    assert out[0, :64].isfinite().all() and out[0, 64:].isnan().all()


@pytest.mark.counted
def test_moves_no_more_than_it_has_to(interpreter):
    from corelib.kernels.cumsum_matmul import moved_bytes
    from corelib.measure import count_io

    assert count_io(TARGET, values(1, 70, 33)).bytes_moved == moved_bytes(1, 70, 33)


def test_launcher_uses_declared_tiles():
    from corelib.kernels.cumsum_matmul import SPECIALISATIONS, TILE

    for row in SPECIALISATIONS:
        assert (row.constexprs["BLOCK_T"], row.constexprs["BLOCK_C"]) == TILE[:2]
        assert row.constexprs["REVERSE"] == (row.direction == "backward")


BAD = {
    "axes": (lambda x: x[0], ValueError, "x: expected .B, L, C."),
    "double": (lambda x: x.double(), TypeError, "x: expected float16, bfloat16 or float32"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_named(interpreter, case):
    change, error, message = BAD[case]
    args = (change(values(1, 2, 3)),)
    shared.assert_refused_where_it_runs(interpreter, TARGET, args, error, message)


def test_the_device_is_named():
    shared.assert_wants_cuda(TARGET, (values(1, 1, 1),))


def check():
    """What every mutant of the kernel has to get past."""
    from corelib.kernels.gates.cases import forward_backward

    x, d_out = values(2, 70, 33), values(2, 70, 33, seed=1)
    for given in (x, x.mT.contiguous().mT):
        for reverse in (False, True):
            (out,), (grad,) = forward_backward(TARGET, (given,), dict(reverse=reverse), (d_out,))
            torch.testing.assert_close(out.double(), expected(x, reverse), atol=2e-5, rtol=0)
            torch.testing.assert_close(
                grad.double(), expected(d_out, not reverse), atol=2e-5, rtol=0
            )


@pytest.mark.slow
def test_mutants_are_caught():
    """A sample; ``limit=None`` runs all of them."""
    assert shared.survivors("cumsum_matmul", f"{__file__}:check", limit=6) == []
