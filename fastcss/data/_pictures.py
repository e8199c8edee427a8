"""Pictures and label maps from files."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from PIL.Image import Image

_ORIENTATION = 0x0112  # of EXIF
_BITS, _MEANING, _WHITE_IS_ZERO = 258, 262, 0  # TIFF's tags of bits a sample and of what a grey value means, and one
_RESCALED = "fastcss: rescaled"  # what ``_open`` notes in a picture's info


def read_image(path: str | Path) -> Tensor:
    """The picture in a file, as float32 ``[3, H, W]`` of red, green and blue in 0…1.

    It is upright: turned as its EXIF orientation says. Grey and palette pictures become coloured ones, and grey of 12
    or 16 bits keeps its full scale; of other colours Pillow reads the upper 8 bits. What is transparent is laid on
    white. A file of several pictures gives its first.

    Args:
        path: of any file that Pillow reads.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a file that is no picture or a damaged one, or pixels of no known range (float, 32-bit).
        ModuleNotFoundError: Pillow is not installed.
    """
    picture = _open(path, upright=True)
    # What Pillow calls I has 32 bits; its own reader of these formats has scaled them to 16.
    if picture.mode.startswith("I;16") or (picture.mode, picture.format) in (("I", "PNG"), ("I", "PPM")):
        return torch.from_numpy(_deep_grey(picture)).expand(3, -1, -1).contiguous()
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

    It is as it was drawn, over the picture upright: an EXIF orientation of its own is not looked at.

    Args:
        path: of a picture whose pixels are labels: palette indices or 8-bit grey.
        classes: the largest label.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a file that is no picture or a damaged one, one of colours or of grey that is not of 8 bits, or a
            label outside the set.
        ModuleNotFoundError: Pillow is not installed.
    """
    picture = _open(path)
    if picture.mode not in ("P", "L"):
        raise ValueError(f"{path}: labels must be palette indices or 8-bit grey (mode P or L), got mode {picture.mode}")
    if picture.info[_RESCALED]:
        raise ValueError(
            f"{path}: labels must be palette indices or 8-bit grey; this grey has fewer bits, another maximum or white "
            "for 0, and would be read as other labels"
        )
    labels = np.asarray(picture)
    outside = labels[(labels > classes) & (labels != 255)]
    if outside.size:
        raise ValueError(f"{path}: labels must be 0 to {classes}, or 255, got {outside.max()}")
    return torch.from_numpy(labels.astype(np.int64))


def read_size(path: str | Path) -> tuple[tuple[int, int], bool]:
    """(height, width) of what ``read_image`` gives, and whether that is turned on its side; only the header is read.

    Raises:
        FileNotFoundError, ValueError, ModuleNotFoundError: as ``read_image``.
    """
    picture = _open(path, pixels=False)
    # Pillow tells the size of a TIFF as it will be turned, and any other as it is in the file.
    turned = picture.format != "TIFF" and picture.getexif().get(_ORIENTATION) in (5, 6, 7, 8)
    return (picture.size if turned else picture.size[::-1]), turned


def _deep_grey(picture: Image) -> np.ndarray:
    """float32 [H, W] in 0…1 of a grey picture of more than 8 bits."""
    grey = np.asarray(picture).astype(np.float32)
    transparent = picture.info.get("transparency")  # the one grey that is, where there is one
    clear = grey == transparent if isinstance(transparent, int) else False
    tags = getattr(picture, "tag_v2", {})
    (bits, *_) = np.atleast_1d(tags.get(_BITS, 16))
    grey /= 2.0 ** int(bits) - 1
    if tags.get(_MEANING) == _WHITE_IS_ZERO:  # which Pillow takes care of in 8 bits only
        grey = 1 - grey
    return np.where(clear, np.float32(1), grey)


def _rescaled(picture: Image) -> bool:
    """Of a picture not yet loaded: Pillow will give other grey values than the file has, from 0 to 255."""
    for codec, _, _, options in picture.tile:
        raw_mode = options[0] if isinstance(options, tuple) and options else options
        if codec == "ppm" or str(raw_mode).startswith("L;"):
            return True
    return False


def _open(path: str | Path, pixels: bool = True, upright: bool = False) -> Image:
    """A picture of Pillow's, its file closed: wholly read, or without ``pixels`` its header."""
    try:
        from PIL import Image, ImageOps
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"pictures are read with Pillow, and {error.name} is not installed: pip install 'fastcss[data]'",
            name=error.name,
        ) from error
    try:
        with Image.open(path) as picture:
            picture.info[_RESCALED] = _rescaled(picture)
            if pixels:
                picture.load()
            else:
                picture.getexif()  # kept by the picture, also once its file is closed
            if upright:
                ImageOps.exif_transpose(picture, in_place=True)
            return picture
    except FileNotFoundError:
        raise
    # What Pillow raises for files that are damaged, of no known format, or too large to be meant.
    except (OSError, SyntaxError, ValueError, TypeError, struct.error, Image.DecompressionBombError) as error:
        raise ValueError(f"{path}: no picture that can be read: {error}") from error
