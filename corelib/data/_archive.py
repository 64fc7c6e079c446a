"""Reading the packed texts and tables of this folder."""

from __future__ import annotations

import functools
import pathlib
import tarfile

FOLDER = pathlib.Path(__file__).parent


@functools.cache
def read_archive(name: str, folder: pathlib.Path = FOLDER) -> dict[str, str]:
    """File name -> text of everything in ``name.tar.xz``.

    Raises ``FileNotFoundError``, naming the command that brings it, for a missing archive.
    """
    path = folder / f"{name}.tar.xz"
    if not path.exists():
        raise FileNotFoundError(
            f"the data file {path.name} is missing from {folder}; "
            "bring it with: python -m corelib.data.build"
        )
    with tarfile.open(path) as tar:
        return {m.name: tar.extractfile(m).read().decode("utf-8") for m in tar.getmembers()}
