"""A check passes what agrees, prints one stable line, and says how far off the rest is."""

from __future__ import annotations

import math
import subprocess
import sys

import numpy as np
import pytest
import torch

from corelib.teach import CheckFailed, check, check_range


@pytest.mark.parametrize(
    ("value", "expected", "tolerance", "line"),
    [
        (172, 172, None, "172 = 172"),
        (0.33333333, 1 / 3, None, "0.333 ≈ 0.333"),
        (2.05, 2.0, 0.1, "2.05 ≈ 2"),
        (12345.0, 12345.0, None, "12,345 ≈ 12,345"),
        (torch.tensor(1.5), 1.5, None, "1.5 ≈ 1.5"),
        (torch.ones(2, 3) + 1e-7, torch.ones(2, 3), None, "shape (2, 3), equal within 1e-05"),
        (torch.arange(3), [0, 1, 2], None, "shape (3,), equal"),
        (np.ones(2), torch.ones(2), 1e-3, "shape (2,), equal within 1e-03"),
        (torch.empty(0, 2), torch.empty(0, 2), None, "shape (0, 2), equal within 1e-06"),
        (torch.ones(2, 3).shape, (2, 3), None, "(2, 3)"),
        ("causal", "causal", None, "causal"),
        (True, True, None, "True"),
        (None, None, None, "None"),
        (1 + 2j, 1 + 2j, None, "1+2j ≈ 1+2j"),
    ],
)
def test_what_agrees_prints_one_line(capsys, value, expected, tolerance, line):
    check("it", value, expected, tolerance)
    assert capsys.readouterr().out == f"✓ it: {line}\n"


@pytest.mark.parametrize(
    ("value", "expected", "tolerance", "words"),
    [
        (1.0, 1.1, None, "got 1, expected 1.1 within 1e-05, off by 0.1"),
        (1.0, 1.1, 0.09, "within 0.09"),
        (3, 4, None, "got 3, expected 4, off by 1"),
        (1e-9, 2e-9, None, "off by 1e-09"),  # a default that is relative: small is not equal
        (2e-6, 0.0, None, "expected 0 within 1e-06"),
        (math.nan, 1.0, 1.0, "got nan"),
        (1.0, math.nan, 1.0, "expected nan"),
        (math.inf, -math.inf, 1.0, "got inf, expected -inf"),
        (torch.ones(3), torch.ones(2, 3), 1.0, r"got shape \(3,\), expected \(2, 3\)"),
        (torch.ones(1), torch.ones(3), 1.0, "shape"),  # no silent broadcasting
        (torch.ones(2), torch.tensor([1.0, 3.0]), None, r"off by 2 at \(1,\) \(1 of 2 differ\)"),
        (torch.tensor([1, torch.nan]), torch.ones(2), 9.0, r"got nan.*\(1,\) \(1 of 2 differ\)"),
        ((2, 3), (2, 4), None, r"got \(2, 3\), expected \(2, 4\)"),
        ("a", "b", None, "got 'a', expected 'b'"),
        (torch.ones(2), None, None, "expected None"),
        (True, False, None, "got True, expected False"),
    ],
)
def test_what_is_off_raises(capsys, value, expected, tolerance, words):
    with pytest.raises(CheckFailed, match=f"^it: .*{words}"):
        check("it", value, expected, tolerance)
    assert capsys.readouterr().out == ""


def test_equal_infinities_and_nans_agree():
    row = torch.tensor([-math.inf, 1.0, math.nan])
    check("empty row", row, row.clone())
    with pytest.raises(CheckFailed):
        check("empty row", row, torch.tensor([-math.inf, 1.1, math.nan]))


def test_gradients_of_what_is_checked_do_not_matter(capsys):
    check("with a graph", torch.ones(2, requires_grad=True) * 2, torch.full((2,), 2.0))
    check("half", torch.ones(2, dtype=torch.float16), torch.ones(2, dtype=torch.float64))
    assert capsys.readouterr().out.count("✓") == 2


def test_a_failed_check_is_an_assertion():
    assert issubclass(CheckFailed, AssertionError)


def test_bad_tolerances_are_refused():
    for tolerance in (-1.0, math.nan):
        with pytest.raises(ValueError, match="tolerance: expected a number of at least 0"):
            check("it", 1.0, 1.0, tolerance)
    with pytest.raises(ValueError, match="compares no numbers"):
        check("it", "a", "a", 0.1)


def test_a_range_prints_no_measured_value(capsys):
    check_range("loss", torch.tensor(1.8123), 1.5, 2.0)
    check_range("edge", 2, 1.5, 2)
    assert capsys.readouterr().out == "✓ loss: between 1.5 and 2\n✓ edge: between 1.5 and 2\n"


@pytest.mark.parametrize("value", [1.49, 2.01, math.nan])
def test_outside_a_range_raises(value):
    with pytest.raises(CheckFailed, match="loss: got .*, expected 1.5 to 2"):
        check_range("loss", value, 1.5, 2.0)


def test_a_range_the_wrong_way_round_is_refused():
    with pytest.raises(ValueError, match="low <= high"):
        check_range("loss", 1.0, 2.0, 1.0)


def test_a_function_keeps_its_name_whatever_is_imported_first():
    """The files exercise.py and explore.py must not take the place of the functions."""
    code = (
        "import importlib, corelib.teach as t\n"
        "for name, home in t._HOME.items():\n"
        "    importlib.import_module(f'corelib.teach.{home}')\n"
        "    assert callable(getattr(t, name)), name\n"
        "from corelib.teach import check, claim, exercise, explore, solution\n"
        "assert t.explore is explore and t.exercise is exercise and callable(exercise)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_an_unknown_name_is_an_attribute_error():
    import corelib.teach as teach

    with pytest.raises(AttributeError, match="no attribute 'cheque'"):
        teach.cheque  # noqa: B018


def test_figures_are_at_hand_too():
    import corelib.teach as teach

    for name in teach.figures.__all__:
        assert getattr(teach, name) is getattr(teach.figures, name)
