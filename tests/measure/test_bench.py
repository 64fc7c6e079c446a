"""The registry of races and the table that make bench writes."""

import json

import pytest

from corelib.measure import (
    Missing,
    Race,
    Row,
    Sweep,
    bench,
    peer,
    races,
    register,
    registered,
    rows,
    this_machine,
)


@pytest.fixture
def registry(monkeypatch):
    """An empty registry, and no race modules to load."""
    monkeypatch.setattr(races, "_REGISTRY", {})
    monkeypatch.setattr(races, "__path__", [])


def _race(scale=1.0, missing=()):
    times = {"corelib": [scale], "peer": [2 * scale]}
    return Race(times, "corelib", "a machine", 0.0, dict(missing))


def test_register_and_run(registry, tmp_path, capsys):
    @register("toy-one", "a toy")
    def toy(quick):
        assert quick
        yield from rows(_race(missing={"rival": "not installed"}), what="forward", shape="B1")

    @register("toy-two", "a broken toy")
    def broken(quick):
        raise RuntimeError("out of luck")

    assert list(registered()) == ["toy-one", "toy-two"]
    target = tmp_path / "deep" / "bench.json"
    assert bench.main(["--quick", "--json", str(target)]) == 1  # one race failed
    page, data = target.with_suffix(".md").read_text(), json.loads(target.read_text())
    assert "RuntimeError: out of luck" in page and "not installed" in page and "2.00" in page
    assert [row["contestant"] for row in data["races"][0]["rows"]] == ["corelib", "peer", "rival"]
    assert data["races"][1]["error"] == "RuntimeError: out of luck" and data["machine"]
    assert bench.main(["toy-one", "--quick", "--json", str(target)]) == 0
    assert "1/1 toy-one" in capsys.readouterr().out


def test_names(registry, capsys):
    register("decode-one", "x")(lambda quick: [])
    register("decode-two", "y")(lambda quick: [])
    register("scan", "z")(lambda quick: [])
    assert [race.name for race in bench.choose(["decode"])] == ["decode-one", "decode-two"]
    assert [race.name for race in bench.choose([])] == ["decode-one", "decode-two", "scan"]
    with pytest.raises(ValueError, match="no race called 'x'"):
        bench.choose(["x"])
    with pytest.raises(SystemExit):
        bench.main(["x"])
    assert bench.main(["--list"]) == 0 and "decode-two" in capsys.readouterr().out


def test_two_races_of_one_name(registry):
    register("scan", "x")(test_names)
    register("scan", "x")(test_names)  # the same function again: a module was reloaded
    with pytest.raises(ValueError, match="already a race called 'scan'"):
        register("scan", "x")(test_two_races_of_one_name)


def test_rows_of_a_sweep_carry_exponents_and_shares():
    lengths = (64, 128, 256, 512, 1024)
    result = Sweep(lengths, tuple(_race(n * 1e-6) for n in lengths))
    spec = this_machine()
    made = list(rows(result, what="f", shape="B1", traffic=lambda n: n, flops=lambda n: n * n))
    assert len(made) == 10
    first, last = made[0], made[-1]
    assert (first.shape, first.ratio, first.exponent) == ("B1 L64", 1.0, None)
    assert (last.shape, last.contestant, last.ratio) == ("B1 L1024", "peer", 2.0)
    assert last.exponent.value == pytest.approx(1.0)
    assert first.bandwidth_share == pytest.approx(1e6 / spec.bandwidth)
    assert last.gemm_share == pytest.approx(1024 / 2e-6 / spec.peak("float32"))


def test_a_race_without_corelib_has_no_ratios():
    assert [row.ratio for row in rows(_race(), what="f", corelib="ours")] == [None, None]
    assert Row("f", "s", "c").seconds is None


def test_a_peer_that_is_not_installed():
    assert isinstance(peer("no_such_package_at_all"), Missing)
    assert peer("json") is json


def test_every_registered_race_has_a_title():
    for name, race in registered().items():
        assert race.title and name == name.lower() and " " not in name
