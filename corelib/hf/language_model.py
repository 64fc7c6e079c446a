"""Any causal language model of transformers, by our contract: ``(ids, cache=None) -> logits``."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from ..primitives import attention
from .attention import PREFIX, register
from .cache import ModelCache


class LanguageModel(nn.Module):
    """A causal language model of transformers that decoders, caches and probes of ours can use.

    With a cache of ours, ``ids`` continue what it holds; rows that were realigned (``cache.pads``)
    count their positions from their own first token. The model keeps its attention implementation
    if that is one of `register`, otherwise it is set to exact attention.
    """

    def __init__(self, model: nn.Module):
        super().__init__()
        if not model.config._attn_implementation.startswith(PREFIX):
            model.set_attn_implementation(register("exact", attention))
        self.model = model

    @property
    def dtype(self) -> torch.dtype:
        return self.model.dtype

    def forward(self, ids: Int[Tensor, "B L"], cache=None) -> Float[Tensor, "B L vocab"]:
        if ids.dim() != 2:
            raise ValueError(f"ids: expected (B, L), got {tuple(ids.shape)}")
        if cache is None:
            return self.model(ids, use_cache=False).logits
        past = ModelCache(cache, self.model)
        slots = torch.arange(len(cache) + ids.shape[1], device=ids.device)
        options = {}
        pads = getattr(cache, "pads", None)
        if pads is not None:
            options["attention_mask"] = slots[None] >= pads[:, None]
            places = slots[None, len(cache) :] - pads[:, None]
            options["position_ids"] = places.clamp(min=0)
        return self.model(ids, past_key_values=past, use_cache=True, **options).logits
