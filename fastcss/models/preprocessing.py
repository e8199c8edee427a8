"""Prepares a picture for the two models: for Grounding DINO in its own shape, for SAM in a square."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

#: Mean and deviation of ImageNet's pixels, for red, green and blue in 0…1; both models were trained with them.
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Picture(NamedTuple):
    """Holds a picture as ``preprocess`` prepares it.

    Attributes:
        pixel_values: ``[3, h, w]`` for the detector.
        sam_pixel_values: ``[3, S, S]`` for SAM, with zeros right of and below the picture.
        size: (height, width) of the original picture.
        crop: (height, width) of the picture within ``sam_pixel_values``.
    """

    pixel_values: Tensor
    sam_pixel_values: Tensor
    size: tuple[int, int]
    crop: tuple[int, int]


def preprocess(image: Tensor, *, sam_side: int = 1024, shortest: int = 800, longest: int = 1333) -> Picture:
    """Resize and normalise a picture for Grounding DINO and for SAM, as their own processors do.

    Args:
        image: ``[3, H, W]`` in 0…1, floating point.
        sam_side: S, ``SamSegmenter.image_size``; the picture's longer side becomes this.
        shortest: length of the picture's shorter side for the detector; less if the longer would exceed ``longest``.
        longest: largest length of the picture's longer side for the detector.

    Raises:
        TypeError, ValueError: ``image`` is no picture; the message says why.

    Source: the image processors of Grounding DINO and of segment-anything. They round the resized picture to 8 bits
    and this function does not: the values differ by less than 1/255 before normalisation.

    Example:
        >>> preprocess(torch.rand(3, 375, 500)).crop
        (768, 1024)
    """
    if not image.is_floating_point():
        raise TypeError(f"preprocess: image must be floating point in 0…1, got {image.dtype}")
    if image.dim() != 3 or image.shape[0] != 3 or 0 in image.shape:
        raise ValueError(f"preprocess: image must be [3, H, W] with at least one pixel, got {list(image.shape)}")
    size = (image.shape[1], image.shape[2])
    scale = sam_side / max(size)
    height, width = (max(1, int(side * scale + 0.5)) for side in size)
    crop = (height, width)
    padding = (0, sam_side - crop[1], 0, sam_side - crop[0])
    return Picture(
        pixel_values=_normalise(_resize(image, _detector_size(size, shortest, longest))),
        sam_pixel_values=F.pad(_normalise(_resize(image, crop)), padding),
        size=size,
        crop=crop,
    )


def _detector_size(size: tuple[int, int], shortest: int, longest: int) -> tuple[int, int]:
    """Return the detector's size, rounded as in Grounding DINO: the shorter side to the nearest, the longer down."""
    short, long = min(size), max(size)
    exact = min(shortest, longest * short / long)
    becomes = {short: max(1, round(exact)), long: max(1, int(exact * long / short))}
    return becomes[size[0]], becomes[size[1]]


def _resize(image: Tensor, size: tuple[int, int]) -> Tensor:
    # Bilinear with antialiasing equals Pillow's resizing, which the models' own processors use.
    return F.interpolate(image[None], size, mode="bilinear", antialias=True, align_corners=False)[0]


def _normalise(image: Tensor) -> Tensor:
    mean, std = (torch.tensor(of, dtype=image.dtype, device=image.device)[:, None, None] for of in (MEAN, STD))
    return (image - mean) / std
