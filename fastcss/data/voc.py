"""PASCAL VOC 2012, semantic segmentation."""

from __future__ import annotations

from pathlib import Path

from ._labelled import LabelledPictures, pair

#: Name of each label: the challenge's, with a space in "dining table", "potted plant" and "tv monitor", since a text
#: encoder reads them.
CLASSES = (
    *("background", "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow"),
    *("dining table", "dog", "horse", "motorbike", "person", "potted plant", "sheep", "sofa", "train", "tv monitor"),
)
SPLITS = ("train", "val", "trainval", "train_aug")


class VOC(LabelledPictures):
    """PASCAL VOC 2012 from its usual folders.

    Args:
        root: ``VOC2012``, ``VOCdevkit``, or the folder that has it: with ``JPEGImages``, ``SegmentationClass`` and
            ``ImageSets/Segmentation``.
        split: "train" (1,464 images), "val" (1,449), "trainval", or "train_aug" (10,582), which continual segmentation
            trains on: its list, ``train_aug.txt``, and label maps, ``SegmentationClassAug``, come from the Semantic
            Boundaries Dataset. The other splits take ``SegmentationClassAug`` only where there is no
            ``SegmentationClass``.
        cache: folder that keeps what the images show (``shown``); None is fastcss in the user's cache folder. Nothing
            is written below ``root``.

    Raises:
        ValueError: an unknown split; a list of no names.
        FileNotFoundError: a folder, list, picture or label map is missing; names what was looked for.

    Each item is ``(image, labels)``: float32 ``[3, H, W]`` in 0…1, and int64 ``[H, W]`` of 0…20 (see ``CLASSES``), 255
    at the rims of objects. ValueError names the file that is no picture, has a label outside the set, or is not of its
    picture's size.

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
        stems = _names(folder / "ImageSets" / "Segmentation" / f"{split}.txt")
        super().__init__(
            *pair("VOC", stems, (folder / "JPEGImages", ".jpg"), (masks, ".png")), classes=len(CLASSES) - 1, cache=cache
        )


def lists(root: str | Path) -> list[str]:
    """The splits whose list is there; FileNotFoundError where there is no VOC 2012 at all."""
    folder = _voc2012(Path(root)) / "ImageSets" / "Segmentation"
    return [split for split in SPLITS if (folder / f"{split}.txt").is_file()]


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


def _names(path: Path) -> list[str]:
    """Names in a list of VOC's, or of DeepLab's, which has a line "/JPEGImages/NAME.jpg /SegmentationClassAug/NAME.png"
    for each."""
    if not path.is_file():
        raise FileNotFoundError(f"VOC: no list of the split: looked for {path}")
    words = [line.split()[0] for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    if not words:
        raise ValueError(f"VOC: {path} lists no pictures")
    return [Path(word).stem for word in words]
