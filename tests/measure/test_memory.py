"""Counted memory against cases that can be counted by hand."""

import subprocess
import sys

import pytest
import torch

from corelib.measure import peak_memory

N = 256
X = torch.randn(N, N)
SQUARE = N * N * 4  # bytes of one such matrix


@pytest.mark.parametrize(
    ("fn", "squares"),
    [
        (lambda: X @ X, 1),
        (lambda: X.add_(0), 0),  # in place on what existed
        (lambda: (X @ X).mul_(2).view(-1)[5:].t(), 1),  # in place, views
        (lambda: (X + 1) + 1, 2),
        (lambda: ((X + 1) + 1) + 1, 2),  # the first intermediate is freed in time
        (lambda: [X + 1, X + 1, X + 1], 3),
        (lambda: X.t().contiguous(), 1),
        (lambda: X.double(), 2),
        (lambda: (X.double(), None)[1], 2),  # dropped, yet it was held
        (lambda: torch.empty(N, N).fill_(1), 1),
        (lambda: torch.mm(X, X, out=torch.empty(0)), 1),  # grows out=
    ],
)
def test_hand_counts(fn, squares):
    assert peak_memory(fn) == squares * SQUARE


def test_what_autograd_saves_counts():
    w = X.clone().requires_grad_()

    def saved():
        return w.exp().exp()  # both results are saved for backward

    def free():
        with torch.no_grad():
            return w.exp().exp().exp()

    assert peak_memory(lambda: saved().exp()) == 3 * SQUARE
    assert peak_memory(free) == 2 * SQUARE


def test_backward_runs_under_the_count():
    w = X.clone().requires_grad_()
    gradient = torch.ones(N, N)

    def step():
        (w * X).backward(gradient)  # product, then w.grad
        w.grad = None

    assert peak_memory(step) == 2 * SQUARE


def test_twice_the_same_and_attention_grows_with_the_square():
    def naive(n):
        q = torch.ones(n, 8)
        return peak_memory(lambda: (q @ q.t()).softmax(-1) @ q)

    assert naive(64) == naive(64) == 2 * 64 * 64 * 4
    assert naive(256) == 16 * naive(64)


@pytest.mark.no_shape_checks
@pytest.mark.parametrize("device", ["tpu", *([] if torch.cuda.is_available() else ["cuda"])])
def test_unknown_device(device):
    with pytest.raises(ValueError, match="device must be"):
        peak_memory(lambda: None, device=device)


@pytest.mark.slow
def test_counting_does_not_load_the_compiler():
    code = (
        "import sys, torch; from corelib.measure import peak_memory; x = torch.ones(3);"
        "assert peak_memory(lambda: x + 1) == 12; assert 'torch._dynamo' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
