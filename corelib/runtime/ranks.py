"""Ranks: processes joined by `torch.distributed`, started from a test, a script or a notebook.

`run_ranks` starts ``P`` processes on gloo (NCCL when every rank has a GPU of its own), calls
the function on each and returns the results in rank order. They meet through a file in a temporary
folder, never through a port. Functions travel by value (cloudpickle), so one defined in a notebook
cell works. An error on a rank is raised here with the rank's own traceback; a rank that is killed
or that hangs ends in an error that names it, within the time limit.
"""

from __future__ import annotations

import contextlib
import datetime
import multiprocessing
import os
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import wait
from typing import Any

import cloudpickle
import torch

GRACE = 2.0  # seconds for the other ranks' errors to arrive after the first one
# Seconds to start: a busy machine takes long to import torch, and that is no fault of the function.
START = 300.0
# Stands in the error of a rank that failed only because another one went away.
_LOST_PEER = "gloo/transport/"


class RankError(RuntimeError):
    """A rank raised, died or did not answer in time. ``rank`` is its number."""

    def __init__(self, rank: int, message: str):
        super().__init__(message)
        self.rank = rank


class Ranks:
    """``P`` processes that stay up for several calls: starting them costs a second or two.

    >>> with Ranks(4) as ranks:
    ...     ranks.run(lambda rank: rank * 10)
    [0, 10, 20, 30]

    Args:
        size: how many ranks, at least 1.
        timeout: seconds that one call, and any single collective inside it, may take. Starting
            the processes, before the first call, has a limit of its own.
        backend: ``"gloo"``, ``"nccl"``, or None for NCCL when there is a GPU for every rank.
    """

    def __init__(self, size: int, *, timeout: float = 60.0, backend: str | None = None):
        if not isinstance(size, int) or size < 1:
            raise ValueError(f"size: expected a whole number of ranks, at least 1, got {size!r}")
        if not timeout > 0:
            raise ValueError(f"timeout: expected seconds above 0, got {timeout}")
        if backend not in (None, "gloo", "nccl"):
            raise ValueError(f"backend: expected 'gloo', 'nccl' or None, got {backend!r}")
        self.size, self.timeout, self._started = size, timeout, False
        if backend is None:
            backend = "nccl" if torch.cuda.device_count() >= size else "gloo"
        self._folder = tempfile.TemporaryDirectory(prefix="ranks-")
        meeting = os.path.join(self._folder.name, "meeting")
        context = _context()
        self._pipes, self._processes = [], []
        for rank in range(size):
            ours, theirs = context.Pipe()
            process = context.Process(
                target=_serve,
                args=(rank, size, backend, meeting, timeout, theirs),
                name=f"rank {rank}",
                daemon=True,
            )
            process.start()
            theirs.close()
            self._pipes.append(ours)
            self._processes.append(process)

    def run(self, fn: Callable[..., Any], *args: Any) -> list[Any]:
        """``[fn(0, *args), fn(1, *args), …]``, each on its own rank.

        Raises `RankError` for the first rank that raised, died or did not answer; the ranks are
        then stopped, because the others may be waiting for it.
        """
        if not self._processes:
            raise RuntimeError("these ranks have been stopped")
        task = cloudpickle.dumps((fn, args))
        self._await_start()
        for pipe in self._pipes:
            with contextlib.suppress(OSError):  # a rank that died is named below
                pipe.send_bytes(task)
        answers = self._collect(self.timeout)
        return [answers[rank] for rank in range(self.size)]

    def _await_start(self) -> None:
        if not self._started:
            self._collect(START)
            self._started = True

    def _collect(self, limit: float) -> dict[int, Any]:
        """One answer of every rank within ``limit`` seconds; else the ranks are stopped."""
        try:
            return self._answers(limit)
        except BaseException:
            self.close(kill=True)
            raise

    def _answers(self, limit: float) -> dict[int, Any]:
        answers: dict[int, Any] = {}
        errors: dict[int, str] = {}
        deadline = time.monotonic() + limit
        while len(answers) + len(errors) < self.size:
            open_ = {self._pipes[r]: r for r in range(self.size) if r not in answers | errors}
            ready = wait(list(open_), timeout=max(0.0, deadline - time.monotonic()))
            if not ready:
                break
            for pipe in ready:
                rank = open_[pipe]
                try:
                    ok, value = cloudpickle.loads(pipe.recv_bytes())
                except (EOFError, OSError):
                    ok, value = False, self._how_it_ended(rank)
                (answers if ok else errors)[rank] = value
                if not ok:  # the others may wait for this rank in vain
                    deadline = min(deadline, time.monotonic() + GRACE)
        if errors:
            rank = min(errors, key=lambda r: (_LOST_PEER in errors[r], r))
            raise RankError(rank, errors[rank])
        if len(answers) < self.size:
            silent = [rank for rank in range(self.size) if rank not in answers]
            raise RankError(
                silent[0], f"rank {silent[0]} gave no answer within {limit:g} s"
                + (f" (nor did {silent[1:]})" if silent[1:] else ""),
            )  # fmt: skip
        return answers

    def _how_it_ended(self, rank: int) -> str:
        process = self._processes[rank]
        process.join(timeout=GRACE)
        code = process.exitcode
        if code is not None and code < 0:
            return f"rank {rank} was killed by {signal.Signals(-code).name}"
        return f"rank {rank} ended without an answer (exit code {code})"

    def close(self, kill: bool = False) -> None:
        """Stop the ranks."""
        for pipe in self._pipes:
            pipe.close()  # a rank that waits for a task sees this and leaves
        for process in self._processes:
            if kill:
                process.kill()
            process.join(timeout=GRACE)
            if process.is_alive():
                process.kill()
                process.join()
        self._pipes, self._processes = [], []
        self._folder.cleanup()

    def __enter__(self) -> Ranks:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def run_ranks(
    fn: Callable[..., Any],
    size: int,
    *args: Any,
    timeout: float = 60.0,
    backend: str | None = None,
) -> list[Any]:
    """Start ``size`` ranks, return ``[fn(0, *args), …, fn(size - 1, *args)]``, stop them."""
    with Ranks(size, timeout=timeout, backend=backend) as ranks:
        return ranks.run(fn, *args)


def _context():
    """Fork each rank from a small server that has imported torch once; spawn where there is none.

    Forking this process itself would copy locks that its threads hold.
    """
    if sys.platform == "win32":
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "torch.distributed", "corelib.runtime"])
    return context


def _serve(rank: int, size: int, backend: str, meeting: str, timeout: float, pipe) -> None:
    """A rank's life: join the others, then answer calls until the pipe closes."""
    import torch.distributed as dist

    torch.set_num_threads(1)
    with contextlib.suppress(OSError):  # stopped before it started
        pipe.send_bytes(cloudpickle.dumps((True, "started")))
    joined = False
    while True:
        try:
            task = pipe.recv_bytes()
        except (EOFError, OSError):
            break
        try:
            if not joined:
                _join(rank, size, backend, meeting, timeout)
                joined = True
            fn, args = cloudpickle.loads(task)
            answer = True, _on_cpu(fn(rank, *args))
        except BaseException:
            answer = False, f"on rank {rank} of {size}:\n{traceback.format_exc()}"
        pipe.send_bytes(cloudpickle.dumps(answer))
    if joined:
        with contextlib.suppress(Exception):
            dist.destroy_process_group()


def _join(rank: int, size: int, backend: str, meeting: str, timeout: float) -> None:
    import torch.distributed as dist

    if backend == "nccl":
        torch.cuda.set_device(rank)
    dist.init_process_group(
        backend,
        store=dist.FileStore(meeting, size),
        rank=rank,
        world_size=size,
        timeout=datetime.timedelta(seconds=timeout),
    )


def _on_cpu(value: Any) -> Any:
    """Results travel as plain CPU tensors without their graph."""
    if isinstance(value, torch.Tensor):
        return value.detach().cpu()
    if isinstance(value, (list, tuple)) and not hasattr(value, "_fields"):
        return type(value)(map(_on_cpu, value))
    if isinstance(value, dict):
        return {name: _on_cpu(item) for name, item in value.items()}
    return value
