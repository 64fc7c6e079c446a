"""Gate 1: run kernels under Triton's interpreter, in a process of their own.

Triton decides at decoration whether a kernel is interpreted or compiled, so the process that asks
must not be the process that interprets. `Interpreter` owns a worker whose environment says
``TRITON_INTERPRET=1``; tensors travel to it and back through a pipe.

>>> with Interpreter() as interpreter:
...     flash = "corelib.kernels.flash_attention:flash_attention"
...     out = interpreter.call(flash, q, k, v, causal=True)

The interpreter does not support bfloat16 (dots are silently wrong) and runs programs one after
another, so that races stay hidden: it shows that the arithmetic and the masks are right, no more.
"""

from __future__ import annotations

import atexit
import importlib
import os
import pickle
import subprocess
import sys
import traceback
from typing import Any

import torch

_WORKER = "from corelib.kernels.gates.interpreter import _serve; _serve()"


class KernelError(RuntimeError):
    """The worker's own traceback, raised where the call was made."""


class Interpreter:
    """A worker process in which every Triton kernel is interpreted."""

    def __init__(self, threads: int = 1):
        env = dict(os.environ, TRITON_INTERPRET="1", OMP_NUM_THREADS=str(threads))
        self._worker = subprocess.Popen(
            [sys.executable, "-c", _WORKER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=env
        )
        atexit.register(self.close)

    def call(self, target: str, *args: Any, **kwargs: Any) -> Any:
        """Call ``"package.module:function"`` in the worker; tensors come back detached.

        Raises `KernelError` with the worker's traceback when the function raises.
        """
        if self._worker.poll() is not None:
            raise KernelError(f"the interpreter worker has ended (exit {self._worker.returncode})")
        pickle.dump((target, args, kwargs), self._worker.stdin)
        self._worker.stdin.flush()
        try:
            ok, answer = pickle.load(self._worker.stdout)
        except EOFError:
            code = self._worker.wait()
            raise KernelError(f"the interpreter worker died (exit {code}) in {target}") from None
        if not ok:
            raise KernelError(f"in {target}:\n{answer}")
        return answer

    def close(self) -> None:
        atexit.unregister(self.close)
        if self._worker.poll() is None:
            self._worker.stdin.close()
            self._worker.wait(timeout=30)

    def __enter__(self) -> Interpreter:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def resolve(target: str) -> Any:
    """``"package.module:name"`` -> the object."""
    module, _, name = target.partition(":")
    found = importlib.import_module(module)
    for part in name.split("."):
        found = getattr(found, part)
    return found


def _detached(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.detach().clone()
    if isinstance(value, (list, tuple)):
        return type(value)(map(_detached, value))
    if isinstance(value, dict):
        return {name: _detached(item) for name, item in value.items()}
    return value


def _serve() -> None:
    requests, answers = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # a stray print must not end up between two answers
    while True:
        try:
            target, args, kwargs = pickle.load(requests)
        except EOFError:
            return
        try:
            answer = True, _detached(resolve(target)(*args, **kwargs))
        except BaseException:
            answer = False, traceback.format_exc()
        pickle.dump(answer, answers)
        answers.flush()
