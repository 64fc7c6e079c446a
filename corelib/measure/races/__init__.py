"""The registered races: what ``make bench`` runs.

A race is a function ``(quick: bool) -> rows``; a module in this folder registers it::

    from corelib.measure import peer, register, rows, sweep

    @register("attention-lse", "causal attention with its log-sum-exp")
    def attention_lse(quick):
        lengths = (256, 512, 1024, 2048, 4096) if not quick else (128, 256)
        result = sweep(lengths, contestants)          # length -> {"corelib": …, "torch": …}
        yield from rows(result, what="forward", shape="B1 H8 D64 float32")

``quick`` asks for sizes that take a second or two together. A peer that is not installed takes
part as `Missing`, so that the table says so.
"""

from __future__ import annotations

import dataclasses
import importlib
import pkgutil
from collections.abc import Callable, Iterable, Iterator
from numbers import Real
from typing import Any

from ..hardware import this_machine
from ..race import Missing, Race
from ..scaling import Exponent, Sweep


@dataclasses.dataclass(frozen=True)
class Row:
    """One contestant at one shape.

    ``ratio``: its time over corelib's (above 1: corelib is faster); ``exponent``: of its time
    over the lengths of a sweep; ``bandwidth_share`` and ``gemm_share``: of what `this_machine`
    reached in its self-test; ``note``: why a contestant could not run.
    """

    what: str
    shape: str
    contestant: str
    seconds: float | None = None
    ratio: float | None = None
    exponent: Exponent | None = None
    bandwidth_share: float | None = None
    gemm_share: float | None = None
    note: str = ""


@dataclasses.dataclass(frozen=True)
class Registered:
    """A race with its name and one line on what it is about."""

    name: str
    title: str
    run: Callable[[bool], Iterable[Row]]


_REGISTRY: dict[str, Registered] = {}


def register(name: str, title: str) -> Callable[[Callable], Callable]:
    """Decorate a function ``(quick) -> rows`` to make it a race of ``make bench``.

    Raises:
        ValueError: another function already has that name.
    """

    def decorate(run: Callable) -> Callable:
        known = _REGISTRY.get(name)
        if known is not None and known.run.__qualname__ != run.__qualname__:
            raise ValueError(f"there is already a race called {name!r}")
        _REGISTRY[name] = Registered(name, title, run)
        return run

    return decorate


def registered() -> dict[str, Registered]:
    """Every race, by name, after loading the modules of this folder."""
    for module in sorted(found.name for found in pkgutil.iter_modules(__path__)):
        importlib.import_module(f"{__name__}.{module}")
    return dict(sorted(_REGISTRY.items()))


def peer(module: str) -> Any:
    """The module of that name, or `Missing` when it is not installed (see the peers extra)."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        return Missing(f"not installed ({error})")


def rows(
    result: Race | Sweep,
    *,
    what: str,
    shape: str = "",
    corelib: str = "corelib",
    traffic: Real | Callable[[int], Real] | None = None,
    flops: Real | Callable[[int], Real] | None = None,
    dtype: str = "float32",
) -> Iterator[Row]:
    """Turn a race, or a sweep (a row per length and contestant), into rows.

    Args:
        what: what is computed.
        shape: sizes and dtype; a sweep adds its length as ``L…``.
        corelib: the name of our contestant, which ratios refer to.
        traffic: bytes that the operation has to move (least possible), for the bandwidth share;
            over a sweep a function of the length.
        flops: operations that it has to do, likewise.
        dtype: of the matrix products, for the GEMM share.
    """
    if isinstance(result, Race):
        yield from _rows(result, what, shape, corelib, traffic, flops, dtype, {})
        return
    for length, single in zip(result.lengths, result.races, strict=True):
        counts = [count(length) if callable(count) else count for count in (traffic, flops)]
        sized = f"{shape} L{length}".strip()
        last = result.exponents if length == max(result.lengths) else {}
        yield from _rows(single, what, sized, corelib, *counts, dtype, last)


def _rows(single, what, shape, corelib, traffic, flops, dtype, exponents) -> Iterator[Row]:
    ours = single.medians.get(corelib)
    spec = this_machine() if traffic or flops else None
    for name, seconds in single.medians.items():
        yield Row(
            what=what,
            shape=shape,
            contestant=name,
            seconds=seconds,
            ratio=seconds / ours if ours else None,
            exponent=exponents.get(name),
            bandwidth_share=traffic / seconds / spec.bandwidth if traffic else None,
            gemm_share=flops / seconds / spec.peak(dtype) if flops else None,
        )
    for name, reason in single.missing.items():
        yield Row(what=what, shape=shape, contestant=name, note=reason)
