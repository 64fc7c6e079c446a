"""What the layers of S4 (arXiv 2111.00396) and S4D (arXiv 2206.11893) hand on, and what they take.

A convolution gives the outputs of a stretch without the state behind it. `S4State` is a promise of
that state, kept when somebody goes on from there; training drops it without working it out.
"""

from __future__ import annotations

from collections.abc import Callable

from jaxtyping import Complex
from torch import Tensor, nn
from torch.utils._pytree import register_pytree_node

from .dplr import StepForm


class S4State:
    """The state ``x (B, C, N/2)``, complex, behind a stretch of inputs.

    Worked out when first asked for: it costs about twice the outputs, and training drops it.
    ``form`` is what steps need; it belongs to the parameters at the time it was made.
    """

    def __init__(self, make: Callable[[], Tensor], form: StepForm | None = None):
        self._make, self._x, self.form = make, None, form

    @property
    def x(self) -> Complex[Tensor, "B C P"]:
        if self._x is None:
            self._x, self._make = self._make(), None
        return self._x


# so that probes can count and perturb the states of S4 and S4D like any others
register_pytree_node(S4State, lambda state: ([state.x], None), lambda xs, _: S4State(lambda: xs[0]))


def check_input(x: Tensor, axes: tuple[str, ...], layer: nn.Module) -> None:
    """ValueError or TypeError unless ``x`` has ``axes`` and the layer's channels and dtype."""
    if x.dim() != len(axes) + 1 or x.shape[-1] != layer.channels:
        raise ValueError(
            f"x: expected ({', '.join(axes)}, {layer.channels}), got shape {tuple(x.shape)}"
        )
    if x.dtype != layer.log_step.dtype:
        raise TypeError(f"x: expected the layer's dtype, {layer.log_step.dtype}, got {x.dtype}")
