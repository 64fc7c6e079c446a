"""The short causal convolution in front of recurrent mixers: each channel, its last few inputs.

    y[c, t] = bias[c] + sum_i weight[c, i] x[c, t - W + 1 + i]

It shows a recurrence the neighbourhood that its state blurs (Mamba, arXiv 2312.00752, section 3.4;
earlier H3, arXiv 2212.14052). Linear in L; the state is the last ``W - 1`` inputs.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from ._checks import check_same_kind


def causal_short_conv(
    x: Float[Tensor, "B C L"],
    weight: Float[Tensor, "C W"],
    bias: Float[Tensor, " C"] | None = None,
    *,
    state: Float[Tensor, "B C inputs"] | None = None,
    return_state: bool = False,
) -> Float[Tensor, "B C L"] | tuple[Float[Tensor, "B C L"], Float[Tensor, "B C inputs"]]:
    """The convolution of this module over ``L`` steps; ``L = 1`` is a decoding step.

    Args:
        weight: of the last W inputs, oldest first.
        state: the ``W - 1`` inputs before ``x``, what an earlier call returned; None: zeros.
        return_state: also return the last ``W - 1`` inputs.

    Raises:
        ValueError, TypeError: shapes, dtypes or devices that do not fit together.
    """
    optional = {n: y for n, y in (("bias", bias), ("state", state)) if y is not None}
    check_same_kind(x=x, weight=weight, **optional)
    if x.dim() != 3:
        raise ValueError(f"x: expected 3 axes (B, C, L), got shape {tuple(x.shape)}")
    C = x.shape[1]
    if weight.dim() != 2 or len(weight) != C or not weight.shape[1]:
        raise ValueError(f"weight: expected shape ({C}, W), got {tuple(weight.shape)}")
    before = weight.shape[1] - 1
    for name, wanted in (("bias", (C,)), ("state", (len(x), C, before))):
        if name in optional and tuple(optional[name].shape) != wanted:
            got = tuple(optional[name].shape)
            raise ValueError(f"{name}: expected shape {wanted}, got {got}")
    padded = F.pad(x, (before, 0)) if state is None else torch.cat([state, x], 2)
    y = F.conv1d(padded, weight[:, None], bias, groups=C) if x.shape[2] else torch.zeros_like(x)
    return (y, padded[:, :, padded.shape[2] - before :]) if return_state else y
