"""Adaptive layer normalisation: LayerNorm whose scale, shift and gate depend on the input.

    adaln(x, shift, scale)                       = norm(x) (1 + scale) + shift
    gated_adaln(x, branch, gate, shift, scale)   = residual, norm(residual) (1 + scale) + shift
                                        residual = x + gate branch

``norm`` is LayerNorm without weights. The condition's ``shift``, ``scale`` and ``gate`` are
``(B, 1, C)``, one for all tokens (DiT, arXiv 2212.09748, section 3.2), or ``(B, L, C)``, one for
each token. `gated_adaln` is the seam between two branches of such a block: the attention's output
enters the residual stream, and what the MLP reads leaves it. Written out it is four passes over
the tokens, fused it is one (``corelib.kernels.adaln``).

``gate = 0`` leaves ``x`` as it is, bit for bit (adaLN-Zero): ``x + 0 branch``, for finite branches.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from ._checks import check_same_kind

EPS = 1e-6

Modulation = Float[Tensor, "B Lm C"]  # Lm is 1 or L


def adaln_reference(
    x: Float[Tensor, "B L C"], shift: Modulation, scale: Modulation, *, eps: float = EPS
) -> Float[Tensor, "B L C"]:
    """`adaln` by its definition, in the dtype of ``x``."""
    check_adaln(eps, x, shift=shift, scale=scale)
    centred = x - x.mean(-1, keepdim=True)
    variance = (centred**2).mean(-1, keepdim=True)
    return centred / torch.sqrt(variance + eps) * (1 + scale) + shift


def gated_adaln_reference(
    x: Float[Tensor, "B L C"],
    branch: Float[Tensor, "B L C"],
    gate: Modulation,
    shift: Modulation,
    scale: Modulation,
    *,
    eps: float = EPS,
) -> tuple[Float[Tensor, "B L C"], Float[Tensor, "B L C"]]:
    """`gated_adaln` by its definition."""
    check_adaln(eps, x, branch, gate=gate, shift=shift, scale=scale)
    residual = x + gate * branch
    return residual, adaln_reference(residual, shift, scale, eps=eps)


def adaln(
    x: Float[Tensor, "B L C"], shift: Modulation, scale: Modulation, *, eps: float = EPS
) -> Float[Tensor, "B L C"]:
    """LayerNorm of each token, scaled by ``1 + scale`` and shifted.

    Args:
        x: the tokens.
        shift, scale: ``(B, 1, C)`` for all tokens of a request or ``(B, L, C)`` for each.
        eps: added to the variance.

    Differentiable in all three. Raises ValueError or TypeError for shapes or dtypes that do not
    fit.
    """
    if x.is_cuda:
        from corelib.kernels import adaln as kernel

        return kernel.adaln(x, shift, scale, eps=eps)
    check_adaln(eps, x, shift=shift, scale=scale)
    return torch.addcmul(shift, _norm(x, eps), 1 + scale)


def gated_adaln(
    x: Float[Tensor, "B L C"],
    branch: Float[Tensor, "B L C"],
    gate: Modulation,
    shift: Modulation,
    scale: Modulation,
    *,
    eps: float = EPS,
) -> tuple[Float[Tensor, "B L C"], Float[Tensor, "B L C"]]:
    """``x + gate branch``, and its `adaln`; one pass over the tokens on a GPU.

    Args:
        x: the residual stream.
        branch: what a branch (attention, MLP) gave.
        gate, shift, scale: all ``(B, 1, C)`` or all ``(B, L, C)``.
        eps: added to the variance.

    Returns:
        the new residual stream, and what the next branch reads.
    """
    if x.is_cuda:
        from corelib.kernels import adaln as kernel

        return kernel.gated_adaln(x, branch, gate, shift, scale, eps=eps)
    check_adaln(eps, x, branch, gate=gate, shift=shift, scale=scale)
    residual = torch.addcmul(x, gate, branch)
    return residual, torch.addcmul(shift, _norm(residual, eps), 1 + scale)


def _norm(x: Tensor, eps: float) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], eps=eps)


def check_adaln(eps: float, x: Tensor, branch: Tensor | None = None, **modulation: Tensor) -> None:
    """Raise unless ``branch`` has the shape of ``x`` and the modulation's tensors fit it."""
    named = {"x": x} | ({} if branch is None else {"branch": branch}) | modulation
    check_same_kind(**named)
    if x.dim() != 3 or x.shape[2] == 0:
        raise ValueError(f"x: expected (batch, length, width), got {tuple(x.shape)}")
    if branch is not None and branch.shape != x.shape:
        raise ValueError(f"branch: expected {tuple(x.shape)}, as x, got {tuple(branch.shape)}")
    B, L, C = x.shape
    lengths = {m.shape[1] if m.dim() == 3 else None for m in modulation.values()}
    for name, m in modulation.items():
        if m.shape not in ((B, 1, C), (B, L, C)):
            raise ValueError(f"{name}: expected {(B, 1, C)} or {(B, L, C)}, got {tuple(m.shape)}")
    if len(lengths) > 1:
        raise ValueError(f"{', '.join(modulation)}: expected one length, got {sorted(lengths)}")
    if not eps > 0:
        raise ValueError(f"eps: expected more than 0, got {eps}")
