"""A KV cache of ours as a transformers ``Cache``.

In transformers a cache stores keys and values and the attention function reads them all. Ours
(`corelib.contracts.KVCache`) attend themselves: they may hold less than all, or hold it elsewhere.
So `ModelCache.update` hands the new keys on with a note of the cache they went to, and an
attention implementation of ours finds the note and asks that cache. Any other implementation would
see the new keys alone, so it is refused.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .attention import PREFIX

try:
    from transformers import Cache
except ImportError:  # a package without the extra still imports; _transformers() says what to do
    Cache = object

from ._transformers import transformers


class ModelCache(Cache):
    """``model(ids, past_key_values=ModelCache(DenseCache(), model))``.

    Args:
        inner: a `corelib.contracts.KVCache`. Left-padded batches need one with ``pads``.
        model: the model that will use it; its attention must be one of `corelib.hf.register`.
    """

    def __init__(self, inner: Any, model: Any):
        transformers()
        super().__init__(layers=[])
        self.inner, self.config = inner, model.config

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args, **kwargs):
        """Append to ``inner``; the keys handed on carry the cache as ``corelib_cache``."""
        chosen = self.config._attn_implementation
        if not chosen.startswith(PREFIX):
            raise ValueError(
                f"model: expected an attention implementation of corelib.hf.register, got "
                f"{chosen!r}, which would read the new keys alone"
            )
        self.inner.append(layer_idx, key_states, value_states)
        noted = key_states.view_as(key_states)
        noted.corelib_cache = self
        return noted, value_states

    def attend(self, layer: int, q: Tensor, *, scale: float | None) -> Tensor:
        return self.inner.attend(layer, q, scale=scale)

    def set_pads(self, pads: Tensor | None) -> None:
        """How many slots are empty before each row, ``(B,)``."""
        if pads is not None and not hasattr(self.inner, "pads"):
            name = type(self.inner).__name__
            raise ValueError(f"attention_mask: {name} holds no padded rows")
        if hasattr(self.inner, "pads"):
            self.inner.pads = pads

    # What transformers asks a cache.

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return len(self.inner)

    def get_mask_sizes(self, cache_position: Tensor, layer_idx: int) -> tuple[int, int]:
        return len(self.inner) + len(cache_position), 0

    def get_max_cache_shape(self, layer_idx: int = 0) -> int:
        return -1  # it grows

    def crop(self, max_length: int) -> None:
        """Keep ``max_length`` positions; a negative number drops as many."""
        self.inner.crop(max_length if max_length >= 0 else len(self.inner) + max_length)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.inner.gather_rows(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        self.inner.gather_rows(indices)

    @property
    def is_initialized(self) -> bool:
        return len(self.inner) > 0

    def __len__(self) -> int:
        return len(self.inner)
