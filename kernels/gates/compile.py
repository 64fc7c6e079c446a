"""Gate 2: compile every declared specialisation for every target, on a machine without a GPU.

``triton.compile`` needs no device, and the wheel carries NVIDIA's disassembler: the compiled code
can be read here for registers, spills, shared memory and matrix instructions, target by target.
This gate shows that a kernel *would* fit and use the right units; it says nothing of its speed.

$ python -m corelib.kernels.gates.compile corelib.kernels.flash_attention --targets sm_90 gfx942

prints the rows as JSON. Other processes call `compile_module`, which runs that command: compiling
and interpreting cannot share a process.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import pathlib
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from typing import Any

from corelib.kernels.gates.architecture import ARCHITECTURES, occupancy
from corelib.kernels.gates.specialisation import TARGETS, Specialisation

#: Tensor-core instructions: Ampere's HMMA family, Hopper's warp-group HGMMA family, Blackwell's
#: tensor-memory UTC*MMA family; AMD's matrix fused multiply-adds.
_NVIDIA_MATRIX = re.compile(
    r"^\s+/\*\w+\*/\s+(?:@\S+\s+)?((?:[A-Z]{1,2}|[A-Z]G|UTC[A-Z])MMA)\b", re.M
)
_AMD_MATRIX = re.compile(r"^\s+(v_s?mfmac?_\w+)", re.M)

#: A scalar spill goes to a lane of a vector register, not to memory: a few cost nothing.
SCALAR_SPILLS_ALLOWED = 32

#: What is read from the compiled code; all None in the row of a kernel that does not compile.
MEASURED = (
    "registers",
    "spills",
    "scalar_spills",
    "matrix_instructions",
    "shared",
    "shared_limit",
    "occupancy",
    "has_dot",
    "plain_dots",
)


def compile_module(
    module: str, targets: Sequence[str] = TARGETS, labels: Sequence[str] | None = None
) -> list[dict[str, Any]]:
    """Compile the ``SPECIALISATIONS`` of ``module`` in a worker process.

    Args:
        module: dotted name, such as ``"corelib.kernels.flash_attention"``.
        targets: some of `TARGETS`.
        labels: only the specialisations with these labels.

    Returns:
        One row per specialisation and target, see `compiled_row`; ``problems`` lists what is wrong.

    Raises:
        RuntimeError: the worker failed as a whole (a kernel that does not compile is a problem in
            its row instead).
    """
    command = [sys.executable, "-m", __name__, module, "--targets", *targets]
    command += ["--labels", *labels] if labels else []
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"compiling {module} failed:\n{done.stderr[-4000:]}")
    return json.loads(done.stdout)


def compiled_row(module: Any, spec: Specialisation, target: str) -> dict[str, Any]:
    """Compile one specialisation for one target (this process must not interpret).

    Returns a row with ``kernel label direction target num_warps num_stages``, and of the compiled
    code ``registers`` (a thread), ``spills`` (bytes a thread), ``scalar_spills`` (AMD), ``shared``
    (bytes a program) and its ``shared_limit``, ``occupancy`` (0 to 1), ``matrix_instructions``
    (name -> count), ``has_dot`` (the source holds a ``tl.dot``), ``plain_dots`` (how many are done
    without matrix instructions) and ``problems``.
    """
    spec = spec.on(target)
    row = {
        "kernel": spec.kernel,
        "label": spec.label,
        "direction": spec.direction,
        "target": target,
        "num_warps": spec.num_warps,
        "num_stages": spec.num_stages,
    } | dict.fromkeys(MEASURED)
    try:
        row |= _measured(_compiled(getattr(module, spec.kernel), spec, target), target, spec)
    except Exception as error:  # whatever the compiler raises belongs into the row
        text = " ".join(str(error).split())
        return row | {"problems": [f"does not compile: {type(error).__name__}: {text[:300]}"]}
    return row | {"problems": problems(row)}


def problems(row: dict[str, Any]) -> list[str]:
    """What the gate refuses in a compiled row, in words; empty for a good one."""
    found = []
    if row["spills"]:
        found.append(f"spills {row['spills']} bytes a thread")
    if row["scalar_spills"] > SCALAR_SPILLS_ALLOWED:
        found.append(f"spills {row['scalar_spills']} scalar registers")
    if row["shared"] > row["shared_limit"]:
        found.append(f"needs {row['shared']} bytes of shared memory of {row['shared_limit']}")
    if row["plain_dots"]:
        found.append(f"{row['plain_dots']} of its dots use no matrix instructions")
    if row["has_dot"] and not row["matrix_instructions"]:
        found.append("holds a tl.dot, but no matrix instruction")
    if not found and not row["occupancy"]:
        found.append("not even one program fits on a multiprocessor")
    return found


def _compiled(function: Any, spec: Specialisation, target: str) -> Any:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    missing = set(function.arg_names) - set(spec.signature) - set(spec.constexprs)
    unknown = (set(spec.signature) | set(spec.constexprs)) - set(function.arg_names)
    if missing or unknown:
        raise ValueError(
            f"{spec.kernel}: arguments not declared {sorted(missing)}, unknown {sorted(unknown)}"
        )
    signature = {name: spec.signature.get(name, "constexpr") for name in function.arg_names}
    aligned = {
        (index,): [["tt.divisibility", 16]]
        for index, (name, kind) in enumerate(signature.items())
        if kind.startswith("*") or name in spec.divisible
    }
    amd = target.startswith("gfx")
    gpu = GPUTarget("hip", target, 64) if amd else GPUTarget("cuda", int(target[3:]), 32)
    options = {"num_warps": spec.num_warps, "num_stages": spec.num_stages}
    source = ASTSource(function, signature, dict(spec.constexprs), aligned)
    return triton.compile(source, target=gpu, options=options)


def _measured(compiled: Any, target: str, spec: Specialisation) -> dict[str, Any]:
    layout = compiled.asm["ttgir"]
    read = _read_amd if target.startswith("gfx") else _read_nvidia
    found = read(compiled.asm)
    warps = re.search(r'"ttg\.total-num-warps" = (\d+)', layout)  # warp specialisation adds some
    warps = int(warps.group(1)) if warps else spec.num_warps
    shared = compiled.metadata.shared
    tensor_memory = getattr(compiled.metadata, "tmem_size", None) or 0
    fraction = occupancy(target, found["registers"], shared, warps, tensor_memory)
    return found | {
        "shared": shared,
        "shared_limit": ARCHITECTURES[target].shared_per_program,
        "occupancy": round(fraction, 4),
        "has_dot": bool(re.search(r"= tt\.dot(?:_scaled)? ", compiled.asm["ttir"])),
        "plain_dots": len(re.findall(r"= tt\.dot .*-> tensor<[^#>]*#(?!mma)", layout)),
    }


def _read_nvidia(asm: dict[str, Any]) -> dict[str, Any]:
    import triton

    tool = pathlib.Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.TemporaryDirectory() as folder:
        cubin = pathlib.Path(folder, "kernel.cubin")
        cubin.write_bytes(asm["cubin"])
        usage, sass = (
            subprocess.run([tool, flag, cubin], capture_output=True, text=True, check=True).stdout
            for flag in ("--dump-resource-usage", "-sass")
        )
    # STACK is where spilled registers go; LOCAL stays 0 even then, SHARED is the static part only.
    registers, stack = map(int, re.search(r"REG:(\d+) STACK:(\d+)", usage).groups())
    return {
        "registers": registers,
        "spills": stack,
        "scalar_spills": 0,
        "matrix_instructions": dict(Counter(_NVIDIA_MATRIX.findall(sass))),
    }


def _read_amd(asm: dict[str, Any]) -> dict[str, Any]:
    text = asm["amdgcn"]

    def number(name: str) -> int:
        return int(re.search(rf"\.{name}: +(\d+)", text).group(1))

    return {
        "registers": number("vgpr_count"),  # vector and accumulation registers together
        "spills": max(number("private_segment_fixed_size"), 4 * number("vgpr_spill_count")),
        "scalar_spills": number("sgpr_spill_count"),
        "matrix_instructions": dict(Counter(_AMD_MATRIX.findall(text))),
    }


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m corelib.kernels.gates.compile")
    parser.add_argument("module", help="dotted name of a kernel module")
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=TARGETS)
    parser.add_argument("--labels", nargs="+", help="only the specialisations with these labels")
    options = parser.parse_args(argv)
    module = importlib.import_module(options.module)
    rows = [
        compiled_row(module, spec, target)
        for spec in module.SPECIALISATIONS
        if not options.labels or spec.label in options.labels
        for target in options.targets
    ]
    print(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
