"""The linear recurrence: every form against the loop, against fla's, and its gradients."""

from __future__ import annotations

import pytest
import torch

from corelib.primitives import cumulative_lengths, linear_recurrence, linear_recurrence_varlen
from corelib.primitives.linear_recurrence_chunked import CHUNK
from corelib.primitives.linear_recurrence_decay import LARGEST, ChunkDecay, plain_width

EXACT = dict(atol=1e-11, rtol=1e-10)
FAST = ["recurrent", "chunked"]
KINDS = [None, "scalar", "vector"]


def random_inputs(kind, beta=False, B=1, H=2, L=37, K=6, V=5, strongest=1.0, dtype=torch.float64):
    """Arguments by name; unit keys, so that the delta rule is stable."""
    torch.manual_seed(0)
    q, k = torch.randn(2, B, H, L, K, dtype=torch.float64)
    k = k / k.norm(dim=-1, keepdim=True)
    v, state = torch.randn(B, H, L, V).double(), torch.randn(B, H, K, V).double()
    given = dict(q=q, k=k, v=v, state=state)
    if kind:
        shape = (B, H, L) if kind == "scalar" else (B, H, L, K)
        given["log_decay"] = -strongest * torch.rand(shape, dtype=torch.float64)
    if beta:
        given["beta"] = torch.rand(B, H, L, dtype=torch.float64)
    return {name: x.to(dtype) for name, x in given.items()}


def with_gradients(given, **options):
    """Output, state, and a gradient for each argument."""
    given = {name: x.detach().requires_grad_() for name, x in given.items()}
    results = linear_recurrence(**given, **options, return_state=True)
    weights = [torch.linspace(-1, 2, x.numel(), dtype=x.dtype).view_as(x) for x in results]
    total = sum((x * w).sum() for x, w in zip(results, weights, strict=True))
    return *results, *torch.autograd.grad(total, list(given.values()))


def assert_forms_agree(given, forms=FAST, tolerance=EXACT, **options):
    wanted = with_gradients(given, form="reference", **options)
    for form in forms:
        got = with_gradients(given, form=form, **options)
        for name, x, y in zip(("out", "state", *given), got, wanted, strict=True):
            torch.testing.assert_close(
                x, y, **tolerance, msg=lambda m, n=f"{form} {name}": f"{n}: {m}"
            )


@pytest.mark.parametrize("beta", [False, True])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("L", [1, 2, 37, CHUNK, CHUNK + 1])
def test_forms_equal_the_loop(kind, beta, L):
    assert_forms_agree(random_inputs(kind, beta, L=L), scale=0.7)


@pytest.mark.parametrize("kind", ["scalar", "vector"])
@pytest.mark.parametrize("strongest", [0.3, 3.0, 15.0, 500.0])
def test_every_strength_of_decay(kind, strongest):
    """Blocks of 64, 16, 4 and 1 are split plainly; the rest is halved, for a head written out."""
    given = random_inputs(kind, L=2 * CHUNK + 3, strongest=strongest)
    expected = {0.3: 64, 3.0: 16, 15.0: 4, 500.0: 1}[strongest]
    assert plain_width(given["log_decay"], CHUNK) == expected
    assert_forms_agree(given, ["chunked"])


@pytest.mark.parametrize("beta", [False, True])
@pytest.mark.parametrize("kind", ["scalar", "vector"])
def test_a_reset_forgets_all(kind, beta):
    given = random_inputs(kind, beta, L=20)
    given["log_decay"][:, :, 7] = -torch.inf
    assert_forms_agree(given)
    fresh = {name: x[:, :, 7:] for name, x in given.items() if name != "state"}
    out = linear_recurrence(**given)[:, :, 7:]
    torch.testing.assert_close(out, linear_recurrence(**fresh), **EXACT)


@pytest.mark.parametrize("kind", ["scalar", "vector"])
def test_strong_decays_stay_exact_in_float32(kind):
    given = random_inputs(kind, L=100, strongest=300.0, dtype=torch.float32)
    got = with_gradients(given, form="chunked")
    wanted = with_gradients({n: x.double() for n, x in given.items()}, form="reference")
    for x, y in zip(got, wanted, strict=True):
        assert x.isfinite().all()
        torch.testing.assert_close(x.double(), y, atol=3e-5, rtol=1e-4)


def test_plain_split_never_passes_its_bound():
    g = random_inputs("vector", L=CHUNK, strongest=2.0)["log_decay"].flatten(0, 1)
    ones, width = torch.ones_like(g), plain_width(g, CHUNK)
    assert 1 < width < CHUNK
    here = ChunkDecay(ones, ones, g, width, keep=True)
    read, plain = here.pair
    assert read.max() <= 1 <= plain.max() <= torch.tensor(LARGEST).exp()
    assert (
        here.read.max() <= 1 and here.write.max() <= 1 and here.scores.max() <= g.shape[-1] + 1e-9
    )


@pytest.mark.parametrize("beta", [False, True])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("form", ["auto", "recurrent", "chunked"])
def test_pieces_with_the_state_equal_the_whole(kind, beta, form):
    given = random_inputs(kind, beta, L=75)
    whole, last = linear_recurrence(**given, return_state=True)
    state, outs = given.pop("state"), []
    for start, end in ((0, 1), (1, 70), (70, 75)):
        piece = {name: x[:, :, start:end] for name, x in given.items()}
        out, state = linear_recurrence(**piece, state=state, form=form, return_state=True)
        outs.append(out)
    torch.testing.assert_close(torch.cat(outs, 2), whole, **EXACT)
    torch.testing.assert_close(state, last, **EXACT)


@pytest.mark.parametrize("slab", [64, 1024, 4096])
def test_many_heads_and_many_slabs(monkeypatch, slab):
    """Heads in groups and long heads in stretches, with and without a last chunk to be filled up.

    Decays strong in one stretch only: each slab finds the width that it can split plainly.
    """
    import sys

    monkeypatch.setattr(sys.modules["corelib.primitives.linear_recurrence_chunked"], "SLAB", slab)
    for kind, L in (("vector", 150), ("vector", 128), ("scalar", 150), (None, 128)):
        given = random_inputs(kind, B=2, H=3, L=L, K=4)
        if kind:
            given["log_decay"][:, 1, 64:90] *= 40
        assert_forms_agree(given, ["chunked"])


@pytest.mark.parametrize("kind", KINDS)
def test_gradcheck(kind):
    given = random_inputs(kind, H=1, L=5, K=3, V=2)
    names = list(given)

    def run(*values):
        pairs = dict(zip(names, values, strict=True))
        return linear_recurrence(**pairs, form="chunked", return_state=True)

    assert torch.autograd.gradcheck(run, [x.requires_grad_() for x in given.values()])


FLA = {
    "simple_gla": ("naive_recurrent_simple_gla", "scalar", False, "g"),
    "gla": ("naive_recurrent_gla", "vector", False, "gk"),
    "gated_delta_rule": ("naive_recurrent_gated_delta_rule", "scalar", True, "g"),
    "kda": ("naive_recurrent_kda", "vector", True, "g"),
}


@pytest.mark.parametrize("form", ["reference", "chunked"])
@pytest.mark.parametrize("op", FLA)
def test_equals_fla(fla_naive, op, form):
    """Their layout is (B, L, H, ...) and their references compute in float32."""
    name, kind, beta, decay = FLA[op]
    given = random_inputs(kind, beta, L=70, dtype=torch.float32)
    theirs = {n: x if n == "state" else x.transpose(1, 2) for n, x in given.items()}
    theirs["initial_state"], theirs[decay] = theirs.pop("state"), theirs.pop("log_decay")
    out, state = fla_naive(op, name)(**theirs, output_final_state=True)
    ours, last = linear_recurrence(**given, form=form, return_state=True)
    torch.testing.assert_close(ours, out.transpose(1, 2), atol=2e-5, rtol=2e-5)
    torch.testing.assert_close(last, state, atol=2e-5, rtol=2e-5)


def test_equals_fla_delta_rule(fla_naive):
    given = random_inputs(None, True, L=70, dtype=torch.float32)
    theirs = dict(given)
    theirs["initial_state"] = theirs.pop("state")
    out, state = fla_naive("delta_rule", "delta_rule_recurrence")(**theirs)
    ours, last = linear_recurrence(**given, return_state=True)
    torch.testing.assert_close(ours, out, atol=2e-5, rtol=2e-5)
    torch.testing.assert_close(last, state, atol=2e-5, rtol=2e-5)


def test_equals_the_matrix_written_out():
    """Independent of every loop: out = ((q k^T) * decays, lower triangle) v."""
    given = random_inputs("scalar", L=30)
    given.pop("state")
    sums = given["log_decay"].cumsum(-1)
    weights = (given["q"] @ given["k"].mT * (sums[..., :, None] - sums[..., None, :]).exp()).tril()
    out = linear_recurrence(**given, scale=1.0)
    torch.testing.assert_close(out, weights @ given["v"], **EXACT)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("beta", [False, True])
def test_half_precision_keeps_a_float32_state(dtype, beta):
    given = random_inputs("vector", beta, L=70, dtype=dtype)
    out, state = linear_recurrence(**given, return_state=True)
    assert out.dtype == dtype and state.dtype == torch.float32
    wanted = linear_recurrence(**{n: x.double() for n, x in given.items()})
    torch.testing.assert_close(out.double(), wanted, atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize("sizes", [dict(L=0), dict(B=0), dict(H=0)])
def test_nothing_to_do(sizes):
    given = random_inputs("vector", **sizes)
    out, state = linear_recurrence(**given, return_state=True)
    assert out.shape == given["v"].shape
    torch.testing.assert_close(state, given["state"])


def test_the_state_takes_no_more_memory_with_length():
    sizes = {linear_recurrence(**random_inputs("scalar", L=n), return_state=True)[1].nbytes
             for n in (3, 100)}  # fmt: skip
    assert sizes == {2 * 6 * 5 * 8}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("form", ["auto", "reference"])
def test_packed_sequences_equal_each_alone(kind, form):
    lengths = [9, 0, 20, 1, 9]
    given = random_inputs(kind, True, L=sum(lengths))
    given.pop("state")
    packed = {name: x[0].transpose(0, 1) for name, x in given.items()}
    states = torch.randn(len(lengths), 2, 6, 5, dtype=torch.float64)
    starts = cumulative_lengths(torch.tensor(lengths))
    out, after = linear_recurrence_varlen(
        **packed, cu_seqlens=starts, state=states, form=form, return_state=True
    )
    for s in range(len(lengths)):
        piece = {n: x[:, :, int(starts[s]) : int(starts[s + 1])] for n, x in given.items()}
        one, last = linear_recurrence(**piece, state=states[s : s + 1], return_state=True)
        torch.testing.assert_close(out[starts[s] : starts[s + 1]], one[0].transpose(0, 1), **EXACT)
        torch.testing.assert_close(after[s : s + 1], last, **EXACT)


BAD = {
    "axes of q": (lambda a: a | dict(q=a["q"][0]), ValueError, "q: expected 4 axes"),
    "k": (lambda a: a | dict(k=a["k"][..., :3]), ValueError, "k: expected the shape of q"),
    "v": (lambda a: a | dict(v=a["v"][:, :, :3]), ValueError, "v: expected shape"),
    "dtype": (lambda a: a | dict(v=a["v"].float()), TypeError, "v: expected the dtype of q"),
    "decay's shape": (
        lambda a: a | dict(log_decay=a["log_decay"][..., :2]), ValueError, "log_decay: expected sh",
    ),
    "growth": (lambda a: a | dict(log_decay=-a["log_decay"]), ValueError, "log_decay: .*at most 0"),
    "beta": (lambda a: a | dict(beta=a["v"]), ValueError, "beta: expected shape"),
    "kind of beta": (lambda a: a | dict(beta=0.5), TypeError, "beta: expected a floating-point"),
    "state": (lambda a: a | dict(state=a["state"][:, :1]), ValueError, "state: expected shape"),
    "form": (lambda a: a | dict(form="fast"), ValueError, "form: expected one of"),
    "scale": (lambda a: a | dict(scale="1"), TypeError, "scale: expected a number"),
}  # fmt: skip


@pytest.mark.no_shape_checks
@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_named(case):
    change, error, message = BAD[case]
    with pytest.raises(error, match=message):
        linear_recurrence(**change(random_inputs("vector")))


@pytest.mark.parametrize("strength", [0.1, 3.0])
def test_many_chunks_are_handed_on_by_one_product(strength):
    """Outputs, last state and gradients, of 20 chunks."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 2, 1220, 3, generator=generator).double() for _ in range(3))
    decay = -strength * torch.rand(1, 2, 1220, generator=generator).double()
    state = torch.randn(1, 2, 3, 3, generator=generator).double()
    found = []
    for form in ("chunked", "recurrent"):
        leaves = [x.clone().requires_grad_() for x in (q, k, v, decay, state)]
        y, last = linear_recurrence(
            *leaves[:3], log_decay=leaves[3], state=leaves[4], form=form, return_state=True
        )
        loss = (y * v).sum() + last.sum()
        found.append([y, last, *torch.autograd.grad(loss, leaves)])
    for got, wanted in zip(*found):
        torch.testing.assert_close(got, wanted, atol=1e-9, rtol=1e-9)
