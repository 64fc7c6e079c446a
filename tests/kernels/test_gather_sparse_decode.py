"""The gather-sparse decode kernel, interpreted, against the loop over the lists in float64."""

from __future__ import annotations

import pathlib

import pytest
import torch

from corelib.kernels.gates.interpreter import load_file
from corelib.primitives import gather_decode_reference

shared = load_file(str(pathlib.Path(__file__).with_name("shared.py")))
KERNEL = "corelib.kernels.gather_sparse_decode:gather_sparse_decode"
RUN = "corelib.kernels.gates.cases:forward_backward"


def random_inputs(B, H, G, L, S, D, V, U, n, dtype=torch.float32, seed=0, padding=0.2):
    """``q, k, v, indices``; keys that no list names are NaN, lists have gaps."""
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (
        torch.randn(shape, generator=generator).to(dtype)
        for shape in [(B, H, L, D), (B, G, S, D), (B, G, S, V)]
    )
    drawn = [torch.randperm(S, generator=generator)[:n] for _ in range(B * U)]
    indices = torch.stack(drawn).view(B, U, n)
    indices[torch.rand(indices.shape, generator=generator) < padding] = -1
    for b in range(B):
        for g in range(G):
            lists = indices[b, g * U // G : max(g * U // G + 1, (g + 1) * U // G)]
            unnamed = torch.ones(S, dtype=torch.bool)
            unnamed[lists[lists >= 0]] = False
            k[b, g, unnamed], v[b, g, unnamed] = torch.nan, torch.nan
    return q, k, v, indices


def expected(q, k, v, indices, scale=None):
    wide = (x.double() for x in (q, k, v))
    return gather_decode_reference(*wide, indices, scale=scale, return_lse=True)


def assert_decodes(interpreter, inputs, tolerance=3e-6, **options):
    """With NaN in every buffer that the function allocates, and every access checked."""
    (out, lse), _ = interpreter.call(RUN, KERNEL, inputs, dict(**options, return_lse=True))
    assert out.dtype == inputs[0].dtype and lse.dtype == torch.float32
    wanted = expected(*inputs, scale=options.get("scale"))
    shared.assert_close(("out", "lse"), (out, lse), wanted, tolerance)


CASES = {
    "one key": (dict(B=1, H=1, G=1, L=1, S=1, D=16, V=16, U=1, n=1, padding=0), {}),
    "a list for each key head": (
        dict(B=2, H=4, G=2, L=1, S=150, D=20, V=36, U=2, n=100), dict(splits=3),
    ),
    "a list for each query head": (
        dict(B=2, H=4, G=2, L=2, S=70, D=16, V=16, U=4, n=63), dict(splits=2),
    ),
    "one list for all": (dict(B=2, H=4, G=2, L=1, S=50, D=16, V=8, U=1, n=40), {}),
    "several queries, own scale": (
        dict(B=1, H=4, G=2, L=3, S=60, D=16, V=16, U=2, n=33), dict(scale=0.7),
    ),
    "more rows than a tile holds": (dict(B=1, H=20, G=1, L=1, S=30, D=8, V=8, U=1, n=9), {}),
    "more splits than blocks": (
        dict(B=1, H=2, G=1, L=1, S=80, D=16, V=16, U=1, n=70), dict(splits=9),
    ),
    "wide": (dict(B=1, H=2, G=1, L=1, S=40, D=100, V=70, U=1, n=30), {}),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_equals_the_loop(interpreter, case):
    sizes, options = CASES[case]
    assert_decodes(interpreter, random_inputs(**sizes), **options)


def test_half_precision_and_short_integers(interpreter):
    q, k, v, indices = random_inputs(1, 4, 2, 1, 90, 24, 16, 2, 70, dtype=torch.float16)
    assert_decodes(interpreter, (q, k, v, indices.int()), tolerance=4e-3)


def test_any_layout_and_positions_beyond_the_cache(interpreter):
    """Tokens before heads, room for more tokens, a list cut from a longer one."""
    q, k, v, indices = random_inputs(2, 4, 2, 1, 40, 16, 16, 2, 20)
    wanted = expected(q, k, v, indices)[0]
    k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (k, v))
    longer = torch.cat([indices, torch.full_like(indices, 99)], 2)
    got = interpreter.call(KERNEL, q, k, v, longer)
    torch.testing.assert_close(got.double(), wanted, atol=3e-6, rtol=3e-6)
    got = interpreter.call(KERNEL, q, k, v, longer[..., :20])
    torch.testing.assert_close(got.double(), wanted, atol=3e-6, rtol=3e-6)


@pytest.mark.parametrize("change", [dict(L=0), dict(n=0), dict(B=0, U=1), dict(padding=1.1)])
def test_nothing_to_do(interpreter, change):
    sizes = dict(B=1, H=2, G=1, L=1, S=30, D=8, V=4, U=1, n=5) | change
    if sizes["B"] == 0:
        q, k, v, indices = (x[:0] for x in random_inputs(**sizes | dict(B=1)))
    else:
        q, k, v, indices = random_inputs(**sizes)
    out, lse = interpreter.call(KERNEL, q, k, v, indices, return_lse=True)
    assert out.shape == (*q.shape[:3], 4) and not out.any() and (lse == -torch.inf).all()


@pytest.mark.counted
def test_reads_what_is_listed_and_nothing_else(interpreter):
    from corelib.kernels.gather_sparse_decode import gather_decode_bytes
    from corelib.measure import count_io

    sizes = dict(B=2, H=8, G=2, L=1, D=16, V=24, U=2, n=96)
    moved = {}
    for S in (100, 400):
        inputs = random_inputs(S=S, **sizes)
        count = count_io(KERNEL, *inputs, splits=3)
        listed = int((inputs[3] >= 0).sum())
        least = gather_decode_bytes(
            listed, 2, 8, 1, 16, 24, entries=4 * 96, partials=4 * 3, rows=4, itemsize=4
        )
        assert least <= count.bytes_moved <= 1.05 * least
        moved[S] = (count.bytes_moved - least) / least
    assert abs(moved[100] - moved[400]) < 0.01


def test_launcher_uses_declared_tiles():
    from corelib.kernels.gather_sparse_decode import SPECIALISATIONS, TILES

    declared = {
        (4 if x.signature["q"] == "*fp32" else 2, x.constexprs["D"]): x.constexprs["BLOCK_N"]
        for x in SPECIALISATIONS
    }
    assert declared == {key: blocks.block_n for key, blocks in TILES.items()}


BAD = {
    "lists": (lambda x: (*x[:3], x[3][:, :0]), {}, ValueError, r"indices: expected \(batch 1, l"),
    "kind": (lambda x: (*x[:3], x[3].float()), {}, TypeError, "indices: expected a tensor of int"),
    "splits": (lambda x: x, dict(splits=0), ValueError, "splits: expected at least 1, got 0"),
    "kind of splits": (lambda x: x, dict(splits=1.0), TypeError, "splits: expected an int or None"),
    "gradients": (lambda x: (x[0].requires_grad_(), *x[1:]), {}, ValueError, "no backward pass"),
    "width": (
        lambda x: (*(y.repeat(1, 1, 1, 9) for y in x[:3]), x[3]), {}, ValueError,
        "expected widths of at most 128 in float32, got 144",
    ),
    "device": (lambda x: x, {}, ValueError, "expected CUDA tensors"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_named(case):
    change, options, error, message = BAD[case]
    inputs = change(random_inputs(1, 4, 2, 1, 20, 16, 16, 2, 5))
    shared.assert_refused(KERNEL, inputs, error, message, **options)


def check():
    """What every mutant of the kernel has to get past."""
    from corelib.kernels.gates.cases import poisoned
    from corelib.kernels.gather_sparse_decode import gather_sparse_decode

    for sizes, options in (
        (dict(B=2, H=4, G=2, L=2, S=90, D=12, V=10, U=2, n=70), dict(splits=2)),
        (dict(B=2, H=4, G=2, L=1, S=20, D=12, V=20, U=4, n=9), dict(splits=1)),
        (dict(B=1, H=18, G=1, L=1, S=9, D=8, V=8, U=1, n=5), dict(splits=1)),
    ):
        q, k, v, indices = random_inputs(**sizes)
        n, S = indices.shape[2], sizes["S"]
        indices[0, 0, :40] = -1  # a whole block of padding comes first
        beyond = indices.new_tensor([S]).expand(*indices.shape[:2], 1)
        more = torch.cat([indices, beyond, indices[..., -1:].clamp(min=0)], 2)
        with poisoned():
            got = gather_sparse_decode(
                q, k, v, more[..., : n + 1], **options, scale=1.5, return_lse=True
            )
        wanted = expected(q, k, v, indices, scale=1.5)
        shared.assert_close(("out", "lse"), got, wanted, 1e-5)


EQUIVALENT = {
    "_gather_decode_kernel: row + lanes < rows -> (row + lanes) <= (rows)": (
        "the workspace's padding rows are never read"
    ),
    "_gather_decode_kernel: real -> ((real) == (real))": (
        "the workspace's padding rows are never read"
    ),
}


@pytest.mark.slow
def test_mutants_are_caught():
    """A sample; ``limit=None`` runs all of them in a minute."""
    check = f"{__file__}:check"
    assert shared.survivors("gather_sparse_decode", check, limit=10, equivalent=EQUIVALENT) == []
