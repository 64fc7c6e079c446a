"""What two or more families share. Everything here needs torch only.

Masks keep their short names to themselves: ``from corelib.primitives import masks`` and then
``masks.causal() & masks.sliding_window(64)``.
"""

from . import masks
from .associative_scan import associative_scan
from .attention import (
    attention,
    attention_reference,
    masked_attention_reference,
    visible_keys,
)
from .block_scores import (
    attention_recall,
    block_density,
    grouped_block_scores,
    keep_ends,
    mass_blocks,
    pool_blocks,
    pooled_block_scores,
    reachable_blocks,
    top_blocks,
)
from .block_sparse import (
    BlockLists,
    block_sparse_attention,
    block_sparse_attention_reference,
)
from .column_sums import attention_column_sums, attention_column_sums_reference
from .diagonal_scan import block_scan, diagonal_scan, scan_reference
from .discretise import (
    bilinear,
    bilinear_diagonal,
    zero_order_hold,
    zero_order_hold_diagonal,
)
from .feature_maps import (
    symmetric_taylor_features,
    symmetric_taylor_width,
    taylor_features,
    taylor_kernel,
    taylor_width,
)
from .fft_conv import direct_conv_reference, fft_conv, gated_fft_conv, two_sided_fft_conv
from .gather_decode import gather_decode, gather_decode_reference
from .linear_recurrence import linear_recurrence
from .linear_recurrence_varlen import linear_recurrence_varlen
from .masks import Mask
from .merge import merge_partials
from .monarch import monarch_conv, monarch_factors
from .random_features import (
    gaussian_directions,
    orthogonal_directions,
    positive_features,
)
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
from .selective_scan import selective_scan, selective_scan_reference
from .short_conv import causal_short_conv
from .sliding_window import RingCache, sliding_window_attention
from .spiking_scan import spiking_scan, spiking_scan_reference
from .ssd import ssd_chunked, ssd_reference
from .toeplitz import toeplitz_fft
from .varlen import (
    cumulative_lengths,
    pack,
    restarting_positions,
    sequence_ids,
    unpack,
    varlen_attention,
    varlen_visible_keys,
)
from .vertical_slash import vertical_slash_attention, vertical_slash_attention_reference

__all__ = [
    "BlockLists",
    "Mask",
    "RingCache",
    "associative_scan",
    "attention",
    "attention_column_sums",
    "attention_column_sums_reference",
    "attention_recall",
    "attention_reference",
    "bilinear",
    "bilinear_diagonal",
    "block_density",
    "block_scan",
    "block_sparse_attention",
    "block_sparse_attention_reference",
    "causal_short_conv",
    "cumulative_lengths",
    "diagonal_scan",
    "direct_conv_reference",
    "dynamic_ntk_frequencies",
    "fft_conv",
    "gated_fft_conv",
    "gather_decode",
    "gather_decode_reference",
    "gaussian_directions",
    "grouped_block_scores",
    "half_split_to_interleaved",
    "interleaved_to_half_split",
    "keep_ends",
    "linear_frequencies",
    "linear_recurrence",
    "linear_recurrence_varlen",
    "llama3_frequencies",
    "masked_attention_reference",
    "masks",
    "mass_blocks",
    "merge_partials",
    "monarch_conv",
    "monarch_factors",
    "ntk_frequencies",
    "orthogonal_directions",
    "pack",
    "pool_blocks",
    "pooled_block_scores",
    "positive_features",
    "reachable_blocks",
    "restarting_positions",
    "rope_frequencies",
    "rope_half_split",
    "rope_interleaved",
    "scan_reference",
    "selective_scan",
    "selective_scan_reference",
    "sequence_ids",
    "sliding_window_attention",
    "spiking_scan",
    "spiking_scan_reference",
    "ssd_chunked",
    "ssd_reference",
    "symmetric_taylor_features",
    "symmetric_taylor_width",
    "taylor_features",
    "taylor_kernel",
    "taylor_width",
    "toeplitz_fft",
    "top_blocks",
    "two_sided_fft_conv",
    "unpack",
    "varlen_attention",
    "varlen_visible_keys",
    "vertical_slash_attention",
    "vertical_slash_attention_reference",
    "visible_keys",
    "yarn_attention_factor",
    "yarn_frequencies",
    "zero_order_hold",
    "zero_order_hold_diagonal",
]
