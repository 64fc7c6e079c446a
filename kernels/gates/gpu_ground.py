"""What the races of ``make gpu-check`` stand on: a device, contestants, and that they agree.

A race is a function of a `Ground` (a device, and whether sizes are small enough for an interpreter)
and returns a `Contest`. The contestants must agree before the clock starts, so that every race is
also a test of its kernel at a real size, in the type that it is meant for. ``bytes`` and ``flops``
are the least that has to be moved and multiplied: with the device's own measured copy bandwidth and
matrix rate they give the *floor*, a modelled time. What mostly reads, or finds its inputs in a
cache, can come out a little below it: a copy writes half of what it moves.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from corelib.measure import Missing
from corelib.measure.agreement import agreement


class Contest(NamedTuple):
    """Who runs (the kernel first), what must move and be multiplied, and how far they may differ.

    ``tolerance`` is relative to the largest value, as in `corelib.measure.race`.
    """

    contestants: dict[str, Callable[[], Any] | Missing]
    bytes: int = 0
    flops: float = 0.0
    tolerance: float = 1e-4


HALF = 3e-2  # a tolerance for bfloat16 results, relative to the largest


class Ground:
    """Where a race is held: makes its inputs, and compiles where compiling makes sense."""

    def __init__(self, device: str, small: bool = False):
        self.device, self.small = device, small
        self._generator = torch.Generator(device).manual_seed(0)

    @property
    def half(self) -> torch.dtype:
        """bfloat16, which the interpreter does not know."""
        return torch.float32 if self.small else torch.bfloat16

    def size(self, real: int, small: int) -> int:
        return small if self.small else real

    def randn(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(shape, generator=self._generator, device=self.device).to(dtype)

    def rand(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.rand(shape, generator=self._generator, device=self.device).to(dtype)

    def integers(self, high: int, *shape: int) -> Tensor:
        return torch.randint(high, shape, generator=self._generator, device=self.device)

    def compiled(self, function: Callable) -> Callable:
        """``torch.compile`` of it, fixed shapes; on small ground the function itself."""
        return function if self.small else torch.compile(function, dynamic=False)

    def replayed(self, call: Callable[[], Any]) -> Callable[[], Any]:
        """The call as a CUDA graph, as decoding loops run it: launching then costs next to nothing.

        On small ground the call itself.
        """
        if self.small:
            return call
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # compile and tune before the capture
            call(), call()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            result = call()

        def replay() -> Any:
            graph.replay()
            return result

        return replay

    def only_real(self, make: Callable[[], Callable[[], Any]]) -> Callable[[], Any] | Missing:
        """A contestant that runs on a GPU alone; `Missing` where its package is."""
        if self.small:
            return Missing("runs on a GPU alone")
        try:
            return make()
        except ImportError as problem:
            return Missing(str(problem))


def agreeing(contest: Contest) -> dict[str, Callable[[], Any]]:
    """Run everyone once and return those that can run, the kernel first.

    A peer that fails here is left out with a word; the kernel, or one that disagrees, may not.

    Raises:
        ValueError: a contestant computes something else than the kernel.
    """
    runners, reference = {}, None
    for name, call in contest.contestants.items():
        if isinstance(call, Missing):
            continue
        try:
            result = call()
            torch.cuda.synchronize() if torch.cuda.is_available() else None
        except Exception as problem:
            if reference is None or isinstance(problem, torch.OutOfMemoryError):
                raise
            print(f"  {name} is left out: {type(problem).__name__}: {str(problem)[:200]}")
            continue
        if reference is None:
            reference = result
        else:
            agreement(result, reference, contest.tolerance, name)
        runners[name] = call
    return runners


def both_ways(
    function: Callable[..., Any], leaves: Sequence[Tensor]
) -> Callable[[], tuple[Tensor, ...]]:
    """Forward and backward: the gradients of all ``leaves`` for a fixed gradient of the output."""
    leaves = [x.detach().clone().requires_grad_() for x in leaves]
    wanted: list[Tensor] = []

    def call() -> tuple[Tensor, ...]:
        out = function(*leaves)
        if not wanted:
            generator = torch.Generator(out.device).manual_seed(1)
            grad = torch.randn(out.shape, generator=generator, device=out.device)
            wanted.append(grad.to(out.dtype))
        return torch.autograd.grad(out, leaves, wanted[0])

    return call


def contestants_of(
    functions: dict[str, Any], leaves: Sequence[Tensor], backward: bool
) -> dict[str, Any]:
    """The functions on ``leaves``: forward, or forward and `both_ways`."""

    def contestant(function):
        if isinstance(function, Missing):
            return function
        return both_ways(function, leaves) if backward else lambda: function(*leaves)

    return {name: contestant(function) for name, function in functions.items()}


def both_titles(race: Callable[..., Contest], title: str, *options: Any) -> dict[str, Callable]:
    """A race forward, and with its backward, under two titles."""
    return {
        title: lambda on: race(on, *options, False),
        f"{title}, with backward": lambda on: race(on, *options, True),
    }
