"""Reads PASCAL VOC 2012 for semantic segmentation."""

from __future__ import annotations

import codecs
import re
from collections import Counter
from pathlib import Path

from ._labelled import LabelledPictures, pair

#: The name of each label, as in the challenge, but "dining table", "potted plant" and "tv monitor" have a space, since
#: a text encoder reads them.
CLASSES = (
    *("background", "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow"),
    *("dining table", "dog", "horse", "motorbike", "person", "potted plant", "sheep", "sofa", "train", "tv monitor"),
)
SPLITS = ("train", "val", "trainval", "train_aug")
#: The list of a split may have these names, beside the split's own name.
_ALSO = {"train_aug": ("trainaug",)}


class VOC(LabelledPictures):
    """Reads PASCAL VOC 2012 from its usual folders.

    Args:
        root: ``VOC2012``, ``VOCdevkit``, or the folder that has it. ``VOC2012`` holds ``JPEGImages``,
            ``SegmentationClass`` and ``ImageSets/Segmentation``.
        split: "train" (1,464 images), "val" (1,449), "trainval", or "train_aug" (10,582), which continual segmentation
            trains on. The list of "train_aug", ``train_aug.txt`` (or ``trainaug.txt``), and its label maps,
            ``SegmentationClassAug``, come from the Semantic Boundaries Dataset. The other splits take
            ``SegmentationClassAug`` only if there is no ``SegmentationClass``.
        cache: folder that keeps which labels the images show (``shown``); None is fastcss in the user's cache folder.
            Nothing is written below ``root``.

    Raises:
        ValueError: the split is unknown, or its list is empty, has a name twice, or is no text.
        FileNotFoundError: a folder, list, picture or label map is missing; the message names what was looked for.

    Each item is ``(image, labels)``: float32 ``[3, H, W]`` in 0…1, and int64 ``[H, W]`` of 0…20 (see ``CLASSES``), or
    255 at the rims of objects. ValueError names a file that is no picture, has a label outside the set, or is not of
    its picture's size.

    Source: Everingham et al., The PASCAL Visual Object Classes Challenge, 2010; for train_aug Hariharan et al.,
    Semantic Contours from Inverse Detectors, 2011.

    Example:
        >>> image, labels = VOC("VOCdevkit/VOC2012", "val")[0]
    """

    def __init__(self, root: str | Path, split: str, *, cache: str | Path | None = None) -> None:
        if split not in SPLITS:
            raise ValueError(f"VOC: split must be one of {', '.join(SPLITS)}, got {split!r}")
        folder = _voc2012(Path(root))
        masks = _masks(folder, split)
        stems = _names(_list(folder, split))
        super().__init__(
            *pair("VOC", stems, (folder / "JPEGImages", ".jpg"), (masks, ".png")), classes=len(CLASSES) - 1, cache=cache
        )


def lists(root: str | Path) -> list[str]:
    """Return the splits whose list exists; raise FileNotFoundError if there is no VOC 2012 at all."""
    folder = _voc2012(Path(root))
    return [split for split in SPLITS if any(path.is_file() for path in _lists(folder, split))]


def _voc2012(root: Path) -> Path:
    candidates = (root, root / "VOC2012", root / "VOCdevkit" / "VOC2012")
    for folder in candidates:
        if (folder / "JPEGImages").is_dir():
            return folder
    looked = ", ".join(str(folder / "JPEGImages") for folder in candidates)
    raise FileNotFoundError(f"VOC: no pictures of VOC 2012 at {root}: looked for the folders {looked}")


def _masks(folder: Path, split: str) -> Path:
    augmented, own = folder / "SegmentationClassAug", folder / "SegmentationClass"
    candidates = (augmented,) if split == "train_aug" else (own, augmented)
    for masks in candidates:
        if masks.is_dir():
            return masks
    looked = " or ".join(map(str, candidates))
    raise FileNotFoundError(f"VOC: no label maps for {split!r}: looked for the folder {looked}")


def _lists(folder: Path, split: str) -> list[Path]:
    """Return the places where the list of a split may be."""
    names = (split, *_ALSO.get(split, ()))
    return [folder / "ImageSets" / "Segmentation" / f"{name}.txt" for name in names]


def _list(folder: Path, split: str) -> Path:
    candidates = _lists(folder, split)
    for path in candidates:
        if path.is_file():
            return path
    raise FileNotFoundError(f"VOC: no list of the split: looked for {' or '.join(map(str, candidates))}")


def _names(path: Path) -> list[str]:
    """Read the names in a list.

    A list of VOC has one name per line, which may contain dots and spaces. A list of DeepLab has a line
    "/JPEGImages/NAME.jpg /SegmentationClassAug/NAME.png" for each picture.
    """
    lines = [line.strip() for line in _text(path).splitlines() if line.strip()]
    if not lines:
        raise ValueError(f"VOC: {path} lists no pictures")
    names = [_name(line) for line in lines]
    if twice := [name for name, count in Counter(names).items() if count > 1]:  # each would count as two pictures
        raise ValueError(f"VOC: {path} lists {len(twice)} of its pictures more than once, the first is {twice[0]}")
    return names


def _name(line: str) -> str:
    deeplab = re.fullmatch(r"(?:.*/)?([^/]+)\.jpg\s+(?:.*/)?\1\.png", line)
    return deeplab[1] if deeplab else line.rpartition("/")[2].removesuffix(".jpg")


def _text(path: Path) -> str:
    """Read a file in UTF-8, or in UTF-16 with a byte order mark, as editors of other systems save it."""
    content = path.read_bytes()
    wide = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    try:
        text = content.decode("utf-16" if wide else "utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"VOC: {path} is no text in UTF-8, save it as such: {error}") from error
    if "\0" in text:  # UTF-16 without its mark looks like this
        raise ValueError(f"VOC: {path} is no text in UTF-8, save it as such: it has zero bytes")
    return text
