"""What a measurement ran on, in one line, and waiting for a GPU to finish."""

from __future__ import annotations

import functools
import os
import platform

import torch


@functools.cache
def processor_name() -> str:
    """The processor's model name, or its architecture where the system does not tell."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            for line in lines:
                if line.startswith("model name"):
                    return " ".join(line.split(":", 1)[1].split())
    except OSError:
        pass
    return platform.processor() or platform.machine() or "unknown processor"


def machine() -> str:
    """Device, threads and torch version: ``"Intel Xeon …, 1 thread, torch 2.13.0"``."""
    threads = torch.get_num_threads()
    parts = [processor_name(), f"{threads} thread{'s' if threads != 1 else ''}"]
    if torch.cuda.is_available():
        parts.insert(0, torch.cuda.get_device_name())
    return ", ".join([*parts, f"torch {torch.__version__.split('+')[0]}"])


def synchronize() -> None:
    """Wait until the GPU has done what was asked of it; nothing to do on a CPU."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.synchronize()


def memory_bytes() -> int:
    """The machine's main memory in bytes; 0 where the system does not tell."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return 0
