"""Adapters for Hugging Face transformers (the optional extra ``hf``).

>>> from corelib import hf
>>> hf.register("window", window_attention)             # an attention function of ours or yours
>>> model.set_attn_implementation("corelib:window")     # in any model with attention interfaces
>>> lm = hf.LanguageModel(model)                        # `corelib.contracts.LanguageModel`
>>> cache = hf.ModelCache(DenseCache(), model)          # any cache of ours as a transformers Cache
>>> hf.to_transformers(zoo.load("text_lm"))             # our decoder as a Llama or Qwen2
"""

from __future__ import annotations

import importlib

_HOMES = {
    "LanguageModel": "language_model",
    "ModelCache": "cache",
    "register": "attention",
    "to_transformers": "export",
}
__all__ = sorted(_HOMES)


def __getattr__(name: str):
    if name in _HOMES:
        return getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)
    raise AttributeError(f"module 'corelib.hf' has no attribute {name!r}")


def __dir__():
    return __all__
