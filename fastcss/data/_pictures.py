"""Pictures and label maps from files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor


def read_image(path: str | Path) -> Tensor:
    """The picture in a file, as float32 ``[3, H, W]`` of red, green and blue in 0…1.

    Grey and palette pictures become coloured ones, and 16-bit grey keeps its full scale. What is transparent is laid on
    white. A file of several pictures gives its first.

    Args:
        path: of any file that Pillow reads.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a file that is no picture or a damaged one, or pixels of no known range (float, 32-bit).
        ModuleNotFoundError: Pillow is not installed.
    """
    picture = _open(path)
    sixteen_bit = picture.mode.startswith("I;16") or (picture.mode, picture.format) == ("I", "PNG")
    if sixteen_bit:
        grey = np.asarray(picture).astype(np.float32) / 65535
        return torch.from_numpy(grey).expand(3, -1, -1).contiguous()
    if picture.mode in ("I", "F"):
        raise ValueError(f"{path}: pixels of mode {picture.mode} have no known range; 8- or 16-bit ones do")
    try:
        pixels = np.asarray(picture.convert("RGBA" if picture.has_transparency_data else "RGB"))
    except ValueError as error:
        raise ValueError(f"{path}: not to be made RGB: {error}") from error
    pixels = pixels / np.float32(255)
    if pixels.shape[2] == 4:
        opacity = pixels[..., 3:]
        pixels = pixels[..., :3] * opacity + (1 - opacity)
    return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()


def read_labels(path: str | Path, classes: int) -> Tensor:
    """The label map in a file, as int64 ``[H, W]`` of 0…classes, and 255 where nothing counts.

    Args:
        path: of a picture whose pixels are labels: palette indices or 8-bit grey.
        classes: the largest label.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a file that is no picture or a damaged one, one of colours, or a label outside the set.
        ModuleNotFoundError: Pillow is not installed.
    """
    picture = _open(path)
    if picture.mode not in ("P", "L"):
        raise ValueError(f"{path}: labels must be palette indices or 8-bit grey (mode P or L), got mode {picture.mode}")
    labels = np.asarray(picture)
    outside = labels[(labels > classes) & (labels != 255)]
    if outside.size:
        raise ValueError(f"{path}: labels must be 0 to {classes}, or 255, got {outside.max()}")
    return torch.from_numpy(labels.astype(np.int64))


def _open(path: str | Path):
    """A picture of Pillow's, wholly read, its file closed."""
    try:
        from PIL import Image
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"pictures are read with Pillow, and {error.name} is not installed: pip install 'fastcss[data]'",
            name=error.name,
        ) from error
    try:
        with Image.open(path) as picture:
            picture.load()
            return picture
    except FileNotFoundError:
        raise
    # What Pillow raises for files that are damaged, of no known format, or too large to be meant.
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path}: no picture that can be read: {error}") from error
