"""The general shelf: exact remedies give plain training's gradients, the others what they say."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from corelib.foundations.efficiency import (
    AttentionPart,
    Block,
    FeedForwardPart,
    Reversible,
    SharedLayers,
    checkpointed,
    distill_loss,
    magnitude_prune,
    micro_batches,
)
from corelib.measure import peak_memory

pytestmark = pytest.mark.method("faster_lighter")
EXACT = dict(atol=1e-10, rtol=1e-10)
C, HEADS = 8, 2


def blocks(n, C=C):
    torch.manual_seed(0)
    return nn.ModuleList(Block(C, HEADS) for _ in range(n)).double()


def gradients(run, x, module):
    """Output, gradient of the input, gradients of the parameters."""
    module.zero_grad()
    leaf = x.clone().requires_grad_()
    y = run(leaf)
    y.square().sum().backward()
    return y.detach(), leaf.grad, [p.grad.clone() for p in module.parameters()]


def in_turn(layers):
    def run(x):
        for layer in layers:
            x = layer(x)
        return x

    return run


@pytest.mark.parametrize("segments", [None, 1, 2, 5])
def test_checkpointing_gives_the_same_gradients(segments):
    layers, x = blocks(5), torch.randn(2, 6, C, dtype=torch.float64)
    got = gradients(lambda x: checkpointed(layers, x, segments), x, layers)
    torch.testing.assert_close(got, gradients(in_turn(layers), x, layers), **EXACT)


def reversible(n, C=C):
    torch.manual_seed(0)
    return Reversible([(AttentionPart(C, HEADS), FeedForwardPart(C)) for _ in range(n)]).double()


@pytest.mark.parametrize("n", [0, 1, 4])
def test_reversible_inverts_and_gives_the_same_gradients(n):
    stack, x = reversible(n), torch.randn(2, 6, 2 * C, dtype=torch.float64)
    torch.testing.assert_close(stack.inverse(stack(x)), x, **EXACT)
    got, wanted = gradients(stack, x, stack), gradients(stack.plain, x, stack)
    torch.testing.assert_close(got, wanted, **EXACT)
    if n:
        one, two = x.chunk(2, -1)
        f, g = stack.pairs[0]
        y = one + f(two), two + g(one + f(two))
        first = Reversible([(f, g)])(x)
        torch.testing.assert_close(first, torch.cat(y, -1), **EXACT)


def test_reversible_with_frozen_and_shared_parameters():
    stack, x = reversible(3), torch.randn(1, 4, 2 * C, dtype=torch.float64)
    stack.pairs[2] = stack.pairs[0]
    for p in stack.pairs[1].parameters():
        p.requires_grad_(False)
    wanted = torch.autograd.grad(stack.plain(x).square().sum(), list(stack.pairs[0].parameters()))
    stack(x).square().sum().backward()
    got = [p.grad for p in stack.pairs[0].parameters()]
    torch.testing.assert_close(got, list(wanted), **EXACT)
    assert all(p.grad is None for p in stack.pairs[1].parameters())


def test_memory_over_depth():
    """Bytes that training holds: plain grows with the depth, checkpoints slower, reversible not."""
    x = torch.randn(4, 64, 2 * C, dtype=torch.float64, requires_grad=True)

    def growth(make):
        used = []
        for n in (4, 16):
            run = make(n)
            for p in run.parameters() if isinstance(run, nn.Module) else ():
                p.requires_grad_(False)  # their gradients grow with the depth in every case
            used.append(peak_memory(lambda run=run: run(x).sum().backward()))
        return used[1] / used[0]

    def plain(n):
        layers = blocks(n, 2 * C).requires_grad_(False)
        return lambda x: in_turn(layers)(x)

    def by_root(n):
        layers = blocks(n, 2 * C).requires_grad_(False)
        return lambda x: checkpointed(layers, x)

    assert growth(plain) > 3
    assert growth(by_root) < 2.5
    assert growth(reversible) < 1.3


@pytest.mark.parametrize("pieces", [1, 2, 3, 7])
def test_micro_batches_give_the_batchs_gradients(pieces):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 5)).double()
    x, y = torch.randn(7, 3, dtype=torch.float64), torch.arange(7) % 5

    def loss_of(x, y):
        return F.cross_entropy(model(x), y)

    whole = loss_of(x, y)
    wanted = torch.autograd.grad(whole, list(model.parameters()))
    got = micro_batches(loss_of, [x, y], pieces)
    torch.testing.assert_close(got.double(), whole.detach(), **EXACT)
    torch.testing.assert_close([p.grad for p in model.parameters()], list(wanted), **EXACT)


def test_shared_layers_are_one_layer_many_times():
    layer = Block(C, HEADS).double()
    shared, x = SharedLayers(layer, 3), torch.randn(1, 4, C, dtype=torch.float64)
    torch.testing.assert_close(shared(x), layer(layer(layer(x))), **EXACT)
    assert sum(p.numel() for p in shared.parameters()) == sum(p.numel() for p in layer.parameters())


@pytest.mark.parametrize("share", [0, 0.3, 1])
def test_pruning_takes_the_smallest(share):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 6), nn.Linear(6, 4))
    before = [p.detach().clone() for p in model.parameters()]
    masks = magnitude_prune(model, share)
    weights = torch.cat([before[0].flatten(), before[2].flatten()]).abs()
    kept = torch.cat([masks["0.weight"].flatten(), masks["1.weight"].flatten()])
    assert int((~kept).sum()) == round(share * len(weights))
    if 0 < share < 1:
        assert weights[~kept].max() <= weights[kept].min()
    for p, old in zip(model.parameters(), before, strict=True):
        same = p.detach()[p != 0]
        torch.testing.assert_close(same, old[p.detach() != 0], atol=0, rtol=0)
    torch.testing.assert_close(model[0].bias.detach(), before[1], atol=0, rtol=0)


def test_distillation_from_certainty_is_cross_entropy():
    generator = torch.Generator().manual_seed(0)
    student = torch.randn(2, 3, 5, generator=generator, dtype=torch.float64, requires_grad=True)
    labels = torch.tensor([[0, 1, 4], [2, 2, 3]])
    certain = torch.zeros(2, 3, 5, dtype=torch.float64).scatter_(-1, labels[..., None], 1e4)
    wanted = F.cross_entropy(student.flatten(0, 1), labels.flatten())
    torch.testing.assert_close(distill_loss(student, certain, temperature=1), wanted, **EXACT)
    torch.testing.assert_close(distill_loss(student, certain, labels, alpha=0), wanted, **EXACT)


def test_distillation_is_least_at_the_teacher_and_mixes_linearly():
    generator = torch.Generator().manual_seed(0)
    teacher, student = torch.randn(2, 4, 5, generator=generator, dtype=torch.float64)
    labels = torch.tensor([0, 1, 2, 3])
    at = teacher.clone().requires_grad_()
    distill_loss(at, teacher, temperature=3).backward()
    torch.testing.assert_close(at.grad, torch.zeros_like(teacher), atol=1e-12, rtol=0)
    kl = F.kl_div((student / 3).log_softmax(-1), (teacher / 3).softmax(-1), reduction="batchmean")
    gap = distill_loss(student, teacher, temperature=3) - distill_loss(
        teacher, teacher, temperature=3
    )
    torch.testing.assert_close(gap, 9 * kl, **EXACT)
    ends = [distill_loss(student, teacher, labels, alpha=a) for a in (0, 1)]
    half = distill_loss(student, teacher, labels, alpha=0.25)
    torch.testing.assert_close(half, 0.75 * ends[0] + 0.25 * ends[1], **EXACT)


@pytest.mark.no_shape_checks
def test_errors_name_what_was_expected():
    x = torch.randn(2, 3)
    with pytest.raises(ValueError, match="segments: expected at most 2 layers, got 3"):
        checkpointed([nn.Tanh(), nn.Tanh()], x, 3)
    with pytest.raises(ValueError, match="x: expected an even width"):
        Reversible([])(x)
    with pytest.raises(ValueError, match="pieces: expected at most the 2 rows"):
        micro_batches(lambda x: x.sum(), [x], 3)
    with pytest.raises(ValueError, match="times: expected at least 1"):
        SharedLayers(nn.Tanh(), 0)
    with pytest.raises(ValueError, match="share: expected 0 to 1, got 2"):
        magnitude_prune(nn.Linear(2, 2), 2)
    with pytest.raises(ValueError, match="temperature: expected above 0"):
        distill_loss(x, x, temperature=0)
    with pytest.raises(ValueError, match="labels: expected class numbers"):
        distill_loss(x, x, alpha=0.5)
    with pytest.raises(ValueError, match="alpha: expected 0 to 1"):
        distill_loss(x, x, alpha=2)
