"""Every class: the fast product is its matrix, and what its parameters reach."""

from __future__ import annotations

import doctest

import pytest
import torch

from corelib.measure.structure import structure_report
from corelib.state_space import matrix_mixers
from corelib.state_space.matrix_mixers import CLASSES, MatrixMixer, example
from corelib.testing import assert_same

pytestmark = pytest.mark.method("hydra")
ALIGNED = [name for name, kind in CLASSES.items() if kind.can_align]


def drawn(kind, L, N=3, batch=2, heads=2):
    g = torch.Generator().manual_seed(L)
    numbers = CLASSES[kind].numbers(N, L)
    p = torch.randn(batch, heads, L, numbers, generator=g, dtype=torch.float64)
    return p, torch.randn(batch, heads, L, 4, generator=g, dtype=torch.float64)


def test_doctest():
    failures, tests = doctest.testmod(matrix_mixers)
    assert tests and not failures


@pytest.mark.parametrize("kind", CLASSES)
@pytest.mark.parametrize("L", [1, 6, 13])
def test_the_product_is_the_matrix(kind, L):
    p, v = drawn(kind, L)
    assert_same(CLASSES[kind].product(p, v), CLASSES[kind].matrix(p) @ v)


@pytest.mark.parametrize("kind", CLASSES)
def test_gradients_too(kind):
    leaves = [x.requires_grad_() for x in drawn(kind, 6)]
    weight = torch.linspace(-1, 1, leaves[1].numel(), dtype=torch.float64)
    got, wanted = (
        torch.autograd.grad(y.flatten() @ weight, leaves)
        for y in (CLASSES[kind].product(*leaves), CLASSES[kind].matrix(leaves[0]) @ leaves[1])
    )
    assert_same(got, wanted)


def test_what_kind_of_matrix():
    """Rank, and the ranks of the blocks below and above the diagonal, at N = 3 and L = 16."""
    seen = {k: structure_report(CLASSES[k].matrix(drawn(k, 16)[0])[0, 0]) for k in CLASSES}
    ranks = {k: (s.rank, s.state_forward, s.state_backward) for k, s in seen.items()}
    assert ranks["low rank"] == (3, 3, 3)
    assert ranks["semiseparable"] == (16, 3, 0)
    assert ranks["quasiseparable"] == (16, 3, 3)
    for kind in ("dense", "attention", "toeplitz", "vandermonde", "butterfly"):
        assert ranks[kind] == (16, 8, 8), kind
    assert [k for k, s in seen.items() if s.toeplitz < 1e-9] == ["toeplitz"]
    assert [k for k, s in seen.items() if s.causal] == ["semiseparable"]
    assert [k for k, s in seen.items() if s.normalised] == ["attention"]


def test_entries():
    """A few classes against their formula, entry by entry."""
    for kind in ("cauchy", "vandermonde", "low rank", "toeplitz"):
        p = drawn(kind, 5)[0][0, 0]
        M = CLASSES[kind].matrix(p[None, None])[0, 0]
        q, k = p.chunk(2, -1)
        for i in range(5):
            for j in range(5):
                wanted = {
                    "cauchy": (1 / (1 + q[i].exp() + k[j].exp())).sum(),
                    "vandermonde": (torch.cos(q[i] * j) - torch.cos(k[j] * i)).sum(),
                    "low rank": q[i] @ k[j],
                    "toeplitz": p[i - j, 0] if i >= j else p[j - i, 1],
                }
                torch.testing.assert_close(M[i, j], wanted[kind])


def test_butterfly_is_dense_and_its_factors_are_not():
    p = drawn("butterfly", 16)[0]
    assert structure_report(CLASSES["butterfly"].matrix(p)[0, 0]).density == 1
    two = p.clone()
    two[..., 4:] = torch.tensor([1.0, 0, 1, 0])  # the last two factors do nothing
    M = CLASSES["butterfly"].matrix(two)[0, 0]
    assert structure_report(M).density == 4 / 16
    assert not M[:4, 4:].any()


@pytest.mark.parametrize("kind", ALIGNED)
def test_sequence_aligned(kind):
    """The leading part of the matrix is that of the leading parameters, at any length."""
    p = drawn(kind, 9)[0]
    whole, part = CLASSES[kind].matrix(p)[..., :5, :5], CLASSES[kind].matrix(p[:, :, :5])
    if kind == "attention":  # but for the sums of its rows
        whole = whole / whole.sum(-1, keepdim=True)
    assert_same(whole, part)


@pytest.mark.parametrize("kind", CLASSES)
@pytest.mark.parametrize("aligned", [True, False])
def test_the_layer(kind, aligned):
    if aligned and kind not in ALIGNED:
        with pytest.raises(ValueError, match=f"aligned: a {kind} matrix"):
            MatrixMixer(kind, 8, aligned=True, length=6)
        return
    torch.manual_seed(0)
    mixer = MatrixMixer(kind, 8, aligned=aligned, length=6, heads=2, state=2).double()
    x = torch.randn(2, 6, 8, dtype=torch.float64)
    y, M = mixer(x), mixer.matrix(x)
    v = mixer.values(x).unflatten(2, (2, 4)).transpose(1, 2)
    assert_same(y, x + mixer.out((M @ v).transpose(1, 2).flatten(2)))
    assert aligned == (not torch.equal(M[0], M[1]))  # the matrix follows the input, or does not
    y.square().sum().backward()
    assert all(p.grad is not None for p in mixer.parameters())
    if aligned:
        assert mixer(torch.randn(1, 11, 8, dtype=torch.float64)).shape == (1, 11, 8)
    else:
        with pytest.raises(ValueError, match="x: expected length 6, got 7"):
            mixer(torch.randn(1, 7, 8, dtype=torch.float64))


@pytest.mark.no_shape_checks
def test_bad_input_is_named():
    with pytest.raises(ValueError, match="kind: expected one of dense, attention"):
        MatrixMixer("sparse", 8, aligned=True, length=6)
    with pytest.raises(ValueError, match="heads: expected a number that divides 8, got 3"):
        MatrixMixer("dense", 8, aligned=False, length=6, heads=3)
    with pytest.raises(ValueError, match="p: expected 8 numbers, got 6"):
        CLASSES["butterfly"].product(torch.zeros(1, 1, 9, 6), torch.zeros(1, 1, 9, 1))


def test_example():
    for kind in CLASSES:
        given = example(kind)
        assert CLASSES[kind].product(**given).shape == (1, 1, 6, 1)
