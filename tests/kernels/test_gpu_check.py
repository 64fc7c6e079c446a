"""What `make gpu-check` does, as far as it shows without a GPU."""

import json
import pathlib

import pytest

from corelib.kernels import report


@pytest.mark.slow
@pytest.mark.counted
@pytest.mark.parametrize("module", report.kernel_modules())
def test_kernels_and_their_peers_compute_the_same(interpreter, module):
    """Each race at a small size."""
    found = interpreter.call("corelib.kernels.gates.gpu_races:agree_on_small_ground", module)
    assert found, f"{module} has no race"
    for title, names in found.items():
        assert names[0].startswith("kernel"), title
    met = [any(not name.startswith("kernel") for name in names) for names in found.values()]
    assert all(met) or module == "diagonal_scan"  # whose one peer, fla's, runs on a GPU alone


def test_a_peer_that_computes_something_else_is_refused():
    import torch

    from corelib.kernels.gates.gpu_ground import Contest, agreeing

    one = torch.ones(3)
    good = {"kernel": lambda: one, "peer": lambda: one + 1e-6, "broken": lambda: 1 / 0}
    assert list(agreeing(Contest(good))) == ["kernel", "peer"]
    with pytest.raises(ValueError, match="peer"):
        agreeing(Contest(good | {"peer": lambda: one + 1e-2}))
    with pytest.raises(ZeroDivisionError):
        agreeing(Contest({"kernel": lambda: 1 / 0}))


def test_without_a_gpu_nothing_is_checked_and_nothing_recorded(capsys, monkeypatch):
    import torch

    from corelib.kernels.gates import gpu_check

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(gpu_check, "write", lambda *given: pytest.fail("recorded"))
    assert gpu_check.main() == 0 and "nothing was checked" in capsys.readouterr().out


def test_what_passed_is_recorded_with_its_versions_and_what_failed_is_not(monkeypatch):
    import torch

    from corelib.kernels.gates import gpu_check

    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Some GPU")
    monkeypatch.setattr(gpu_check, "target_of", lambda: "sm_90")
    monkeypatch.setattr(gpu_check, "run_tests", lambda modules: {"a": [], "b": ["test_b"], "c": []})
    raced = {"a": {"microseconds": {"race": {"kernel": 1.0}}, "problems": []}}
    raced["c"] = {"microseconds": {}, "problems": ["peer disagrees"]}
    monkeypatch.setattr(gpu_check, "run_races", lambda modules: {m: raced[m] for m in modules})
    older = {"device": "Some GPU", "date": "2020-01-01"}
    card = {"modules": {x: {"hash": x, "runs": []} for x in "abc"}}
    card["modules"]["a"]["runs"].append(older)
    assert gpu_check.check(["a", "b", "c"], card) == ["b", "c"]
    (run,) = card["modules"]["a"]["runs"]
    assert run["device"] == "Some GPU" and run["target"] == "sm_90" and run["hash"] == "a"
    assert run["torch"] == torch.__version__ and run["microseconds"] == {"race": {"kernel": 1.0}}
    assert card["modules"]["b"]["runs"] == card["modules"]["c"]["runs"] == []


def test_a_module_fails_with_its_own_tests_and_when_none_ran(monkeypatch):
    from types import SimpleNamespace

    from corelib.kernels.gates import gpu_check

    outcomes = {
        "tests/kernels/test_ssd.py::test_good": {"outcome": "passed"},
        "tests/kernels/test_selective_scan.py::test_good": {"outcome": "passed"},
        "tests/kernels/test_selective_scan_int8.py::test_bad": {"outcome": "failed"},
    }

    def run(command, **options):
        assert options["env"]["CORELIB_KERNELS"] == "native"
        pathlib.Path(command[command.index("--record") + 1]).write_text(json.dumps(outcomes))
        return SimpleNamespace(stdout="", returncode=1)

    monkeypatch.setattr(gpu_check.subprocess, "run", run)
    failed = gpu_check.run_tests(["ssd", "selective_scan", "selective_scan_int8", "adaln"])
    assert failed == {
        "ssd": [],
        "selective_scan": [],
        "selective_scan_int8": ["tests/kernels/test_selective_scan_int8.py::test_bad"],
        "adaln": ["no test of adaln ran"],
    }
