"""Column sums of attention, interpreted, against the map in float64."""

from __future__ import annotations

import pathlib

import pytest
import torch

from corelib.kernels.gates.interpreter import load_file
from corelib.primitives import visible_keys

shared = load_file(str(pathlib.Path(__file__).with_name("shared.py")))
KERNEL = "corelib.kernels.attention_column_sums:attention_column_sums"
RUN = "corelib.kernels.gates.cases:forward_backward"


def random_inputs(B, H, G, L, S, D, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    q, k, weights = (
        torch.randn(shape, generator=generator).to(dtype)
        for shape in ((B, H, L, D), (B, G, S, D), (B, H, L))
    )
    return q, k, weights.float()


def scores(q, k, causal, scale=None):
    keys = k.double().repeat_interleave(q.shape[1] // k.shape[1], 1)
    found = q.double() @ keys.mT * (q.shape[3] ** -0.5 if scale is None else scale)
    return found.masked_fill(~visible_keys(q.shape[2], k.shape[2], causal=causal), -torch.inf)


def expected(q, k, *, causal, scale=None, weights=None):
    """``(lse, sums)`` from the map."""
    found = scores(q, k, causal, scale)
    shares = found.softmax(-1).nan_to_num(0.0)
    if weights is not None:
        shares = shares * weights.double()[..., None]
    return found.logsumexp(-1).float(), shares.sum(2)


def assert_equal(got, wanted, tolerance=5e-6):
    torch.testing.assert_close(got.double(), wanted, atol=tolerance, rtol=tolerance)


CASES = {
    "one token": ((1, 1, 1, 1, 1, 16), dict(causal=True)),
    "grouped, odd length": ((2, 4, 2, 63, 63, 20), dict(causal=True)),
    "not causal, own scale": ((1, 2, 1, 30, 50, 16), dict(causal=False, scale=0.7)),
    "more keys than queries": ((1, 2, 1, 20, 100, 16), dict(causal=True)),
    "queries that see nothing": ((1, 2, 2, 50, 21, 16), dict(causal=True)),
    "several tiles": ((1, 1, 1, 130, 140, 8), dict(causal=True)),
    "two slices": ((1, 1, 1, 20, 20, 50), dict(causal=True)),
}


@pytest.mark.parametrize("case", CASES)
def test_sums_are_those_of_the_map(interpreter, case):
    sizes, options = CASES[case]
    q, k, weights = random_inputs(*sizes)
    for w in (None, weights):
        lse, wanted = expected(q, k, **options, weights=w)
        (got,), _ = interpreter.call(RUN, KERNEL, (q, k, lse), options | dict(weights=w))
        assert got.dtype == torch.float32
        assert_equal(got, wanted)


def test_equals_the_primitive(interpreter):
    from corelib.primitives.column_sums import attention_column_sums

    q, k, weights = random_inputs(1, 4, 2, 37, 45, 16)
    options = dict(causal=True, weights=weights[:, :1])
    lse, _ = expected(q, k, causal=True)
    got = interpreter.call(KERNEL, q, k, lse, **options)
    wanted = attention_column_sums(q.double(), k.double(), **options)
    assert_equal(got, wanted)


def test_half_precision(interpreter):
    q, k, weights = random_inputs(1, 4, 2, 45, 45, 24, dtype=torch.float16)
    lse, wanted = expected(q, k, causal=True, weights=weights)
    options = dict(causal=True, weights=weights)
    (got,), _ = interpreter.call(RUN, KERNEL, (q, k, lse), options)
    assert_equal(got, wanted)


def test_any_layout_and_nothing_beyond_it(interpreter):
    q, k, weights = random_inputs(2, 4, 2, 35, 43, 12)
    lse, wanted = expected(q, k, causal=True, weights=weights)
    strided = torch.stack([weights, weights + torch.nan], 3)[..., 0]
    views = shared.guarded(q), shared.guarded(k)
    got = interpreter.call(KERNEL, *views, lse, causal=True, weights=strided)
    assert_equal(got, wanted)


@pytest.mark.parametrize("sizes", [(1, 2, 1, 0, 9, 16), (1, 2, 1, 9, 0, 16), (0, 2, 1, 9, 9, 16)])
def test_nothing_to_do(interpreter, sizes):
    q, k, weights = random_inputs(*sizes)
    got = interpreter.call(KERNEL, q, k, weights, causal=True)
    assert torch.equal(got, torch.zeros(sizes[0], 2, sizes[4]))


@pytest.mark.counted
def test_moves_no_more_than_it_has_to(interpreter):
    from corelib.kernels.attention_column_sums import column_sum_bytes
    from corelib.measure import count_io

    q, k, weights = random_inputs(2, 2, 2, 60, 50, 32)
    lse, _ = expected(q, k, causal=False)
    for w in (None, weights):
        count = count_io(KERNEL, q, k, lse, causal=False, weights=w)
        wanted = column_sum_bytes(2, 2, 2, 60, 50, 32, itemsize=4, weighted=w is not None)
        assert count.bytes_moved == wanted


@pytest.mark.counted
def test_hidden_tiles_are_not_read(interpreter):
    """Of 2 by 2 tiles, the one of early queries and late keys is left out."""
    from corelib.measure import count_io

    q, k, _ = random_inputs(1, 1, 1, 128, 128, 8)
    every, causal = (
        count_io(KERNEL, q, k, expected(q, k, causal=c)[0], causal=c).bytes_moved
        for c in (False, True)
    )
    assert every - causal == 64 * (8 + 8 + 1) * 4


BAD = {
    "kind": (dict(q=torch.zeros(1, 4, 9, 8).double()), TypeError, "q: expected float16"),
    "kinds": (dict(k=torch.zeros(1, 2, 9, 8).half()), TypeError, "k: expected float16"),
    "axes": (dict(q=torch.zeros(4, 9, 8)), ValueError, r"q: expected \(batch, heads, length"),
    "heads": (dict(k=torch.zeros(1, 3, 9, 8)), ValueError, "k: expected batch 1, heads that"),
    "lse": (dict(lse=torch.zeros(1, 4, 8)), ValueError, r"lse: expected shape \(1, 4, 9\)"),
    "weights": (dict(weights=torch.zeros(1, 3, 9)), ValueError, "weights: expected a shape"),
    "gradients": (
        dict(k=torch.zeros(1, 2, 9, 8, requires_grad=True)), ValueError, "no backward pass"
    ),
    "device": ({}, ValueError, "expected CUDA tensors"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_named(case):
    change, error, message = BAD[case]
    good = dict(q=torch.zeros(1, 4, 9, 8), k=torch.zeros(1, 2, 9, 8), lse=torch.zeros(1, 4, 9))
    shared.assert_refused(KERNEL, (), error, message, **good | change, causal=True)


def check():
    """What every mutant of the kernel has to get past."""
    from corelib.kernels.attention_column_sums import attention_column_sums
    from corelib.kernels.gates.cases import poisoned

    for sizes, options, weighted in (
        ((2, 4, 2, 35, 43, 12), dict(causal=True), True),
        ((1, 1, 1, 70, 21, 36), dict(causal=True), False),  # two tiles, rows that see nothing
        ((1, 2, 1, 66, 67, 4), dict(causal=False, scale=1.5), True),
    ):
        q, k, weights = random_inputs(*sizes)
        weights = weights if weighted else None
        lse, wanted = expected(q, k, **options, weights=weights)
        views = shared.guarded(q), shared.guarded(k)
        with poisoned():
            got = attention_column_sums(*views, lse, weights=weights, **options)
        assert_equal(got, wanted, tolerance=1e-5)


@pytest.mark.slow
def test_mutants_are_caught():
    """A sample; of twelve, none lived."""
    assert shared.survivors("attention_column_sums", f"{__file__}:check", limit=8) == []
