"""Counted operations: those of products exactly, of transforms and attention by their formulas."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from corelib.measure import fit_exponent
from corelib.measure.work import count_work
from corelib.primitives import attention


def test_products_and_elements():
    a, b = torch.randn(3, 5), torch.randn(5, 7)
    assert count_work(lambda: a @ b) == 2 * 3 * 5 * 7
    assert count_work(lambda: (a @ b).exp()) == 2 * 3 * 5 * 7 + 21
    assert count_work(lambda: a.T.reshape(5, 3)[1:].unsqueeze(0)) in (0, 15)  # views are free


def test_every_kind_of_product():
    a, b, c = torch.randn(2, 3, 5), torch.randn(2, 5, 7), torch.randn(2, 3, 7)
    x, taps = torch.randn(1, 4, 9), torch.randn(4, 1, 3)
    assert count_work(lambda: a @ b) == 2 * 2 * 3 * 5 * 7
    assert count_work(lambda: torch.addmm(c[0], a[0], b[0])) == 2 * 3 * 5 * 7
    assert count_work(lambda: torch.baddbmm(c, a, b)) == 2 * 2 * 3 * 5 * 7
    assert count_work(lambda: b[0] @ c[0, 0]) == 2 * 5 * 7
    assert count_work(lambda: F.conv1d(x, taps, groups=4)) == 2 * 4 * 7 * 3


def test_a_transform():
    x = torch.randn(4, 64)
    assert count_work(lambda: torch.fft.rfft(x)) == pytest.approx(5 * 256 * math.log2(64))
    assert count_work(lambda: torch.fft.irfft(torch.fft.rfft(x))) >= 2 * 5 * 132 * math.log2(64)


def test_attention_counts_all_pairs():
    q, k, v = torch.randn(3, 1, 2, 64, 8)
    found = count_work(lambda: attention(q, k, v, causal=True))
    assert 4 * 2 * 64 * 64 * 8 <= found < 1.2 * 4 * 2 * 64 * 64 * 8


def test_exponents():
    lengths = (64, 128, 256, 512, 1024)

    def grows(run):
        return fit_exponent(lengths, [count_work(lambda n=n: run(n)) for n in lengths]).value

    assert grows(lambda n: torch.zeros(n, 4).cumsum(0)) == pytest.approx(1, abs=1e-6)
    assert 1.05 < grows(lambda n: torch.fft.rfft(torch.zeros(n))) < 1.25
    q = {n: torch.zeros(1, 1, n, 8) for n in lengths}
    assert grows(lambda n: attention(q[n], q[n], q[n], causal=True)) == pytest.approx(2, abs=0.05)
