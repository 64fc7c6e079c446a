"""Checks that anyone can run on their own layer or attention function.

`conformance` holds a layer to the sequence-mixer contract of `corelib.contracts`,
`causality_probe` shows which inputs each output depends on, `assert_same` compares results with the
largest difference in the message, and `mutants` (from the kernel gates) breaks a kernel's source in
many small ways to see whether its tests notice.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["assert_same", "causality_probe", "conformance", "mutants"]  # noqa: F822


def __getattr__(name: str):
    if name == "mutants":
        from corelib.kernels.gates import mutants

        return mutants
    raise AttributeError(f"module 'corelib.testing' has no attribute {name!r}")


def assert_same(
    got: Any, want: Any, *, what: str = "result", tolerance: float | None = None
) -> None:
    """Raise `AssertionError` unless the tensors (or tuples of tensors) agree, NaN being a failure.

    ``tolerance`` is relative to the largest magnitude of ``want`` (at least 1); it defaults to
    1e-10 in float64, 2e-5 in float32 and 1e-2 in half precision.
    """
    if isinstance(want, (tuple, list)):
        assert len(got) == len(want), f"{what}: {len(got)} parts, expected {len(want)}"
        for index, (one, other) in enumerate(zip(got, want)):
            assert_same(one, other, what=f"{what}[{index}]", tolerance=tolerance)
        return
    assert got.shape == want.shape, f"{what}: shape {tuple(got.shape)}, not {tuple(want.shape)}"
    if tolerance is None:
        tolerance = {torch.float64: 1e-10, torch.float32: 2e-5}.get(got.dtype, 1e-2)
    got, want = got.detach().double(), want.detach().double()
    same_infinity = got.isinf() & (got == want)
    gap = torch.where(same_infinity, 0.0, (got - want).abs())
    scale = max(1.0, want[want.isfinite()].abs().max().item() if want.isfinite().any() else 1.0)
    worst = gap.max().item() if gap.numel() else 0.0
    # "not <=" rather than ">": a NaN must fail
    if not worst <= tolerance * scale:
        where = tuple(
            i.item() for i in torch.unravel_index(gap.nan_to_num(torch.inf).argmax(), gap.shape)
        )
        raise AssertionError(
            f"{what}: differs by {worst:.3g} at {where}, allowed {tolerance * scale:.3g} "
            f"(got {got[where]:.6g}, expected {want[where]:.6g})"
        )


def causality_probe(fn: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Which inputs each output depends on, by gradient.

    ``fn`` maps ``x (B, L, C)`` to ``(B, L, …)``. Returns ``influence (L, L)``: entry ``(i, j)`` is
    the largest gradient of a random projection of output position ``i`` with respect to input
    position ``j``. A causal ``fn`` leaves the part above the diagonal exactly zero.
    """
    if x.dim() != 3:
        raise ValueError(f"x must have shape (B, L, C), got {tuple(x.shape)}")
    x = x.detach().clone().requires_grad_()
    y = fn(x)
    if y.shape[:2] != x.shape[:2]:
        raise ValueError(f"fn must return (B, L, …) = {tuple(x.shape[:2])}, got {tuple(y.shape)}")
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(y.shape, generator=generator, dtype=torch.float64).to(y)
    influence = []
    for position in range(x.shape[1]):
        (grad,) = torch.autograd.grad(
            (y[:, position] * weight[:, position]).sum(), x, retain_graph=True, allow_unused=True
        )
        influence.append(torch.zeros_like(x) if grad is None else grad)
    return torch.stack(influence).abs().amax(dim=(1, 3))


def _check_pieces(mixer: nn.Module, x: Tensor, whole: Tensor, tolerance: float) -> None:
    """The same outputs in pieces of uneven length, and one position at a time."""
    length = x.shape[1]
    cuts = sorted({0, 1, length // 3, length // 2 + 1, length} & set(range(length + 1)))
    state, pieces = None, []
    for start, end in zip(cuts, cuts[1:]):
        y, state = mixer(x[:, start:end], state)
        pieces.append(y)
    assert_same(torch.cat(pieces, 1), whole, what=f"continuation at {cuts}", tolerance=tolerance)

    state, steps = mixer.init_state(x.shape[0]), []
    for position in range(length):
        y, state = mixer.step(x[:, position], state)
        steps.append(y)
    assert_same(torch.stack(steps, 1), whole, what="step by step", tolerance=tolerance)

    y, state = mixer(x[:, : length - 1])
    last, _ = mixer.step(x[:, -1], state)
    assert_same(last, whole[:, -1], what="a step after a parallel stretch", tolerance=tolerance)


def conformance(mixer: nn.Module, x: Tensor, *, tolerance: float = 1e-9, leak: float = 0.0) -> None:
    """Hold ``mixer`` to the sequence-mixer contract on the example ``x (B, L, C)``.

    ``x`` needs ``B >= 2`` and ``L >= 4`` and is best float64 (give the mixer the same dtype).
    Raises `AssertionError` naming the first rule that does not hold:

    1. one pass == uneven pieces with the state carried == ``step`` after ``step``, length 1 too;
    2. no output depends on a later input (zero gradient above the diagonal; with ``leak``, at
       most that share of the largest gradient: an FFT rounds into every position);
    3. a row of the batch does not depend on the other rows;
    4. the output keeps shape ``(B, L, C)``, dtype and device, and every parameter gets a gradient.
    """
    if x.dim() != 3 or x.shape[0] < 2 or x.shape[1] < 4:
        raise ValueError(f"x must have shape (B >= 2, L >= 4, C), got {tuple(x.shape)}")
    was_training = mixer.training
    mixer.eval()
    try:
        with torch.no_grad():
            whole, _ = mixer(x)
            assert whole.shape == x.shape, (
                f"output shape {tuple(whole.shape)}, not {tuple(x.shape)}"
            )
            assert whole.dtype == x.dtype, f"output dtype {whole.dtype}, not {x.dtype}"
            assert whole.device == x.device, f"output on {whole.device}, not {x.device}"
            _check_pieces(mixer, x, whole, tolerance)
            one, _ = mixer(x[:, :1])
            assert_same(one, whole[:, :1], what="length 1", tolerance=tolerance)
            for row in range(x.shape[0]):
                alone, _ = mixer(x[row : row + 1])
                assert_same(
                    alone, whole[row : row + 1], what=f"row {row} alone", tolerance=tolerance
                )
        influence = causality_probe(lambda value: mixer(value)[0], x)
        above = ~(influence.triu(1) <= leak * influence.max())  # a NaN must fail
        assert not above.any(), "output {} depends on the later input {}".format(
            *above.nonzero()[0].tolist()
        )
        y, _ = mixer(x)
        named = [(n, p) for n, p in mixer.named_parameters() if p.requires_grad]
        weight = torch.linspace(0.5, 1.5, y.numel()).to(y).view_as(y)
        grads = (
            torch.autograd.grad((y * weight).sum(), [p for _, p in named], allow_unused=True)
            if named
            else []
        )
        for (name, _), grad in zip(named, grads):
            assert grad is not None, f"parameter {name} gets no gradient"
            assert grad.isfinite().all(), f"the gradient of parameter {name} is not finite"
    finally:
        mixer.train(was_training)
