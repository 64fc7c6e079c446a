"""Block sizes of flash attention's kernels, and the specialisations that follow from them.

Chosen so that nothing spills, shared memory fits and every dot uses matrix instructions on all four
targets; the launcher and the offline compile gate read the same table. sm_80's entries also fit the
99 KiB of its smaller relatives; gfx942 has 64 KiB and keeps masks in scalar registers, so it takes
narrower blocks of keys. Where an entry names two, the first launch times both.
"""

from __future__ import annotations

import torch

from corelib.kernels._shared import Blocks, padded, precision
from corelib.kernels.gates.specialisation import TARGETS, Specialisation

#: (pass, bytes of a number, wider of D and V) -> for sm_80, sm_90, sm_100 and gfx942: queries and
#: keys per block, warps, pipeline stages. Wide float32 is read in slices, see `slice_width`.
BLOCKS = {
    ("forward", 2, 64): [
        ((64, 64, 4, 3), (128, 64, 8, 3), (128, 64, 4, 3), (128, 32, 4, 2)),
        ((64, 64, 4, 2), (64, 64, 4, 3), (64, 64, 4, 2), (64, 32, 4, 2)),
    ],
    ("forward", 2, 128): [
        ((128, 64, 8, 3), (128, 128, 8, 3), (128, 64, 8, 3), (128, 32, 8, 2)),
        ((64, 64, 4, 2), (64, 64, 4, 2), (64, 64, 4, 2), (64, 32, 4, 2)),
    ],
    ("forward", 2, 256): [((64, 32, 8, 2), (128, 32, 8, 2), (128, 32, 8, 2), (64, 32, 8, 2))],
    ("forward", 4, 64): [((64, 16, 4, 2), (64, 32, 4, 2), (64, 32, 8, 2), (64, 32, 4, 2))],
    ("forward", 4, 128): [((64, 32, 8, 1), (32, 16, 4, 1), (64, 32, 8, 1), (64, 32, 4, 1))],
    ("forward", 4, 256): [((64, 16, 8, 1), (32, 32, 8, 1), (32, 16, 8, 1), (64, 32, 8, 1))],
    ("dq", 2, 64): [((64, 32, 4, 2), (64, 64, 4, 3), (64, 64, 4, 2), (64, 32, 4, 2))],
    ("dq", 2, 128): [((64, 64, 8, 2), (128, 64, 8, 2), (64, 64, 8, 2), (64, 32, 4, 2))],
    ("dq", 2, 256): [((64, 32, 8, 1), (64, 32, 8, 2), (64, 32, 8, 2), (64, 16, 8, 2))],
    ("dq", 4, 64): [((32, 32, 4, 2), (64, 32, 4, 1), (64, 32, 8, 2), (64, 32, 4, 1))],
    ("dq", 4, 128): [((32, 16, 8, 1), (32, 16, 4, 1), (64, 32, 8, 1), (64, 32, 4, 1))],
    ("dq", 4, 256): [((32, 16, 8, 1), (32, 16, 8, 1), (32, 16, 8, 1), (32, 32, 8, 1))],
    ("dkdv", 2, 64): [((32, 32, 4, 2), (64, 64, 4, 3), (32, 64, 4, 2), (16, 64, 4, 1))],
    ("dkdv", 2, 128): [((32, 32, 8, 2), (32, 128, 8, 2), (32, 32, 8, 2), (16, 64, 4, 1))],
    ("dkdv", 2, 256): [((32, 32, 8, 1), (32, 32, 8, 1), (32, 32, 8, 1), (16, 32, 8, 1))],
    ("dkdv", 4, 64): [((32, 32, 8, 1), (32, 32, 8, 1), (32, 32, 8, 1), (16, 64, 4, 1))],
    ("dkdv", 4, 128): [((16, 16, 8, 1), (16, 16, 8, 1), (16, 16, 8, 1), (32, 32, 4, 1))],
    ("dkdv", 4, 256): [((16, 16, 8, 1), (16, 32, 8, 1), (16, 32, 8, 1), (16, 32, 8, 1))],
}
WIDTHS = (64, 128, 256)

_KERNELS = {"forward": "flash_forward", "dq": "flash_backward_dq", "dkdv": "flash_backward_dkdv"}
_STRIDED = {
    "forward": ("q", "k", "v", "out"),
    "dq": ("q", "k", "v", "out", "d_out", "dq"),
    "dkdv": ("q", "k", "v", "d_out", "dk", "dv"),
}
_FLOAT32 = {"forward": ("lse",), "dq": ("lse", "d_lse", "delta_out"), "dkdv": ("lse", "delta")}
_CARRIED = ("row_max", "acc_in", "max_in", "sum_in")
_MASKS = {
    "causal": dict(CAUSAL=True, WINDOW=False),
    "causal window": dict(CAUSAL=True, WINDOW=True),
    "two-sided window": dict(CAUSAL=False, WINDOW=True),
}


def candidates_for(which: str, target: str, dtype: torch.dtype, D: int, V: int) -> list[Blocks]:
    """The blocks to choose from for one pass (``"forward"``, ``"dq"`` or ``"dkdv"``)."""
    width = next(width for width in WIDTHS if padded(max(D, V)) <= width)
    rows = BLOCKS[which, dtype.itemsize, width]
    return [Blocks(*row[TARGETS.index(target)]) for row in rows]


def slice_width(dtype: torch.dtype, D: int, V: int) -> int:
    """0: tiles of queries and keys are held whole. Wide float32 ones are read in slices of 32."""
    return 32 if dtype == torch.float32 and padded(max(D, V)) > 64 else 0


def specialisations(*passes: str) -> list[Specialisation]:
    """What is shipped of these passes: every entry of the table, on the mask that needs most.

    The other variants are compiled once, for bfloat16 and a width of 128: they use no more.
    """
    shipped = []
    for which, itemsize, width in BLOCKS:
        if which not in passes:
            continue
        dtype = torch.float32 if itemsize == 4 else torch.bfloat16
        for index in range(len(BLOCKS[which, itemsize, width])):
            shipped.append(_specialisation(which, dtype, width, index, "causal window"))
            if itemsize == 2 and width <= 128:
                shipped.append(_specialisation(which, dtype, width, index, "causal"))
        if (itemsize, width) == (2, 128):
            for extra in ("two-sided window", "packed", "carry"):
                if extra != "carry" or which == "forward":
                    shipped.append(_specialisation(which, torch.bfloat16, width, 0, extra))
            shipped.append(_specialisation(which, torch.float16, width, 0, "causal window"))
    return shipped


def _specialisation(
    which: str, dtype: torch.dtype, width: int, index: int, variant: str
) -> Specialisation:
    """One row: an entry of the table on one mask, or packed, or with a carried state."""
    name = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}[dtype]
    carry, packed = variant == "carry", variant == "packed"
    strides = [f"{x}_{axis}" for x in _STRIDED[which] for axis in "bhl"]
    scalars = ["lse_h", "heads_per_group", "L", "S", "shift", "window", "sinks"]
    signature = {x: f"*{name}" for x in _STRIDED[which]}
    signature |= dict.fromkeys(_FLOAT32[which], "*fp32") | dict.fromkeys(strides + scalars, "i32")
    signature |= {"scale_log2": "fp32"}
    absent = {}
    if which == "forward":
        absent |= dict.fromkeys(() if carry else _CARRIED)
        signature |= dict.fromkeys((*_CARRIED, "out"), "*fp32") if carry else {}
    absent |= dict.fromkeys(() if packed else ("starts_q", "starts_k"))
    signature |= dict.fromkeys(("starts_q", "starts_k"), "*i32") if packed else {}
    constants = _MASKS.get(variant, _MASKS["causal window"]) | {
        "D": width, "V": width, "BLOCK_D": width, "BLOCK_V": width, "VARLEN": packed,
        "SLICE": slice_width(dtype, width, width),
    }  # fmt: skip
    if which == "forward":
        constants |= {"CARRY": carry}
    on = {target: _launch_on(which, dtype, width, index, target) for target in TARGETS}
    first = on.pop("sm_80")
    return Specialisation(
        kernel=_KERNELS[which],
        label=f"{name} D={width} {variant}" + (f", blocks {index + 1}" if index else ""),
        direction="forward" if which == "forward" else "backward",
        signature=signature,
        constexprs={**absent, **constants, **first["constexprs"]},
        num_warps=first["num_warps"],
        num_stages=first["num_stages"],
        divisible=tuple(strides),
        overrides=on,
    )


def _launch_on(which: str, dtype: torch.dtype, width: int, index: int, target: str) -> dict:
    m, n, warps, stages = candidates_for(which, target, dtype, width, width)[index]
    constants = {"BLOCK_M": m, "BLOCK_N": n, "PRECISION": precision(dtype, target)}
    return {"constexprs": constants, "num_warps": warps, "num_stages": stages}
