"""Every mixer against its matrix written out, and with gradients."""

from __future__ import annotations

import pytest
import scipy.linalg
import torch

from corelib.foundations import mixers
from corelib.measure.structure import materialize

pytestmark = pytest.mark.method("unified_mixing")
EXACT = dict(atol=1e-10, rtol=1e-10)
B, H, D, V = 2, 3, 4, 5


def random(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def content(L, seed=0):
    return [random(B, H, L, n, seed=seed + i) for i, n in enumerate((D, D, V))]


def visible(L, rule):
    i, j = torch.arange(L)[:, None], torch.arange(L)[None, :]
    return rule(i, j)


def softmax_over(q, k, seen):
    scores = q @ k.mT * q.shape[-1] ** -0.5
    return scores.masked_fill(~seen, -torch.inf).softmax(-1)


def normalised(P):
    return P / P.sum(-1, keepdim=True)


def decay_matrix(log_decay):
    """``prod a_(j+1) ... a_i`` below the diagonal, by multiplying."""
    L = log_decay.shape[-1]
    out = log_decay.new_zeros(*log_decay.shape, L)
    for i in range(L):
        for j in range(i + 1):
            out[..., i, j] = log_decay[..., j + 1 : i + 1].exp().prod(-1)
    return out


def cases(L):
    """Name -> the mixer on values, and its matrix."""
    q, k, _ = content(L)
    directions, matrix = random(7, D, seed=5), random(H, L, L, seed=6)
    projection, taps = random(3, L, seed=7), random(H, 3, seed=8)
    kernel, log_decay = random(H, L, seed=9), -random(B, H, L, seed=10).abs()
    decay, weight = random(H, 4, seed=11).sigmoid(), random(H, 4, seed=12)
    phi = mixers.positive_random_features(directions)
    past = visible(L, lambda i, j: j <= i)
    near = visible(L, lambda i, j: (i - j).abs() < 3).double()
    elu = mixers.elu_features
    short = torch.zeros(H, L, dtype=torch.float64)
    short[:, : min(3, L)] = taps[:, :L]

    def toeplitz(c):
        return torch.stack([torch.tensor(scipy.linalg.toeplitz(row, 0 * row)) for row in c.numpy()])

    steps = torch.stack([(weight * decay**t).sum(-1) for t in range(L)], -1)
    return {
        "strided": (
            lambda v: mixers.strided_attention(q, k, v, stride=3),
            softmax_over(q, k, visible(L, lambda i, j: (i - j) % 3 == 0)),
        ),
        "low rank": (
            lambda v: mixers.low_rank_attention(q, k, v, projection),
            (q @ (projection @ k).mT * D**-0.5).softmax(-1) @ projection,
        ),
        "kernel": (
            lambda v: mixers.kernel_attention(q, k, v),
            normalised(elu(q) @ elu(k).mT),
        ),
        "random features": (
            lambda v: mixers.kernel_attention(q, k, v, phi),
            normalised(phi(q) @ phi(k).mT),
        ),
        "causal kernel": (
            lambda v: mixers.causal_kernel_attention(q, k, v),
            normalised((elu(q) @ elu(k).mT).tril()),
        ),
        "decayed": (
            lambda v: mixers.decayed_attention(q, k, v, log_decay, chunk=4),
            (q @ k.mT) * decay_matrix(log_decay) * past,
        ),
        "long convolution": (lambda v: mixers.long_convolution(v, kernel), toeplitz(kernel)),
        "state space": (
            lambda v: mixers.long_convolution(v, mixers.state_space_kernel(decay, weight, L)),
            toeplitz(steps),
        ),
        "short convolution": (lambda v: mixers.short_convolution(v, taps), toeplitz(short)),
        "pooling": (lambda v: mixers.pooling(v, window=3), normalised(near)),
        "fourier": (mixers.fourier, torch.tensor(scipy.linalg.dft(L))),
        "learned": (lambda v: mixers.learned_mixing(v, matrix), matrix),
    }


@pytest.mark.parametrize("name", cases(2))
@pytest.mark.parametrize("L", [1, 2, 11])
def test_equals_its_matrix_and_its_gradient(name, L):
    mix, P = cases(L)[name]
    v = random(B, H, L, V, seed=3).requires_grad_()
    y = mix(v)
    wanted = P @ v.to(P.dtype)
    torch.testing.assert_close(y, wanted, **EXACT)
    weight = random(*y.shape, seed=4)
    grads = [torch.autograd.grad((x.real * weight).sum(), v)[0] for x in (y, wanted)]
    torch.testing.assert_close(*grads, **EXACT)
    found = materialize(mix, L, batch=(B, H))
    torch.testing.assert_close(found, P.expand_as(found), **EXACT)


@pytest.mark.parametrize("chunk", [1, 3, 64])
def test_chunks_do_not_matter_and_strong_decay_stays_finite(chunk):
    q, k, v = content(13)
    log_decay = torch.full((B, H, 13), -400.0, dtype=torch.float64)
    torch.testing.assert_close(
        mixers.decayed_attention(q, k, v, log_decay, chunk=chunk), (q * k).sum(-1, True) * v
    )
    always = mixers.decayed_attention(q, k, v, 0 * log_decay, chunk=chunk)
    torch.testing.assert_close(always, (q @ k.mT).tril() @ v)


def test_random_features_estimate_the_softmax():
    q, k = 0.5 * random(1, 1, 6, D), 0.5 * random(1, 1, 6, D, seed=1)
    wanted = softmax_over(q, k, visible(6, lambda i, j: i == i + 0 * j))
    off = []
    for R in (50, 50_000):
        phi = mixers.positive_random_features(random(R, D, seed=2))
        off.append((normalised(phi(q) @ phi(k).mT) - wanted).abs().max())
    assert off[1] < 0.01 < off[0]


def test_fnet_is_the_template_with_a_complex_matrix():
    """``Re(F x G)``: mixing by ``F``, values ``x G``."""
    x = random(2, 6, 4)
    F, G = (torch.tensor(scipy.linalg.dft(n)) for n in (6, 4))
    values = x.to(G.dtype) @ G
    torch.testing.assert_close(mixers.fnet(x), (F @ values).real, **EXACT)
    two_real = F.real @ values.real - F.imag @ values.imag  # or two real mixings
    torch.testing.assert_close(mixers.fnet(x), two_real, **EXACT)


@pytest.mark.no_shape_checks
def test_errors_name_what_was_expected():
    q, k, v = content(4)
    with pytest.raises(ValueError, match="stride: expected at least 1, got 0"):
        mixers.strided_attention(q, k, v, stride=0)
    with pytest.raises(TypeError, match="window: expected an int, got float"):
        mixers.pooling(v, window=2.0)
    with pytest.raises(ValueError, match=r"projection: expected \(R, 4\), got \(3, 5\)"):
        mixers.low_rank_attention(q, k, v, random(3, 5))
    with pytest.raises(ValueError, match=r"kernel: expected \(3, 4\), got \(3, 5\)"):
        mixers.long_convolution(v, random(3, 5))
