"""How the split-KV decode kernels are launched: checks, tile sizes, workspace, specialisations.

One table serves the launcher and the offline compile gate, so that what is reported is what runs.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from corelib.kernels._flash_launch import check_inputs, with_contiguous_rows
from corelib.kernels._shared import Blocks, check_device, is_interpreted, padded, precision
from corelib.kernels.gates.specialisation import Specialisation

#: Warps a multiprocessor: the registers of every tile below leave room for eight at once.
RESIDENT_WARPS = 8

#: (bytes of a number, the wider of D and V, padded) -> tiles to choose from by their rows. Keys are
#: read 4 to 16 KiB a step with two steps under way; more rows than the last entry has take a
#: second pass over the keys.
TILES = {
    (2, 64): (Blocks(16, 64, 4, 3), Blocks(32, 64, 8, 3), Blocks(64, 64, 8, 3)),
    (2, 128): (Blocks(16, 32, 4, 3), Blocks(32, 32, 8, 3), Blocks(64, 32, 8, 3)),
    (2, 256): (Blocks(16, 32, 8, 3), Blocks(32, 32, 8, 2)),
    (4, 64): (Blocks(16, 32, 4, 3), Blocks(32, 32, 8, 3)),
    (4, 128): (Blocks(16, 16, 4, 3),),
    (4, 256): (Blocks(16, 16, 4, 3),),
}
#: The merge reads this many partials of a row at a time.
MERGED_AT_ONCE = 16
#: (outputs, tiles of the longest, programs that fill the device)
#: -> grid, places for partials in the workspace, the kernel's own sizes
Schedule = Callable[[int, int, int], tuple[tuple[int, ...], int, dict[str, int]]]


def decode(
    kernels: tuple[Any, Any],
    schedule: Schedule,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: Tensor | None,
    tile: int | None,
    scale: float | None,
    return_lse: bool,
):
    """Partials of all outputs by the first kernel, merged and normalised by the second."""
    check_inputs(q, k, v)
    check_lengths(lengths, q)
    check_count("tile", 1 if tile is None else tile)
    if torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v)):
        raise ValueError(
            "q, k, v: the decode kernels have no backward pass; call them under torch.no_grad(), "
            "or use corelib.primitives.attention"
        )
    attend, merge = kernels
    check_device("split_kv_decode", attend, q, k, v)
    (B, H, L, D), (_, G, S, V) = q.shape, v.shape
    out, lse = q.new_empty(B, H, L, V), q.new_empty(B, H, L, dtype=torch.float32)
    if 0 in (B, L, S):
        out, lse = out.zero_(), lse.fill_(-math.inf)
        return (out, lse) if return_lse else out
    if lengths is None:
        lengths = torch.full((B,), S, dtype=torch.int32, device=q.device)
    q, (k, v) = q.contiguous(), with_contiguous_rows(k, v)
    tile = default_tile(max(D, V)) if tile is None else tile
    blocks = blocks_for(H // G * L, max(D, V), q.dtype)
    row_blocks = -(-(H // G * L) // blocks.block_m)
    outputs, filling = B * G * row_blocks, resident_programs(q.device, blocks.num_warps)
    grid, slots, own = schedule(outputs, -(-S // tile), filling)
    peaks, totals = (_floats(q, slots, blocks.block_m) for _ in range(2))
    sums = _floats(q, slots, blocks.block_m, V)
    # An output's partials are neighbours: where they begin and end. Empty outputs have none.
    stretch = torch.zeros(outputs, 2, dtype=torch.int32, device=q.device)
    shape = {"GROUP": H // G, "ROW_BLOCKS": row_blocks, "V": V, "BLOCK_V": padded(V)}
    shape |= {"BLOCK_M": blocks.block_m}
    scale = D**-0.5 if scale is None else float(scale)
    with torch.cuda.device(q.device) if q.is_cuda else nullcontext():
        attend[grid](
            q, k, v, lengths, peaks, totals, sums, stretch, scale * math.log2(math.e),
            *k.stride()[:3], *v.stride()[:3], B, G, S, L, tile, **own, **shape, D=D,
            BLOCK_D=padded(D), BLOCK_N=blocks.block_n, PRECISION=precision(q.dtype),
            SLICE=slice_width(q.itemsize, max(D, V)), **_options(attend, blocks),
        )  # fmt: skip
        merge[(B * G, H // G * L)](
            peaks, totals, sums, stretch, out, lse, L, **shape, BLOCK_SLOTS=MERGED_AT_ONCE,
        )  # fmt: skip
    return (out, lse) if return_lse else out


def _floats(like: Tensor, *shape: int) -> Tensor:
    return like.new_empty(shape, dtype=torch.float32)


def _options(kernel: Any, blocks: Blocks) -> dict[str, int]:
    if is_interpreted(kernel):
        return {}
    stages = blocks.num_stages - (torch.version.hip is not None)
    return {"num_warps": blocks.num_warps, "num_stages": stages}


def blocks_for(rows: int, width: int, dtype: torch.dtype) -> Blocks:
    """The tile for ``rows`` query rows: the smallest that holds them, else the largest."""
    choices = TILES[dtype.itemsize, max(64, padded(width))]
    return next((blocks for blocks in choices if blocks.block_m >= rows), choices[-1])


def slice_width(itemsize: int, width: int) -> int:
    """0: the queries stay in registers. Very wide float32 ones are read again, 64 at a time."""
    return 64 if itemsize == 4 and padded(width) == 256 else 0


def default_tile(width: int) -> int:
    """Keys in a schedule's tile, as the paper found best: 256 for heads 64 wide, 128 for 128."""
    return max(16, 16384 // padded(width))


def resident_programs(device: torch.device, num_warps: int) -> int:
    """Programs that fill ``device``; 4 where it is no GPU, for the interpreter."""
    if device.type != "cuda":
        return 4
    processors = torch.cuda.get_device_properties(device).multi_processor_count
    return processors * RESIDENT_WARPS // num_warps


def check_count(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}: expected an int, got {type(value).__name__}")
    if value < 1:
        raise ValueError(f"{name}: expected at least 1, got {value}")


def check_lengths(lengths: Tensor | None, q: Tensor) -> None:
    if lengths is None:
        return
    if not isinstance(lengths, Tensor) or lengths.dtype not in (torch.int32, torch.int64):
        found = lengths.dtype if isinstance(lengths, Tensor) else type(lengths).__name__
        raise TypeError(f"lengths: expected a tensor of int32 or int64, got {found}")
    if lengths.shape != q.shape[:1]:
        raise ValueError(f"lengths: expected shape ({q.shape[0]},), got {tuple(lengths.shape)}")
    if lengths.device != q.device:
        raise ValueError(f"lengths: expected the device of q, {q.device}, got {lengths.device}")


def decode_bytes(
    lengths: list[int], H: int, G: int, L: int, D: int, V: int, *, partials: int, itemsize: int = 2
) -> int:
    """Bytes that decoding has to move when the outputs' keys are cut into ``partials`` pieces.

    Every key and value that is held is read once. A piece reads its queries and leaves a partial
    softmax, ``V + 2`` float32 numbers a row, which the merge reads again. Holds while the rows
    ``H / G * L`` fit one tile.
    """
    keys = sum(lengths) * G * (D + V) * itemsize
    rows = H // G * L
    pieces = partials * rows * (D * itemsize + 2 * 4 * (V + 2))
    return keys + pieces + len(lengths) * H * L * (V * itemsize + 4)


def specialisations() -> list[Specialisation]:
    """Every tile of the table under both schedules, and the merge."""
    attend = [
        _attend_specialisation(kernel, dtype, width, blocks)
        for kernel, half in (("_fixed_split_kernel", "fp16"), ("_stream_k_kernel", "bf16"))
        for (itemsize, width), choices in TILES.items()
        for dtype in ("fp32" if itemsize == 4 else half,)
        for blocks in choices
    ]
    return attend + [_merge_specialisation(dtype, width) for dtype, width in _MERGED]


_MERGED = (("fp16", 64), ("bf16", 128), ("fp32", 256))


def _attend_specialisation(kernel: str, dtype: str, width: int, blocks: Blocks) -> Specialisation:
    one = blocks.block_m == 16  # a single query, the usual case: Triton makes L = 1 a constant
    stream = kernel == "_stream_k_kernel"
    strides = [f"stride_{name}" for name in ("kb", "kg", "ks", "vb", "vg", "vs")]
    sizes = ["B", "G", "S", "tile", "programs" if stream else "splits"] + ([] if one else ["L"])
    signature = dict.fromkeys(("q", "k", "v"), f"*{dtype}")
    signature |= dict.fromkeys(("peaks", "totals", "sums"), "*fp32")
    signature |= {"lengths": "*i32", "slots": "*i32", "scale_log2": "fp32"}
    signature |= dict.fromkeys(strides + sizes, "i32")
    constexprs = {
        "GROUP": 4, "ROW_BLOCKS": 1, "D": width, "V": width, "BLOCK_D": width, "BLOCK_V": width,
        "BLOCK_M": blocks.block_m, "BLOCK_N": blocks.block_n,
        "SLICE": slice_width(4 if dtype == "fp32" else 2, width),
        "PRECISION": "tf32x3" if dtype == "fp32" else "ieee",
    } | ({"BLOCK_B": 64} if stream else {}) | ({"L": 1} if one else {})  # fmt: skip
    return Specialisation(
        kernel=kernel,
        label=f"{dtype} D={width} rows={blocks.block_m}",
        direction="forward",
        signature=signature,
        constexprs=constexprs,
        num_warps=blocks.num_warps,
        num_stages=blocks.num_stages,
        divisible=tuple(strides),
        overrides={
            "gfx942": {"num_stages": blocks.num_stages - 1, "constexprs": {"PRECISION": "ieee"}}
        },
    )


def _merge_specialisation(dtype: str, width: int) -> Specialisation:
    signature = dict.fromkeys(("peaks", "totals", "sums", "lse"), "*fp32")
    signature |= {"slots": "*i32", "out": f"*{dtype}"}
    constexprs = {"L": 1, "GROUP": 4, "ROW_BLOCKS": 1, "V": width, "BLOCK_V": width}
    constexprs |= {"BLOCK_M": 16, "BLOCK_SLOTS": MERGED_AT_ONCE}
    return Specialisation(
        "_merge_kernel", f"{dtype} V={width}", "forward", signature, constexprs, 4, 3
    )
