"""State space duality: against its loop, the linear recurrence, its own pieces; all gradients."""

from __future__ import annotations

import pytest
import torch

from corelib.primitives import linear_recurrence, ssd_chunked, ssd_reference

EXACT = dict(atol=1e-11, rtol=1e-10)


def random_inputs(batch=2, H=4, G=2, L=37, K=3, V=5) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(shape, generator=g, dtype=torch.float64)

    given = dict(x=normal(batch, H, L, V), dt=normal(batch, H, L), A=-normal(H).abs() * 2)
    given |= dict(B=normal(batch, G, L, K), C=normal(batch, G, L, K), D=normal(H))
    return given | dict(dt_bias=normal(H), state=normal(batch, H, K, V))


def with_gradients(run, given, **options) -> list[torch.Tensor]:
    given = {name: x.detach().requires_grad_() for name, x in given.items()}
    results = run(**given, dt_softplus=True, return_state=True, **options)
    weights = [torch.linspace(-1, 2, x.numel(), dtype=x.dtype).view_as(x) for x in results]
    total = sum((x * w).sum() for x, w in zip(results, weights, strict=True))
    return [*results, *torch.autograd.grad(total, list(given.values()))]


@pytest.mark.parametrize("L, chunk", [(1, 64), (37, 1), (37, 7), (37, 16), (37, 64), (48, 16)])
@pytest.mark.parametrize("G", [1, 2, 4])
def test_any_chunk_equals_the_loop(L, chunk, G):
    given = random_inputs(L=L, G=G)
    wanted = with_gradients(ssd_reference, given)
    got = with_gradients(ssd_chunked, given, chunk=chunk)
    for name, x, y in zip(("y", "S", *given), got, wanted, strict=True):
        torch.testing.assert_close(x, y, **EXACT, msg=lambda m, n=name: f"{n}: {m}")


def test_it_is_linear_attention_with_a_decay():
    given = random_inputs(G=4)
    dt = given["dt"].abs()
    x, A, B, C, state = (given[n] for n in ("x", "A", "B", "C", "state"))
    wanted = linear_recurrence(
        C, B, dt[..., None] * x, log_decay=dt * A[:, None], state=state, scale=1.0
    )
    torch.testing.assert_close(ssd_chunked(x, dt, A, B, C, state=state), wanted, **EXACT)


def test_pieces_equal_the_whole():
    given = random_inputs(L=50)
    given["dt"] = given["dt"].abs()
    whole, last = ssd_chunked(**given, chunk=16, return_state=True)
    state, parts = given.pop("state"), []
    for cut in (slice(0, 1), slice(1, 30), slice(30, 30), slice(30, 50)):
        piece = {n: x[:, :, cut] if n in ("x", "dt", "B", "C") else x for n, x in given.items()}
        y, state = ssd_chunked(**piece, state=state, chunk=16, return_state=True)
        parts.append(y)
    torch.testing.assert_close(torch.cat(parts, 2), whole, **EXACT)
    torch.testing.assert_close(state, last, **EXACT)


def test_behind_a_reset_nothing_is_lost():
    """A log-decay of about -10^6 takes six digits off a running sum in float32."""
    given = {n: x.float() for n, x in random_inputs(L=40).items()}
    given["dt"] = given["dt"].abs() * 0.1
    given["dt"][:, :, 20] = 1e6
    given["x"][:, :, 20] = 0
    got = ssd_chunked(**given)[:, :, 21:]
    del given["state"]
    fresh = {n: x[:, :, 21:] if n in ("x", "dt", "B", "C") else x for n, x in given.items()}
    torch.testing.assert_close(got, ssd_chunked(**fresh), atol=1e-5, rtol=1e-5)


def test_half_precision_is_computed_in_float32():
    given = {n: x.bfloat16() for n, x in random_inputs().items()}
    y, state = ssd_chunked(**given, dt_softplus=True, return_state=True)
    assert y.dtype == torch.bfloat16 and state.dtype == torch.float32
    wanted = ssd_chunked(**{n: x.float() for n, x in given.items()}, dt_softplus=True)
    torch.testing.assert_close(y, wanted.bfloat16(), rtol=0.01, atol=0.01)


@pytest.mark.no_shape_checks
@pytest.mark.parametrize(
    "name, wrong, message",
    [
        ("x", torch.zeros(2, 9, 5), r"x: expected 4 axes, got shape \(2, 9, 5\)"),
        ("dt", torch.zeros(2, 9, 4), r"dt: expected shape \(2, 4, 9\), got \(2, 9, 4\)"),
        ("A", torch.zeros(4, 3), r"A: expected shape \(4,\), got \(4, 3\)"),
        ("B", torch.zeros(2, 3, 9, 3), r"B: expected a number of groups that divides 4 heads"),
        ("C", torch.zeros(2, 1, 9, 3), r"C: expected shape \(2, 2, 9, 3\)"),
        ("state", torch.zeros(2, 4, 5, 3), r"state: expected shape \(2, 4, 3, 5\)"),
        ("chunk", 0, "chunk: expected an int of at least 1, got 0"),
    ],
)
def test_wrong_arguments(name, wrong, message):
    given = {n: x.float() for n, x in random_inputs(L=9).items()} | {name: wrong}
    with pytest.raises(ValueError, match=message):
        ssd_chunked(**given)
