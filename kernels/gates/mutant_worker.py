"""The process that runs a check against the mutants of a kernel module; see `gates.mutants`.

It imports what takes long once, then forks for each mutant: the child puts the changed module in
the place of the real one, runs the check, and whatever happens to it happens to nobody else.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import pathlib
import signal
import sys
import tempfile
import time
import traceback

import torch

from corelib.kernels.gates.interpreter import _hasten, resolve
from corelib.kernels.gates.memory import memory_check

_KEPT = ("corelib", "corelib.kernels", "corelib.kernels.gates")


def serve() -> None:
    """Read a job from standard input, write a list of ``[killed, how]``; exit 1 if the check fails
    on the unchanged module, which is the first of the job's sources."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    _hasten()
    job = json.load(sys.stdin)
    resolve(job["check"])  # warm: torch, triton and all else that the check imports
    torch.testing.assert_close(torch.zeros(1), torch.zeros(1))  # imports much at its first call
    _forget()
    started = time.monotonic()
    failed, how = _tried(job, job["sources"][0], 600)
    if failed:
        sys.exit(how)
    limit = 10 + int(20 * (time.monotonic() - started))
    json.dump([_tried(job, source, limit) for source in job["sources"][1:]], answers)
    answers.close()


def _tried(job: dict, source: str, seconds: int) -> tuple[bool, str]:
    """Run the check on this source in a child: whether it failed, and by what."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reader)
        signal.alarm(seconds)
        code = 1
        try:
            _run(job["module"], source, job["check"])
            code = 0
        except BaseException:
            os.write(writer, traceback.format_exc()[-4000:].encode())
        finally:
            os._exit(code)
    os.close(writer)
    with os.fdopen(reader, "rb") as pipe:
        said = pipe.read().decode(errors="replace")
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        return True, f"the process died of {signal.Signals(os.WTERMSIG(status)).name}"
    return os.WEXITSTATUS(status) != 0, said


def _run(module: str, source: str, check: str) -> None:
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 2)
    os.dup2(null, 1)
    with tempfile.TemporaryDirectory() as folder:
        # The interpreter reads a kernel's source from its file, so that there has to be one.
        path = pathlib.Path(folder, module.rpartition(".")[2] + ".py")
        path.write_text(source, encoding="utf-8")
        spec = importlib.util.spec_from_file_location(module, path)
        changed = importlib.util.module_from_spec(spec)
        sys.modules[module] = changed
        spec.loader.exec_module(changed)
        parent, _, leaf = module.rpartition(".")
        setattr(importlib.import_module(parent), leaf, changed)
        function = resolve(check)
        with memory_check():
            function()


def _forget() -> None:
    """Unload our own modules (the gates aside), so that a child imports the changed one anew."""
    for name in list(sys.modules):
        ours = name.startswith(("corelib.", "_loaded_"))
        if ours and name not in _KEPT and not name.startswith("corelib.kernels.gates."):
            module = sys.modules.pop(name)
            parent, _, leaf = name.rpartition(".")
            if getattr(sys.modules.get(parent), leaf, None) is module:
                delattr(sys.modules[parent], leaf)
