"""Puts strokes and blobs into real scenes, on which the small models are pre-trained before they meet a digit."""

from __future__ import annotations

import functools

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from ._scenes import SIZE, background, photographs, put, warp

MOST_GLYPHS = 4
DRAWINGS = 16  # drawings of each glyph
_BITMAP = 32  # side in pixels; scikit-learn's digits are bitmaps of this size too, counted in squares of 4×4
_BLOBS = 0.2  # share of the glyphs


class GlyphScenes(Dataset):
    """Lays one to four drawings of random glyphs on photographs, as ``DigitScenes`` lays digits.

    A glyph is a few curves, or for one in five a filled outline, drawn at random: a figure without a name. Its drawings
    differ a little, as handwriting does. A scene has at most three glyphs, some of them more than once. For a fixed
    number of glyphs, scene i depends on ``(seed, i)`` alone: in any order or worker process it is the same.

    Args:
        count: how many scenes there are, numbered from 0.
        glyphs: how many glyphs there are, labelled from 1; they do not depend on the seed.
        seed: seed of the scenes.

    Raises:
        ValueError: the count or seed is negative, or there are no glyphs.
        ModuleNotFoundError: scikit-learn, which brings the photographs, or Pillow is not installed.

    Each item is ``(image, labels)``: float32 ``[3, 128, 128]`` in 0…1, and int64 ``[128, 128]`` of 0…glyphs.

    Example:
        >>> image, labels = GlyphScenes(100)[3]
    """

    def __init__(self, count: int, *, glyphs: int = 500, seed: int = 0) -> None:
        for name, value, least in (("count", count, 0), ("glyphs", glyphs, 1), ("seed", seed, 0)):
            if value < least:
                raise ValueError(f"GlyphScenes: {name} must be at least {least}, got {value}")
        self.count, self.glyphs, self.seed = count, glyphs, seed
        photographs()  # a missing package is reported here, not in a worker process

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, item: int) -> tuple[Tensor, Tensor]:
        random = np.random.default_rng([self.seed, range(self.count)[item]])
        image = background(random)
        labels = torch.zeros(SIZE, SIZE, dtype=torch.int64)
        few = random.integers(1, self.glyphs + 1, size=3)
        for label in random.choice(few, size=random.integers(1, MOST_GLYPHS + 1)).tolist():
            drawing = drawings(label)[random.integers(DRAWINGS)]
            put(image, labels, label, warp(drawing, random), random)
        return image.clamp_(0, 1), labels


@functools.cache
def drawings(label: int) -> Tensor:
    """Draw one glyph several times, float32 ``[DRAWINGS, 8, 8]`` in 0…1."""
    random = np.random.default_rng([0, label])
    blob = random.random() < _BLOBS
    curves = [random.random((6, 2))] if blob else _curves(random)
    width = random.uniform(0.35, 0.75)  # half the width of a stroke, in pixels of the drawing
    stretch = random.uniform(0.45, 1.0)
    sheets = []
    for _ in range(DRAWINGS):
        bent = [curve + random.normal(0, 0.035, curve.shape) for curve in curves]
        sheets.append(_render(bent, blob, width * random.uniform(0.8, 1.25), stretch * random.uniform(0.9, 1.1)))
    return torch.from_numpy(np.stack(sheets))


def _curves(random: np.random.Generator) -> list[np.ndarray]:
    """Draw the control points of one to four quadratic curves; most begin where the one before ended."""
    curves, end = [], random.random(2)
    for _ in range(random.integers(1, 5)):
        start = end if random.random() < 0.75 else random.random(2)
        curve = np.stack([start, random.random(2) * 1.4 - 0.2, random.random(2)])
        curves.append(curve)
        end = curve[2]
    return curves


def _render(curves: list[np.ndarray], blob: bool, width: float, stretch: float) -> np.ndarray:
    """Render curves as a drawing [8, 8] that they fill from top to bottom."""
    t = np.linspace(0, 1, 25)[:, None]
    if blob:
        points = _closed(curves[0])
    else:
        points = np.concatenate([(1 - t) ** 2 * a + 2 * t * (1 - t) * b + t**2 * c for a, b, c in curves])
    low, high = points.min(0), points.max(0)
    size = np.array([_BITMAP - 8 * width, (_BITMAP - 8 * width) * min(stretch, 1.0)])  # rows, columns
    scale = size / np.maximum(high - low, 0.25)
    points = (points - (low + high) / 2) * scale + _BITMAP / 2
    rows, columns = np.mgrid[:_BITMAP, :_BITMAP] + 0.5
    offsets = np.stack([rows, columns], -1)[:, :, None] - points  # [32, 32, points, 2]
    ink = np.square(offsets).sum(-1).min(-1) < (4 * width) ** 2
    if blob:
        ink |= _inside(rows, columns, points)
    return ink.reshape(8, 4, 8, 4).mean((1, 3), dtype=np.float32)


def _closed(corners: np.ndarray) -> np.ndarray:
    """Return an outline [96, 2] around the middle of the corners, slightly farther out than these, at equal angles."""
    centre = corners.mean(0)
    angle = np.linspace(0, 2 * np.pi, len(corners), endpoint=False)
    radius = 0.3 + np.linalg.norm(corners - centre, axis=1)
    at = np.linspace(0, 2 * np.pi, 96)
    around = np.interp(at, angle, radius, period=2 * np.pi)
    return np.stack([np.sin(at), np.cos(at)], -1) * around[:, None]


def _inside(rows: np.ndarray, columns: np.ndarray, outline: np.ndarray) -> np.ndarray:
    """Tell which pixels lie within an outline, by the parity of its crossings."""
    inside = np.zeros_like(rows, dtype=bool)
    for (y0, x0), (y1, x1) in zip(outline, np.roll(outline, -1, 0), strict=True):
        crosses = (y0 > rows) != (y1 > rows)
        if crosses.any():
            inside ^= crosses & (columns < (x1 - x0) * (rows - y0) / (y1 - y0) + x0)
    return inside
