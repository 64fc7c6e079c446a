"""The general shelf in miniature: remedies that make any Transformer faster or lighter.

They leave attention as it is, and compose. Exact ones give the gradients of plain training:

* `checkpointed`: keep one activation per segment, compute the others again when they are needed.
  With ``N`` layers in ``sqrt(N)`` segments about ``2 sqrt(N)`` activations live, for one more
  forward pass (Chen et al., arXiv 1604.06174).
* `Reversible`: ``y1 = x1 + f(x2)``, ``y2 = x2 + g(y1)``. Inputs follow from outputs, so that *no*
  activation is kept, whatever the depth (RevNet, arXiv 1707.04585; Reformer, 2001.04451).
* `micro_batches`: a batch in pieces, one after another, their gradients added.

Others give up something for size or speed: `SharedLayers` (ALBERT, arXiv 1909.11942),
`magnitude_prune` (Han et al., 1506.02626), `distill_loss` (Hinton et al., 1503.02531).

Not for layers that draw random numbers: `checkpointed` and `Reversible` run them a second time and
would draw others. Nor for batch statistics, which see a whole batch or a piece of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from math import isqrt
from numbers import Real
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from corelib.primitives import attention

from .shared import check_counts


class AttentionPart(nn.Module):
    """Normalise, attend (causally), project: the first half of a block, without its residual."""

    def __init__(self, C: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norm, self.into = nn.LayerNorm(C), nn.Linear(C, 3 * C)
        self.out = nn.Linear(C, C)

    def forward(self, x: Float[Tensor, "B L C"]) -> Float[Tensor, "B L C"]:
        q, k, v = self.into(self.norm(x)).unflatten(-1, (3, self.heads, -1)).unbind(2)
        mixed = attention(*(part.transpose(1, 2) for part in (q, k, v)), causal=True)
        return self.out(mixed.transpose(1, 2).flatten(2))


class FeedForwardPart(nn.Sequential):
    """Normalise, widen fourfold, GELU, narrow: the second half, without its residual."""

    def __init__(self, C: int):
        super().__init__(nn.LayerNorm(C), nn.Linear(C, 4 * C), nn.GELU(), nn.Linear(4 * C, C))


class Block(nn.Module):
    """An ordinary Transformer block: ``x + attention``, then ``x + feed-forward``."""

    def __init__(self, C: int, heads: int):
        super().__init__()
        self.mix, self.feed = AttentionPart(C, heads), FeedForwardPart(C)

    def forward(self, x: Float[Tensor, "B L C"]) -> Float[Tensor, "B L C"]:
        x = x + self.mix(x)
        return x + self.feed(x)


def checkpointed(
    layers: Iterable[nn.Module], x: Float[Tensor, "*any"], segments: int | None = None
) -> Float[Tensor, "*any"]:
    """``layers`` one after another, keeping the activations at ``segments`` places only.

    ``segments=None`` means the square root of their number. Gradients are those without it.
    """
    layers = list(layers)
    segments = max(1, isqrt(len(layers))) if segments is None else segments
    check_counts(segments=segments)
    if segments > max(1, len(layers)):
        raise ValueError(f"segments: expected at most {len(layers)} layers, got {segments}")
    cuts = [s * len(layers) // segments for s in range(segments + 1)]
    for start, stop in zip(cuts, cuts[1:], strict=False):
        part = nn.Sequential(*layers[start:stop])
        x = _Recomputed.apply(x, part, *part.parameters())
    return x


class _Recomputed(torch.autograd.Function):
    """What `torch.utils.checkpoint` does, without its first call's import of a compiler."""

    @staticmethod
    def forward(ctx, x, part, *parameters):
        ctx.part, ctx.parameters = part, parameters
        ctx.save_for_backward(x)
        return part(x)  # autograd is off in here: nothing inside is kept

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        grads: dict[Tensor, Tensor] = {}
        _, dx = _again(ctx.part, ctx.saved_tensors[0], dy, grads)
        return dx, None, *[grads.get(p) for p in ctx.parameters]


def _again(part: nn.Module, x: Tensor, dy: Tensor, grads: dict) -> tuple[Tensor, Tensor]:
    """``part(x)`` once more, and the gradient of ``x``; adds those of the parameters."""
    own = [p for p in part.parameters() if p.requires_grad]
    leaf = x.detach().requires_grad_()
    with torch.enable_grad():
        out = part(leaf)
        # as a number: given gradients make torch import sympy
        found = torch.autograd.grad((out * dy).sum(), [leaf, *own])
    for parameter, grad in zip(own, found[1:], strict=True):
        grads[parameter] = grads[parameter] + grad if parameter in grads else grad
    return out.detach(), found[0]


class Reversible(nn.Module):
    """Reversible blocks in a row: ``x (..., 2 C) -> y (..., 2 C)``, keeping only ``y``.

    Args:
        pairs: for each block ``(f, g)``, modules on ``(..., C)``: the attention part and the
            feed-forward part of an ordinary block.
    """

    def __init__(self, pairs: Sequence[tuple[nn.Module, nn.Module]]):
        super().__init__()
        self.pairs = nn.ModuleList(nn.ModuleList(pair) for pair in pairs)

    def forward(self, x: Float[Tensor, "*rows W"]) -> Float[Tensor, "*rows W"]:
        if x.shape[-1] % 2:
            raise ValueError(f"x: expected an even width, two halves, got {x.shape[-1]}")
        return _Reversible.apply(x, self, *self.parameters())

    def plain(self, x: Float[Tensor, "*rows W"]) -> Float[Tensor, "*rows W"]:
        """The same function, differentiated by keeping everything."""
        one, two = x.chunk(2, -1)
        for f, g in self.pairs:
            one = one + f(two)
            two = two + g(one)
        return torch.cat([one, two], -1)

    def inverse(self, y: Float[Tensor, "*rows W"]) -> Float[Tensor, "*rows W"]:
        """The input that gave ``y``, up to rounding."""
        one, two = y.chunk(2, -1)
        for f, g in reversed(self.pairs):
            two = two - g(one)
            one = one - f(two)
        return torch.cat([one, two], -1)


class _Reversible(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, stack, *parameters):
        y = stack.plain(x)  # autograd is off in here: nothing is kept
        ctx.stack, ctx.parameters = stack, parameters
        ctx.save_for_backward(y)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        (one, two), (d_one, d_two) = ctx.saved_tensors[0].chunk(2, -1), dy.chunk(2, -1)
        grads: dict[Tensor, Tensor] = {}
        for f, g in reversed(ctx.stack.pairs):
            added, more = _again(g, one, d_two, grads)
            two, d_one = two - added, d_one + more
            added, more = _again(f, two, d_one, grads)
            one, d_two = one - added, d_two + more
        return torch.cat([d_one, d_two], -1), None, *[grads.get(p) for p in ctx.parameters]


def micro_batches(
    loss_of: Callable[..., Tensor], tensors: Sequence[Tensor], pieces: int
) -> Float[Tensor, ""]:
    """Go backward from a batch's mean loss piece by piece: one piece's activations at a time.

    Args:
        loss_of: ``loss_of(*piece) -> mean loss`` over the rows of its piece.
        tensors: the batch; all have the same number of rows, at least ``pieces``.
        pieces: how many; they may differ by a row.

    Gradients are added to ``.grad``; the loss of the whole batch is returned.
    """
    check_counts(pieces=pieces)
    rows = tensors[0].shape[0]
    if pieces > rows:
        raise ValueError(f"pieces: expected at most the {rows} rows of the batch, got {pieces}")
    total = torch.zeros(())
    for piece in zip(*(x.tensor_split(pieces) for x in tensors), strict=True):
        loss = loss_of(*piece) * (len(piece[0]) / rows)
        loss.backward()
        total = total + loss.detach()
    return total


class SharedLayers(nn.Module):
    """One layer's parameters at every depth: ``times`` layers in the size of one."""

    def __init__(self, layer: nn.Module, times: int):
        super().__init__()
        check_counts(times=times)
        self.layer, self.times = layer, times

    def forward(self, x: Float[Tensor, "*any"]) -> Float[Tensor, "*any"]:
        for _ in range(self.times):
            x = self.layer(x)
        return x


def magnitude_prune(model: nn.Module, share: Real) -> dict[str, Any]:
    """Set the smallest ``share`` of all weights (matrices only, counted together) to zero.

    Returns name -> mask of what was kept, to hold the zeros during further training. Speed comes
    only with storage or hardware that skips zeros.
    """
    if not 0 <= share <= 1:
        raise ValueError(f"share: expected 0 to 1, got {share}")
    matrices = {name: p for name, p in model.named_parameters() if p.dim() > 1}
    sizes = torch.cat([p.detach().abs().flatten() for p in matrices.values()])
    keep = torch.ones_like(sizes, dtype=torch.bool)
    keep[sizes.argsort(stable=True)[: round(share * len(sizes))]] = False
    masks = {}
    parts = keep.split([p.numel() for p in matrices.values()])
    for (name, p), part in zip(matrices.items(), parts, strict=True):
        masks[name] = part.view_as(p)
        with torch.no_grad():
            p.mul_(masks[name])
    return masks


def distill_loss(
    student: Float[Tensor, "*rows vocab"],
    teacher: Float[Tensor, "*rows vocab"],
    labels: Int[Tensor, "*rows"] | None = None,
    *,
    temperature: Real = 2.0,
    alpha: Real = 1.0,
) -> Float[Tensor, ""]:
    """Learn from a larger model's probabilities: ``alpha soft + (1 - alpha) hard``, row means.

    ``soft`` is the cross-entropy to ``softmax(teacher / temperature)``, times ``temperature ** 2``
    so that its gradients keep their size; ``hard`` that to ``labels``, needed where ``alpha < 1``.
    The teacher gets no gradient.
    """
    if not temperature > 0:
        raise ValueError(f"temperature: expected above 0, got {temperature}")
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha: expected 0 to 1, got {alpha}")
    if labels is None and alpha < 1:
        raise ValueError(f"labels: expected class numbers for alpha {alpha} below 1, got None")
    target = (teacher.detach() / temperature).softmax(-1)
    soft = -(target * (student / temperature).log_softmax(-1)).sum(-1).mean() * temperature**2
    if labels is None:
        return soft
    hard = F.cross_entropy(student.flatten(0, -2), labels.flatten())
    return alpha * soft + (1 - alpha) * hard
