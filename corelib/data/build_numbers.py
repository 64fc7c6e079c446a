"""The tables and sequences of this folder, taken out of the packages that publish them.

`corelib.data.build` packs what these functions return: file name -> bytes.
"""

from __future__ import annotations

import csv
import io
import pathlib
import re
import tarfile
import zipfile

STATSMODELS = "statsmodels==0.15.0"
VEGA = "vega_datasets==0.9.0"
BIOPYTHON = "biopython==1.88"
GENBANK = {"phix174": "Tests/GFF/NC_001422.gbk", "chloroplast": "Tests/GenBank/NC_000932.gb"}
MONTHS = range(1, 13)


def table(header: list[str], rows: list[list[str]]) -> bytes:
    """A CSV file with Unix line ends."""
    out = io.StringIO()
    csv.writer(out, lineterminator="\n").writerows([header, *rows])
    return out.getvalue().encode()


def _lines(wheel: pathlib.Path, member: str) -> list[str]:
    with zipfile.ZipFile(wheel) as archive:
        return archive.read(member).decode("utf-8").splitlines()


def statsmodels_series(wheel: pathlib.Path) -> dict[str, bytes]:
    """Carbon dioxide by the week, sea temperature and sunspots by the month."""
    folder = "statsmodels/datasets"
    co2 = [line.split(",") for line in _lines(wheel, f"{folder}/co2/co2.csv")[1:]]
    co2 = [[f"{d[:4]}-{d[4:6]}-{d[6:]}", value] for d, value in co2]
    years = [line.split(",") for line in _lines(wheel, f"{folder}/elnino/elnino.csv")[1:]]
    dots = _lines(wheel, f"{folder}/sunspots/src/sunspots_monthly.dat")
    spots = [line.split() for line in dots if re.match(r"\d{4} ", line)]
    return {
        "co2.csv": table(["week", "CO2 (ppm)"], co2),
        "sea_temperature.csv": table(["month", "sea surface temperature (°C)"], _months(years)),
        "sunspots.csv": table(["month", "sunspot number"], _months(spots)),
    }


def _months(years: list[list[str]]) -> list[list[str]]:
    """``[year, January, …]`` rows as one row a month; the last year may be shorter."""
    return [
        [f"{year}-{month:02d}", f"{float(value):g}"]
        for year, *values in years
        for month, value in zip(MONTHS, values)
    ]


def vega_series(wheel: pathlib.Path) -> dict[str, bytes]:
    """Seattle's weather by the day, and its average year by the hour."""
    days = csv.DictReader(_lines(wheel, "vega_datasets/_data/seattle-weather.csv"))
    units = {"precipitation": "mm", "temp_max": "°C", "temp_min": "°C", "wind": "m/s"}
    rows = [[day["date"].replace("/", "-"), *(day[name] for name in units)] for day in days]
    header = [f"{name.replace('_', ' ')} ({unit})" for name, unit in units.items()]
    hours = csv.reader(_lines(wheel, "vega_datasets/_data/seattle-temps.csv")[1:])
    hourly = [[date.replace("/", "-").replace(" ", "T"), value] for date, value in hours]
    return {
        "seattle_weather.csv": table(["day", *header], rows),
        "seattle_hours.csv": table(["hour", "temperature (°F)"], hourly),
    }


def genbank_sequence(text: str) -> str:
    """The letters behind ``ORIGIN`` in a GenBank record, in capitals."""
    _, _, body = text.partition("\nORIGIN")
    return re.sub(r"[^A-Z]", "", body.partition("\n//")[0].upper())


def genomes(archive: pathlib.Path) -> dict[str, bytes]:
    """Name -> letters, from the GenBank records in Biopython's tests."""
    root = archive.name.removesuffix(".tar.gz")
    with tarfile.open(archive) as tar:
        records = {n: tar.extractfile(f"{root}/{path}").read() for n, path in GENBANK.items()}
    return {f"{n}.txt": (genbank_sequence(r.decode()) + "\n").encode() for n, r in records.items()}
