"""The kernels of state space duality, interpreted, against the loop in float64."""

from __future__ import annotations

import pathlib

import pytest
import torch

from corelib.kernels.gates.interpreter import load_file
from corelib.primitives import ssd_reference
from corelib.testing import assert_same

shared = load_file(str(pathlib.Path(__file__).with_name("shared.py")))
RUN = "corelib.kernels.gates.cases:forward_backward"
SSD = "corelib.kernels.ssd:ssd"
NAMES = "y", "last", "d_values", "d_log_decay", "d_B", "d_C", "d_state"


def inputs(batch, H, G, L, K, V, dtype=torch.float32, strongest=0.3):
    """``(values, log_decay, B, C, state), (d_y, d_last)``"""
    torch.manual_seed(L)
    values, d_y = torch.randn(2, batch, H, L, V).to(dtype)
    B, C = (torch.randn(2, batch, G, L, K) / K**0.5).to(dtype)
    log_decay = -strongest * torch.rand(batch, H, L)
    state, d_last = torch.randn(2, batch, H, K, V)
    return [values, log_decay, B, C, state], (d_y, d_last)


def expected(given, grads):
    """Outputs, last state and every gradient of the loop, in float64."""
    leaves = [x.detach().double().requires_grad_() for x in given]
    values, log_decay, B, C, state = leaves
    # dt = 1 and A = 0 would hide the decay; a step of -log_decay at A = -1 divides it out again.
    A, x = -values.new_ones(values.shape[1]), values / -log_decay[..., None]
    results = ssd_reference(x, -log_decay, A, B, C, state=state, return_state=True)
    return *results, *torch.autograd.grad(results, leaves, [x.double() for x in grads])


def assert_equals_loop(got, given, grads, tolerance):
    assert got[0][0].dtype == given[0].dtype and got[0][1].dtype == torch.float32
    wanted = expected(given, grads)
    for name, x, y in zip(NAMES, [*got[0], *got[1]], wanted, strict=True):
        assert_same(x, y, what=name, tolerance=tolerance)


CASES = {  # batch, H, G, L, K, V
    "one step": (1, 1, 1, 1, 4, 3),
    "below a chunk, two batches": (2, 2, 2, 23, 5, 7),
    "chunks, groups, two value blocks": (1, 4, 2, 40, 6, 33),
    "heads in two parts": (1, 5, 1, 20, 20, 4),
}


@pytest.mark.parametrize("case", CASES)
def test_equals_the_loop(interpreter, case):
    given, grads = inputs(*CASES[case])
    got = interpreter.call(RUN, SSD, given, {"chunk": 32}, grads)
    assert_equals_loop(got, given, grads, 2e-6)


def test_half_precision(interpreter):
    given, grads = inputs(1, 2, 1, 70, 16, 16, dtype=torch.float16)
    got = interpreter.call(RUN, SSD, given, {"chunk": 64}, grads)
    assert_equals_loop(got, given, grads, 3e-3)


def test_strong_decays(interpreter):
    """The sums of a chunk reach -5000, where float32 counts in steps of 5e-4."""
    given, grads = inputs(1, 1, 1, 70, 4, 4, strongest=150.0)
    got = interpreter.call(RUN, SSD, given, {"chunk": 64}, grads)
    assert_equals_loop(got, given, grads, 1e-5)


def test_resets_forget(interpreter):
    given, _ = inputs(1, 2, 1, 40, 4, 4)
    given[1][:, :, 20] = -torch.inf
    y, last = interpreter.call(SSD, *given)
    fresh = [x[:, :, 20:] for x in given[:4]]
    want = interpreter.call(SSD, *fresh, torch.zeros_like(given[4]))
    torch.testing.assert_close((y[:, :, 20:], last), want, atol=1e-6, rtol=1e-6)


def test_any_chunk_and_layout(interpreter):
    """Heads that are slices of one projection, tokens before heads; chunks of 32 and of 256."""
    given, _ = inputs(1, 2, 1, 40, 8, 8)
    want = interpreter.call(SSD, *given, chunk=256)
    strided = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in given[:4]]
    got = interpreter.call(SSD, *strided, given[4].mT.contiguous().mT, chunk=32)
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)


def test_pieces_with_the_state_equal_the_whole(interpreter):
    given, _ = inputs(1, 1, 1, 40, 4, 4)
    whole, last = interpreter.call(SSD, *given, chunk=32)
    state, ys = given[4], []
    for start, end in ((0, 17), (17, 18), (18, 40)):
        y, state = interpreter.call(SSD, *(x[:, :, start:end] for x in given[:4]), state)
        ys.append(y)
    torch.testing.assert_close((torch.cat(ys, 2), state), (whole, last), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("sizes", [(1, 2, 1, 0, 3, 4), (0, 2, 1, 3, 3, 4)])
def test_nothing_to_do(interpreter, sizes):
    given, _ = inputs(*sizes)
    y, last = interpreter.call(SSD, *given)
    assert y.shape == given[0].shape
    torch.testing.assert_close(last, given[4])


@pytest.mark.counted
def test_moves_the_bytes_that_it_says(interpreter):
    from corelib.kernels.ssd import forward_bytes
    from corelib.measure import count_io

    sizes = (1, 1, 1, 50, 16, 40)
    count = count_io(SSD, *inputs(*sizes)[0], chunk=32)
    assert count.bytes_moved == forward_bytes(*sizes, chunk=32)


def test_traffic_of_a_small_case_by_hand():
    from corelib.kernels.ssd import forward_bytes

    rows, decays, state = 4 * (2 + 3), 2 * 4, 4 * 2 * 3
    for_states = 5 * (rows + decays) + decays
    combined = 2 * state + 4 + 2 * state  # sums, decays of the chunk, first and last state
    outputs = state + 5 * (rows + decays) + 5 * (4 * (2 + 3) + decays)
    assert forward_bytes(1, 1, 1, 5, 2, 3) == for_states + state + combined + outputs
    assert forward_bytes(3, 4, 1, 5, 2, 3) == 12 * forward_bytes(1, 1, 1, 5, 2, 3)


def test_the_primitive_through_this_kernel(interpreter, monkeypatch):
    """Step sizes, groups and the skip around the kernel, as a GPU runs them."""
    import importlib

    primitive = importlib.import_module("corelib.primitives.ssd")
    (x, log_decay, B, C, state), _ = inputs(1, 2, 1, 20, 3, 5)
    A, D = torch.tensor([[-0.5, -2.0], [1.0, 3.0]])
    given = (x, log_decay, A, B, C, D)
    options = dict(dt_bias=D, dt_softplus=True, state=state, return_state=True)
    want = primitive.ssd_chunked(*given, **options)
    monkeypatch.setattr(primitive, "_fits_kernel", lambda *_: True)
    monkeypatch.setattr(primitive, "_by_kernel", lambda *parts: interpreter.call(SSD, *parts))
    got = primitive.ssd_chunked(*given, **options)
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)


def test_launcher_uses_declared_blocks():
    from corelib.kernels import ssd, ssd_backward

    for row in (*ssd.SPECIALISATIONS, *ssd_backward.SPECIALISATIONS):
        if row.kernel == "_combine":
            continue
        dtype = torch.float32 if row.signature["b"] == "*fp32" else torch.bfloat16
        for target in ("sm_90", "gfx942"):
            there = row.on(target)
            tile, _, *launch = ssd.blocks_for(row.constexprs["K"], dtype, target)
            assert (there.constexprs["TILE"], there.num_warps, there.num_stages) == (tile, *launch)


BAD = {
    "rank": (0, lambda x: x[0], ValueError, "values: expected 4 axes"),
    "dtype": (2, lambda x: x.double(), TypeError, "B: expected float16, bfloat16 or float32"),
    "width": (
        0,
        lambda x: x.repeat(1, 1, 1, 20),
        ValueError,
        "values: expected a width of 1 to 64",
    ),
    "groups": (2, lambda x: x[:, [0, 0, 0]], ValueError, "B: expected a number of groups"),
    "C": (3, lambda x: x[:, :, :2], ValueError, "C: expected shape"),
    "decay": (1, lambda x: x.double(), TypeError, "log_decay: expected float32"),
    "state": (4, lambda x: x.mT, ValueError, "state: expected shape"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_named(case):
    place, change, error, message = BAD[case]
    given, _ = inputs(1, 2, 1, 3, 4, 5)
    given[place] = change(given[place])
    shared.assert_refused(SSD, given, error, message)


@pytest.mark.parametrize("chunk, message", [(40, "chunk: .* of 16"), (64, "expected CUDA tensors")])
def test_bad_chunk_and_device(chunk, message):
    given, _ = inputs(1, 2, 1, 3, 4, 5)
    shared.assert_refused(SSD, given, ValueError, message, chunk=chunk)


def check():
    """What every mutant of the kernels has to get past."""
    from corelib.kernels.gates.cases import forward_backward

    for sizes in ((2, 2, 2, 40, 5, 35), (1, 5, 1, 20, 3, 4)):
        given, grads = inputs(*sizes)
        got = forward_backward(SSD, given, {"chunk": 32}, grads)
        assert_equals_loop(got, given, grads, 1e-5)


@pytest.mark.slow
def test_mutants_are_caught():
    """A sample; ``limit=None`` runs all of them."""
    assert shared.survivors("ssd", f"{__file__}:check", limit=6) == []
