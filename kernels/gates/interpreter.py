"""Gate 1: run kernels under Triton's interpreter, in a process of their own.

Triton decides at decoration whether a kernel is interpreted or compiled, so the process that asks
must not be the process that interprets. `Interpreter` owns a worker whose environment says
``TRITON_INTERPRET=1``; tensors travel to it and back through a pipe.

>>> with Interpreter() as interpreter:
...     flash = "corelib.kernels.flash_attention:flash_attention"
...     out = interpreter.call(flash, q, k, v, causal=True)

The interpreter does not support bfloat16 (dots are silently wrong) and runs programs one after
another, so that the values never show a race: it shows that the arithmetic and the masks are right,
no more. (`corelib.kernels.gates.memory` looks for the commonest races by address.)
"""

from __future__ import annotations

import atexit
import dataclasses
import functools
import importlib
import importlib.util
import os
import pathlib
import pickle
import subprocess
import sys
import traceback
import types
from types import ModuleType
from typing import Any

import torch

_WORKER = "from corelib.kernels.gates.interpreter import _serve; _serve()"


class KernelError(RuntimeError):
    """The worker's own traceback, raised where the call was made."""


class Native:
    """The same ``call`` on this machine's GPU: nothing is interpreted, `gpu_check` uses it."""

    def call(self, target: str, *args: Any, **kwargs: Any) -> Any:
        args, kwargs = _moved(args, "cuda"), _moved(kwargs, "cuda")
        return _moved(_detached(resolve(target)(*args, **kwargs)), "cpu")

    def close(self) -> None:
        pass

    def __enter__(self) -> Native:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


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


@functools.cache
def shared_interpreter() -> Interpreter:
    """One worker for all calls of this process: starting one takes seconds."""
    return Interpreter()


def kernel_runner() -> Interpreter | Native:
    """What the tests run kernels with: the interpreter, or the GPU inside `gpu_check`."""
    return Native() if os.environ.get("CORELIB_KERNELS") == "native" else shared_interpreter()


def interpreting() -> bool:
    """Whether Triton kernels of this very process are interpreted."""
    try:
        import triton
    except ImportError:
        return False
    return bool(triton.knobs.runtime.interpret)


def resolve(target: str) -> Any:
    """``"package.module:name"`` or ``"path/to/file.py:name"`` -> the object."""
    module, _, name = target.rpartition(":")
    found: Any = load_file(module) if module.endswith(".py") else importlib.import_module(module)
    for part in name.split("."):
        found = getattr(found, part)
    return found


def load_file(path: str) -> ModuleType:
    """Import a file by its path, once; a test file can so hold the function that a worker calls."""
    name = "_loaded_" + pathlib.Path(path).resolve().as_posix().replace("/", "_")[:-3]
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, path)
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        spec.loader.exec_module(module)
    return sys.modules[name]


def _mapped(function: Any, value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return function(value)
    if isinstance(value, tuple) and hasattr(value, "_fields"):  # a named tuple
        return type(value)(*(_mapped(function, item) for item in value))
    if isinstance(value, (list, tuple)):
        return type(value)(_mapped(function, item) for item in value)
    if isinstance(value, dict):
        return {name: _mapped(function, item) for name, item in value.items()}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):  # block lists, say
        fields = {x.name: getattr(value, x.name) for x in dataclasses.fields(value)}
        return dataclasses.replace(value, **_mapped(function, fields))
    return value


def _detached(value: Any) -> Any:
    return _mapped(lambda tensor: tensor.detach().clone(), value)


def _moved(value: Any, device: str) -> Any:
    return _mapped(lambda tensor: tensor.to(device), value)


def _hasten() -> None:
    """Make interpretation about three times faster, with the same results (Triton 3.7).

    The interpreter replaces the language's functions anew at every call of a helper function,
    though the launch has done it; and it computes every int32 sum twice to look for overflow.
    """
    try:
        from triton.runtime import interpreter
    except ImportError:
        return
    patch, language = interpreter._patch_lang, interpreter.tl
    everything = types.SimpleNamespace(__globals__={"tl": language, "core": language.core})
    interpreter._patch_lang = lambda function: patch(everything)
    interpreter.InterpretedFunction.__call__ = lambda self, *args, **kwargs: self.rewrite()(
        *args, **kwargs
    )
    options = vars(interpreter.interpreter_builder.options)
    interpreter.interpreter_builder.options = interpreter.InterpreterOptions(
        **{**options, "sanitize_overflow": False}
    )


def _serve() -> None:
    _hasten()
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
