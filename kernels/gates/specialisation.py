"""What a kernel module declares: the exact specialisations of its kernels that it ships.

A kernel compiles once per combination of argument types and compile-time constants. The offline
compile gate needs these combinations named, and the launcher should use the same table, so that
what is reported is what runs. A kernel module lists them:

>>> SPECIALISATIONS = [
...     Specialisation(
...         kernel="_add_kernel",                       # the @triton.jit function in this module
...         label="fp32",                               # what differs from the other rows
...         direction="forward",
...         signature={"x": "*fp32", "y": "*fp32", "out": "*fp32", "n": "i32"},
...         constexprs={"BLOCK": 1024},
...     )
... ]

This file imports without Triton.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

#: The targets that every shipped specialisation is compiled for.
TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")

_OVERRIDABLE = {"num_warps", "num_stages", "constexprs"}


@dataclass(frozen=True)
class Specialisation:
    """One combination of types and constants of one kernel.

    Attributes:
        kernel: name of the ``@triton.jit`` function in the declaring module.
        label: what tells this row from the kernel's others, such as ``"fp16 D=64 causal"``.
        direction: ``"forward"`` or ``"backward"``.
        signature: argument name -> Triton type (``"*fp16"``, ``"i32"``, ``"i64"``, ``"fp32"``).
            Order is free, and constants are left out: they stand in ``constexprs``.
        constexprs: argument name -> value, for ``tl.constexpr`` arguments and for arguments that
            the launcher always specialises (a stride of 1, an optional pointer that is ``None``).
        num_warps, num_stages: as in the launch.
        divisible: integer arguments that are multiples of 16 (strides, mostly). Pointers always
            count as 16-byte aligned, as PyTorch's allocations are.
        overrides: target -> what differs there, any of ``num_warps``, ``num_stages`` and
            ``constexprs`` (merged into the others), as in ``{"gfx942": {"num_warps": 8}}``.
    """

    kernel: str
    label: str
    direction: str
    signature: Mapping[str, str]
    constexprs: Mapping[str, Any] = field(default_factory=dict)
    num_warps: int = 4
    num_stages: int = 2
    divisible: tuple[str, ...] = ()
    overrides: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def __post_init__(self):
        if self.direction not in ("forward", "backward"):
            raise ValueError(f"direction: expected forward or backward, got {self.direction!r}")
        both = set(self.signature) & set(self.constexprs)
        if both:
            raise ValueError(f"constexprs: also in signature: {sorted(both)} ({self.label})")
        if unknown := set(self.divisible) - set(self.signature):
            raise ValueError(f"divisible: not in signature: {sorted(unknown)} ({self.label})")
        for target, change in self.overrides.items():
            if target not in TARGETS:
                raise ValueError(f"overrides: expected one of {TARGETS}, got {target!r}")
            if unknown := set(change) - _OVERRIDABLE:
                raise ValueError(f"overrides: expected {_OVERRIDABLE}, got {sorted(unknown)}")

    def on(self, target: str) -> Specialisation:
        """This specialisation with the overrides of ``target`` applied."""
        change = dict(self.overrides.get(target, {}))
        constexprs = {**self.constexprs, **change.pop("constexprs", {})}
        return replace(self, constexprs=constexprs, overrides={}, **change)
