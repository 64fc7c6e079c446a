"""The Legendre memory, its layer and the dense model."""

import doctest
import math

import pytest
import torch

from corelib.state_space import lmuformer
from corelib.state_space.lmuformer import (
    LMUFFT,
    LegendreMemory,
    LMUFormer,
    discrete_memory,
    impulse_response,
    lmu_block,
    memory_fft,
    memory_reference,
)
from corelib.state_space.lmuformer_layers import CausalConv, early_exit
from corelib.state_space.shared import legendre_basis, legendre_matrices
from corelib.testing import assert_same, conformance

LEAK = 1e-12
double = torch.float64


def rand(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=double)


def test_doctest():
    failures, tests = doctest.testmod(lmuformer)
    assert tests and not failures


def test_discrete_system_is_scipys():
    """The hold as one exponential of A and B together (what its cont2discrete does)."""
    linalg = pytest.importorskip("scipy.linalg")
    A, B = legendre_matrices(7, 20.0)
    both = torch.cat([torch.cat([A, B[:, None]], 1), torch.zeros(1, 8, dtype=double)])
    wanted = torch.from_numpy(linalg.expm(both.numpy()))
    A_bar, B_bar = discrete_memory(7, 20.0)
    torch.testing.assert_close(A_bar, wanted[:7, :7], atol=1e-13, rtol=0)
    torch.testing.assert_close(B_bar, wanted[:7, 7], atol=1e-13, rtol=0)


def test_entries_are_the_papers():
    A, B = legendre_matrices(3, 2.0)
    wanted = [[-0.5, -0.5, -0.5], [1.5, -1.5, -1.5], [-2.5, 2.5, -2.5]]
    assert A.tolist() == wanted and B.tolist() == [0.5, -1.5, 2.5]


@pytest.mark.parametrize("L", [1, 2, 5, 37, 64])
@pytest.mark.parametrize("with_state", [False, True])
def test_fft_is_the_recurrence(L, with_state):
    """States and gradients, from an empty memory and from a full one."""
    A_bar, B_bar = discrete_memory(6, 9.0)
    found = []
    for f in (memory_fft, memory_reference):
        u = rand(2, L).requires_grad_()
        state = rand(2, 6, seed=1).requires_grad_() if with_state else None
        m = f(u, A_bar, B_bar, state)
        leaves = [u, state] if with_state else [u]
        found.append((m, *torch.autograd.grad((m * rand(2, L, 6, seed=2)).sum(), leaves)))
    assert_same(found[0], found[1], tolerance=1e-12)


def test_no_steps_at_all():
    A_bar, B_bar = discrete_memory(3, 4.0)
    u = torch.zeros(2, 0, dtype=double)
    assert memory_fft(u, A_bar, B_bar).shape == memory_reference(u, A_bar, B_bar).shape == (2, 0, 3)


def test_impulse_response_is_what_a_one_leaves():
    A_bar, B_bar = discrete_memory(4, 9.0)
    one = torch.zeros(1, 11, dtype=double)
    one[0, 0] = 1
    torch.testing.assert_close(
        impulse_response(A_bar, B_bar, 11), memory_reference(one, A_bar, B_bar)[0]
    )


def test_the_memory_redraws_its_window():
    """Twelve numbers tell a sine of period 100 over the last 128 steps."""
    theta, t = 128.0, torch.arange(400, dtype=double)
    A_bar, B_bar = discrete_memory(12, theta)

    def sine(at):
        return torch.sin(2 * math.pi * at / 100)

    m = memory_reference(sine(t)[None], A_bar, B_bar)[0, -1]
    places = torch.tensor([0.25, 0.5, 0.75, 1.0], dtype=double)
    told = legendre_basis(12, places) @ m
    # the hold keeps each input for a step: its middle is half a step later
    worst = (told - sine(399 + 0.5 - places * theta)).abs().max()
    assert worst < 1e-3
    assert (told - sine(399 - places * theta)).abs().max() > 10 * worst


def test_the_memory_forgets_what_has_left_the_window():
    A_bar, B_bar = discrete_memory(12, 50.0)
    response = impulse_response(A_bar, B_bar, 150).norm(dim=1)
    assert response[:50].min() > 20 * response[100:].max()


@pytest.mark.parametrize("length", [4, 9])
def test_conformance(length):
    torch.manual_seed(0)
    mixer = LMUFFT(3, 5, theta=6.0).double()
    with torch.no_grad():
        mixer.write.bias.fill_(0.5)
    conformance(mixer, rand(2, length, 3), leak=LEAK)


def test_conformance_of_the_block_and_the_convolution():
    torch.manual_seed(1)
    conformance(_lively(lmu_block(4, theta=5.0)), rand(2, 7, 4), leak=LEAK)
    conformance(CausalConv(3, 3).double(), rand(2, 6, 3))


def test_written_numbers_are_not_negative_and_move_the_output():
    torch.manual_seed(0)
    layer = LMUFFT(4).double()
    x = rand(1, 9, 4)
    assert layer.written(x).min() >= 0 and layer.written(x).max() > 0
    assert layer.memory.size == 4


def test_a_kept_spectrum_follows_length_and_dtype():
    memory = LegendreMemory(3, 5.0)
    for length, kind in ((4, torch.float32), (7, torch.float32), (7, double), (4, double)):
        u = rand(1, length).to(kind)
        m, last = memory.to(kind)(u)
        assert m.dtype == kind
        wanted = memory_reference(u, memory.A_bar, memory.B_bar)
        assert_same(m, wanted)
        assert_same(last, wanted[:, -1])


def test_a_kept_spectrum_made_in_inference_mode_can_be_trained_with():
    memory, u = LegendreMemory(3, 5.0), torch.ones(1, 4)
    with torch.inference_mode():
        memory(u)
    (gradient,) = torch.autograd.grad(memory(u.requires_grad_())[0].sum(), u)
    assert gradient.isfinite().all()


def test_model_as_a_stream():
    """Step by step, and the parallel logits of every prefix; the last one is the model's."""
    torch.manual_seed(0)
    model = _lively(LMUFormer(3, 5, 8, depth=2, theta=6.0))
    x = rand(2, 9, 3)
    with torch.no_grad():
        whole, state, steps = model.prefix_logits(x), model.init_state(2), []
        for x_t in x.unbind(1):
            logits, state = model.step(x_t, state)
            steps.append(logits)
        assert_same(torch.stack(steps, 1), whole)
        assert_same(model(x), whole[:, -1])
        assert_same(model(x[:, :4]), whole[:, 3])


def test_model_does_not_need_the_training_length():
    model = LMUFormer(2, 3, 4).eval()
    assert model(torch.zeros(1, 1, 2)).shape == (1, 3)


def test_parameters_are_counted_by_hand():
    """The paper's shape: 128 bands, 256 channels, one block, 35 words: 1.66 million."""
    C, F, classes = 256, 128, 35
    embed = 3 * C * (F + 4 * C) + 4 * 2 * C
    lmu = (C + 1) + (2 * C * C + C) + (C * C + C) + 2 * C
    mixer = 2 * 4 * C * C + 5 * C + 2 * 5 * C
    wanted = embed + lmu + mixer + (C + 1) * classes
    assert sum(p.numel() for p in LMUFormer(F, classes).parameters()) == wanted
    assert 1.6e6 < wanted < 1.7e6


def test_early_exit():
    logits = torch.tensor([[[0.0, 1], [5, 0], [0, 9]], [[0.0, 0.5], [0.2, 0], [0.1, 0]]])
    labels, lengths = early_exit(logits, 0.9)
    assert labels.tolist() == [0, 0] and lengths.tolist() == [2, 3]
    assert early_exit(logits, 0.6)[1].tolist() == [1, 1]
    assert early_exit(logits, 2.0)[1].tolist() == [3, 3]


@pytest.mark.no_shape_checks
@pytest.mark.parametrize(
    ("run", "error", "message"),
    [
        (lambda: LMUFFT(0), ValueError, "channels: expected at least 1"),
        (lambda: LMUFFT(2, theta=0.0), ValueError, "theta: expected more than 0"),
        (lambda: memory_fft(rand(2, 3, 1), *discrete_memory(3, 4.0)), ValueError, "u: expected"),
        (lambda: memory_fft(rand(2, 3).float(), *discrete_memory(3, 4.0)), TypeError, "B_bar: exp"),
        (
            lambda: memory_fft(rand(2, 3), *discrete_memory(3, 4.0), rand(1, 3)),
            ValueError,
            r"state: expected shape \(2, 3\)",
        ),
        (lambda: LMUFormer(2, 3, 4)(torch.zeros(1, 0, 2)), ValueError, "x: expected"),
        (
            lambda: LMUFormer(2, 3, 4).step(torch.zeros(1, 2), None),
            ValueError,
            "step: expected a model in evaluation mode",
        ),
        (lambda: early_exit(torch.zeros(1, 2), 0.5), ValueError, "logits: expected"),
        (lambda: early_exit(torch.zeros(1, 2, 3), 0.0), ValueError, "confidence: expected"),
    ],
)
def test_bad_input_is_named(run, error, message):
    with pytest.raises(error, match=message):
        run()


def _lively(model):
    """Batch norms with statistics of their own, as after training; float64, evaluation mode."""
    generator = torch.Generator().manual_seed(3)
    for name, buffer in model.named_buffers():
        if name.endswith(("running_mean", "running_var")):
            buffer.copy_(0.5 + torch.rand(buffer.shape, generator=generator))
    return model.double().eval()
