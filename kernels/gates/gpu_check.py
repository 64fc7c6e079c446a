"""``make gpu-check``: the kernels' tests and short races on this machine's GPU.

The tests are the very ones that the interpreter runs (those that take the ``interpreter`` fixture,
which hands out a runner on the GPU here). Where all of a kernel's tests pass, the device, the date
and the races' times go into the report card as *run on (device, date)*; a failure records nothing.
Without a GPU nothing is checked and nothing recorded.
"""

from __future__ import annotations

import datetime
import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from corelib.kernels.gates.refresh import tests_pass, write
from corelib.kernels.report import SHIPPED, read, stale


def target_of(device: int = 0) -> str:
    """The compile target of a GPU, as in ``TARGETS``: ``"sm_90"``, ``"gfx942"``."""
    if torch.version.hip:
        return torch.cuda.get_device_properties(device).gcnArchName.split(":")[0]
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


def check(module: str, report: dict[str, Any]) -> bool:
    """Test and race one kernel module on the GPU; note the run in ``report`` if all is well."""
    device = torch.cuda.get_device_name()
    print(f"· {module}: running its tests on {device}", flush=True)
    plugin = ("-p", "corelib.kernels.gates.gpu_tests")
    if not tests_pass(module, plugin, CORELIB_KERNELS="native"):
        print(f"  {module} fails on {device}: nothing recorded")
        return False
    races = {}
    for title, race in RACES.get(module, {}).items():
        medians = race("cuda", 4096)
        races[title] = {name: round(1e6 * seconds, 1) for name, seconds in medians.items()}
        print(f"  {title}, microseconds: {races[title]}", flush=True)
    runs = report["modules"][module]["runs"]
    runs[:] = [run for run in runs if run["device"] != device]
    today = datetime.date.today().isoformat()
    runs.append({"device": device, "target": target_of(), "date": today, "microseconds": races})
    return True


def attention_race(device: str, length: int) -> dict[str, float]:
    """Causal GQA attention forward: median seconds of the kernel, SDPA and flex_attention."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    from corelib.kernels.flash_attention import flash_attention

    q, k, v = _inputs(device, length, length)
    causal = create_block_mask(lambda b, h, i, j: i >= j, None, None, length, length, device)
    flex = torch.compile(flex_attention)
    return _medians(
        {
            "kernel": lambda: flash_attention(q, k, v, causal=True),
            "sdpa": lambda: F.scaled_dot_product_attention(
                q, k, v, is_causal=True, enable_gqa=True
            ),
            "flex_attention": lambda: flex(q, k, v, block_mask=causal, enable_gqa=True),
        }
    )


def decode_race(device: str, length: int) -> dict[str, float]:
    """One query over a long cache: median seconds of the kernel and SDPA."""
    from corelib.kernels.split_kv_decode import split_kv_decode

    q, k, v = _inputs(device, 1, length)
    return _medians(
        {
            "kernel": lambda: split_kv_decode(q, k, v, splits=16),
            "sdpa": lambda: F.scaled_dot_product_attention(q, k, v, enable_gqa=True),
        }
    )


#: Kernel module -> what is raced -> the race, a function of device and length.
RACES: dict[str, dict[str, Callable[[str, int], dict[str, float]]]] = {
    "flash_attention": {"causal forward, B1 H16 G4 L4096 D64 float16": attention_race},
    "split_kv_decode": {"decode, B1 H16 G4 S4096 D64 float16": decode_race},
}


def _inputs(device: str, L: int, S: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = (1, 16, L, 64), (1, 4, S, 64), (1, 4, S, 64)
    return [torch.randn(shape, generator=generator).to(device, torch.float16) for shape in shapes]


def _medians(contestants: dict[str, Callable[[], torch.Tensor]]) -> dict[str, float]:
    from corelib.measure import race

    return race(contestants, min_time=0.2).medians


def main() -> int:
    if not torch.cuda.is_available():
        print("no GPU: nothing was checked")
        return 0
    report = read()
    if changed := stale(report):
        print(f"{', '.join(changed)}: changed since the report card was made; first run")
        print("  python -m corelib.kernels.report --update")
        return 1
    passed = [check(module, report) for module in report["modules"]]
    write(report, SHIPPED)
    return int(not all(passed))


if __name__ == "__main__":
    sys.exit(main())
