"""Keys as a product of two thin matrices: factored before RoPE, rebuilt token by token with it.

    unrotated key of token j in head g  ~=  left[j] @ right[g]        rank R, left for all heads
    key_j                                =  RoPE(left[j] @ right[g], j)

Rotated keys have no low rank: RoPE turns each token's pairs by another angle, and a matrix of rank
one comes out with almost as many directions as it has channels. Hence the order.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from corelib.primitives import rope_half_split
from corelib.primitives.gather_decode import take_rows


class KeyFactors(NamedTuple):
    """``left[b, j] @ right[b, g]`` is the unrotated key of token ``j`` in head ``g``."""

    left: Float[Tensor, "B S R"]
    right: Float[Tensor, "B G R D"]


def factor_keys(keys: Float[Tensor, "B G S D"], rank: int) -> KeyFactors:
    """The best factors of that rank of unrotated keys, all heads of a token side by side.

    A rank above that of the matrix's shape is lowered to it.
    """
    if rank < 1:
        raise ValueError(f"rank: expected at least 1, got {rank}")
    G, D = keys.shape[1], keys.shape[3]
    wide = torch.promote_types(keys.dtype, torch.float32)
    matrix = keys.transpose(1, 2).flatten(2).to(wide)
    u, s, vt = torch.linalg.svd(matrix, full_matrices=False)
    right = (s[:, :rank, None] * vt[:, :rank]).unflatten(2, (G, D)).transpose(1, 2)
    return KeyFactors(u[:, :, :rank].to(keys.dtype).contiguous(), right.to(keys.dtype).contiguous())


def rebuild_keys(
    factors: KeyFactors, positions: Int[Tensor, "B G n"], frequencies: Float[Tensor, " pairs"]
) -> Float[Tensor, "B G n D"]:
    """The rotated keys of these tokens: gather, multiply, RoPE. -1 gives zeros.

    On a GPU this is the fused kernel ``corelib.kernels.low_rank_keys``.
    """
    left, right = factors
    if left.is_cuda:
        from corelib.kernels.low_rank_keys import low_rank_keys

        return low_rank_keys(left, right, positions, frequencies)
    absent = positions < 0
    places = positions.clamp(min=0)
    rows = take_rows(left[:, None], places)
    keys = rope_half_split(rows @ right, places, frequencies)
    return keys.masked_fill(absent[..., None], 0.0)
