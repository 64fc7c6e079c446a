"""The linear recurrence kernel, interpreted, against the loop in float64."""

from __future__ import annotations

import pathlib

import pytest
import torch

from corelib.kernels.gates.interpreter import load_file
from corelib.primitives import linear_recurrence

shared = load_file(str(pathlib.Path(__file__).with_name("shared.py")))
SCAN = "corelib.kernels.linear_recurrence:linear_recurrence"
RUN = "corelib.kernels.gates.cases:forward_backward"


def random_inputs(kind, L, K=8, V=12, H=1, strongest=1.0, dtype=torch.float32):
    """``(q, k, v), {state, log_decay}, (d_out, d_state)``"""
    torch.manual_seed(0)
    q, k, v, d_out = (torch.randn(1, H, L, n) for n in (K, K, V, V))
    state, d_state = torch.randn(2, 1, H, K, V)
    options = {"state": state}
    if kind:
        shape = (1, H, L) if kind == "scalar" else (1, H, L, K)
        options["log_decay"] = -strongest * torch.rand(shape)
    return (q.to(dtype), (k / K**0.5).to(dtype), v.to(dtype)), options, (d_out.to(dtype), d_state)


def expected(qkv, options, grads, **more):
    """Output, state and every gradient of the loop, in float64."""
    leaves = [x.double().requires_grad_() for x in (*qkv, *options.values())]
    named = dict(zip(options, leaves[3:], strict=True))
    results = linear_recurrence(*leaves[:3], **named, **more, form="reference", return_state=True)
    return *results, *torch.autograd.grad(results, leaves, [x.double() for x in grads])


def assert_equals_loop(interpreter, inputs, tolerance=1e-5, **more):
    qkv, options, grads = inputs
    got = interpreter.call(RUN, SCAN, qkv, options | more, grads)
    names = "out", "state", "dq", "dk", "dv", *(f"d{name}" for name in options)
    assert got[0][0].dtype == qkv[0].dtype and got[0][1].dtype == torch.float32
    shared.assert_close(names, [*got[0], *got[1]], expected(*inputs, **more), tolerance)


CASES = {
    "plain, one step": (dict(kind=None, L=1), {}),
    "plain, odd length, two value blocks": (dict(kind=None, L=63, K=20, V=36, H=2), {}),
    "scalar decay, below one chunk": (dict(kind="scalar", L=7), dict(scale=0.7)),
    "scalar decay, several chunks": (dict(kind="scalar", L=100, K=20, V=36, H=2), {}),
    "vector decay": (dict(kind="vector", L=21), dict(scale=0.7)),
    "vector, strong": (dict(kind="vector", L=17, strongest=150.0), {}),
    "vector, wide values, one step": (dict(kind="vector", L=1, V=40), {}),
}


@pytest.mark.parametrize("case", CASES)
def test_equals_the_loop(interpreter, case):
    sizes, more = CASES[case]
    assert_equals_loop(interpreter, random_inputs(**sizes), **more)


def test_strong_scalar_decays(interpreter):
    """Sums of a chunk's log-decays reach -1600, where float32 counts in steps of 1e-4."""
    assert_equals_loop(interpreter, random_inputs("scalar", 40, strongest=150.0), tolerance=1e-3)


@pytest.mark.parametrize("kind", [None, "scalar", "vector"])
def test_half_precision(interpreter, kind):
    inputs = random_inputs(kind, 18, dtype=torch.float16)
    assert_equals_loop(interpreter, inputs, tolerance=2e-2)


def test_any_layout(interpreter):
    """Heads that are slices of one projection, tokens before heads."""
    (q, k, v), options, grads = random_inputs("scalar", 40, K=8, V=8, H=2)
    packed = torch.cat([q, k, v], -1).transpose(1, 2).contiguous().transpose(1, 2)
    assert_equals_loop(interpreter, (packed.split(8, -1), options, grads))


def test_resets_forget(interpreter):
    (q, k, v), options, _ = random_inputs("scalar", 36)
    options["log_decay"][:, :, 33] = -torch.inf
    out, state = interpreter.call(SCAN, q, k, v, **options)
    fresh = interpreter.call(SCAN, *(x[:, :, 33:] for x in (q, k, v)),
                             log_decay=options["log_decay"][:, :, 33:])  # fmt: skip
    torch.testing.assert_close(out[:, :, 33:], fresh[0], atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(state, fresh[1], atol=2e-5, rtol=1e-4)


def test_pieces_with_the_state_equal_the_whole(interpreter):
    (q, k, v), options, _ = random_inputs("scalar", 50)
    whole, last = interpreter.call(SCAN, q, k, v, **options)
    state, outs = options["state"], []
    for start, end in ((0, 33), (33, 34), (34, 50)):
        piece = (x[:, :, start:end] for x in (q, k, v))
        decay = options["log_decay"][:, :, start:end]
        out, state = interpreter.call(SCAN, *piece, log_decay=decay, state=state)
        outs.append(out)
    torch.testing.assert_close(torch.cat(outs, 2), whole, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(state, last, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("sizes", [dict(L=0), dict(L=3, H=0)])
def test_nothing_to_do(interpreter, sizes):
    (q, k, v), options, _ = random_inputs("scalar", **sizes)
    out, state = interpreter.call(SCAN, q, k, v, **options)
    assert out.shape == v.shape
    torch.testing.assert_close(state, options["state"])


@pytest.mark.counted
@pytest.mark.parametrize(
    ("kind", "decay", "L"), [(None, "none", 96), ("scalar", "scalar", 96), ("vector", "key", 16)]
)
def test_moves_no_more_than_it_has_to(interpreter, kind, decay, L):
    from corelib.kernels.linear_recurrence import scan_bytes
    from corelib.measure import count_io

    (q, k, v), options, _ = random_inputs(kind, L, K=16, V=40, H=2)
    count = count_io(SCAN, q, k, v, **options)
    assert count.bytes_moved == scan_bytes(2, L, 16, 40, decay)


def test_traffic_of_a_small_case_by_hand():
    from corelib.kernels.linear_recurrence import scan_bytes

    state, tokens = 2 * 4 * 2 * 3, 5 * 4 * (2 + 2 + 3 + 3)
    assert scan_bytes(1, 5, 2, 3, "none") == tokens + state
    assert scan_bytes(1, 5, 2, 3, "scalar") == tokens + 5 * 4 + state
    assert scan_bytes(1, 5, 2, 3, "value") == tokens + 5 * 4 * 3 + state


def test_launcher_uses_declared_blocks():
    from corelib.kernels.linear_recurrence import BLOCKS, SPECIALISATIONS, blocks_for

    declared = {(x.constexprs["DECAY"], x.signature["a"], x.constexprs["BLOCK_K"]):
                (x.constexprs["CHUNK"], x.constexprs["BLOCK_V"], x.num_warps, x.num_stages)
                for x in SPECIALISATIONS}  # fmt: skip
    for (decay, kind, width), row in declared.items():
        dtype = torch.float32 if kind == "*fp32" else torch.bfloat16
        assert row == tuple(blocks_for(decay, width, width, dtype))
    assert set(declared.values()) <= {tuple(row) for row in BLOCKS.values()}


BAD = {
    "rank": (lambda x: (x[0][0], *x[1:]), {}, ValueError, "q: expected"),
    "dtype": (lambda x: (x[0].double(), *x[1:]), {}, TypeError, "q: expected float16"),
    "width": (lambda x: (*x[:2], x[2].repeat(1, 1, 1, 20)), {}, ValueError, "v: expected a width"),
    "lengths": (lambda x: (x[0][:, :, :2], *x[1:]), {}, ValueError, "q, k, v: expected one"),
    "decay": (lambda x: x, dict(log_decay=torch.zeros(2)), ValueError, "log_decay: expected"),
    "state": (lambda x: x, dict(state=torch.zeros(2)), ValueError, "state: expected"),
    "device": (lambda x: x, {}, ValueError, "expected CUDA tensors"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_named(case):
    change, options, error, message = BAD[case]
    qkv = change(random_inputs(None, 3)[0])
    shared.assert_refused(SCAN, qkv, error, message, **options)


def check():
    """What every mutant of the kernel has to get past."""
    from corelib.kernels.gates.cases import forward_backward

    mild, strong = ("vector", dict(L=17)), ("vector", dict(L=17, strongest=3.0))
    for kind, sizes in (("scalar", dict(L=18, V=33)), (None, dict(L=17)), mild, strong):
        qkv, options, grads = random_inputs(kind, H=2, **sizes)
        got = forward_backward(SCAN, qkv, options | dict(scale=1.5), grads)
        wanted = expected(qkv, options, grads, scale=1.5)
        for x, y in zip([*got[0], *got[1]], wanted, strict=True):
            torch.testing.assert_close(x.double(), y, atol=2e-5, rtol=2e-5)


@pytest.mark.slow
def test_mutants_are_caught():
    """A sample; ``limit=None`` runs all of them in some minutes."""
    assert shared.survivors("linear_recurrence", f"{__file__}:check", limit=6) == []
