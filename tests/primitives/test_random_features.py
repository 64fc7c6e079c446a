"""Positive random features: unbiased, positive, and as noisy as the formula says."""

from __future__ import annotations

import pytest
import torch

from corelib.primitives.random_features import (
    gaussian_directions,
    log_positive_features,
    orthogonal_directions,
    positive_features,
    relative_variance,
)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def vectors(length, width=4):
    """Two vectors of this length, at an angle of 60 degrees."""
    x, y = torch.zeros(2, width, dtype=torch.float64)
    x[0], y[0], y[1] = length, 0.5 * length, 0.75**0.5 * length
    return x, y


def test_features_by_hand():
    x = torch.tensor([[1.0, 2.0]], dtype=torch.float64)
    w = torch.tensor([[0.0, 0.0], [1.0, 1.0], [3.0, -1.0]], dtype=torch.float64)
    wanted = torch.tensor([[-2.5, 0.5, -1.5]], dtype=torch.float64).exp() / 3**0.5
    torch.testing.assert_close(positive_features(x, w), wanted)
    torch.testing.assert_close(log_positive_features(x, w), wanted.log())


@pytest.mark.parametrize("draw", [gaussian_directions, orthogonal_directions])
def test_unbiased(draw):
    x, y = vectors(0.9)
    w = draw(200_000, 4, generator=seeded()).double()
    got = positive_features(x, w) @ positive_features(y, w)
    deviation = (relative_variance(x, y, 200_000)) ** 0.5
    assert abs(got / (x @ y).exp() - 1) < 4 * deviation


def estimates(draw, length, blocks=40_000):
    """Of ``exp(x . y)``, relative, from four directions each; blocks are independent draws."""
    pair = torch.stack(vectors(length))
    w = draw(4 * blocks, 4, generator=seeded(1)).double()
    phi = positive_features(pair, w).view(2, blocks, 4) * blocks**0.5
    return (phi[0] * phi[1]).sum(-1) / (pair[0] @ pair[1]).exp()


@pytest.mark.parametrize("length", [0.2, 0.5])
def test_variance_of_independent_directions(length):
    got = estimates(gaussian_directions, length).var()
    assert abs(got / relative_variance(*vectors(length), 4) - 1) < 0.05


def test_orthogonal_directions_vary_less():
    got = estimates(orthogonal_directions, 0.5).var()
    assert got < 0.95 * relative_variance(*vectors(0.5), 4)


def test_directions_are_at_right_angles_and_as_long_as_normal_ones():
    w = orthogonal_directions(11, 4, generator=seeded(3)).double()
    for block in w.split(4):
        gram = block @ block.T
        torch.testing.assert_close(gram, gram.diagonal().diag(), atol=1e-5, rtol=0)
    many = orthogonal_directions(8000, 4, generator=seeded(4))
    squares = many.square().sum(1)
    assert abs(squares.mean() - 4) < 0.15 and abs(squares.var() - 8) < 0.8
    assert many.mean(0).abs().max() < 0.05


def test_variance_explodes_with_the_length():
    x, y = vectors(1.0)
    by_length = [relative_variance(s * x, s * y, 64).item() for s in (1.0, 2.0, 4.0)]
    assert by_length[1] > 100 * by_length[0] and by_length[2] > 1e6 * by_length[1]


def test_gradients_and_axes():
    w = gaussian_directions(3, 4, generator=seeded()).double()
    x = torch.randn(2, 1, 5, 4, generator=seeded(1), dtype=torch.float64).requires_grad_()
    assert positive_features(x, w).shape == (2, 1, 5, 3)
    assert torch.autograd.gradcheck(lambda a: positive_features(a, w), (x,))


@pytest.mark.no_shape_checks
def test_bad_input_is_named():
    x = torch.zeros(2, 4)
    with pytest.raises(ValueError, match=r"directions: expected shape \(m, D\)"):
        positive_features(x, torch.zeros(3, 5))
    with pytest.raises(ValueError, match="directions: expected at least one"):
        positive_features(x, torch.zeros(0, 4))
    with pytest.raises(TypeError, match="directions: expected the dtype of x"):
        positive_features(x, torch.zeros(3, 4).double())
    for draw in (gaussian_directions, orthogonal_directions):
        with pytest.raises(ValueError, match="features: expected a whole number"):
            draw(0, 4)
