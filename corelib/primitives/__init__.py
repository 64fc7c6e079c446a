"""What two or more families share. Everything here needs torch only."""

from .attention import (
    attention,
    attention_reference,
    masked_attention_reference,
    visible_keys,
)
from .merge import merge_partials

__all__ = [
    "attention",
    "attention_reference",
    "masked_attention_reference",
    "merge_partials",
    "visible_keys",
]
