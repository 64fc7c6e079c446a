"""Linear layers and convolutions through fewer channels: LED and CED of Greenformers
(arXiv 2108.10808).

    LED:  y = U (V x) + b                       V (r, n) into r channels, U (m, r) out of them
    CED:  the same for windows:  V (r, channels * window), then a convolution that is 1 wide

``r (m + n)`` parameters and multiplications a token for ``m n``. `greenformers.auto_fact` puts them
where the layers of a model were; `greenformers` has the solvers that make ``U`` and ``V``.
Oracle: the layer whose weight is ``U V``.
"""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor, nn


class LED(nn.Module):
    """``x -> second(first(x))``: a linear layer through ``r`` channels, the bias on the second.

    ``weight``, ``bias``, ``in_features`` and ``out_features`` are those of the layer that it stands
    for, for code that looks at them. ``weight`` multiplies the factors out on every look; PyTorch's
    own ``nn.TransformerEncoderLayer`` does look when it evaluates without gradients, and is then as
    slow as before (``torch.backends.mha.set_fastpath_enabled(False)`` stops that).
    """

    def __init__(
        self, U: Float[Tensor, "m r"], V: Float[Tensor, "r n"], bias: Tensor | None = None
    ):
        super().__init__()
        (self.out_features, rank), self.in_features = U.shape, V.shape[1]
        self.first = nn.Linear(self.in_features, rank, bias=False, device="meta")
        self.second = nn.Linear(rank, self.out_features, bias=bias is not None, device="meta")
        _fill(self, U, V, bias)

    @property
    def weight(self) -> Float[Tensor, "m n"]:
        return self.second.weight @ self.first.weight

    @property
    def bias(self) -> Tensor | None:
        return self.second.bias

    def forward(self, x: Float[Tensor, "*rows n"]) -> Float[Tensor, "*rows m"]:
        return self.second(self.first(x))


class CED(nn.Module):
    """A convolution through ``r`` channels: ``convolution``'s window into them, then 1 wide.

    Takes stride, padding and dilation of ``convolution``; ``V (r, channels * window)``.
    """

    def __init__(
        self,
        convolution: nn.Module,
        U: Float[Tensor, "m r"],
        V: Float[Tensor, "r n"],
        bias: Tensor | None = None,
    ):
        super().__init__()
        (m, rank), kind, old = U.shape, type(convolution), convolution
        options = dict(stride=old.stride, padding=old.padding, dilation=old.dilation)
        options |= dict(padding_mode=old.padding_mode, bias=False, device="meta")
        self.first = kind(old.in_channels, rank, old.kernel_size, **options)
        self.second = kind(rank, m, 1, bias=bias is not None, device="meta")
        _fill(self, U, V, bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x))


def _fill(unit: nn.Module, U: Tensor, V: Tensor, bias: Tensor | None) -> None:
    """Put the factors into ``unit``'s two layers."""
    for layer, factor in ((unit.first, V), (unit.second, U)):
        layer.weight = nn.Parameter(factor.reshape(layer.weight.shape).contiguous())
    if bias is not None:
        unit.second.bias = nn.Parameter(bias)
