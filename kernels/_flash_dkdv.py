"""Tiles of flash attention's gradients of keys and values that differ from `_flash_table`'s.

On an H100, float32 tiles of 64 keys on eight warps gave wrong gradients where D and V differ: a
fault of the compiler (Triton 3.6 and 3.7.1), since four warps, or 32 keys, are right.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from corelib.kernels._flash_table import WIDTHS, candidates_for
from corelib.kernels._shared import Blocks, padded
from corelib.kernels.gates.specialisation import TARGETS, Specialisation

#: Where the table's tile for ``dkdv`` would spill: (bytes of a number, width, target) -> tile.
ROOMIER = {
    (2, 128, "sm_80"): Blocks(32, 64, 8, 2),
    (4, 64, "sm_90"): Blocks(16, 64, 4, 1),
    (4, 64, "sm_100"): Blocks(16, 32, 8, 1),
    (4, 256, "sm_90"): Blocks(16, 16, 8, 1),
}


def tiles_for_dkdv(target: str, dtype: torch.dtype, D: int, V: int) -> list[Blocks]:
    """The tiles to choose from for the gradients of keys and values."""
    width = next(width for width in WIDTHS if padded(max(D, V)) <= width)
    roomier = ROOMIER.get((dtype.itemsize, width, target))
    return [roomier] if roomier else candidates_for("dkdv", target, dtype, D, V)


def with_own_tile(row: Specialisation) -> Specialisation:
    """A row of the table as `tiles_for_dkdv` has it launched."""
    if row.kernel != "flash_backward_dkdv":
        return row
    itemsize, width = 4 if row.signature["q"] == "*fp32" else 2, row.constexprs["BLOCK_D"]
    for target in TARGETS:
        if tile := ROOMIER.get((itemsize, width, target)):
            on = row.on(target)
            own = on.constexprs | {"BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n}
            launched = dict(num_warps=tile.num_warps, num_stages=tile.num_stages)
            if target == TARGETS[0]:
                row = replace(row, constexprs=row.constexprs | own, **launched)
            else:
                changed = {target: {"constexprs": own, **launched}}
                row = replace(row, overrides={**row.overrides, **changed})
    return row
