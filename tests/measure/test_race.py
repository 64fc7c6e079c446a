"""Races: fair turns, agreement first, missing peers named."""

import json
import sys
from types import SimpleNamespace

import pytest
import torch

from corelib.measure import Missing, Race, format_seconds, forward_backward, race, sweep
from corelib.measure.agreement import agreement


@pytest.fixture(autouse=True)
def clock(monkeypatch):
    """A clock that only contestants made by `takes` move: tests of timing that cannot be late."""
    now = SimpleNamespace(seconds=0.0)
    fake = SimpleNamespace(perf_counter=lambda: now.seconds)
    monkeypatch.setattr(sys.modules[race.__module__], "time", fake)
    return now


@pytest.fixture
def takes(clock):
    """``takes(seconds, value)``: a contestant that takes so long and returns a tensor."""

    def make(seconds, value=1.0):
        def fn():
            clock.seconds += seconds
            return torch.tensor([value, 2.0])

        return fn

    return make


def test_contestants_take_turns_and_ratios_refer_to_the_first(takes):
    turns = []
    slow, fast = takes(2), takes(1)
    two = {"a": lambda: (turns.append("a"), slow()), "b": lambda: (turns.append("b"), fast())}
    result = race(two, repeats=4, min_time=0, check=None)
    rounds = ["".join(turns[n : n + 2]) for n in range(4, len(turns), 2)]  # after two warm-ups each
    assert len(rounds) == 4 and set(rounds) == {"ab", "ba"}  # neither always comes second
    assert result.baseline == "a" and result.ratios == {"a": 1.0, "b": 0.5}
    assert result.times == {"a": [2.0] * 4, "b": [1.0] * 4}


def test_short_calls_are_repeated_inside_a_sample(takes):
    calls = []
    fn = takes(2**-13)
    result = race({"a": lambda: (calls.append(1), fn())}, repeats=2, min_time=0, check=None)
    assert len(calls) == 2 + 2 * 5  # five calls of 0.12 ms fill the 0.5 ms of a sample
    assert result.times["a"] == [2**-13] * 2


def test_min_time_adds_rounds(takes):
    assert len(race({"a": takes(0.25)}, repeats=1, min_time=2).times["a"]) == 8
    assert len(race({"a": takes(0.25)}, repeats=9, min_time=2).times["a"]) == 9


def test_medians_ratios_speedup_and_baseline():
    times = {"slow": [4.0, 2.0, 100.0], "fast": [1.0, 0.5, 2.0]}
    result = Race(times, "slow", "a machine")
    assert result.medians == {"slow": 4.0, "fast": 1.0}
    assert result.ratios == {"slow": 1.0, "fast": 0.25}
    assert result.fastest == "fast" and result.speedup("fast", over="slow") == 4.0
    with pytest.raises(ValueError, match="no contestant 'x': there are slow, fast"):
        result.speedup("x", over="slow")


def test_ratio_to_fastest(takes):
    two = {"a": takes(0.003), "b": takes(0.0005)}
    assert race(two, ratio_to="fastest", repeats=2, min_time=0).baseline == "b"
    assert race(two, ratio_to="b", repeats=1, min_time=0).baseline == "b"


def test_table_and_json_name_machine_agreement_and_missing_peers(takes):
    two = {"a": takes(0.001), "b": takes(0.001), "c": Missing("not installed")}
    result = race(two, repeats=2, min_time=0)
    table = result.table()
    assert "| c | not installed | – |" in table and "results equal" in table
    assert f"torch {torch.__version__.split('+')[0]}" in table and "1 thread" in table
    assert result._repr_markdown_() == table == repr(result)
    stored = json.loads(result.to_json())
    assert stored["missing"] == {"c": "not installed"} and set(stored["medians"]) == {"a", "b"}


def test_different_results_do_not_race(takes):
    with pytest.raises(ValueError, match="contestant 'b' computes something else"):
        race({"a": takes(1), "b": takes(1, value=1.001)})
    race({"a": takes(1), "b": takes(1, value=1.001)}, tolerance=1e-2, repeats=1, min_time=0)
    unchecked = race({"a": takes(1), "b": takes(1, 5.0)}, check=None, repeats=1, min_time=0)
    assert "results not compared" in unchecked.table()


def test_an_explicit_reference_and_a_check_of_ones_own(takes):
    with pytest.raises(ValueError, match="contestant 'a'"):
        race({"a": takes(1)}, reference=torch.tensor([9.0, 9.0]))
    with pytest.raises(ValueError, match="'b' computes something else"):
        race({"a": takes(1), "b": takes(1, 3.0)}, check=lambda got, ref: bool((got == ref).all()))


@pytest.mark.no_shape_checks
@pytest.mark.parametrize(
    ("contestants", "options", "message"),
    [
        ({}, {}, "needs a contestant"),
        ({"a": Missing("no compiler")}, {}, "a: no compiler"),
        ({"a": abs}, {"repeats": 0}, "repeats must be at least 1"),
        ({"a": abs}, {"min_time": -1}, "min_time"),
        ({"a": abs}, {"ratio_to": "z"}, "ratio_to must be 'fastest' or one of"),
        ({"a": abs}, {"check": "close"}, "check must be"),
    ],
)
def test_bad_input(contestants, options, message):
    with pytest.raises(ValueError, match=message):
        race(contestants, **options)


@pytest.mark.no_shape_checks
def test_a_contestant_must_be_a_function():
    with pytest.raises(TypeError, match="contestant 'a' must be a function, got Tensor"):
        race({"a": torch.ones(1)})


def test_agreement_compares_nested_results():
    a = {"out": torch.tensor([1.0, 2.0]), "rest": (3, [torch.zeros(0), None, "x"])}
    assert agreement(a, a, None, "a") == 0.0
    b = {"out": torch.tensor([1.0, 2.0 + 1e-5]), "rest": (3, [torch.zeros(0), None, "x"])}
    assert agreement(b, a, None, "b") == pytest.approx(5e-6, rel=0.1)
    for wrong, message in [
        ({"out": a["out"], "rest": (4, a["rest"][1])}, r"result\['rest'\]\[0\] differs"),
        ({"out": a["out"][:1], "rest": a["rest"]}, r"shape \(1,\), expected \(2,\)"),
        ({"out": a["out"], "rest": (3, [torch.zeros(0), None, "y"])}, "'y', expected 'x'"),
        ({"out": "no", "rest": a["rest"]}, "is a str"),
        ({"out": a["out"]}, "expected"),
    ]:
        with pytest.raises(ValueError, match=message):
            agreement(wrong, a, None, "w")


def test_infinities_and_nan_must_stand_in_the_same_places():
    lse = torch.tensor([-torch.inf, 1.0, torch.nan])
    assert agreement(lse.clone(), lse, None, "a") == 0.0
    for wrong in ([torch.inf, 1.0, torch.nan], [0.0, 1.0, torch.nan], [-torch.inf, torch.nan, 1.0]):
        with pytest.raises(ValueError, match="computes something else"):
            agreement(torch.tensor(wrong), lse, None, "a")
    assert agreement(torch.zeros(3), torch.zeros(3), None, "a") == 0.0


def test_coarser_dtype_sets_the_tolerance():
    exact = torch.linspace(1, 2, 100, dtype=torch.float64)
    agreement(exact.bfloat16(), exact, None, "a")
    with pytest.raises(ValueError):
        agreement(exact.bfloat16().double(), exact, None, "a")


def test_forward_backward_compares_gradients():
    x, y = torch.randn(4, dtype=torch.float64), torch.randn(4, dtype=torch.float64)
    out, (dx, dy) = forward_backward(lambda x, y: x * x, x, y)()
    assert torch.equal(out, x * x) and not out.requires_grad
    assert torch.equal(dy, torch.zeros(4)) and not torch.equal(dx, torch.zeros(4))
    good = {"a": forward_backward(lambda x: x * x, x), "b": forward_backward(torch.square, x)}
    race(good, repeats=1, min_time=0)
    cheat = forward_backward(lambda x: x * x.detach(), x)
    with pytest.raises(ValueError, match=r"result\[1\]\[0\] differs"):
        race({"a": good["a"], "cheat": cheat})


@pytest.mark.no_shape_checks
def test_forward_backward_needs_floating_point():
    with pytest.raises(TypeError, match="tensor 1 must be floating point"):
        forward_backward(torch.add, torch.ones(1), torch.ones(1, dtype=torch.long))


def test_sweep_races_at_every_length(takes):
    def make(n):
        both = {"line": takes(n * 2e-6), "square": takes(n * n * 1e-7)}
        return both if n < 160 else {"line": both["line"], "peer": Missing("absent")}

    result = sweep([10, 20, 40, 80, 160], make, repeats=1, min_time=0)
    assert list(result.seconds("line")) == [10, 20, 40, 80, 160]
    assert list(result.seconds("square")) == [10, 20, 40, 80]
    assert result.exponents["line"].value == pytest.approx(1.0)
    assert set(result.exponents) == {"line"}  # four lengths are too few for the other
    assert result.missing == {"peer": "absent"}
    assert "| contestant | 10 | 20 | 40 | 80 | 160 | exponent |" in result.table()
    with pytest.raises(ValueError, match="no contestant"):
        result.seconds("nobody")
    with pytest.raises(ValueError, match="at least one length"):
        sweep([], make)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (2.5e-9, "2.5 ns"),
        (9.996e-4, "1 ms"),
        (1.234e-3, "1.23 ms"),
        (0.9996, "1 s"),
        (12345.6, "12346 s"),
        (5e-7, "500 ns"),
        (1.5e-5, "15 µs"),
        (0.123, "123 ms"),
    ],
)
def test_format_seconds(seconds, text):
    assert format_seconds(seconds) == text
