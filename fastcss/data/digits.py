"""Puts handwritten digits into real scenes: a small segmentation data set that needs no download."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from ._scenes import SIZE, background, needs_extra, photographs, put, warp

#: The name of each label: 0 is the background, d + 1 the digit d.
CLASSES = ("background", "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
MOST_DIGITS = 4

#: Each split gets these of every ten handwritten digits of a class, so that no digit is in two splits.
SPLITS = {"train": range(7), "val": range(7, 8), "test": range(8, 10)}


class DigitScenes(Dataset):
    """Lays one to four handwritten digits, scaled, rotated and coloured, on crops of two photographs.

    Scene i of a split depends on ``(seed, split, i)`` alone: in any order, subset or worker process it is the same.
    The handwriting of a split is in no other split, whatever the seeds.

    Args:
        split: "train", "val" or "test".
        count: how many scenes are drawn, numbered from 0.
        seed: seed of all draws.
        classes: labels from 1 to 10; keeps the scenes that show at least one of them, and labels all other digits as
            background, which is the overlapped protocol of continual segmentation. None keeps everything.

    Attributes:
        indices: number of each scene kept; ``range(count)`` without ``classes``.

    Raises:
        ValueError: the split is unknown, the count or seed is negative, or a class does not exist or is given twice.
        ModuleNotFoundError: scikit-learn, which brings digits and photographs, or Pillow is not installed.

    Each item is ``(image, labels)``: float32 ``[3, 128, 128]`` in 0…1, and int64 ``[128, 128]`` of 0…10 (see
    ``CLASSES``). Every pixel counts; none is 255.

    Example:
        >>> image, labels = DigitScenes("test", count=100)[3]
    """

    def __init__(self, split: str, count: int, *, seed: int = 0, classes: Sequence[int] | None = None) -> None:
        if split not in SPLITS:
            raise ValueError(f"DigitScenes: split must be one of {', '.join(SPLITS)}, got {split!r}")
        for name, value in (("count", count), ("seed", seed)):
            if value < 0:
                raise ValueError(f"DigitScenes: {name} must be at least 0, got {value}")
        if classes is not None:
            classes = tuple(classes)
            if len(set(classes)) < len(classes) or not set(classes) <= set(range(1, len(CLASSES))):
                raise ValueError(
                    f"DigitScenes: classes must be different labels from 1 to {len(CLASSES) - 1}, got {classes}"
                )
        self.split, self.seed, self.classes = split, seed, classes
        self._handwriting = _handwriting(split)
        photographs()  # a missing package is reported here, not in a worker process
        self.indices: Sequence[int] = range(count)
        if classes is not None:
            self.indices = [i for i in range(count) if not set(classes).isdisjoint(self.digits(i))]

    def __len__(self) -> int:
        return len(self.indices)

    def digits(self, scene: int) -> list[int]:
        """Return the labels of a scene's digits, from the lowest to the topmost; its number is one of ``indices``."""
        return self._draw(scene)[1].tolist()

    def _draw(self, scene: int) -> tuple[np.random.Generator, np.ndarray]:
        """Return the scene's generator, and the digits of the scene, which are the first draw from it."""
        random = np.random.default_rng([self.seed, list(SPLITS).index(self.split), scene])
        return random, random.integers(1, len(CLASSES), size=random.integers(1, MOST_DIGITS + 1))

    def __getitem__(self, item: int) -> tuple[Tensor, Tensor]:
        random, digits = self._draw(self.indices[item])
        image = background(random)
        labels = torch.zeros(SIZE, SIZE, dtype=torch.int64)
        for label in digits.tolist():
            drawings = self._handwriting[label - 1]
            put(image, labels, label, warp(drawings[random.integers(len(drawings))], random), random)
        if self.classes is not None:
            labels[~torch.isin(labels, torch.tensor(self.classes))] = 0
        return image.clamp_(0, 1), labels


@functools.cache
def _handwriting(split: str) -> tuple[Tensor, ...]:
    """Return for each of the ten digits scikit-learn's drawings that the split may use, [n, 8, 8] in 0…1."""
    try:
        from sklearn.datasets import load_digits
    except ModuleNotFoundError as error:
        raise needs_extra(error) from error
    drawings, digits = load_digits(return_X_y=True)
    drawings = torch.from_numpy(drawings.reshape(-1, 8, 8) / np.float32(16)).float()
    chosen = []
    for digit in range(10):
        mine = drawings[digits == digit]
        chosen.append(mine[[i for i in range(len(mine)) if i % 10 in SPLITS[split]]])
    return tuple(chosen)
