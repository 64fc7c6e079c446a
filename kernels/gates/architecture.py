"""The limits of the GPUs that kernels are compiled for, and the occupancy that follows."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Architecture:
    """One multiprocessor (AMD: compute unit). A warp is AMD's wavefront.

    Attributes:
        name: the best-known GPU of this architecture.
        warp: threads of a warp.
        warps: warps resident at once.
        programs: programs (thread blocks) resident at once.
        quarters: parts that each hold their own registers and warps.
        registers: 32-bit registers of one quarter, counted in threads of ``warp``.
        register_step: registers a thread are handed out in multiples of this.
        shared: bytes of shared memory.
        shared_per_program: the most that one program may have.
        shared_reserved: bytes that the system takes for each program.
        tensor_memory: columns of tensor memory (Blackwell).
    """

    name: str
    warp: int
    warps: int
    programs: int
    quarters: int
    registers: int
    register_step: int
    shared: int
    shared_per_program: int
    shared_reserved: int = 0
    tensor_memory: int = 0


_KIB = 1024

#: NVIDIA: CUDA C++ Programming Guide, "Technical Specifications per Compute Capability" (8.0, 9.0,
#: 10.0): 64 K registers, 64 warps and 32 blocks a multiprocessor; 164 or 228 KiB of shared memory,
#: of which a block gets 163 or 227 and pays 1 KiB to the system; registers are handed out per warp
#: in units of 256. 10.0 has 512 columns of tensor memory (PTX ISA, "Tensor Memory").
#: AMD: "CDNA3 Instruction Set Architecture" and LLVM's "User Guide for AMDGPU Backend", gfx942:
#: 4 SIMDs with 512 vector registers a lane, in steps of 8, 8 wavefronts each; 64 KiB of LDS;
#: 16 workgroups of more than one wavefront.
ARCHITECTURES = {
    "sm_80": Architecture("A100", 32, 64, 32, 4, 512, 8, 164 * _KIB, 163 * _KIB, _KIB),
    "sm_90": Architecture("H100", 32, 64, 32, 4, 512, 8, 228 * _KIB, 227 * _KIB, _KIB),
    "sm_100": Architecture("B200", 32, 64, 32, 4, 512, 8, 228 * _KIB, 227 * _KIB, _KIB, 512),
    "gfx942": Architecture("MI300X", 64, 32, 16, 4, 512, 8, 64 * _KIB, 64 * _KIB),
}


def resident_programs(
    target: str, registers: int, shared: int, num_warps: int, tensor_memory: int = 0
) -> int:
    """Programs that fit on one multiprocessor at once.

    Args:
        target: a key of `ARCHITECTURES`.
        registers: registers a thread.
        shared: bytes of shared memory a program.
        num_warps: warps a program.
        tensor_memory: columns of tensor memory a program.
    """
    chip = ARCHITECTURES[target]
    step = chip.register_step
    each = max(step, -(-registers // step) * step)
    warps = chip.quarters * min(chip.warps // chip.quarters, chip.registers // each)
    limits = [chip.programs, warps // num_warps]
    if shared + chip.shared_reserved:
        limits.append(chip.shared // (shared + chip.shared_reserved))
    if tensor_memory:
        limits.append(chip.tensor_memory // tensor_memory)
    return min(limits)


def occupancy(
    target: str, registers: int, shared: int, num_warps: int, tensor_memory: int = 0
) -> float:
    """Resident warps over the most possible, 0 to 1 (arguments as `resident_programs`)."""
    programs = resident_programs(target, registers, shared, num_warps, tensor_memory)
    return programs * num_warps / ARCHITECTURES[target].warps
