"""Reads ADE20K, with the 150 classes of its scene parsing challenge."""

from __future__ import annotations

from pathlib import Path

from ._labelled import LabelledPictures, pair

# fmt: off
#: The name of each label.
CLASSES = (
    "background", "wall", "building", "sky", "floor", "tree", "ceiling", "road", "bed", "windowpane", "grass",
    "cabinet", "sidewalk", "person", "earth", "door", "table", "mountain", "plant", "curtain", "chair", "car", "water",
    "painting", "sofa", "shelf", "house", "sea", "mirror", "rug", "field", "armchair", "seat", "fence", "desk", "rock",
    "wardrobe", "lamp", "bathtub", "railing", "cushion", "base", "box", "column", "signboard", "chest of drawers",
    "counter", "sand", "sink", "skyscraper", "fireplace", "refrigerator", "grandstand", "path", "stairs", "runway",
    "case", "pool table", "pillow", "screen door", "stairway", "river", "bridge", "bookcase", "blind", "coffee table",
    "toilet", "flower", "book", "hill", "bench", "countertop", "stove", "palm", "kitchen island", "computer",
    "swivel chair", "boat", "bar", "arcade machine", "hovel", "bus", "towel", "light", "truck", "tower", "chandelier",
    "awning", "streetlight", "booth", "television receiver", "airplane", "dirt track", "apparel", "pole", "land",
    "bannister", "escalator", "ottoman", "bottle", "buffet", "poster", "stage", "van", "ship", "fountain",
    "conveyer belt", "canopy", "washer", "plaything", "swimming pool", "stool", "barrel", "basket", "waterfall", "tent",
    "bag", "minibike", "cradle", "oven", "ball", "food", "step", "tank", "trade name", "microwave", "pot", "animal",
    "bicycle", "lake", "dishwasher", "screen", "blanket", "sculpture", "hood", "sconce", "vase", "traffic light",
    "tray", "ashcan", "fan", "pier", "crt screen", "plate", "monitor", "bulletin board", "shower", "radiator", "glass",
    "clock", "flag",
)
# fmt: on
#: The folder of each split.
SPLITS = {"train": "training", "val": "validation"}


class ADE20K(LabelledPictures):
    """Reads ADE20K, in the form of its scene parsing challenge, from its usual folders.

    Label 0, "other", is the background, as everywhere in continual segmentation ("150 annotated classes and one
    background class"): a separate class that counts in training and evaluation. The challenge itself leaves these
    pixels out.

    Args:
        root: ``ADEChallengeData2016`` or the folder that has it. It holds ``images`` and ``annotations``, and each of
            these ``training`` and ``validation``.
        split: "train" (20,210 images) or "val" (2,000).
        cache: folder that keeps which labels the images show (``shown``); None is fastcss in the user's cache folder.
            Nothing is written below ``root``.

    Raises:
        ValueError: the split is unknown.
        FileNotFoundError: a folder, picture or label map is missing; the message names what was looked for.

    Each item is ``(image, labels)``, in the order of the files' names: float32 ``[3, H, W]`` in 0…1, and int64
    ``[H, W]`` of 0…150 (see ``CLASSES``). ValueError names a file that is no picture, has a label outside the set, or
    is not of its picture's size.

    Source: Zhou et al., Scene Parsing through ADE20K Dataset, CVPR 2017; DecoupleCSS, appendix C.

    Example:
        >>> image, labels = ADE20K("ADEChallengeData2016", "val")[0]
    """

    def __init__(self, root: str | Path, split: str, *, cache: str | Path | None = None) -> None:
        if split not in SPLITS:
            raise ValueError(f"ADE20K: split must be one of {', '.join(SPLITS)}, got {split!r}")
        images, masks = _folders(Path(root), SPLITS[split])
        stems = _stems(images, ".jpg") | _stems(masks, ".png")
        if not stems:
            raise FileNotFoundError(f"ADE20K: no pictures: looked for *.jpg in {images}")
        super().__init__(
            *pair("ADE20K", sorted(stems), (images, ".jpg"), (masks, ".png")), classes=len(CLASSES) - 1, cache=cache
        )


def _stems(folder: Path, suffix: str) -> set[str]:
    """Return the names of a folder's files, without hidden ones such as "._NAME.jpg", which macOS leaves behind."""
    names = (path.name for path in folder.glob(f"*{suffix}"))
    return {name.removesuffix(suffix) for name in names if not name.startswith(".")}


def _folders(root: Path, split: str) -> tuple[Path, Path]:
    """Find the folders of the pictures and of the label maps."""
    candidates = [
        (top / "images" / split, top / "annotations" / split) for top in (root, root / "ADEChallengeData2016")
    ]
    for images, masks in candidates:
        if images.is_dir() and masks.is_dir():
            return images, masks
    looked = " or ".join(f"{images} and {masks}" for images, masks in candidates)
    raise FileNotFoundError(f"ADE20K: no pictures and label maps at {root}: looked for the folders {looked}")
