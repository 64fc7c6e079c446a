"""Exact attention with its log-sum-exp: the primitive that most of the lab stands on.

    s_ij  = scale * q_i . k_j                    for the keys j that query i may see
    lse_i = log sum_j exp(s_ij)
    out_i = sum_j exp(s_ij - lse_i) * v_j

* ``attention`` is the one to use: on a CPU it takes PyTorch's blocked (flash) kernel and never
  holds an ``L x S`` matrix, forward or backward, and a window costs ``O(L * window)``; on a GPU it
  takes the Triton kernel of ``corelib.kernels.flash_attention``.
* ``attention_reference`` has the same signature and writes the three lines above out, densely.

Which keys a query sees. Queries align with the last keys: query ``i`` has position
``p = i + S - L``. ``causal`` hides the keys after ``p``. ``window=w`` leaves the keys with
``p - w < j <= p`` (causal) or ``|p - j| < w`` (not causal). ``sinks=n`` keeps the first ``n`` keys
visible in addition to the window, still subject to causality. A query that may see nothing gives
zeros, and ``-inf`` as its ``lse``.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from ._checks import check_attention
from .cpu_attention import cpu_attention

OutAndLse = tuple[Float[Tensor, "B H L V"], Float[Tensor, "B H L"]]


def attention(
    q: Float[Tensor, "B H L D"],
    k: Float[Tensor, "B G S D"],
    v: Float[Tensor, "B G S V"],
    *,
    causal: bool,
    window: int | None = None,
    sinks: int = 0,
    scale: float | None = None,
    return_lse: bool = False,
) -> Float[Tensor, "B H L V"] | OutAndLse:
    """Exact attention; ``(out, lse)`` with ``return_lse=True``.

    ``scale=None`` means ``D ** -0.5``. Query head ``h`` reads key head ``h // (H // G)``. ``lse``
    holds natural logarithms, in float32 for half-precision inputs and in their dtype otherwise.
    Gradients flow through ``out`` and through ``lse``.

    Raises ``ValueError`` or ``TypeError`` for shapes, dtypes or options that do not fit.
    """
    check_attention(q, k, v, window, sinks, scale)
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    options = dict(causal=causal, window=window, sinks=sinks, scale=scale)
    if q.is_cuda:
        from corelib.kernels.flash_attention import flash_attention

        return flash_attention(q, k, v, **options, return_lse=return_lse)
    if q.device.type != "cpu":
        raise ValueError(f"q: expected a tensor on a CPU or CUDA device, got {q.device}")
    out, lse = cpu_attention(q, k, v, **options)
    return (out, lse) if return_lse else out


def attention_reference(
    q: Float[Tensor, "B H L D"],
    k: Float[Tensor, "B G S D"],
    v: Float[Tensor, "B G S V"],
    *,
    causal: bool,
    window: int | None = None,
    sinks: int = 0,
    scale: float | None = None,
    return_lse: bool = False,
) -> Float[Tensor, "B H L V"] | OutAndLse:
    """``attention`` written out with the whole ``L x S`` matrix: slow, and obviously right."""
    check_attention(q, k, v, window, sinks, scale)
    visible = visible_keys(
        q.shape[2], k.shape[2], causal=causal, window=window, sinks=sinks, device=q.device
    )
    out, lse = masked_attention_reference(q, k, v, visible, scale=scale, return_lse=True)
    return (out, lse) if return_lse else out


def visible_keys(
    L: int,
    S: int,
    *,
    causal: bool,
    window: int | None = None,
    sinks: int = 0,
    device: torch.device | str | None = None,
) -> Bool[Tensor, "L S"]:
    """Which of ``S`` keys each of ``L`` queries sees, by the rules of `attention`."""
    p = torch.arange(L, device=device)[:, None] + S - L
    j = torch.arange(S, device=device)[None, :]
    visible = torch.ones(L, S, dtype=torch.bool, device=device)
    if window is not None:
        visible &= ((p - j).abs() < window) | (j < sinks)
    if causal:
        visible &= j <= p
    return visible


def masked_attention_reference(
    q: Float[Tensor, "B H L D"],
    k: Float[Tensor, "B G S D"],
    v: Float[Tensor, "B G S V"],
    visible: Bool[Tensor, "*#broadcast L S"],
    *,
    scale: float | None = None,
    return_lse: bool = False,
) -> Float[Tensor, "B H L V"] | OutAndLse:
    """Dense attention under any boolean mask that broadcasts to ``(B, H, L, S)``.

    Half-precision inputs are computed in float32 and the output is rounded once.
    """
    check_attention(q, k, v, None, 0, scale)
    wide = torch.promote_types(q.dtype, torch.float32)
    heads_per_group = q.shape[1] // k.shape[1]
    keys = k.to(wide).repeat_interleave(heads_per_group, dim=1)
    values = v.to(wide).repeat_interleave(heads_per_group, dim=1)
    scores = q.to(wide) @ keys.transpose(-1, -2) * (q.shape[-1] ** -0.5 if scale is None else scale)

    visible = visible.expand(scores.shape)
    seen = visible.any(dim=-1)
    scores = scores.masked_fill(~visible, -torch.inf)
    # A row that sees nothing would give log(0) and NaN gradients: it is computed on zeros.
    lse = torch.logsumexp(scores.masked_fill(~seen[..., None], 0.0), dim=-1)
    lse = lse.masked_fill(~seen, -torch.inf)
    weights = torch.exp(scores - lse.masked_fill(~seen, 0.0)[..., None])
    out = (weights @ values).to(q.dtype)
    return (out, lse) if return_lse else out
