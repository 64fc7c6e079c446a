"""What a kind of model must say about itself to be trained, measured and shipped.

`train`, `release` and `zoo` know nothing of tokens or images: they ask the `Kind` that a recipe
names. A new kind is a subclass in a file of its own, listed in ``_WHERE``.
"""

from __future__ import annotations

import functools
import importlib
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from torch import Tensor, nn

if TYPE_CHECKING:
    from .recipes import Recipe, Stage

_WHERE = {
    "decoder": "text_kinds.DecoderKind",
    "encoder": "text_kinds.EncoderKind",
    "frames": "dit_kinds.FrameKind",
    "grids": "dit_kinds.GridKind",
    "masked_diffusion": "masked_diffusion.MaskedDiffusionKind",
    "recurrent": "recurrent_kind.RecurrentKind",
    "vlm": "vlm_kind.VLMKind",
}


@runtime_checkable
class Kind(Protocol):
    """One kind of model: how to build it, what it learns from, what is measured of it.

    ``config``: the dataclass of its sizes (it must survive ``dataclasses.asdict`` and JSON).
    ``data``, ``limits``: sentences of the model card. ``unit``: what the curve's ``valid`` is.
    """

    config: type
    data: str
    limits: str
    unit: str

    def build(self, config: Any, seed: int | None) -> nn.Module:
        """A new model; ``seed=None`` leaves the weights as they come (they will be loaded)."""
        ...

    def batch(self, recipe: Recipe, step: int) -> tuple[Tensor, ...]:
        """The batch of step number ``step``: it depends on the recipe and the number alone."""
        ...

    def loss(self, model: nn.Module, batch: tuple[Tensor, ...], stage: Stage) -> Tensor:
        """What is minimised, a scalar."""
        ...

    def held_out(self, model: nn.Module) -> float:
        """One number on fixed data that is not trained on, in ``unit``; smaller is better."""
        ...

    def figures(self, model: nn.Module) -> dict[str, float]:
        """What the model card reports, measured on the weights as stored."""
        ...

    def shape(self, config: Any) -> str:
        """The sizes in words, for the model card."""
        ...


@functools.cache
def find_kind(name: str) -> Kind:
    """The kind called ``name``; raises ``ValueError`` with the names there are."""
    if name not in _WHERE:
        raise ValueError(f"kind: expected one of {', '.join(sorted(_WHERE))}; got {name!r}")
    module, _, attribute = _WHERE[name].partition(".")
    return getattr(importlib.import_module(f".{module}", __package__), attribute)()


def kind_names() -> list[str]:
    """The kinds there are."""
    return sorted(_WHERE)
