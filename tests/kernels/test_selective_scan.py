"""The selective scan's kernels, interpreted, against the loop in float64."""

from __future__ import annotations

import pathlib

import pytest
import torch

from corelib.kernels.gates.interpreter import load_file
from corelib.primitives import selective_scan_reference
from corelib.testing import assert_same

shared = load_file(str(pathlib.Path(__file__).with_name("shared.py")))
RUN = "corelib.kernels.gates.cases:forward_backward"
KERNEL = "corelib.kernels.selective_scan:selective_scan"
TARGET = f"{__file__}:both"


def both(u, dt, A, B, C, state):
    """Outputs and last state side by side, so that the gate differentiates both."""
    from corelib.kernels.selective_scan import selective_scan

    y, last = selective_scan(u, dt, A, B, C, state)
    return torch.cat([y.flatten(), last.flatten()])


def inputs(batch, D, L, N, dtype=torch.float64, strongest=2.0):
    g = torch.Generator().manual_seed(L)
    u, dt = torch.randn(2, batch, D, L, generator=g, dtype=torch.float64)
    A = -strongest * torch.rand(D, N, generator=g, dtype=torch.float64)
    B, C = torch.randn(2, batch, N, L, generator=g, dtype=torch.float64)
    state = torch.randn(batch, D, N, generator=g, dtype=torch.float64)
    return [x.to(dtype) for x in (u, dt.abs(), A, B, C, state)]


def weights(given) -> torch.Tensor:
    size = given[0].numel() + given[5].numel()
    generator = torch.Generator().manual_seed(1)
    return torch.randn(size, generator=generator, dtype=torch.float64).to(given[0].dtype)


def expected(given, d_out):
    leaves = [x.detach().double().requires_grad_() for x in given]
    y, last = selective_scan_reference(*leaves[:5], state=leaves[5], return_state=True)
    out = torch.cat([y.flatten(), last.flatten()])
    return [out.detach(), *torch.autograd.grad(out, leaves, d_out.double())]


CASES = {
    "one of everything": (1, 1, 1, 1),
    "shorter than a block": (2, 3, 63, 1),
    "one block": (1, 4, 64, 1),
    "channels and steps left over": (1, 5, 100, 2),
    "three blocks": (1, 2, 130, 1),
}
NAMES = ("y and state", "u", "dt", "A", "B", "C", "state")


@pytest.mark.parametrize(
    "case, dtype",
    [*((case, torch.float64) for case in CASES), ("channels and steps left over", torch.float32)],
)
def test_outputs_and_gradients(interpreter, case, dtype):
    given = inputs(*CASES[case], dtype=dtype)
    d_out = weights(given)
    (out,), grads = interpreter.call(RUN, TARGET, given, None, (d_out,))
    tolerance = 1e-11 if dtype == torch.float64 else 1e-5
    for name, got, want in zip(NAMES, (out, *grads), expected(given, d_out), strict=True):
        assert got.dtype == dtype
        assert_same(got, want, what=name, tolerance=tolerance)


@pytest.mark.parametrize("strongest", [0.0, 1e6])
def test_no_decay_and_total_decay(interpreter, strongest):
    given = inputs(1, 2, 70, 1, strongest=strongest)
    d_out = weights(given)
    (out,), grads = interpreter.call(RUN, TARGET, given, None, (d_out,))
    shared.assert_close(NAMES, (out, *grads), expected(given, d_out), 1e-9)


def through_strides(u, dt, A, B, C, state):
    """Every argument a view with strides of its own."""
    views = [x.mT.contiguous().mT for x in (u, dt, A, B, C, state)]
    return both(*views)


def test_strides(interpreter):
    given = inputs(1, 3, 9, 2)
    out = interpreter.call(f"{__file__}:through_strides", *given)
    torch.testing.assert_close(out, expected(given, weights(given))[0], atol=1e-11, rtol=0)


@pytest.mark.parametrize("sizes", [(0, 2, 5, 2), (1, 0, 5, 2), (1, 2, 0, 2)])
def test_nothing_to_do(interpreter, sizes):
    given = inputs(*sizes)
    (out,), grads = interpreter.call(RUN, TARGET, given, None, (weights(given),))
    torch.testing.assert_close(out, given[5].flatten(), atol=0, rtol=0)
    assert not any(x.any() for x in grads[:5])
    torch.testing.assert_close(grads[5].flatten(), weights(given), atol=0, rtol=0)


@pytest.mark.counted
def test_moves_the_bytes_that_it_says(interpreter):
    from corelib.kernels.selective_scan import forward_bytes
    from corelib.measure import count_io

    sizes = (1, 5, 70, 2)
    count = count_io(TARGET, *inputs(*sizes, dtype=torch.float32))
    assert count.bytes_moved == forward_bytes(*sizes)
    assert count.bytes_moved < 4 * 2 * 2 * 5 * 70 * 2  # decays and states, written and read


@pytest.mark.counted
def test_backward_moves_the_bytes_that_it_says(interpreter):
    from corelib.kernels.selective_scan import backward_bytes, forward_bytes
    from corelib.measure import count_io

    sizes = (1, 5, 70, 2)
    given = inputs(*sizes, dtype=torch.float32)
    count = count_io(RUN, TARGET, given, None, (weights(given),))
    assert count.bytes_moved == forward_bytes(*sizes) + backward_bytes(*sizes)


BAD = {
    "axes": (0, lambda u: u[0], "u, A: expected shapes"),
    "states": (2, lambda A: A[:, :3], "A: .*power of two, got 3"),
    "B": (3, lambda B: B.mT, "B: expected shape"),
    "dtype": (4, lambda C: C.float(), "C: expected the dtype of u"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_named(interpreter, case):
    place, change, message = BAD[case]
    given = inputs(1, 2, 5, 4)
    given[place] = change(given[place])
    error = TypeError if case == "dtype" else ValueError
    shared.assert_refused_where_it_runs(interpreter, KERNEL, given, error, message)


def test_the_primitive_through_this_kernel(interpreter, monkeypatch):
    """Bias, softplus, skip and gate around the kernel, as a GPU runs them."""
    import importlib

    primitive = importlib.import_module("corelib.primitives.selective_scan")
    u, dt, A, B, C, state = inputs(1, 3, 20, 2)
    options = dict(D=A[:, 0], z=u.flip(1), dt_bias=A[:, 1], dt_softplus=True, state=state)
    want = primitive.selective_scan(u, dt, A, B, C, **options)

    def by_kernel(*parts):
        out = interpreter.call(TARGET, *parts)
        return out[: u.numel()].view(u.shape), out[u.numel() :].view(state.shape)

    monkeypatch.setattr(primitive, "_recurrence", by_kernel)
    got = primitive.selective_scan(u, dt, A, B, C, **options)
    torch.testing.assert_close(got, want, atol=1e-11, rtol=0)


def test_launcher_uses_declared_tiles():
    from corelib.kernels.selective_scan import BACKWARD, FORWARD, SPECIALISATIONS

    tiles = {"_scan_forward": FORWARD, "_scan_backward": BACKWARD}
    assert {x.kernel for x in SPECIALISATIONS} == set(tiles)
    for x in SPECIALISATIONS:
        tile = tiles[x.kernel]
        assert (x.constexprs["BLOCK_D"], x.constexprs["BLOCK_T"]) == tile[:2]


def before_nan(x: torch.Tensor) -> torch.Tensor:
    """``x`` in memory that goes on with NaN: what is read behind the end shows."""
    longer = torch.full((x.numel() + 128,), torch.nan, dtype=x.dtype)
    longer[: x.numel()] = x.flatten()
    return longer[: x.numel()].view(x.shape)


def check():
    """What every mutant of the kernels has to get past."""
    from corelib.kernels.selective_scan import selective_scan

    leaves = [before_nan(x).requires_grad_() for x in inputs(2, 5, 70, 2)]
    d_out = weights(leaves)
    out = torch.cat([x.flatten() for x in selective_scan(*leaves)])
    grads = torch.autograd.grad(out, leaves, d_out)
    shared.assert_close(NAMES, (out, *grads), expected(leaves, d_out), 1e-10)


@pytest.mark.slow
def test_mutants_are_caught():
    """A sample; ``limit=None`` runs all of them."""
    assert shared.survivors("selective_scan", f"{__file__}:check", limit=8) == []
