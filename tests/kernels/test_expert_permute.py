"""Permuting and multiplying by expert, interpreted, against loops in float64."""

from __future__ import annotations

import pathlib

import pytest
import torch

from corelib.kernels.gates.interpreter import load_file
from corelib.primitives.expert_permute import sort_by_expert

shared = load_file(str(pathlib.Path(__file__).with_name("shared.py")))
MODULE = "corelib.kernels.expert_permute"
RUN = "corelib.kernels.gates.cases:forward_backward"


def normal(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def plan(N, k, E, dropped=0, seed=0):
    """The last expert gets nothing; ``dropped`` tokens lose a choice, the second of all both."""
    experts = torch.rand(N, max(E - 1, k), generator=torch.Generator().manual_seed(seed))
    experts = experts.argsort(1)[:, :k]
    first = min(1, N - dropped)
    experts[first : first + dropped, -1] = -1
    experts[first : first + min(1, dropped)] = -1
    how = sort_by_expert(experts, E)
    return how._replace(order=how.order.clone())  # nothing behind it that may be read


def combined(rows, place, weights=None):
    """The sum of each token's rows, token by token."""
    out = torch.zeros(len(place), rows.shape[1], dtype=torch.float64)
    for n, j in ((n, j) for n in range(len(place)) for j in range(place.shape[1])):
        if place[n, j] >= 0:
            out[n] += (1 if weights is None else weights[n, j].double()) * rows[place[n, j]]
    return out


SIZES = [
    (1, 1, 1, 1, 0),
    (37, 2, 5, 130, 0),
    (40, 3, 4, 7, 9),
    (5, 1, 3, 20, 5),
    (16, 2, 4, 128, 0),
]


@pytest.mark.parametrize("sizes", SIZES)
def test_permute_with_its_gradient(interpreter, sizes):
    N, k, E, C, dropped = sizes
    how, x = plan(N, k, E, dropped), normal(N, C)
    d_rows = normal(len(how.order), C, seed=1)
    args = (x, how.order, how.place)
    (rows,), (grad,) = interpreter.call(RUN, f"{MODULE}:permute", args, None, (d_rows,))
    assert torch.equal(rows, x[how.order // k])
    wanted = combined(d_rows.double(), how.place)
    torch.testing.assert_close(grad.double(), wanted, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("sizes", SIZES)
def test_unpermute_with_its_gradients(interpreter, sizes, weighted):
    N, k, E, C, dropped = sizes
    how = plan(N, k, E, dropped)
    rows, weights, d_out = normal(len(how.order), C), normal(N, k, seed=1), normal(N, C, seed=2)
    args = (rows, how.order, how.place) + ((weights,) if weighted else ())
    (out,), grads = interpreter.call(RUN, f"{MODULE}:unpermute", args, None, (d_out,))
    leaves = [rows.double().requires_grad_(), weights.double().requires_grad_()]
    wanted = combined(*leaves[:1], how.place, leaves[1] if weighted else None)
    torch.testing.assert_close(out.double(), wanted, atol=2e-6, rtol=2e-6)
    exact = torch.autograd.grad(
        wanted, leaves, d_out.double(), allow_unused=True, materialize_grads=True
    ) if wanted.requires_grad else [torch.zeros_like(x) for x in leaves]  # fmt: skip
    for got, want in zip(grads, exact, strict=False):
        torch.testing.assert_close(got.double(), want, atol=1e-5, rtol=1e-5)


LENGTHS = {
    "one row": ([1], 1, 1),
    "empty ones between": ([0, 63, 0, 0, 3], 16, 24),
    "several tiles, odd sizes": ([100, 1, 65], 35, 70),
    "whole tiles": ([64, 128], 32, 64),
    "nothing": ([0, 0], 4, 3),
    "wide": ([5, 9], 130, 66),
}


def products(rows, weights, lengths):
    parts = zip(rows.split(lengths), weights, strict=True)
    return torch.cat([part @ w for part, w in parts])


@pytest.mark.parametrize("case", LENGTHS)
def test_products_and_gradients(interpreter, case):
    lengths, I, O = LENGTHS[case]
    ends = torch.tensor([0, *lengths]).cumsum(0)
    given = normal(sum(lengths), I), normal(len(lengths), I, O, seed=1)
    d_out = normal(sum(lengths), O, seed=2)
    args = (*given, ends)
    (out,), grads = interpreter.call(RUN, f"{MODULE}:grouped_matmul", args, None, (d_out,))
    leaves = [x.double().requires_grad_() for x in given]
    wanted = products(*leaves, lengths)
    torch.testing.assert_close(out.double(), wanted, atol=1e-4, rtol=1e-5)
    for got, want in zip(grads, torch.autograd.grad(wanted, leaves, d_out.double()), strict=True):
        torch.testing.assert_close(got.double(), want, atol=1e-4, rtol=1e-5)


def test_half_precision_is_summed_in_float32(interpreter):
    how, weights = plan(9, 2, 4), normal(9, 2, seed=1)
    rows = normal(18, 20, dtype=torch.float16)
    args = rows, how.order, how.place, weights
    out = interpreter.call(f"{MODULE}:unpermute", *args)
    wanted = combined(rows.double(), how.place, weights)
    assert out.dtype == torch.float16
    torch.testing.assert_close(out.double(), wanted, atol=2e-3, rtol=1e-3)
    rows, matrices = torch.full((3, 300), 8, dtype=torch.float16), torch.ones(1, 300, 2).half()
    found = interpreter.call(f"{MODULE}:grouped_matmul", rows, matrices, torch.tensor([0, 3]))
    assert (found == 2400).all()


def along_strides(x, how, matrices):
    from corelib.kernels.expert_permute import grouped_matmul, permute

    rows = permute(x.T.contiguous().T, how.order, how.place)
    ends = how.cu_seqlens.repeat_interleave(3)[::3]
    return grouped_matmul(rows, matrices.mT.contiguous().mT, ends)


def test_strides_and_a_whole_layer(interpreter):
    how, x, matrices = plan(11, 2, 4), normal(11, 6), normal(4, 6, 5, seed=1)
    got = interpreter.call(f"{__file__}:along_strides", x, how, matrices)
    wanted = products(x[how.order // 2], matrices, how.cu_seqlens.diff().tolist())
    torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("N", "C"), [(0, 4), (3, 0)])
def test_nothing_to_do(interpreter, N, C):
    how = plan(N, 1, 2)
    args = normal(N, C), how.order, how.place
    assert interpreter.call(f"{MODULE}:permute", *args).shape == (N, C)
    assert interpreter.call(f"{MODULE}:unpermute", *args).shape == (N, C)


def test_what_goes_nowhere_is_not_read(interpreter):
    how, x = plan(12, 2, 4, dropped=4), normal(12, 8)
    x[1] = torch.nan  # the token that lost all its choices
    rows = interpreter.call(f"{MODULE}:permute", x, how.order, how.place)
    out = interpreter.call(f"{MODULE}:unpermute", rows, how.order, how.place)
    assert out.isfinite().all() and not out[1].any()


@pytest.mark.counted
def test_moves_no_more_than_it_has_to(interpreter):
    from corelib.kernels.expert_permute import grouped_bytes, permute_bytes
    from corelib.measure import count_io

    how = plan(40, 2, 4)
    count = count_io(f"{MODULE}:permute", normal(40, 130), how.order, how.place)
    assert count.bytes_moved == permute_bytes(80, 130)
    lengths, I, O = [70, 0, 20], 33, 66
    given = normal(90, I), normal(3, I, O), torch.tensor([0, 70, 70, 90])
    count = count_io(f"{MODULE}:grouped_matmul", *given)
    assert count.bytes_moved == grouped_bytes(lengths, I, O)


def test_launcher_uses_declared_tiles():
    from corelib.kernels import expert_permute as kernels

    for row in kernels.SPECIALISATIONS:
        tile = {name: getattr(kernels, name) for name in ("ROWS", "COLUMNS", "BLOCK", "DEPTH")}
        assert {n: row.constexprs[n] for n in tile if n in row.constexprs}.items() <= tile.items()
        assert row.num_warps == kernels.WARPS


BAD = {
    "kind": ("permute", lambda x, h, w: (x.double(), *h[:2]), TypeError, "x: expected float16"),
    "rows of x": ("permute", lambda x, h, w: (x[1:], *h[:2]), ValueError, r"x: expected shape \(4"),
    "order": (
        "permute", lambda x, h, w: (x, h[0].int(), h[1]), ValueError, "order: expected int64",
    ),
    "rows": ("unpermute", lambda x, h, w: (x, *h[:2]), ValueError, r"rows: expected shape \(8, C"),
    "weights": (
        "unpermute", lambda x, h, w: (x.repeat(2, 1), *h[:2], x), ValueError, "weights: expected",
    ),
    "matrices": (
        "grouped_matmul", lambda x, h, w: (x, w[:, 1:], h[2]), ValueError, r"expected \(R, I\)",
    ),
    "dtypes": (
        "grouped_matmul", lambda x, h, w: (x, w.half(), h[2]), TypeError, "rows, weights: expect",
    ),
    "lengths": (
        "grouped_matmul", lambda x, h, w: (x, w, h[2][1:]), ValueError, "cu_seqlens: expected sh",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_named(interpreter, case):
    name, change, error, message = BAD[case]
    args = change(normal(4, 6), plan(4, 2, 3), normal(3, 6, 5))
    shared.assert_refused_where_it_runs(interpreter, f"{MODULE}:{name}", args, error, message)


def test_the_device_is_named():
    shared.assert_wants_cuda(f"{MODULE}:permute", (normal(4, 6), *plan(4, 2, 3)[:2]))


def check():
    """What every mutant of the kernels has to get past."""
    from corelib.kernels.gates.cases import forward_backward

    def close(got, wanted):
        torch.testing.assert_close(got.double(), wanted, atol=1e-4, rtol=1e-5)

    how, x = plan(19, 2, 4, dropped=3), normal(19, 130)
    rows, weights = normal(len(how.order), 130), normal(19, 2, seed=1)
    args = (x, how.order, how.place)
    (out,), (grad,) = forward_backward(f"{MODULE}:permute", args, None, (rows,))
    close(out, x[how.order // 2].double())
    close(grad, combined(rows.double(), how.place))
    args = (rows, how.order, how.place, weights)
    (out,), grads = forward_backward(f"{MODULE}:unpermute", args, None, (x,))
    leaves = [rows.double().requires_grad_(), weights.double().requires_grad_()]
    wanted = combined(leaves[0], how.place, leaves[1])
    close(out, wanted)
    for got, want in zip(grads, torch.autograd.grad(wanted, leaves, x.double()), strict=True):
        close(got, want)
    for lengths, I in (([70, 0, 20], 35), ([64, 3, 1], 70)):
        given = normal(sum(lengths), I), normal(3, I, 66, seed=1)
        ends, d_out = torch.tensor([0, *lengths]).cumsum(0), normal(sum(lengths), 66, seed=2)
        args = (*given, ends)
        (out,), grads = forward_backward(f"{MODULE}:grouped_matmul", args, None, (d_out,))
        leaves = [y.double().requires_grad_() for y in given]
        wanted = products(*leaves, lengths)
        close(out, wanted)
        for got, want in zip(grads, torch.autograd.grad(wanted, leaves, d_out.double())):
            close(got, want)


@pytest.mark.slow
def test_mutants_are_caught():
    """A sample; ``limit=None`` runs all of them."""
    assert shared.survivors("expert_permute", f"{__file__}:check", limit=8) == []
