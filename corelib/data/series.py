"""Measured time series with daily, yearly or longer seasons, as they were recorded.

>>> from corelib.data import series
>>> series("co2").values.shape, series("co2").season
((2284, 1), 52)
"""

from __future__ import annotations

import csv
import pathlib
from typing import NamedTuple

import numpy as np

from ._archive import FOLDER, read_archive


class Series(NamedTuple):
    """One row per time step, oldest first.

    ``values (N, C)`` float64, gaps filled linearly; ``missing (N, C)`` says where; ``columns``
    names what was measured, with its unit; ``dates`` are ISO 8601; ``step`` is the time between
    rows; ``season`` the number of steps in the most visible period, rounded.
    """

    values: np.ndarray
    missing: np.ndarray
    columns: tuple[str, ...]
    dates: tuple[str, ...]
    step: str
    season: int


#: Name -> (step, season in steps). Origins and licences are in the README of this folder.
SERIES = {
    "co2": ("week", 52),  # Mauna Loa, 1958 to 2001: a trend and a yearly season
    "sea_temperature": ("month", 12),  # Pacific off Peru (Nino 1+2), 1950 to 2010: El Nino
    "seattle_weather": ("day", 365),  # four columns, 2012 to 2015
    "seattle_hours": ("hour", 24),  # the average year hour by hour (1981 to 2010): a daily season
    "sunspots": ("month", 131),  # 1749 to 2009: cycles of about eleven years
}


def series(name: str, folder: pathlib.Path = FOLDER) -> Series:
    """The series called ``name``; the names are the keys of `SERIES`.

    Raises ``ValueError`` for an unknown name and ``FileNotFoundError``, naming the command that
    brings it, for missing data.
    """
    if name not in SERIES:
        raise ValueError(f"name: expected one of {tuple(SERIES)}, got {name!r}")
    table = read_archive("series", pathlib.Path(folder))[f"{name}.csv"]
    (_, *columns), *rows = csv.reader(table.splitlines())
    raw = np.array([[float(x) if x else np.nan for x in row[1:]] for row in rows])
    step, season = SERIES[name]
    dates = tuple(row[0] for row in rows)
    return Series(_filled(raw), np.isnan(raw), tuple(columns), dates, step, season)


def _filled(raw: np.ndarray) -> np.ndarray:
    """Gaps become straight lines between their neighbours in time."""
    filled, time = raw.copy(), np.arange(len(raw))
    for column in filled.T:
        gap = np.isnan(column)
        column[gap] = np.interp(time[gap], time[~gap], column[~gap])
    return filled


def chronological_split(
    values: np.ndarray, *, train: float = 0.7, valid: float = 0.1
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The first ``train`` share of the rows, the next ``valid`` share, and the rest."""
    if not (train > 0 and valid >= 0 and train + valid < 1):
        raise ValueError(
            f"train, valid: expected shares with train > 0 and a sum below 1, got {train}, {valid}"
        )
    first, second = round(train * len(values)), round((train + valid) * len(values))
    return values[:first], values[first:second], values[second:]
