"""Our attention functions as attention implementations of transformers.

transformers asks two tables for an implementation: one for the function, one for the mask that the
function is given. A function registered in the first table alone receives no mask, and a padded
batch is then silently wrong; `register` fills both. The mask asked for is the two-dimensional one
that FlashAttention gets, ``(B, S)`` with True for real tokens: rows of a batch are then attended
without their padding, so that a method needs to know nothing about padding.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from ._transformers import transformers

PREFIX = "corelib:"


def register(name: str, attention: Callable[..., Tensor]) -> str:
    """Make ``attention`` selectable as ``model.set_attn_implementation("corelib:" + name)``.

    Args:
        name: such as ``"minference"``; registering a name again replaces it.
        attention: keeps `corelib.contracts.AttentionFn`. One that also takes ``layer`` is told the
            number of the layer, one that takes ``window`` serves sliding-window models.

    Returns:
        The full name.
    """
    if not name or "/" in name or "|" in name:
        raise ValueError(f"name: expected a word without '/' and '|', got {name!r}")
    from transformers.masking_utils import flash_attention_mask

    package = transformers()
    package.AttentionInterface.register(PREFIX + name, _forward(attention))
    package.AttentionMaskInterface.register(PREFIX + name, flash_attention_mask)
    return PREFIX + name


def _forward(attention: Callable[..., Tensor]) -> Callable:
    """``attention`` with the signature that transformers calls."""
    takes = inspect.signature(attention).parameters

    def forward(
        module, query, key, value, attention_mask=None, scaling=None, dropout=0.0, **options
    ):
        if dropout:
            raise ValueError(f"dropout: expected 0, got {dropout}; corelib's attention has none")
        if options.get("softcap") is not None:
            raise ValueError("softcap: expected None; corelib's attention does not cap its scores")
        pads = left_pads(attention_mask, query.shape[2])
        cache = getattr(key, "corelib_cache", None)
        if cache is not None:  # the keys stand in a cache of ours: let it attend
            cache.set_pads(pads)
            return cache.attend(module.layer_idx, query, scale=scaling).transpose(1, 2), None
        own = {"causal": bool(options.get("is_causal", getattr(module, "is_causal", True)))}
        own |= {"scale": scaling}
        own |= {"layer": module.layer_idx} if "layer" in takes else {}
        window = options.get("sliding_window")
        if window is not None and "window" in takes:
            own["window"] = window
        elif window is not None and window < key.shape[2]:
            raise ValueError(f"sliding_window: this attention takes no window, got {window}")
        return _without_pads(attention, query, key, value, pads, own).transpose(1, 2), None

    return forward


def left_pads(mask: Tensor | None, queries: int) -> Tensor | None:
    """How many keys each row ignores at its start, ``(B,)``, from the ``(B, S)`` mask.

    Padding behind the last real token is allowed where all tokens are also queries: later keys are
    hidden from earlier queries anyway, and what padding asks for does not matter.
    """
    if mask is None:
        return None
    if mask.dim() != 2:
        raise ValueError(f"attention_mask: expected (B, S), got shape {tuple(mask.shape)}")
    real = mask.bool()
    pads = real.int().argmax(-1)
    last = mask.shape[1] - real.flip(-1).int().argmax(-1)
    if bool((real.sum(-1) != last - pads).any()):
        raise ValueError("attention_mask: expected one run of real tokens in each row, got gaps")
    if bool((last < mask.shape[1]).any()) and queries != mask.shape[1]:
        raise ValueError("attention_mask: expected padding on the left when decoding with a cache")
    return pads if bool(pads.any()) else None


def _without_pads(attention, q, k, v, pads: Tensor | None, own: dict) -> Tensor:
    """``attention`` on each group of rows that are equally padded; padding's rows become zero."""
    if pads is None:
        return attention(q, k, v, **own)
    out = q.new_zeros(*q.shape[:3], v.shape[-1])
    for rows, pad in _equal(pads):
        n = min(q.shape[2], k.shape[2] - pad)
        parts = q[rows, :, q.shape[2] - n :], k[rows, :, pad:], v[rows, :, pad:]
        out[rows, :, q.shape[2] - n :] = attention(*parts, **own)
    return out


def _equal(pads: Tensor) -> Iterator[tuple[Tensor, int]]:
    for pad in pads.unique().tolist():
        yield torch.nonzero(pads == pad)[:, 0], pad
