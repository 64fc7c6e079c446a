"""Ranks start, answer in order, and fail with the name of the rank that failed."""

import os
import signal
import time

import pytest
import torch

from corelib.runtime import RankError, Ranks, all_reduce, run_ranks
from corelib.runtime import ranks as ranks_module


@pytest.fixture(scope="module")
def three():
    with Ranks(3, timeout=30) as ranks:
        yield ranks


def test_results_come_in_rank_order(three):
    assert three.run(lambda rank, base: base + rank, 10) == [10, 11, 12]
    sums = three.run(lambda rank: all_reduce(torch.tensor([1.0 * rank, 1.0])))
    assert [x.tolist() for x in sums] == [[3.0, 3.0]] * 3


def test_a_function_of_a_notebook_cell_travels_by_value(three):
    cell = {}
    exec("def square(rank):\n    return rank ** 2", {"__name__": "__main__"}, cell)
    assert three.run(cell["square"]) == [0, 1, 4]


def test_results_come_without_their_graph(three):
    (x, *_) = three.run(lambda rank: {"x": torch.ones(2, requires_grad=True) * 2})
    assert not x["x"].requires_grad


def test_an_error_is_raised_here_with_the_ranks_traceback():
    def fails(rank):
        if rank == 1:
            raise KeyError("the second rank's own")
        all_reduce(torch.zeros(1))

    start = time.monotonic()
    with pytest.raises(RankError, match="(?s)on rank 1 of 2.*the second rank's own") as caught:
        run_ranks(fails, 2, timeout=20)
    assert caught.value.rank == 1
    assert time.monotonic() - start < 20


def test_a_killed_rank_is_named():
    def dies(rank):
        if rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        all_reduce(torch.zeros(1))

    with pytest.raises(RankError, match="rank 1 was killed by SIGKILL") as caught:
        run_ranks(dies, 2, timeout=20)
    assert caught.value.rank == 1


def test_a_rank_that_hangs_is_named_within_the_limit():
    def hangs(rank):
        if rank == 1:
            time.sleep(60)

    with Ranks(2, timeout=4) as two:
        two.run(lambda rank: all_reduce(torch.zeros(1)))
        start = time.monotonic()
        with pytest.raises(RankError, match="rank 1 gave no answer within 4 s"):
            two.run(hangs)
        assert time.monotonic() - start < 15


class SlowToArrive(float):
    """A limit of 1 s that takes a new process 3 s to read: a slow start."""

    def __reduce__(self):
        return eval, ("__import__('time').sleep(3) or 1.0",)


def test_starting_does_not_count_against_the_limit_of_a_call():
    """On a busy machine importing torch alone may take longer than a call should."""
    with Ranks(1, timeout=SlowToArrive(1.0)) as one:
        assert one.run(lambda rank: "on time") == ["on time"]


def test_a_rank_that_does_not_start_is_named(monkeypatch):
    monkeypatch.setattr(ranks_module, "START", 0.0)
    with Ranks(2) as two, pytest.raises(RankError, match="gave no answer within 0 s"):
        two.run(lambda rank: rank)


def test_stopped_ranks_say_so(three):
    ranks = Ranks(1)
    ranks.close()
    with pytest.raises(RuntimeError, match="stopped"):
        ranks.run(lambda rank: rank)


@pytest.mark.no_shape_checks
@pytest.mark.parametrize(
    "arguments, message",
    [
        (dict(size=0), "size: expected a whole number of ranks"),
        (dict(size=2, timeout=0.0), "timeout: expected seconds above 0"),
        (dict(size=2, backend="mpi"), "backend: expected 'gloo'"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        Ranks(**arguments)
