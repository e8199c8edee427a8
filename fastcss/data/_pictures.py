"""Reads pictures and label maps from files."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from PIL.Image import Image

_ORIENTATION = 0x0112  # the tag of EXIF
_BITS, _MEANING, _WHITE_IS_ZERO = 258, 262, 0  # TIFF's tags for bits per sample and meaning of a grey, and one meaning
_RESCALED = "fastcss: rescaled"  # ``_open`` notes it in a picture's info


def read_image(path: str | Path) -> Tensor:
    """Read the picture in a file as float32 ``[3, H, W]`` of red, green and blue in 0…1.

    It is turned upright, as its EXIF orientation says. Grey and palette pictures become coloured ones, and grey of 12
    or 16 bits keeps its full scale; of other deep colours Pillow reads the upper 8 bits. Transparent pixels are laid on
    white. A file of several pictures gives the first.

    Args:
        path: any file that Pillow reads.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: the file is no picture or a damaged one, or its pixels have no known range (float, 32-bit).
        ModuleNotFoundError: Pillow is not installed.
    """
    picture = _open(path, upright=True)
    # Pillow's mode I has 32 bits, but its readers of these formats have scaled the values to 16 bits.
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
    """Read the label map in a file as int64 ``[H, W]`` of 0…classes, or 255 on pixels that do not count.

    The map is taken as drawn over the upright picture; its own EXIF orientation is ignored.

    Args:
        path: a picture whose pixels are labels: palette indices or 8-bit grey.
        classes: the largest label.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: the file is no picture or a damaged one, has colours or grey of other than 8 bits, or has a label
            outside the set.
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
    """Return the (height, width) of ``read_image``, and whether it turns the picture on its side; read only the header.

    Raises:
        FileNotFoundError, ValueError, ModuleNotFoundError: as for ``read_image``.
    """
    picture = _open(path, pixels=False)
    # Pillow gives the size of a TIFF as turned, and that of any other format as in the file.
    turned = picture.format != "TIFF" and picture.getexif().get(_ORIENTATION) in (5, 6, 7, 8)
    return (picture.size if turned else picture.size[::-1]), turned


def _deep_grey(picture: Image) -> np.ndarray:
    """Convert a grey picture of more than 8 bits to float32 [H, W] in 0…1."""
    grey = np.asarray(picture).astype(np.float32)
    transparent = picture.info.get("transparency")  # the one grey value that is transparent, if any
    clear = grey == transparent if isinstance(transparent, int) else False
    tags = getattr(picture, "tag_v2", {})
    (bits, *_) = np.atleast_1d(tags.get(_BITS, 16))
    grey /= 2.0 ** int(bits) - 1
    if tags.get(_MEANING) == _WHITE_IS_ZERO:  # Pillow handles it in 8 bits only
        grey = 1 - grey
    return np.where(clear, np.float32(1), grey)


def _rescaled(picture: Image) -> bool:
    """Tell whether Pillow will rescale the grey values of a picture that is not loaded yet to 0…255."""
    for codec, _, _, options in picture.tile:
        raw_mode = options[0] if isinstance(options, tuple) and options else options
        if codec == "ppm" or str(raw_mode).startswith("L;"):
            return True
    return False


def _open(path: str | Path, pixels: bool = True, upright: bool = False) -> Image:
    """Open a picture with Pillow, read it whole (or without ``pixels`` only its header), and close its file."""
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
                picture.getexif()  # the picture keeps it after its file is closed
            if upright:
                ImageOps.exif_transpose(picture, in_place=True)
            return picture
    except FileNotFoundError:
        raise
    # Pillow raises these for files that are damaged, of no known format, or suspiciously large.
    except (OSError, SyntaxError, ValueError, TypeError, struct.error, Image.DecompressionBombError) as error:
        raise ValueError(f"{path}: no picture that can be read: {error}") from error
