"""What two or more families share. Everything here needs torch only.

Masks keep their short names to themselves: ``from corelib.primitives import masks`` and then
``masks.causal() & masks.sliding_window(64)``.
"""

from . import masks
from .attention import (
    attention,
    attention_reference,
    masked_attention_reference,
    visible_keys,
)
from .discretise import (
    bilinear,
    bilinear_diagonal,
    zero_order_hold,
    zero_order_hold_diagonal,
)
from .fft_conv import direct_conv_reference, fft_conv, two_sided_fft_conv
from .gather_decode import gather_decode, gather_decode_reference
from .linear_recurrence import linear_recurrence
from .linear_recurrence_varlen import linear_recurrence_varlen
from .masks import Mask
from .merge import merge_partials
from .rope import (
    dynamic_ntk_frequencies,
    half_split_to_interleaved,
    interleaved_to_half_split,
    linear_frequencies,
    llama3_frequencies,
    ntk_frequencies,
    rope_frequencies,
    rope_half_split,
    rope_interleaved,
    yarn_attention_factor,
    yarn_frequencies,
)
from .varlen import (
    cumulative_lengths,
    pack,
    restarting_positions,
    sequence_ids,
    unpack,
    varlen_attention,
    varlen_visible_keys,
)

__all__ = [
    "Mask",
    "attention",
    "attention_reference",
    "bilinear",
    "bilinear_diagonal",
    "cumulative_lengths",
    "direct_conv_reference",
    "dynamic_ntk_frequencies",
    "fft_conv",
    "gather_decode",
    "gather_decode_reference",
    "half_split_to_interleaved",
    "interleaved_to_half_split",
    "linear_frequencies",
    "linear_recurrence",
    "linear_recurrence_varlen",
    "llama3_frequencies",
    "masked_attention_reference",
    "masks",
    "merge_partials",
    "ntk_frequencies",
    "pack",
    "restarting_positions",
    "rope_frequencies",
    "rope_half_split",
    "rope_interleaved",
    "sequence_ids",
    "two_sided_fft_conv",
    "unpack",
    "varlen_attention",
    "varlen_visible_keys",
    "visible_keys",
    "yarn_attention_factor",
    "yarn_frequencies",
    "zero_order_hold",
    "zero_order_hold_diagonal",
]
