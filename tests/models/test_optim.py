"""`FusedAdamW` against torch.optim's AdamW, and the schedule."""

import pytest
import torch

from corelib.models.optim import FusedAdamW, warm_cosine


def problem():
    torch.manual_seed(0)
    return torch.nn.Linear(3, 2).double(), torch.randn(7, 3).double(), torch.randn(7, 2).double()


@pytest.mark.parametrize("clip", [None, 0.1])
def test_takes_the_steps_of_torch_optim(clip):
    (mine, x, y), (theirs, _, _) = problem(), problem()
    optimiser = FusedAdamW(mine.parameters(), 0.1, weight_decay=0.1, clip=clip)
    other = torch.optim.AdamW(theirs.parameters(), 0.1, betas=(0.9, 0.95), weight_decay=0.1)
    for share in (1.0, 0.5, 0.25):
        loss = optimiser.step((mine(x) - y).square().mean(), share)
        expected = (theirs(x) - y).square().mean()
        assert loss == pytest.approx(expected.item(), abs=1e-12)
        other.zero_grad()
        expected.backward()
        if clip is not None:
            torch.nn.utils.clip_grad_norm_(theirs.parameters(), clip)
        other.param_groups[0]["lr"] = 0.1 * share
        other.step()
    torch.testing.assert_close(mine.weight, theirs.weight, rtol=0, atol=1e-9)
    torch.testing.assert_close(mine.bias, theirs.bias, rtol=0, atol=1e-9)


@pytest.mark.parametrize("kind", ["negated lazily", "expanded", "turned"])
def test_gradients_need_not_lie_in_memory_as_parameters_do(kind):
    """Autograd hands out views: of an imaginary part, of a broadcast number, of a transpose."""
    gradient = {
        "negated lazily": torch.complex(torch.ones(3, 3), torch.ones(3, 3)).conj().imag,
        "expanded": torch.tensor([[-2.0], [0.0], [1.0]]).expand(3, 3),
        "turned": torch.arange(9.0).view(3, 3).T - 4,
    }[kind]
    p = torch.zeros(3, 3, requires_grad=True)
    FusedAdamW([p], 0.5).apply([gradient])
    torch.testing.assert_close(p.detach(), -0.5 * gradient.sign())


def test_a_group_may_have_a_rate_of_its_own():
    model, x, y = problem()
    before = model.weight.detach().clone(), model.bias.detach().clone()
    groups = [{"params": [model.weight], "lr": 0.0}, {"params": [model.bias]}]
    FusedAdamW(groups, 0.1).step((model(x) - y).square().mean())
    assert torch.equal(model.weight, before[0])
    # The first step of Adam moves every entry by the rate, whatever its gradient.
    torch.testing.assert_close((model.bias - before[1]).abs(), torch.full((2,), 0.1).double())


def test_a_parameter_that_the_loss_does_not_reach_stays():
    model, x, _ = problem()
    before = model.bias.detach().clone()
    FusedAdamW(model.parameters(), 0.1).step((x @ model.weight.T).square().mean())
    assert torch.equal(model.bias, before)


@pytest.mark.no_shape_checks
def test_refuses_nothing_to_train():
    with pytest.raises(ValueError, match="parameters: expected at least one"):
        FusedAdamW([], 0.1)


def test_warm_cosine_rises_then_falls_to_nearly_nothing():
    shares = [warm_cosine(t, 100, 10) for t in range(100)]
    assert shares[0] == pytest.approx(0.1) and max(shares) == shares[9]
    assert all(a > b for a, b in zip(shares[9:], shares[10:], strict=False)) and shares[-1] < 0.001
