"""Diagonal and block scans: against the loop and scipy, every option, every gradient."""

from __future__ import annotations

import pytest
import torch

from corelib.primitives import block_scan, diagonal_scan, scan_reference
from corelib.primitives.diagonal_scan import WIDE

EXACT = dict(atol=1e-11, rtol=1e-10)
DTYPES = [torch.float64, torch.complex128]
LENGTHS = [1, 2, 15, 16, 37, 100]


def random_inputs(dtype=torch.float64, B=2, L=37, C=3):
    g = torch.Generator().manual_seed(L)

    def normal(*shape):
        return torch.randn(shape, generator=g, dtype=dtype)

    reset = torch.rand(B, L, generator=g) < 0.2
    return dict(decay=normal(B, L, C) * 0.6, x=normal(B, L, C), state=normal(B, C)), reset


def random_blocks(B=2, L=37, C=3):
    g = torch.Generator().manual_seed(L)

    def normal(*shape):
        return torch.randn(shape, generator=g, dtype=torch.float64)

    reset = torch.rand(B, L, generator=g) < 0.2
    blocks = normal(B, L, C, 2, 2) * 0.5
    return dict(blocks=blocks, x=normal(B, L, C, 2), state=normal(B, C, 2)), reset


def with_gradients(run, given, **options) -> list[torch.Tensor]:
    given = {name: x.detach().requires_grad_() for name, x in given.items()}
    h = run(*given.values(), **options)
    weights = torch.linspace(-1, 2, h.numel(), dtype=torch.float64).view_as(h)
    total = (h.real * weights).sum()
    if h.is_complex():
        total = total + (h.imag * weights.flip(0)).sum()
    return [h, *torch.autograd.grad(total, list(given.values()))]


def reference(decay, x, state, **options):
    return scan_reference(decay, x, state=state, **options)


def assert_equal_the_loop(run, given, **options):
    got = with_gradients(lambda a, x, s, **o: run(a, x, state=s, **o), given, **options)
    wanted = with_gradients(reference, given, **options)
    for name, a, b in zip(("h", *given), got, wanted, strict=True):
        torch.testing.assert_close(a, b, **EXACT, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("L", LENGTHS)
def test_diagonal_equals_the_loop(L, dtype, reverse):
    given, reset = random_inputs(dtype, L=L)
    assert_equal_the_loop(diagonal_scan, given, reverse=reverse)
    assert_equal_the_loop(diagonal_scan, given, reverse=reverse, reset=reset)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("L", LENGTHS)
def test_blocks_equal_the_loop(L, reverse):
    given, reset = random_blocks(L=L)
    assert_equal_the_loop(block_scan, given, reverse=reverse)
    assert_equal_the_loop(block_scan, given, reverse=reverse, reset=reset)


@pytest.mark.parametrize("dtype", DTYPES)
def test_many_channels_go_step_by_step(dtype):
    given, reset = random_inputs(dtype, B=1, L=18, C=WIDE)
    assert_equal_the_loop(diagonal_scan, given, reset=reset)


def test_one_decay_for_all_steps_is_a_filter():
    signal = pytest.importorskip("scipy.signal")
    given, _ = random_inputs(L=50)
    decay = torch.tensor([0.9, -0.5, 0.0], dtype=torch.float64)
    h = diagonal_scan(decay, given["x"])
    for c, a in enumerate(decay.tolist()):
        wanted = signal.lfilter([1], [1, -a], given["x"][:, :, c].numpy())
        torch.testing.assert_close(h[:, :, c], torch.from_numpy(wanted), **EXACT)
    slim = dict(decay=decay, x=given["x"], state=given["state"])
    assert_equal_the_loop(diagonal_scan, slim)


def test_a_rotation_block_is_a_complex_number():
    given, _ = random_inputs(torch.complex128, L=40)
    a, x = given["decay"], given["x"]
    rows = [torch.stack([a.real, -a.imag], -1), torch.stack([a.imag, a.real], -1)]
    h = block_scan(torch.stack(rows, -2), torch.view_as_real(x))
    wanted = torch.view_as_real(diagonal_scan(a, x))
    torch.testing.assert_close(h, wanted, **EXACT)


def test_pieces_equal_the_whole():
    given, reset = random_inputs(L=70)
    whole = diagonal_scan(**given, reset=reset)
    state, parts = given["state"], []
    for cut in (slice(0, 1), slice(1, 40), slice(40, 40), slice(40, 70)):
        part = diagonal_scan(
            given["decay"][:, cut], given["x"][:, cut], reset=reset[:, cut], state=state
        )
        state = part[:, -1] if part.shape[1] else state
        parts.append(part)
    torch.testing.assert_close(torch.cat(parts, 1), whole, **EXACT)


def test_a_reset_cuts_the_past_off():
    given, reset = random_inputs(L=64)
    reset[:] = False
    reset[0, 33] = True
    x = given["x"].requires_grad_()
    h = diagonal_scan(given["decay"], x, reset=reset)
    reached = torch.autograd.grad(h[:, 33:].sum(), x)[0] != 0
    assert not reached[0, :33].any() and reached[1, 20:33].any()


@pytest.mark.no_shape_checks
def test_wrong_arguments():
    given, reset = random_inputs(L=9)
    a, x = given["decay"], given["x"]
    with pytest.raises(ValueError, match=r"decay: expected shape \(3,\) or \(2, 9, 3\), got"):
        diagonal_scan(a[:1], x)
    with pytest.raises(ValueError, match=r"x: expected 3 axes, got shape \(9, 3\)"):
        diagonal_scan(a, x[0])
    with pytest.raises(TypeError, match="decay: expected a tensor of x's dtype"):
        diagonal_scan(a.to(torch.complex128), x)
    with pytest.raises(ValueError, match=r"state: expected shape \(2, 3\), got \(3,\)"):
        diagonal_scan(a, x, state=given["state"][0])
    with pytest.raises(ValueError, match=r"reset: expected booleans of shape \(2, 9\)"):
        diagonal_scan(a, x, reset=reset.double())
    blocks, _ = random_blocks(L=9)
    with pytest.raises(ValueError, match=r"blocks: expected shape \(2, 9, 3, 2, 2\)"):
        block_scan(blocks["blocks"][:, :, :, 0], blocks["x"])
    with pytest.raises(TypeError, match="x: expected a floating-point or complex tensor"):
        diagonal_scan(a, x.long())
