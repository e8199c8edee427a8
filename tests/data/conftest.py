"""Makes a PASCAL VOC of three images, and a cache that is not the user's."""

import pytest


@pytest.fixture
def voc_root(tmp_path):
    """Writes VOCdevkit/VOC2012 with three images, the last of which shows nothing."""
    from PIL import Image  # here, since not every test of this folder needs it
    from voc_folder import LABELS, write_labels

    folder = tmp_path / "VOCdevkit" / "VOC2012"
    for part in ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation"):
        (folder / part).mkdir(parents=True)
    for i, (name, rows) in enumerate(LABELS.items()):
        Image.new("RGB", (2, 2), (50 * i, 100, 200)).save(folder / "JPEGImages" / f"{name}.jpg", quality=100)
        write_labels(folder / "SegmentationClass" / f"{name}.png", rows)
    names = list(LABELS)
    for split, chosen in (("train", names[:2]), ("val", names[2:]), ("trainval", names)):
        (folder / "ImageSets" / "Segmentation" / f"{split}.txt").write_text("\n".join(chosen) + "\n")
    return folder


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """Names the folder that the index of classes is kept in, which is a temporary one here."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "fastcss"
