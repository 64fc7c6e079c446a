"""The shipped series: their lengths, dates and seasons, gaps that are filled and marked."""

import datetime
import zipfile

import numpy as np
import pytest

from corelib.data import SERIES, build_numbers, chronological_split, series

LENGTHS = {
    "co2": 2284,
    "sea_temperature": 732,
    "seattle_weather": 1461,
    "seattle_hours": 8759,
    "sunspots": 3126,
}


@pytest.mark.parametrize("name", SERIES)
def test_every_series_is_whole(name):
    found = series(name)
    assert found.values.shape == found.missing.shape == (LENGTHS[name], len(found.columns))
    assert len(found.dates) == LENGTHS[name] and found.dates == tuple(sorted(set(found.dates)))
    assert np.isfinite(found.values).all() and found.values.std(0).min() > 0


@pytest.mark.parametrize("name", SERIES)
def test_the_season_is_in_the_numbers(name):
    """What is one season apart is more alike than what is half a season apart."""
    found = series(name)
    column = found.values[:, 1 if name == "seattle_weather" else 0]
    if name == "co2":  # without its trend
        column = column - np.polyval(np.polyfit(np.arange(len(column)), column, 2), range(2284))

    def alike(lag):
        return np.corrcoef(column[:-lag], column[lag:])[0, 1]

    assert alike(found.season) > 0.3 and alike(found.season) > alike(found.season // 2) + 0.3


def test_dates_are_evenly_spaced():
    for name, days in {"co2": 7, "seattle_weather": 1}.items():
        dates = [datetime.date.fromisoformat(date) for date in series(name).dates]
        assert {(b - a).days for a, b in zip(dates, dates[1:])} == {days}


def test_known_values():
    co2 = series("co2")
    assert (co2.dates[0], co2.values[0, 0]) == ("1958-03-29", 316.1)
    assert (co2.dates[-1], co2.values[-1, 0]) == ("2001-12-29", 371.5)
    spots = series("sunspots")
    at = spots.dates.index("1957-10")  # the largest monthly mean of the solar maximum
    assert spots.values[at, 0] == pytest.approx(253.8)


def test_gaps_are_straight_lines():
    co2 = series("co2")
    assert co2.missing.sum() == 59 and not co2.missing[[0, -1]].any()
    first = int(co2.missing[:, 0].argmax())
    gap = 1
    while co2.missing[first + gap, 0]:
        gap += 1
    ends = co2.values[[first - 1, first + gap], 0]
    line = np.linspace(*ends, gap + 2)
    np.testing.assert_allclose(co2.values[first - 1 : first + gap + 1, 0], line)


def test_split_keeps_the_order_and_every_row():
    parts = chronological_split(np.arange(103), train=0.7, valid=0.1)
    assert [len(part) for part in parts] == [72, 10, 21]
    assert np.array_equal(np.concatenate(parts), np.arange(103))


def test_month_tables_may_end_early():
    rows = build_numbers._months([["1999", *"123456789", "10", "11", "12"], ["2000", "1.50"]])
    assert rows[0] == ["1999-01", "1"] and rows[11:] == [["1999-12", "12"], ["2000-01", "1.5"]]


def packed(path, members):
    with zipfile.ZipFile(path, "w") as wheel:
        for name, text in members.items():
            wheel.writestr(name, text)
    return path


def test_tables_are_read_out_of_the_packages(tmp_path):
    folder = "statsmodels/datasets"
    dots = "MONTHLY MEANS\nYear Jan Feb\n----\n1749 58.0 62.6\n\n1750 0.0\nNote: 2 years\n"
    wheel = packed(
        tmp_path / "statsmodels.whl",
        {
            f"{folder}/co2/co2.csv": "date,co2\n19580329,316.1\n19580405,\n",
            f"{folder}/elnino/elnino.csv": '"YEAR","JAN","FEB"\n1950,23.110,24.200\n',
            f"{folder}/sunspots/src/sunspots_monthly.dat": dots,
        },
    )
    found = build_numbers.statsmodels_series(wheel)
    assert found["co2.csv"] == b"week,CO2 (ppm)\n1958-03-29,316.1\n1958-04-05,\n"
    assert found["sea_temperature.csv"].decode().splitlines()[1:] == [
        "1950-01,23.11",
        "1950-02,24.2",
    ]
    rows = found["sunspots.csv"].decode().splitlines()[1:]
    assert rows == ["1749-01,58", "1749-02,62.6", "1750-01,0"]
    weather = (
        "date,precipitation,temp_max,temp_min,wind,weather\n2012/01/01,0.5,12.8,5.0,4.7,rain\n"
    )
    wheel = packed(
        tmp_path / "vega.whl",
        {
            "vega_datasets/_data/seattle-weather.csv": weather,
            "vega_datasets/_data/seattle-temps.csv": "date,temp\n2010/01/01 23:00,39.4\n",
        },
    )
    found = build_numbers.vega_series(wheel)
    assert found["seattle_weather.csv"].decode().splitlines()[1] == "2012-01-01,0.5,12.8,5.0,4.7"
    assert found["seattle_hours.csv"].decode().splitlines()[1] == "2010-01-01T23:00,39.4"


@pytest.mark.no_shape_checks
def test_errors_name_what_is_wrong(tmp_path):
    with pytest.raises(ValueError, match="name: expected one of .*co2.*, got 'ozone'"):
        series("ozone")
    with pytest.raises(FileNotFoundError, match="python -m corelib.data.build"):
        series("co2", folder=tmp_path)
    with pytest.raises(ValueError, match="sum below 1"):
        chronological_split(np.zeros(9), train=0.9, valid=0.1)
