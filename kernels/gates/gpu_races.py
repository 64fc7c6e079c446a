"""All races of ``make gpu-check``: each kernel against what a user would otherwise call there."""

from __future__ import annotations

from corelib.kernels.gates.gpu_attention_races import ATTENTION_RACES
from corelib.kernels.gates.gpu_ground import Ground, agreeing
from corelib.kernels.gates.gpu_product_races import PRODUCT_RACES
from corelib.kernels.gates.gpu_recurrence_races import RECURRENCE_RACES
from corelib.kernels.gates.gpu_sum_races import SUM_RACES

#: Kernel module -> what is raced -> the race, a function of a `Ground`.
RACES = {**ATTENTION_RACES, **PRODUCT_RACES, **RECURRENCE_RACES, **SUM_RACES}


def agree_on_small_ground(module: str) -> dict[str, list[str]]:
    """In a process that interprets: each race of a kernel module at a small size, and who agreed.

    Raises ValueError where a contestant computes something else than the kernel.
    """
    return {
        title: list(agreeing(make(Ground("cpu", small=True))))
        for title, make in RACES[module].items()
    }
