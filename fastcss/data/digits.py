"""Handwritten digits in real scenes: a small segmentation data set that needs no download."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import Dataset

#: Name of each label: 0 is the background, d + 1 the digit d.
CLASSES = ("background", "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
SIZE = 128  # of a scene, both ways
MOST_DIGITS = 4

#: Of every ten handwritten digits of a class, which belong to a split: no digit is in two.
SPLITS = {"train": range(7), "val": range(7, 8), "test": range(8, 10)}


class DigitScenes(Dataset):
    """One to four handwritten digits, scaled, rotated and coloured, on crops of two photographs.

    Scene i of a split follows from ``(seed, split, i)`` alone: in any order, subset or worker process it is the same.
    The handwriting of a split is in no other split, whatever the seeds.

    Args:
        split: "train", "val" or "test".
        count: scenes drawn, numbered from 0.
        seed: of all draws.
        classes: labels from 1 to 10; keeps the scenes that show at least one of them, and labels all other digits as
            background, which is the overlapped protocol of continual segmentation. None keeps everything.

    Attributes:
        indices: number of each scene kept; ``range(count)`` without ``classes``.

    Raises:
        ValueError: an unknown split, a negative count or seed, a class that is none or given twice.
        ModuleNotFoundError: scikit-learn, which brings digits and photographs, or Pillow is not installed.

    Each item is ``(image, labels)``: float32 ``[3, 128, 128]`` in 0…1, and int64 ``[128, 128]`` of 0…10 (see
    ``CLASSES``). Every pixel counts, none is 255.

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
        _photographs()  # what is missing is missed here, not in a worker process
        self.indices: Sequence[int] = range(count)
        if classes is not None:
            self.indices = [i for i in range(count) if not set(classes).isdisjoint(self.digits(i))]

    def __len__(self) -> int:
        return len(self.indices)

    def digits(self, scene: int) -> list[int]:
        """Labels of the digits in a scene, from the lowest to the topmost; its number is one of ``indices``."""
        return self._draw(scene)[1].tolist()

    def _draw(self, scene: int) -> tuple[np.random.Generator, np.ndarray]:
        """The scene's generator, after the first thing it gives: what digits there are."""
        random = np.random.default_rng([self.seed, list(SPLITS).index(self.split), scene])
        return random, random.integers(1, len(CLASSES), size=random.integers(1, MOST_DIGITS + 1))

    def __getitem__(self, item: int) -> tuple[Tensor, Tensor]:
        random, digits = self._draw(self.indices[item])
        image = _background(random)
        labels = torch.zeros(SIZE, SIZE, dtype=torch.int64)
        for label in digits.tolist():
            drawings = self._handwriting[label - 1]
            _put(image, labels, label, _warp(drawings[random.integers(len(drawings))], random), random)
        if self.classes is not None:
            labels[~torch.isin(labels, torch.tensor(self.classes))] = 0
        return image.clamp_(0, 1), labels


def _put(image: Tensor, labels: Tensor, label: int, opacity: Tensor, random: np.random.Generator) -> None:
    """Lay a warped digit on the scene, in place, where it covers little of those before it."""
    height, width = opacity.shape
    ink = opacity > 0.5
    places = [(random.integers(SIZE - height + 1), random.integers(SIZE - width + 1)) for _ in range(24)]
    here, covered = None, torch.inf
    for top, left in places:
        place = (slice(top, top + height), slice(left, left + width))
        covers = torch.count_nonzero(labels[place][ink]).item()
        if covers < covered:
            here, covered = place, covers
        if covered == 0:
            break
    region = image[(slice(None), *here)]
    region += opacity * (_color(region[:, opacity > 0.1], random) - region)
    labels[here][ink] = label


def _color(behind: Tensor, random: np.random.Generator) -> Tensor:
    """A colour [3, 1, 1] that stands out from the pixels ``behind`` [3, n]: of a few the first to, or the best."""
    candidates = torch.from_numpy(random.random((12, 3), dtype=np.float32))
    brightness = torch.tensor([0.299, 0.587, 0.114])
    contrast = (candidates @ brightness)[:, None] - brightness @ behind  # [12, n]
    # In nine of ten pixels at least so far from what is behind.
    clear = contrast.abs().quantile(0.1, dim=1)
    enough = torch.nonzero(clear > 0.3)
    return candidates[enough[0, 0] if len(enough) else clear.argmax()][:, None, None]


def _warp(drawing: Tensor, random: np.random.Generator) -> Tensor:
    """A drawing [8, 8] in 0…1, turned, slanted and enlarged, as an opacity [height, width] cut to its ink."""
    scale = random.uniform(4.5, 8.0)  # pixels of the scene for one of the drawing
    angle, slant, stretch = random.uniform(-0.35, 0.35), random.uniform(-0.2, 0.2), random.uniform(0.85, 1.15)
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    matrix = np.linalg.inv(scale * turn @ np.array([[stretch, slant], [0, 1 / stretch]]))  # scene → drawing
    side = int(scale * 13)  # room for the diagonal
    theta = torch.zeros(1, 2, 3)
    theta[0, :, :2] = torch.from_numpy(matrix * (side / 8))
    grid = F.affine_grid(theta, [1, 1, side, side], align_corners=False)
    drawing = F.grid_sample(drawing[None, None], grid, mode="bicubic", align_corners=False)[0, 0]
    # The slope makes edges about two pixels wide at any scale, as a lens would.
    opacity = (0.5 + (drawing - 0.5) * (scale / 2)).clamp(0, 1)
    rows, columns = torch.nonzero(opacity.amax(1))[:, 0], torch.nonzero(opacity.amax(0))[:, 0]
    return opacity[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]


def _background(random: np.random.Generator) -> Tensor:
    """A square of one of the photographs, sometimes mirrored, made [3, 128, 128]."""
    pictures = _photographs()
    picture = pictures[random.integers(len(pictures))]
    side = random.integers(SIZE, min(picture.shape[1:]) + 1)
    top, left = (random.integers(length - side + 1) for length in picture.shape[1:])
    square = picture[:, top : top + side, left : left + side]
    if random.random() < 0.5:
        square = square.flip(2)
    return F.interpolate(square[None], (SIZE, SIZE), mode="bilinear", antialias=True, align_corners=False)[0]


@functools.cache
def _photographs() -> tuple[Tensor, ...]:
    """scikit-learn's, each [3, 427, 640] in 0…1."""
    try:
        import PIL  # noqa: F401  what scikit-learn reads them with
        from sklearn.datasets import load_sample_images
    except ModuleNotFoundError as error:
        raise _needs_extra(error) from error
    return tuple(
        torch.from_numpy(picture / np.float32(255)).permute(2, 0, 1).contiguous()
        for picture in load_sample_images().images
    )


@functools.cache
def _handwriting(split: str) -> tuple[Tensor, ...]:
    """For each of the ten digits what the split may use of scikit-learn's drawings, [n, 8, 8] in 0…1."""
    try:
        from sklearn.datasets import load_digits
    except ModuleNotFoundError as error:
        raise _needs_extra(error) from error
    drawings, digits = load_digits(return_X_y=True)
    drawings = torch.from_numpy(drawings.reshape(-1, 8, 8) / np.float32(16)).float()
    chosen = []
    for digit in range(10):
        mine = drawings[digits == digit]
        chosen.append(mine[[i for i in range(len(mine)) if i % 10 in SPLITS[split]]])
    return tuple(chosen)


def _needs_extra(error: ModuleNotFoundError) -> ModuleNotFoundError:
    return ModuleNotFoundError(
        f"DigitScenes needs scikit-learn's digits and photographs, and {error.name} is not installed: "
        "pip install 'fastcss[data]'",
        name=error.name,
    )
