"""The fused FFT convolution, interpreted, against torch.fft in float64."""

from __future__ import annotations

import pathlib

import pytest
import torch

from corelib.kernels.gates.interpreter import load_file
from corelib.testing import assert_same

shared = load_file(str(pathlib.Path(__file__).with_name("shared.py")))
RUN = "corelib.kernels.gates.cases:forward_backward"
CONV = "corelib.kernels.monarch_fft_conv:monarch_fft_conv"
SPARSE = "corelib.kernels.monarch_fft_conv:sparse_conv"
NAMES = "y", "d_u", "d_kernel", "d_in_gate", "d_out_gate"


def inputs(B, H, L, K, gates="", dtype=torch.float32, seed=0):
    """``[u, kernel, in_gate, out_gate], d_y``; ``gates`` of "in", "out", "in out"."""
    generator = torch.Generator().manual_seed(seed + 7 * L + K)
    # each in a storage of its own, or an access beyond its end would not be seen
    u, d_y, *both = (torch.randn(B, H, L, generator=generator).to(dtype) for _ in range(4))
    kernel = torch.randn(H, K, generator=generator) / K**0.5
    in_gate, out_gate = (
        x if name in gates.split() else None for x, name in zip(both, ("in", "out"))
    )
    return [u, kernel, in_gate, out_gate], d_y


def around(u, kernel, in_gate=None, out_gate=None, *, circle, kept=None):
    """By torch.fft, on a circle of so many points; ``kept`` frequencies of the kernel."""
    L = u.shape[-1]
    spectrum = torch.fft.fft(kernel, n=circle)
    spectrum = spectrum if kept is None else spectrum * kept
    inside = u if in_gate is None else u * in_gate
    y = torch.fft.ifft(torch.fft.fft(inside, n=circle) * spectrum).real[..., :L]
    return y if out_gate is None else y * out_gate


def expected(given, d_y, circle, kept=None):
    """The output and the gradients of what there is, in float64."""
    leaves = [x if x is None else x.detach().double().requires_grad_() for x in given]
    y = around(*leaves, circle=circle, kept=kept)
    real = [x for x in leaves if x is not None]
    grads = iter(torch.autograd.grad(y, real, d_y.double()))
    return [y, *(x if x is None else next(grads) for x in leaves)]


def assert_equals(got, given, d_y, circle, tolerance=2e-6, kept=None):
    (y,), grads = got
    assert y.dtype == given[0].dtype
    names = [n for n, x in zip(NAMES, [y, *given]) if x is not None]
    wanted = [x for x in expected(given, d_y, circle, kept) if x is not None]
    for name, x, want in zip(names, [y, *grads], wanted, strict=True):
        assert_same(x, want, what=name, tolerance=tolerance)


CASES = {  # B, H, L, K, gates
    "one step": (1, 1, 1, 1, ""),
    "odd batch, both gates": (3, 2, 100, 100, "in out"),
    "more taps than steps": (2, 1, 63, 90, "in"),
    "few taps": (2, 2, 250, 4, "out"),
    "three times the rows of one side": (1, 1, 257, 256, "in out"),
}


@pytest.mark.parametrize("case", CASES)
def test_equals_the_fft(interpreter, case):
    given, d_y = inputs(*CASES[case])
    got = interpreter.call(RUN, CONV, given, None, (d_y,))
    assert_equals(got, given, d_y, 2 * (given[0].shape[-1] + given[1].shape[-1]))


@pytest.mark.parametrize("L", [256, 512])
def test_around_the_circle(interpreter, L):
    """No zeros anywhere: every row of the first table is needed."""
    given, d_y = inputs(1, 1, L, L)
    got = interpreter.call(RUN, CONV, given, {"circle": L}, (d_y,))
    assert_equals(got, given, d_y, L)


@pytest.mark.parametrize("L, circle", [(1024, 1024), (600, 2048), (1500, 4096)])
def test_half_precision(interpreter, L, circle):
    """The larger circles; the sum of a constant input would be beyond float16 if not scaled."""
    given, d_y = inputs(1, 1, L, L, "in out", dtype=torch.float16)
    given[0] += 100
    got = interpreter.call(RUN, CONV, given, {"circle": circle}, (d_y,))
    assert_equals(got, given, d_y, circle, tolerance=4e-3)


def with_splits(u, kernel, *gates, splits):
    from corelib.kernels._monarch_tables import plan_of, spectrum_grid
    from corelib.kernels.monarch_fft_conv import convolve

    plan = plan_of(u.shape[2], 256)
    every = tuple(range(plan.N1)), tuple(range(plan.N2))
    return convolve(u, spectrum_grid(kernel, 256), *gates, plan, *every, splits=splits)


@pytest.mark.parametrize("splits", [1, 2])
def test_a_program_goes_through_the_batch(interpreter, splits):
    given, d_y = inputs(7, 2, 60, 60, "in out")
    got = interpreter.call(RUN, f"{__file__}:with_splits", given, {"splits": splits}, (d_y,))
    assert_equals(got, given, d_y, 120)


@pytest.mark.parametrize("keep", [(32, 4), (3, 2), (1, 1), (20, 9)])
def test_a_part_of_the_spectrum(interpreter, keep):
    from corelib.linear_time.flashfftconv import frequency_sparse_conv, kept_frequencies

    given, d_y = inputs(3, 1, 240, 240)
    u, kernel = (x.double() for x in given[:2])
    kept = kept_frequencies((32, 16), *keep)
    want = frequency_sparse_conv(u, kernel, *keep, factors=(32, 16))
    torch.testing.assert_close(around(u, kernel, circle=512, kept=kept), want)
    got = interpreter.call(RUN, SPARSE, [*given[:2], *keep], None, (d_y,))
    assert_equals(got, given, d_y, 512, kept=kept)


@pytest.mark.counted
def test_what_is_zero_is_not_multiplied(interpreter):
    """Of 32 by 16, a block whose rows and negatives are 16 and fewer: half the first product, a
    half of the second, the same back."""
    from corelib.measure import count_io

    given, _ = inputs(2, 1, 240, 240)
    full, half = count_io(CONV, *given[:2]), count_io(SPARSE, *given[:2], 3, 2)
    assert half.dot_flops == full.dot_flops / 2
    assert half.bytes_moved < full.bytes_moved


@pytest.mark.counted
def test_zeros_are_not_multiplied(interpreter):
    """A causal signal on 1,024 points fills half the rows: 3 / 4 of the products of a full one."""
    from corelib.measure import count_io

    sides = 32 * 32
    a_row = 8 * sides * 32 * 2  # a product of one complex matrix, there and back
    half = torch.float16
    causal, full = (inputs(2, 1, L, L, dtype=half)[0][:2] for L in (512, 1024))
    assert count_io(CONV, *causal).dot_flops == a_row * 3 // 2
    assert count_io(CONV, *full, circle=1024).dot_flops == a_row * 2


def test_any_layout(interpreter):
    given, _ = inputs(2, 3, 40, 40, "in out")
    want = interpreter.call(CONV, *given)
    moved = [x.transpose(0, 1).contiguous().transpose(0, 1).mT.contiguous().mT for x in given[::2]]
    got = interpreter.call(CONV, moved[0], given[1], moved[1], given[3])
    torch.testing.assert_close(got, want, rtol=0, atol=0)


def through_the_primitive(u, kernel, in_gate, out_gate, circle=None):
    """What `monarch_conv` does with tensors on a GPU."""
    from corelib.primitives.monarch import _fused

    return _fused(u, kernel, in_gate, out_gate, circle)


@pytest.mark.method("flashfftconv")
@pytest.mark.parametrize("causal", [True, False])
def test_through_the_primitive(interpreter, causal):
    """Two axes of channels and two of the batch."""
    from corelib.primitives import monarch_conv

    generator = torch.Generator().manual_seed(0)
    u, in_gate, out_gate = torch.randn(3, 2, 1, 1, 2, 256, generator=generator)
    kernel = torch.randn(1, 2, 200, generator=generator)
    target = f"{__file__}:through_the_primitive"
    got = interpreter.call(target, u, kernel, in_gate, out_gate, None if causal else 256)
    wide = (x.double() for x in (u, kernel, in_gate, out_gate))
    torch.testing.assert_close(got.double(), monarch_conv(*wide, causal), atol=2e-4, rtol=0)
    for shape, circle in (((1, 600), None), ((1, 255), 255)):
        x = torch.zeros(shape)
        assert interpreter.call(target, x, x, None, None, circle) is None


def sparse_through_the_method(u, kernel, factors, keep):
    from corelib.linear_time.flashfftconv import _on_chip

    return _on_chip(u, kernel, factors, keep)


@pytest.mark.method("flashfftconv")
def test_sparse_through_the_method(interpreter):
    from corelib.linear_time.flashfftconv import frequency_sparse_conv

    u, kernel, *_ = inputs(2, 3, 100, 100)[0]
    target = f"{__file__}:sparse_through_the_method"
    got = interpreter.call(target, u[:, None], kernel[None], (16, 16), (16, 3))
    want = frequency_sparse_conv(u.double(), kernel.double(), 16, 3, factors=(16, 16))
    torch.testing.assert_close(got[:, 0].double(), want, atol=1e-5, rtol=0)
    assert interpreter.call(target, u, kernel, (8, 32), (8, 4)) is None


def middle_pass(inputs, spectra):
    from corelib.linear_time.butterfly import _on_chip

    y = _on_chip(torch.view_as_complex(inputs), torch.view_as_complex(spectra))
    return y if y is None else torch.view_as_real(y)


@pytest.mark.method("long_conv")
def test_middle_pass_of_the_butterfly(interpreter):
    """Complex signals and complex filters: each of three rows is a convolution of its own."""
    generator = torch.Generator().manual_seed(0)
    inputs, d_y = torch.randn(2, 2, 2, 3, 256, 2, generator=generator)
    spectra = torch.randn(2, 3, 256, 2, generator=generator)
    (y,), grads = interpreter.call(RUN, f"{__file__}:middle_pass", (inputs, spectra), None, (d_y,))
    leaves = [x.double().requires_grad_() for x in (inputs, spectra)]
    z, k = map(torch.view_as_complex, leaves)
    want = torch.view_as_real(torch.fft.ifft(torch.fft.fft(z) * k))
    wanted = [want, *torch.autograd.grad(want, leaves, d_y.double())]
    for got, expect in zip((y, *grads), wanted, strict=True):
        torch.testing.assert_close(got.double(), expect, atol=2e-5, rtol=0)
    assert interpreter.call(f"{__file__}:middle_pass", inputs[..., :200, :], spectra) is None


@pytest.mark.parametrize("shape", [(0, 2, 5), (2, 0, 5), (2, 2, 0)])
def test_nothing_to_do(interpreter, shape):
    u, kernel = torch.zeros(shape), torch.zeros(shape[1], 3)
    assert interpreter.call(CONV, u, kernel).shape == shape


@pytest.mark.counted
def test_reads_and_writes_once(interpreter):
    """Signals and gates once, plus the spectrum and the tables for each program."""
    from corelib.kernels._monarch_tables import plan_of
    from corelib.kernels.monarch_fft_conv import forward_bytes
    from corelib.measure import count_io

    B, H, L = 6, 2, 500
    given, _ = inputs(B, H, L, L, "in out", dtype=torch.float16)
    plan = plan_of(L, 1024)
    count = count_io(CONV, *given)
    assert count.bytes_moved == forward_bytes(B, H, L, plan, gates=2, splits=3)
    signals = 4 * B * H * L * 2
    fixed = forward_bytes(0, H, L, plan)
    assert forward_bytes(B, H, L, plan, gates=2) == signals + fixed
    large = forward_bytes(64, 768, 2048, plan_of(2048, 4096))
    least = 2 * 64 * 768 * 2048 * 2
    assert least < large < 1.4 * least  # a program that goes through the whole batch


def test_moves_less_than_calls_to_a_library():
    """The library's bytes are modelled: float32, every call through memory, padded to 4,096."""
    from corelib.kernels._monarch_tables import plan_of
    from corelib.kernels.monarch_fft_conv import forward_bytes
    from corelib.linear_time.fft_costs import library_cost_model
    from corelib.measure.hardware import A100

    B, H, L = 64, 768, 2048
    calls = library_cost_model(2 * L, A100, rows=B * H).main_bytes
    assert calls > 10 * forward_bytes(B, H, L, plan_of(L, 2 * L))


@pytest.mark.counted
@pytest.mark.parametrize("gates", ["", "in out"])
def test_backward_moves_the_bytes_that_it_says(interpreter, gates):
    from corelib.kernels._monarch_tables import plan_of
    from corelib.kernels.monarch_fft_conv import forward_bytes
    from corelib.kernels.monarch_fft_conv_backward import backward_bytes
    from corelib.measure import count_io

    given, d_y = inputs(2, 1, 100, 50, gates)
    plan, flags = plan_of(100, 256), dict(in_gate="in" in gates, out_gate="out" in gates)
    count = count_io(RUN, CONV, given, None, (d_y,))
    ahead = forward_bytes(2, 1, 100, plan, gates=len(gates.split()), itemsize=4)
    assert count.bytes_moved == ahead + backward_bytes(2, 1, 100, plan, **flags, itemsize=4)


def test_what_is_compiled_is_what_is_launched():
    from corelib.kernels._monarch_tables import LONGEST, plan_of, warps_for
    from corelib.kernels.monarch_fft_conv import SPECIALISATIONS

    kinds = {torch.float16: "fp16", torch.float32: "fp32"}
    for dtype, N in ((torch.float16, 4096), (torch.float32, 512)):
        assert LONGEST[dtype] == N
        plan = plan_of(N // 2, N)
        row = next(x for x in SPECIALISATIONS if x.label == f"{kinds[dtype]} N={N}")
        assert row.num_warps == warps_for(plan, dtype) and row.num_stages == 1
        assert plan.constants.items() <= row.constexprs.items()


BAD = {
    "type": (lambda x: [x[0].double(), *x[1:]], TypeError, "u: expected float16, bfloat16"),
    "axes": (lambda x: [x[0][0], *x[1:]], ValueError, r"u: expected \(B, H, L\), got"),
    "channels": (lambda x: [x[0], x[1][:1], *x[2:]], ValueError, r"kernel: expected \(2, K\)"),
    "taps": (lambda x: [x[0], x[1].half(), *x[2:]], TypeError, "kernel: expected float32"),
    "gate": (lambda x: [*x[:2], x[2][:1], x[3]], ValueError, r"in_gate: expected \(2, 2, 9\)"),
    "too long": (lambda x: [x[0].repeat(1, 1, 100), x[1].repeat(1, 100)], ValueError, "up to 512"),
    "device": (lambda x: x, ValueError, "expected CUDA tensors"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_named(case):
    change, error, message = BAD[case]
    args = change(inputs(2, 2, 9, 9, "in out")[0])
    shared.assert_refused(CONV, args, error, message)


def test_bad_sizes_are_named():
    args = inputs(1, 1, 300, 9)[0][:2]
    message = r"circle: expected one of \[256, 512\], at lea"
    for circle in (300, 256, 4096):
        shared.assert_refused(CONV, args, ValueError, message, circle=circle)
    shared.assert_refused(SPARSE, (*args, 4, 17), ValueError, "keep2: expected 1 to 16, got 17")


def check():
    """What every mutant of the kernels has to get past."""
    from corelib.kernels.gates.cases import forward_backward

    given, d_y = inputs(5, 2, 60, 60, "in out")
    got = forward_backward(f"{__file__}:with_splits", given, {"splits": 2}, (d_y,))
    assert_equals(got, given, d_y, 120)
    given, d_y = inputs(1, 1, 270, 200)
    got = forward_backward(CONV, given, None, (d_y,))
    assert_equals(got, given, d_y, 512)


@pytest.mark.slow
@pytest.mark.parametrize("module", ["monarch_fft_conv", "monarch_fft_conv_backward"])
def test_mutants_are_caught(module):
    """A sample; ``limit=None`` runs all of them."""
    assert shared.survivors(module, f"{__file__}:check", limit=7) == []
