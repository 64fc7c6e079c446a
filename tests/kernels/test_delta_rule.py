"""The kernel of the delta rule, interpreted, against the loop in float64."""

from __future__ import annotations

import pathlib

import pytest
import torch

from corelib.kernels.gates.interpreter import load_file
from corelib.primitives import linear_recurrence

shared = load_file(str(pathlib.Path(__file__).with_name("shared.py")))
DELTA = "corelib.kernels.delta_rule:delta_rule"
RUN = "corelib.kernels.gates.cases:forward_backward"


def random_inputs(kind, L, K=8, V=12, H=1, strongest=1.0, length=1.0, dtype=torch.float32):
    """``(q, k, v, beta), {state, log_decay}, (d_out, d_state)``; keys of about ``length``."""
    torch.manual_seed(0)
    q, k, v, d_out = (torch.randn(1, H, L, n) for n in (K, K, V, V))
    beta = torch.rand(1, H, L)
    state, d_state = torch.randn(2, 1, H, K, V)
    options = {"state": state}
    if kind:
        shape = (1, H, L) if kind == "scalar" else (1, H, L, K)
        options["log_decay"] = -strongest * torch.rand(shape)
    k = length * torch.nn.functional.normalize(k, dim=-1)
    return (*(x.to(dtype) for x in (q, k, v)), beta), options, (d_out.to(dtype), d_state)


def expected(given, options, grads, **more):
    """Output, state and every gradient of the loop, in float64."""
    leaves = [x.double().requires_grad_() for x in (*given, *options.values())]
    named = dict(zip(("beta", *options), leaves[3:], strict=True))
    results = linear_recurrence(*leaves[:3], **named, **more, form="reference", return_state=True)
    return *results, *torch.autograd.grad(results, leaves, [x.double() for x in grads])


def assert_equals_loop(interpreter, inputs, tolerance=2e-5, **more):
    given, options, grads = inputs
    got = interpreter.call(RUN, DELTA, given, options | more, grads)
    names = "out", "state", "dq", "dk", "dv", "dbeta", *(f"d{name}" for name in options)
    assert got[0][0].dtype == given[0].dtype and got[0][1].dtype == torch.float32
    shared.assert_close(names, [*got[0], *got[1]], expected(*inputs, **more), tolerance)


CASES = {
    "plain, one step": (dict(kind=None, L=1), {}),
    "plain, odd length, two value blocks": (dict(kind=None, L=35, K=20, V=36, H=2), {}),
    "long keys": (dict(kind=None, L=16, length=1.3), {}),
    "scalar decay, several chunks": (dict(kind="scalar", L=50, K=20, V=12, H=2), dict(scale=0.7)),
    "vector decay": (dict(kind="vector", L=21), dict(scale=0.7)),
    "vector, strong": (dict(kind="vector", L=17, strongest=150.0), {}),
}


@pytest.mark.parametrize("case", CASES)
def test_equals_the_loop(interpreter, case):
    sizes, more = CASES[case]
    assert_equals_loop(interpreter, random_inputs(**sizes), **more)


@pytest.mark.parametrize("kind", [None, "vector"])
def test_half_precision(interpreter, kind):
    assert_equals_loop(interpreter, random_inputs(kind, 18, dtype=torch.float16), tolerance=3e-2)


def test_the_primitive_calls_it(interpreter):
    (q, k, v, beta), options, _ = random_inputs("scalar", 5)
    options |= dict(beta=beta, return_state=True)
    got = interpreter.call(
        "corelib.primitives:linear_recurrence", q, k, v, **options, form="kernel"
    )
    wanted = linear_recurrence(q, k, v, **options, form="reference")
    for x, y in zip(got, wanted, strict=True):
        torch.testing.assert_close(x, y, atol=1e-5, rtol=1e-5)


def test_beta_of_zero_writes_nothing_and_one_overwrites(interpreter):
    (q, k, v, beta), _, _ = random_inputs(None, 20)
    out, state = interpreter.call(DELTA, q, k, v, torch.zeros_like(beta))
    assert not out.any() and not state.any()
    _, state = interpreter.call(DELTA, q, k, v, torch.ones_like(beta))
    torch.testing.assert_close(k[0, 0, -1] @ state[0, 0], v[0, 0, -1], atol=1e-5, rtol=1e-5)


def test_pieces_with_the_state_equal_the_whole(interpreter):
    (q, k, v, beta), options, _ = random_inputs("scalar", 40)
    whole, last = interpreter.call(DELTA, q, k, v, beta, **options)
    state, outs = options["state"], []
    for start, end in ((0, 17), (17, 18), (18, 40)):
        piece = (x[:, :, start:end] for x in (q, k, v, beta))
        decay = options["log_decay"][:, :, start:end]
        out, state = interpreter.call(DELTA, *piece, log_decay=decay, state=state)
        outs.append(out)
    torch.testing.assert_close(torch.cat(outs, 2), whole, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(state, last, atol=1e-5, rtol=1e-5)


def test_nothing_to_do(interpreter):
    (q, k, v, beta), options, _ = random_inputs("scalar", L=0)
    out, state = interpreter.call(DELTA, q, k, v, beta, **options)
    assert out.shape == v.shape
    torch.testing.assert_close(state, options["state"])


@pytest.mark.counted
@pytest.mark.parametrize(("kind", "decay"), [(None, "none"), ("scalar", "scalar")])
def test_moves_no_more_than_it_has_to(interpreter, kind, decay):
    """The errors' pass and the plain recurrence of 16-step chunks."""
    from corelib.kernels.delta_rule import delta_bytes
    from corelib.kernels.linear_recurrence import scan_bytes
    from corelib.measure import count_io

    given, options, _ = random_inputs(kind, 32, K=16, V=40, H=2)
    count = count_io(DELTA, *given, **options)
    assert count.bytes_moved == delta_bytes(2, 32, 16, 40, decay) + scan_bytes(2, 32, 16, 40, decay)


def test_traffic_of_a_small_case_by_hand():
    from corelib.kernels.delta_rule import delta_bytes

    state, a_step = 2 * 4 * 2 * 3, 4 * (2 + 3 + 1 + 3)
    assert delta_bytes(1, 5, 2, 3, "none") == 5 * a_step + state
    assert delta_bytes(1, 5, 2, 3, "scalar") == 5 * (a_step + 4) + state
    assert delta_bytes(1, 5, 2, 3, "key") == 5 * (a_step + 8) + state


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (dict(beta=torch.zeros(2)), ValueError, r"beta: expected shape \(1, 1, 3\)"),
        (dict(beta=None), ValueError, "beta: expected shape .* got NoneType"),
        (dict(q=torch.zeros(1, 1, 3, 8).double()), TypeError, "q: expected float16"),
        ({}, ValueError, "expected CUDA tensors"),
    ],
)
def test_bad_input_is_named(change, error, message):
    named = dict(zip(("q", "k", "v", "beta"), random_inputs(None, 3)[0], strict=True))
    shared.assert_refused(DELTA, (), error, message, **(named | change))


def check():
    """What every mutant of the kernel has to get past."""
    from corelib.kernels.gates.cases import forward_backward

    for kind, sizes in (("scalar", dict(L=18, V=33)), (None, dict(L=17)), ("vector", dict(L=17))):
        given, options, grads = random_inputs(kind, H=2, **sizes)
        got = forward_backward(DELTA, given, options | dict(scale=1.5), grads)
        wanted = expected(given, options, grads, scale=1.5)
        for x, y in zip([*got[0], *got[1]], wanted, strict=True):
            torch.testing.assert_close(x.double(), y, atol=5e-5, rtol=5e-5)


@pytest.mark.slow
def test_mutants_are_caught():
    """A sample; ``limit=None`` runs all of them in some minutes."""
    assert shared.survivors("delta_rule", f"{__file__}:check", limit=4) == []
