"""Lays drawings on crops of photographs, to make the scenes of the offline data sets."""

from __future__ import annotations

import functools

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

SIZE = 128  # height and width of a scene, in pixels


def put(image: Tensor, labels: Tensor, label: int, opacity: Tensor, random: np.random.Generator) -> None:
    """Lay a warped drawing on the scene, in place, where it covers little of the drawings before it."""
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
    """Choose a colour [3, 1, 1] that stands out from the pixels ``behind`` [3, n].

    Of a few candidates it is the first with enough contrast, or else the best.
    """
    candidates = torch.from_numpy(random.random((12, 3), dtype=np.float32))
    brightness = torch.tensor([0.299, 0.587, 0.114])
    contrast = (candidates @ brightness)[:, None] - brightness @ behind  # [12, n]
    # The contrast is at least this large in nine of ten pixels.
    clear = contrast.abs().quantile(0.1, dim=1)
    enough = torch.nonzero(clear > 0.3)
    return candidates[enough[0, 0] if len(enough) else clear.argmax()][:, None, None]


def warp(drawing: Tensor, random: np.random.Generator) -> Tensor:
    """Turn, slant and enlarge a drawing [8, 8] in 0…1; return it as an opacity [height, width], cut to its ink."""
    scale = random.uniform(4.5, 8.0)  # pixels of the scene for one of the drawing
    angle, slant, stretch = random.uniform(-0.35, 0.35), random.uniform(-0.2, 0.2), random.uniform(0.85, 1.15)
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    matrix = np.linalg.inv(scale * turn @ np.array([[stretch, slant], [0, 1 / stretch]]))  # scene → drawing
    side = int(scale * 13)  # leaves room for the diagonal
    theta = torch.zeros(1, 2, 3)
    theta[0, :, :2] = torch.from_numpy(matrix * (side / 8))
    grid = F.affine_grid(theta, [1, 1, side, side], align_corners=False)
    drawing = F.grid_sample(drawing[None, None], grid, mode="bicubic", align_corners=False)[0, 0]
    # The slope makes edges about two pixels wide at any scale, as a lens would.
    opacity = (0.5 + (drawing - 0.5) * (scale / 2)).clamp(0, 1)
    rows, columns = torch.nonzero(opacity.amax(1))[:, 0], torch.nonzero(opacity.amax(0))[:, 0]
    return opacity[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]


def background(random: np.random.Generator) -> Tensor:
    """Cut a square from one of the photographs, sometimes mirror it, and resize it to [3, 128, 128]."""
    pictures = photographs()
    picture = pictures[random.integers(len(pictures))]
    side = random.integers(SIZE, min(picture.shape[1:]) + 1)
    top, left = (random.integers(length - side + 1) for length in picture.shape[1:])
    square = picture[:, top : top + side, left : left + side]
    if random.random() < 0.5:
        square = square.flip(2)
    return F.interpolate(square[None], (SIZE, SIZE), mode="bilinear", antialias=True, align_corners=False)[0]


@functools.cache
def photographs() -> tuple[Tensor, ...]:
    """Load scikit-learn's photographs, each [3, 427, 640] in 0…1."""
    try:
        import PIL  # noqa: F401  what scikit-learn reads them with
        from sklearn.datasets import load_sample_images
    except ModuleNotFoundError as error:
        raise needs_extra(error) from error
    return tuple(
        torch.from_numpy(picture / np.float32(255)).permute(2, 0, 1).contiguous()
        for picture in load_sample_images().images
    )


def needs_extra(error: ModuleNotFoundError) -> ModuleNotFoundError:
    return ModuleNotFoundError(
        f"digits and photographs are scikit-learn's, and {error.name} is not installed: pip install 'fastcss[data]'",
        name=error.name,
    )
