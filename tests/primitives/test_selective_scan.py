"""The selective scan: against its loop, scipy, its own pieces, with every gradient."""

from __future__ import annotations

import pytest
import torch

from corelib.primitives import selective_scan, selective_scan_reference

EXACT = dict(atol=1e-11, rtol=1e-10)
NAMES = ("u", "dt", "A", "B", "C", "D", "z", "dt_bias", "state")


def random_inputs(batch=2, D=5, N=3, L=37, strongest=3.0, seed=0) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=g, dtype=torch.float64)

    given = dict(u=normal(batch, D, L), dt=normal(batch, D, L))
    given["A"] = -strongest * torch.rand(D, N, generator=g, dtype=torch.float64)
    given |= dict(B=normal(batch, N, L), C=normal(batch, N, L), D=normal(D))
    return given | dict(z=normal(batch, D, L), dt_bias=normal(D), state=normal(batch, D, N))


def with_gradients(run, given) -> list[torch.Tensor]:
    given = {name: x.detach().requires_grad_() for name, x in given.items()}
    results = run(**given, dt_softplus=True, return_state=True)
    weights = [torch.linspace(-1, 2, x.numel(), dtype=x.dtype).view_as(x) for x in results]
    total = sum((x * w).sum() for x, w in zip(results, weights, strict=True))
    return [*results, *torch.autograd.grad(total, list(given.values()))]


@pytest.mark.parametrize("L", [1, 2, 37, 64, 65, 130])
def test_output_state_and_gradients_equal_the_loop(L):
    given = random_inputs(L=L)  # blocks of 64 steps at this size
    got = with_gradients(selective_scan, given)
    wanted = with_gradients(selective_scan_reference, given)
    for name, x, y in zip(("y", "h", *given), got, wanted, strict=True):
        torch.testing.assert_close(x, y, **EXACT, msg=lambda m, n=name: f"{n}: {m}")


def test_blocks_of_eight_steps():
    """Many channels make the blocks short."""
    given = random_inputs(batch=1, D=1100, N=16, L=21)
    got = selective_scan(**given)
    torch.testing.assert_close(got, selective_scan_reference(**given), **EXACT)


@pytest.mark.parametrize("left_out", [["D"], ["z"], ["dt_bias"], ["state"], NAMES[5:]])
def test_what_may_be_left_out(left_out):
    given = {n: x for n, x in random_inputs(L=9).items() if n not in left_out}
    given["dt"] = given["dt"].abs()
    got = selective_scan(**given, return_state=True)
    for x, y in zip(got, selective_scan_reference(**given, return_state=True), strict=True):
        torch.testing.assert_close(x, y, **EXACT)


def test_one_channel_with_fixed_steps_is_a_filter():
    """scipy's difference equation: with constant dt, B and C each state is a one-pole filter."""
    signal = pytest.importorskip("scipy.signal")
    u = torch.randn(1, 1, 50, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    dt, A = torch.full_like(u, 0.3), torch.tensor([[-1.0, -0.2]], dtype=torch.float64)
    B, C = (torch.tensor(x, dtype=torch.float64)[None, :, None].expand(1, 2, 50) for x in
            ([0.5, -2.0], [1.5, 0.7]))  # fmt: skip
    poles = torch.exp(0.3 * A[0])
    wanted = sum(
        signal.lfilter([0.3 * b * c], [1, -float(a)], u[0, 0].numpy())
        for a, b, c in zip(poles, [0.5, -2.0], [1.5, 0.7], strict=True)
    )
    got = selective_scan(u, dt, A, B, C)[0, 0]
    torch.testing.assert_close(got, torch.from_numpy(wanted), **EXACT)


def test_pieces_equal_the_whole():
    given = random_inputs(L=50)
    whole, last = selective_scan(**given, return_state=True)
    state, parts = given.pop("state"), []
    for cut in (slice(0, 1), slice(1, 30), slice(30, 50)):
        piece = {n: x[..., cut] if n in ("u", "dt", "B", "C", "z") else x for n, x in given.items()}
        y, state = selective_scan(**piece, state=state, return_state=True)
        parts.append(y)
    torch.testing.assert_close(torch.cat(parts, 2), whole, **EXACT)
    torch.testing.assert_close(state, last, **EXACT)


def test_nothing_at_all():
    given = random_inputs(L=0)
    y, state = selective_scan(**given, return_state=True)
    assert y.shape == (2, 5, 0)
    torch.testing.assert_close(state, given["state"])


def test_the_strongest_decay_resets():
    """exp(dt A) of exactly 0 forgets all: no NaN, and the past has no gradient."""
    given = random_inputs(L=20)
    given["dt"][:, :, 12] = 1e6
    given["u"].requires_grad_()
    y = selective_scan(**given)
    before = torch.autograd.grad(y[:, :, 12:].sum(), given["u"])[0]
    assert bool((before[:, :, :12] == 0).all()) and bool(before.isfinite().all())


def test_half_precision_is_computed_in_float32():
    given = {n: x.bfloat16() for n, x in random_inputs(L=30).items()}
    y, state = selective_scan(**given, dt_softplus=True, return_state=True)
    assert y.dtype == torch.bfloat16 and state.dtype == torch.float32
    wanted = selective_scan(**{n: x.float() for n, x in given.items()}, dt_softplus=True)
    torch.testing.assert_close(y, wanted.bfloat16(), rtol=0.01, atol=0.01)


def test_what_is_kept_for_backward_is_a_state_a_block():
    given = {n: x.detach().requires_grad_() for n, x in random_inputs(L=640).items()}
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        selective_scan(**given)
    states = [x for x in kept if x.shape == (2, 3, 5)]
    assert len(states) == 10
    assert max(x.numel() for x in kept) <= 2 * 5 * 640


@pytest.mark.no_shape_checks
@pytest.mark.parametrize(
    "name, wrong, message",
    [
        ("u", torch.zeros(2, 5), r"u: expected 3 axes \(B, D, L\), got shape \(2, 5\)"),
        ("dt", torch.zeros(2, 5, 8), r"dt: expected shape \(2, 5, 9\), got \(2, 5, 8\)"),
        ("A", torch.zeros(4, 3), r"A: expected shape \(5, N\), got \(4, 3\)"),
        ("B", torch.zeros(2, 9, 3), r"B: expected shape \(2, 3, 9\), got \(2, 9, 3\)"),
        ("D", torch.zeros(3), r"D: expected shape \(5,\), got \(3,\)"),
        ("state", torch.zeros(2, 3, 5), r"state: expected shape \(2, 5, 3\), got \(2, 3, 5\)"),
    ],
)
def test_wrong_shapes(name, wrong, message):
    given = {n: x.float() for n, x in random_inputs(L=9).items()} | {name: wrong}
    with pytest.raises(ValueError, match=message):
        selective_scan(**given)


@pytest.mark.no_shape_checks
def test_wrong_dtypes():
    given = random_inputs(L=9)
    with pytest.raises(TypeError, match="C: expected the dtype of u"):
        selective_scan(**given | {"C": given["C"].float()})
    with pytest.raises(TypeError, match="A: expected a real floating-point"):
        selective_scan(**given | {"A": given["A"].long()})
