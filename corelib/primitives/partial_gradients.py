"""Gradients of attention block by block, from the finished log-sum-exp.

When the keys of a row come in blocks, as they do around a ring of machines, every block's
probabilities follow from the *finished* ``lse`` of the row alone, so that its share of the
gradients needs no other block (FlashAttention, arXiv 2205.14135, appendix B.2):

    p_ij  = exp(scale * q_i . k_j - lse_i)
    ds_ij = p_ij (d_out_i . v_j - delta_i)           delta_i = d_out_i . out_i - d_lse_i
    dq_i  = scale sum_j ds_ij k_j     dk_j = scale sum_i ds_ij q_i     dv_j = sum_i p_ij d_out_i

``dq`` is summed over the blocks of keys, ``dk`` and ``dv`` over the blocks of queries.
"""

from __future__ import annotations

from numbers import Real

import torch
from jaxtyping import Float
from torch import Tensor

from ._checks import check_attention
from ._cpu_plan import plan
from .cpu_attention import _backward

Gradients = tuple[Float[Tensor, "B H L D"], Float[Tensor, "B G S D"], Float[Tensor, "B G S V"]]


def partial_gradients(
    q: Float[Tensor, "B H L D"],
    k: Float[Tensor, "B G S D"],
    v: Float[Tensor, "B G S V"],
    d_out: Float[Tensor, "B H L V"],
    delta: Float[Tensor, "B H L"],
    lse: Float[Tensor, "B H L"],
    *,
    causal: bool,
    scale: Real | None = None,
) -> Gradients:
    """``(dq, dk, dv)`` of one block of queries and one of keys, in the dtype of ``q``.

    Args:
        q, k, v: the two blocks; with ``causal`` the last query aligns with the last key.
        d_out: gradient of the finished output.
        delta: ``(d_out * out).sum(-1) - d_lse`` with the finished output.
        lse: of the finished rows, over *all* their keys; every row sees some key.
    """
    check_attention(q, k, v, None, 0, scale)
    if not (q.numel() and k.numel()):
        return torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    d_out = d_out.to(q.dtype)
    nothing = torch.zeros_like(d_out)  # delta says what the finished output would be needed for
    if q.is_cuda:
        from corelib.kernels.flash_attention_backward import flash_attention_backward

        where = dict(causal=causal, q_start=k.shape[2] - q.shape[2], key_start=0, scale=scale)
        return flash_attention_backward(d_out, -delta, q, k, v, nothing, lse, **where)
    groups = plan(q.shape[2], k.shape[2], causal=causal, window=None, sinks=0)
    return _backward(d_out, -delta, q, k, v, nothing, lse, groups, scale)
