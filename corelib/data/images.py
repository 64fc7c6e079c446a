"""Handwritten digits and two photographs, read from the installed scikit-learn."""

from __future__ import annotations

import functools
import importlib
from types import ModuleType

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

PHOTOGRAPHS = ("china", "flower")
#: Rows of each split after a fixed shuffle; 1,797 in all.
DIGIT_SPLITS = {"train": (0, 1200), "valid": (1200, 1400), "test": (1400, 1797)}


def _datasets() -> ModuleType:
    try:
        return importlib.import_module("sklearn.datasets")
    except ImportError as error:
        raise ModuleNotFoundError(
            "the images come with scikit-learn, which is not installed; "
            "bring it with: pip install scikit-learn"
        ) from error


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
    bunch = _datasets().load_digits()
    order = torch.randperm(len(bunch.target), generator=torch.Generator().manual_seed(0))
    images = torch.from_numpy(bunch.images).float() / 16
    return images[order], torch.from_numpy(bunch.target).long()[order]


def photograph(name: str) -> UInt8[Tensor, "427 640 3"]:
    """``"china"`` (a temple roof) or ``"flower"``: red, green and blue bytes.

    Raises ``ValueError`` for an unknown name, ``ModuleNotFoundError`` without scikit-learn.
    """
    if name not in PHOTOGRAPHS:
        raise ValueError(f"name: expected one of {PHOTOGRAPHS}, got {name!r}")
    return torch.from_numpy(_datasets().load_sample_image(f"{name}.jpg").copy())


def upsample(images: Float[Tensor, "N R R"], side: int) -> Float[Tensor, "N side side"]:
    """Each image at ``side`` by ``side`` pixels, bilinear."""
    if side < 1:
        raise ValueError(f"side: expected at least 1, got {side}")
    options = dict(size=(side, side), mode="bilinear", align_corners=False)
    return torch.nn.functional.interpolate(images[:, None], **options)[:, 0]
