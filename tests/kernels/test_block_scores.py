"""Block means and their scores, interpreted, against the plain means of scores in float64."""

from __future__ import annotations

import pathlib

import pytest
import torch

from corelib.kernels.gates.interpreter import load_file
from corelib.primitives import visible_keys

shared = load_file(str(pathlib.Path(__file__).with_name("shared.py")))
MODULE = "corelib.kernels.block_scores"
RUN = "corelib.kernels.gates.cases:forward_backward"


def random_inputs(B, H, G, L, S, D, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = (B, H, L, D), (B, G, S, D)
    return [torch.randn(x, generator=generator).add(0.5).to(dtype) for x in shapes]


def means(x, block):
    return torch.stack([part.mean(2) for part in x.double().split(block, 2)], 2)


def averaging(length, block):
    """``(n, length)``: rows that take the mean of a block."""
    return means(torch.eye(length)[None, None], block)[0, 0]


def expected(q, k, block, *, causal, scale=None):
    """The mean of all scores of each pair of blocks; ``-inf`` where no pair of tokens is seen."""
    scale = q.shape[3] ** -0.5 if scale is None else scale
    keys = k.double().repeat_interleave(q.shape[1] // k.shape[1], 1)
    average, average_k = averaging(q.shape[2], block), averaging(k.shape[2], block).T
    visible = visible_keys(q.shape[2], k.shape[2], causal=causal).double()
    scores = average @ (q.double() @ keys.mT * scale) @ average_k
    return scores.masked_fill(average @ visible @ average_k == 0, -torch.inf)


def grouped(scores, G):
    return scores.unflatten(1, (G, -1)).sum(2)


def assert_equal(got, wanted, tolerance=2e-6):
    torch.testing.assert_close(got.double(), wanted, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize(
    ("L", "D", "block"), [(1, 16, 4), (63, 20, 16), (100, 16, 33), (7, 8, 1), (5, 130, 64)]
)
def test_means(interpreter, L, D, block):
    x = random_inputs(1, 2, 1, L, 1, D)[0]
    (got,), _ = interpreter.call(RUN, f"{MODULE}:pool_blocks", (x, block))
    assert_equal(got, means(x, block))


CASES = {
    "one token": ((1, 1, 1, 1, 1, 16), dict(block=16, causal=True)),
    "grouped, odd length": ((2, 4, 2, 63, 63, 20), dict(block=16, causal=True)),
    "not causal, own scale": ((1, 2, 1, 30, 50, 16), dict(block=16, causal=False, scale=0.7)),
    "more keys than queries": ((1, 2, 1, 20, 77, 16), dict(block=8, causal=True)),
    "queries that see nothing": ((1, 2, 2, 50, 21, 16), dict(block=8, causal=True)),
    "several tiles": ((1, 1, 1, 66, 67, 8), dict(block=1, causal=True)),
    "two slices": ((1, 1, 1, 20, 20, 50), dict(block=5, causal=True)),
    "chunk means for one query": ((1, 4, 2, 1, 43, 16), dict(block=8, causal=False)),
}


@pytest.mark.parametrize("case", CASES)
def test_scores_are_means_of_scores(interpreter, case):
    sizes, options = CASES[case]
    q, k = random_inputs(*sizes)
    wanted = expected(q, k, **options)
    (got,), _ = interpreter.call(RUN, f"{MODULE}:pooled_block_scores", (q, k), options)
    assert_equal(got, wanted)
    (got,), _ = interpreter.call(RUN, f"{MODULE}:grouped_block_scores", (q, k), options)
    assert_equal(got, grouped(wanted, k.shape[1]))


def test_equals_the_primitive(interpreter):
    from corelib.primitives.block_scores import grouped_block_scores, pooled_block_scores

    q, k = random_inputs(1, 4, 2, 37, 45, 16)
    options = dict(block=8, causal=True)
    got = interpreter.call(f"{MODULE}:pooled_block_scores", q, k, **options)
    assert_equal(got, pooled_block_scores(q.double(), k.double(), **options))
    got = interpreter.call(f"{MODULE}:grouped_block_scores", q, k, **options)
    assert_equal(got, grouped_block_scores(q.double(), k.double(), **options))


def test_half_precision(interpreter):
    q, k = random_inputs(1, 4, 2, 45, 45, 24, dtype=torch.float16)
    options = dict(block=16, causal=True)
    wanted = expected(q, k, **options)
    for name, answer in (("pooled", wanted), ("grouped", grouped(wanted, 2))):
        (got,), _ = interpreter.call(RUN, f"{MODULE}:{name}_block_scores", (q, k), options)
        assert got.dtype == torch.float16
        assert_equal(got, answer, tolerance=3e-3)


def test_half_precision_sums_do_not_overflow(interpreter):
    x = torch.full((1, 1, 64, 16), 2000.0, dtype=torch.float16)
    assert torch.equal(interpreter.call(f"{MODULE}:pool_blocks", x, 64), x[:, :, :1])


def test_any_layout_and_nothing_beyond_it(interpreter):
    q, k = random_inputs(2, 4, 2, 35, 43, 12)
    views = shared.guarded(q), shared.guarded(k)
    got = interpreter.call(f"{MODULE}:pooled_block_scores", *views, 8, causal=True)
    assert_equal(got, expected(q, k, 8, causal=True))


@pytest.mark.parametrize("sizes", [(1, 2, 1, 0, 9, 16), (1, 2, 1, 9, 0, 16), (0, 2, 1, 9, 9, 16)])
def test_nothing_to_do(interpreter, sizes):
    q, k = random_inputs(*sizes)
    got = interpreter.call(f"{MODULE}:pooled_block_scores", q, k, 4, causal=True)
    assert got.shape == (sizes[0], 2, -(-sizes[3] // 4), -(-sizes[4] // 4))


@pytest.mark.counted
def test_moves_no_more_than_it_has_to(interpreter):
    from corelib.kernels.block_scores import block_score_bytes
    from corelib.measure import count_io

    q, k = random_inputs(2, 2, 2, 90, 100, 32)
    count = count_io(f"{MODULE}:pooled_block_scores", q, k, block=8, causal=False)
    assert count.bytes_moved == block_score_bytes(2, 2, 2, 90, 100, 32, block=8, itemsize=4)


@pytest.mark.counted
def test_tiles_that_are_hidden_are_not_multiplied(interpreter):
    """Of four tiles, one has 64 blocks of queries before 2 of keys: none of them is read."""
    from corelib.measure import count_io

    q, k = random_inputs(1, 1, 1, 66, 66, 8)
    every, causal = (
        count_io(f"{MODULE}:pooled_block_scores", q, k, block=1, causal=causal).bytes_moved
        for causal in (False, True)
    )
    assert every - causal == (64 + 2) * 8 * 4


BAD = {
    "kind": (lambda q, k: (q.double(), k), {}, TypeError, "q: expected float16, bfloat16"),
    "kinds": (lambda q, k: (q, k.half()), {}, TypeError, "k: expected float16, bfloat16"),
    "axes": (lambda q, k: (q[0], k), {}, ValueError, r"q: expected \(batch, heads, length"),
    "heads": (lambda q, k: (q[:, :3], k), {}, ValueError, "k: expected batch 1, heads that div"),
    "width": (lambda q, k: (q, k[..., :4]), {}, ValueError, "and width 8, got 1, 2 and 4"),
    "block": (lambda q, k: (q, k), dict(block=0), ValueError, "block: expected"),
    "gradients": (lambda q, k: (q, k.requires_grad_()), {}, ValueError, "no backward pass"),
    "device": (lambda q, k: (q, k), {}, ValueError, "expected CUDA tensors"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_named(case):
    change, options, error, message = BAD[case]
    args, options = change(*random_inputs(1, 4, 2, 9, 9, 8)), dict(block=4, causal=True) | options
    shared.assert_refused(f"{MODULE}:pooled_block_scores", args, error, message, **options)


def check():
    """What every mutant of the kernels has to get past."""
    from corelib.kernels.block_scores import grouped_block_scores, pooled_block_scores
    from corelib.kernels.gates.cases import poisoned

    for sizes, options in (
        ((2, 4, 2, 35, 43, 12), dict(block=8, causal=True)),
        ((1, 1, 1, 50, 21, 20), dict(block=40, causal=False, scale=1.5)),  # rows in two steps
        ((1, 1, 1, 66, 67, 4), dict(block=1, causal=True)),  # several tiles
    ):
        q, k = random_inputs(*sizes)
        views = shared.guarded(q), shared.guarded(k)
        with poisoned():
            got = pooled_block_scores(*views, **options)
            sums = grouped_block_scores(*views, **options)
        wanted = expected(q, k, **options)
        assert_equal(got, wanted, tolerance=5e-6)
        assert_equal(sums, grouped(wanted, k.shape[1]), tolerance=1e-5)


EQUIVALENT = {
    "_scores_kernel: column * block <= last -> ((column * block <= last) == "
    "(column * block <= last))": "hidden tiles are computed too; the byte count sees it",
}


@pytest.mark.slow
def test_mutants_are_caught():
    """A sample; of all, one more lives: a looser bound on the tiles that are skipped."""
    check = f"{__file__}:check"
    assert shared.survivors("block_scores", check, limit=11, equivalent=EQUIVALENT) == []
