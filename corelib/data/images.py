"""Handwritten digits and two photographs, read from the installed scikit-learn."""

from __future__ import annotations

import functools
import importlib.util
import pathlib

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

PHOTOGRAPHS = ("china", "flower")
#: Rows of each split after a fixed shuffle; 1,797 in all.
DIGIT_SPLITS = {"train": (0, 1200), "valid": (1200, 1400), "test": (1400, 1797)}


def _datasets() -> pathlib.Path:
    """The folder of scikit-learn's data: importing the library would take seconds."""
    found = importlib.util.find_spec("sklearn")
    if found is None:
        raise ModuleNotFoundError(
            "the images come with scikit-learn, which is not installed; "
            "bring it with: pip install scikit-learn"
        )
    return pathlib.Path(found.submodule_search_locations[0]) / "datasets"


def digits(split: str) -> tuple[Float[Tensor, "N 8 8"], Int[Tensor, " N"]]:
    """Handwritten digits, 8 by 8 pixels from 0 (paper) to 1 (ink), and which digit each is.

    ``split``: ``"train"`` (1,200), ``"valid"`` (200) or ``"test"`` (397). No image is in two.

    Raises ``ValueError`` for an unknown split, ``ModuleNotFoundError`` without scikit-learn.
    """
    if split not in DIGIT_SPLITS:
        raise ValueError(f"split: expected one of {tuple(DIGIT_SPLITS)}, got {split!r}")
    images, labels = _shuffled_digits()
    chosen = slice(*DIGIT_SPLITS[split])
    return images[chosen].clone(), labels[chosen].clone()


@functools.cache
def _shuffled_digits() -> tuple[Tensor, Tensor]:
    table = np.loadtxt(_datasets() / "data" / "digits.csv.gz", delimiter=",", dtype=np.int64)
    rows = torch.from_numpy(table)  # 64 grey levels from 0 to 16, then the digit
    rows = rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))]
    return rows[:, :64].view(-1, 8, 8).float() / 16, rows[:, 64].clone()


def photograph(name: str) -> UInt8[Tensor, "427 640 3"]:
    """``"china"`` (a temple roof) or ``"flower"``: red, green and blue bytes.

    Raises ``ValueError`` for an unknown name, ``ModuleNotFoundError`` without scikit-learn.
    """
    if name not in PHOTOGRAPHS:
        raise ValueError(f"name: expected one of {PHOTOGRAPHS}, got {name!r}")
    from PIL import Image

    with Image.open(_datasets() / "images" / f"{name}.jpg") as image:
        return torch.from_numpy(np.array(image))


def upsample(images: Float[Tensor, "N R R"], side: int) -> Float[Tensor, "N side side"]:
    """Each image at ``side`` by ``side`` pixels, bilinear."""
    if side < 1:
        raise ValueError(f"side: expected at least 1, got {side}")
    options = dict(size=(side, side), mode="bilinear", align_corners=False)
    return torch.nn.functional.interpolate(images[:, None], **options)[:, 0]
