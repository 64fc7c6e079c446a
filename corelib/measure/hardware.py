"""Machines as numbers, and the time that a roofline allows.

A processor can compute ``flops`` operations a second and move ``bandwidth`` bytes a second, so
an operation takes at least ``max(operations / flops, bytes / bandwidth)`` (Williams, Waterman and
Patterson, "Roofline: an insightful visual performance model", 2009). A time from this model is
*modelled*: it was not measured, and real code is slower.
"""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Mapping
from numbers import Real

import torch

from .machine import machine, memory_bytes, synchronize

TERA, GIGA, KIBI = 1e12, 1e9, 1024


@dataclasses.dataclass(frozen=True)
class HardwareSpec:
    """One device.

    ``flops``: peak operations per second by dtype name (dense; a multiply-add counts two);
    ``bandwidth``: bytes per second between its main memory and the chip; ``memory``: bytes of
    that memory; ``sms``: streaming multiprocessors (threads, on a CPU); ``shared_per_sm``: bytes
    of shared memory on each; ``link_bandwidth``: bytes per second to other devices, one way.
    A value of 0 means unknown.
    """

    name: str
    flops: Mapping[str, Real] = dataclasses.field(hash=False)
    bandwidth: Real
    memory: int = 0
    sms: int = 0
    shared_per_sm: int = 0
    link_bandwidth: Real = 0.0
    measured: bool = False

    def peak(self, dtype: str | torch.dtype) -> float:
        """Peak operations per second in ``dtype`` (``"bfloat16"`` or ``torch.bfloat16``)."""
        name = str(dtype).removeprefix("torch.")
        if name not in self.flops:
            known = ", ".join(self.flops)
            raise ValueError(f"{self.name} has no peak for dtype {name!r}: known are {known}")
        return self.flops[name]

    def ridge(self, dtype: str | torch.dtype) -> float:
        """FLOP per byte from which on computing, not memory, takes the longer time."""
        return self.peak(dtype) / self.bandwidth


A100 = HardwareSpec(
    name="A100 SXM 80 GB",
    flops={
        "float64": 19.5 * TERA,
        "float32": 19.5 * TERA,
        "tfloat32": 156 * TERA,
        "float16": 312 * TERA,
        "bfloat16": 312 * TERA,
        "int8": 624 * TERA,
    },
    bandwidth=2039 * GIGA,
    memory=80 * 1024**3,
    sms=108,
    shared_per_sm=164 * KIBI,
    link_bandwidth=300 * GIGA,
)
"""NVIDIA A100 SXM 80 GB. Source: NVIDIA A100 data sheet (peaks without sparsity; float64 with
tensor cores; NVLink 600 GB/s counts both directions) and the Ampere architecture white paper
(108 SMs, up to 164 kB of shared memory each)."""

H100 = HardwareSpec(
    name="H100 SXM 80 GB",
    flops={
        "float64": 66.9 * TERA,
        "float32": 66.9 * TERA,
        "tfloat32": 494.7 * TERA,
        "float16": 989.4 * TERA,
        "bfloat16": 989.4 * TERA,
        "float8": 1978.9 * TERA,
        "int8": 1978.9 * TERA,
    },
    bandwidth=3350 * GIGA,
    memory=80 * 1024**3,
    sms=132,
    shared_per_sm=228 * KIBI,
    link_bandwidth=450 * GIGA,
)
"""NVIDIA H100 SXM 80 GB. Source: NVIDIA H100 data sheet and the Hopper architecture white paper
(peaks without sparsity; float64 with tensor cores; 132 SMs, up to 228 kB of shared memory each;
NVLink 900 GB/s counts both directions)."""


@dataclasses.dataclass(frozen=True)
class ModelledTime:
    """What `roofline` allows: ``seconds``, what ``bound`` them, and FLOP per byte."""

    seconds: Real
    bound: str
    intensity: Real
    device: str

    def __repr__(self) -> str:
        from .race import format_seconds

        time_ = format_seconds(self.seconds) if self.seconds else "0 s"
        return (
            f"modelled {time_} on {self.device} "
            f"({self.bound}-bound, {self.intensity:.3g} FLOP per byte)"
        )


def roofline(
    spec: HardwareSpec, *, bytes: Real, flops: Real, dtype: str | torch.dtype = "bfloat16"
) -> ModelledTime:
    """The least time that ``spec`` needs to move ``bytes`` and do ``flops`` in ``dtype``.

    Raises:
        ValueError: a negative count, or a dtype without a published peak.
    """
    if bytes < 0 or flops < 0:
        raise ValueError(f"bytes and flops must not be negative, got {bytes} and {flops}")
    moving, computing = bytes / spec.bandwidth, flops / spec.peak(dtype)
    bound = "memory" if moving >= computing else "compute"
    intensity = flops / bytes if bytes else float("inf") if flops else 0.0
    return ModelledTime(max(moving, computing), bound, intensity, spec.name)


def this_machine(device: str = "cpu") -> HardwareSpec:
    """This machine, by a self-test of under a second: matrix product rate and copy bandwidth.

    The result is kept for the process, per device and number of threads. ``measured`` is True:
    these are rates that were reached, not a vendor's peaks.
    """
    if not (device == "cpu" or device.startswith("cuda")):
        raise ValueError(f"device must be 'cpu' or 'cuda', got {device!r}")
    return _self_test(device, torch.get_num_threads())


@functools.cache
def _self_test(device: str, threads: int) -> HardwareSpec:
    gpu = device.startswith("cuda")
    dtypes = (torch.float32, torch.bfloat16) + ((torch.float16,) if gpu else ())
    size = 4096 if gpu else 512
    rates = {str(dtype).removeprefix("torch."): _gemm_rate(dtype, device, size) for dtype in dtypes}
    properties = torch.cuda.get_device_properties(device) if gpu else None
    return HardwareSpec(
        name=properties.name if properties else f"this machine ({machine()})",
        flops=rates,
        bandwidth=_copy_bandwidth(device, (1 << 28) if gpu else (1 << 26)),
        memory=properties.total_memory if properties else memory_bytes(),
        sms=properties.multi_processor_count if properties else threads,
        shared_per_sm=properties.shared_memory_per_multiprocessor if properties else 0,
        measured=True,
    )


def _gemm_rate(dtype: torch.dtype, device: str, size: int) -> float:
    """Operations per second of the fastest square matrix product."""
    a = torch.ones(size, size, dtype=dtype, device=device)
    out = torch.empty_like(a)
    return 2 * size**3 / _best(lambda: torch.mm(a, a, out=out))


def _copy_bandwidth(device: str, size: int) -> float:
    """Bytes read and written per second by the fastest copy of ``size`` bytes."""
    source = torch.ones(size // 4, device=device)
    target = torch.empty_like(source)
    return 2 * size / _best(lambda: target.copy_(source))


def _best(fn, seconds: float = 0.15) -> float:
    """The fastest of the calls that fit in ``seconds``, after a warm-up."""
    fn()
    best, end = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < end:
        synchronize()
        start = time.perf_counter()
        fn()
        synchronize()
        best = min(best, time.perf_counter() - start)
    return best
