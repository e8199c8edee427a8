"""Tests PASCAL VOC's reader, and what both readers do with label maps."""

import numpy as np
import pytest
import torch

pytest.importorskip("PIL")

from PIL import Image
from voc_folder import LABELS, write_labels

from fastcss.data import VOC, tasks, training_set, voc


def test_items_are_the_pictures_and_their_palette_indices(voc_root):
    data = VOC(voc_root, "trainval")
    assert len(data) == 3
    for i, (image, labels) in enumerate(data):
        assert image.dtype == torch.float32
        assert image.is_contiguous()
        expected = torch.tensor([50 * i, 100, 200]) / 255
        torch.testing.assert_close(image, expected[:, None, None].expand(3, 2, 2), atol=3 / 255, rtol=0)
        assert labels.dtype == torch.int64
        assert labels.tolist() == list(LABELS.values())[i]
    with pytest.raises(IndexError):
        data[3]


@pytest.mark.parametrize("up", range(3))
def test_the_root_may_be_any_of_the_usual(voc_root, up):
    given = [voc_root, voc_root.parent, voc_root.parent.parent][up]
    assert len(VOC(given, "train")) == 2
    assert len(VOC(str(given), "val")) == 1


def test_train_aug_takes_its_own_label_maps_and_list(voc_root):
    (voc_root / "SegmentationClassAug").mkdir()
    write_labels(voc_root / "SegmentationClassAug" / "2007_000002.png", [[7, 7], [7, 7]], mode="L")
    line = "/JPEGImages/2007_000002.jpg /SegmentationClassAug/2007_000002.png\n"
    for text in ("2007_000002\n\n", line):
        (voc_root / "ImageSets" / "Segmentation" / "train_aug.txt").write_text(text)
        ((_, labels),) = VOC(voc_root, "train_aug")
        assert labels.unique().tolist() == [7]
    assert VOC(voc_root, "train")[1][1].unique().tolist() == [0, 20]


def test_augmented_label_maps_serve_where_there_are_no_others(voc_root):
    (voc_root / "SegmentationClass").rename(voc_root / "SegmentationClassAug")
    assert VOC(voc_root, "val")[0][1].tolist() == LABELS["2007_000003"]


def test_the_names_are_the_challenges():
    assert len(voc.CLASSES) == len(set(voc.CLASSES)) == 21
    assert (voc.CLASSES[0], voc.CLASSES[1], voc.CLASSES[15], voc.CLASSES[20]) == (
        *("background", "aeroplane", "person", "tv monitor"),
    )


def test_a_task_trains_on_what_shows_its_classes(voc_root, cache):
    second = training_set(VOC(voc_root, "trainval"), tasks("voc", "15-5")[1])
    assert second.indices == [1]
    first = training_set(VOC(voc_root, "trainval"), tasks("voc", "15-5")[0])
    assert [labels.tolist() for _, labels in first] == [[[0, 1], [15, 255]]]


# ---- errors of the data set


@pytest.mark.parametrize(
    ("rows", "mode", "message"),
    [
        ([[0, 21], [1, 255]], "P", "2007_000001.png: labels must be 0 to 20, or 255, got 21"),
        ([[0, 254], [1, 255]], "L", "2007_000001.png: labels must be 0 to 20, or 255, got 254"),
        (np.zeros((2, 2, 3)), "RGB", "2007_000001.png: labels must be palette indices or 8-bit grey .* got mode RGB"),
        ([[0, 1, 1], [0, 1, 1]], "P", "2007_000001.png has 3×2 pixels, and its picture .*2007_000001.jpg has 2×2"),
    ],
)
def test_bad_label_maps_are_named(voc_root, cache, rows, mode, message):
    write_labels(voc_root / "SegmentationClass" / "2007_000001.png", rows, mode)
    data = VOC(voc_root, "train")
    with pytest.raises(ValueError, match=message):
        data[0]
    data[1]
    with pytest.raises(ValueError, match=message):  # before anything is learned
        data.shown()
    assert not cache.exists()


def test_a_damaged_label_map_is_named(voc_root):
    (voc_root / "SegmentationClass" / "2007_000001.png").write_bytes(b"\x89PNG")
    with pytest.raises(ValueError, match=r"2007_000001.png: no picture that can be read"):
        VOC(voc_root, "train")[0]


def test_what_is_missing_is_named(voc_root, tmp_path):
    with pytest.raises(ValueError, match="split must be one of train, val, trainval, train_aug, got 'test'"):
        VOC(voc_root, "test")
    with pytest.raises(FileNotFoundError, match=r"looked for the folders .*nowhere/JPEGImages, .*VOC2012/JPEGImages"):
        VOC(tmp_path / "nowhere", "train")
    with pytest.raises(FileNotFoundError, match=r"no label maps for 'train_aug': looked for .*SegmentationClassAug"):
        VOC(voc_root, "train_aug")
    (voc_root / "SegmentationClassAug").mkdir()
    with pytest.raises(FileNotFoundError, match=r"looked for .*Segmentation/train_aug.txt or .*/trainaug.txt"):
        VOC(voc_root, "train_aug")
    (voc_root / "ImageSets" / "Segmentation" / "train_aug.txt").write_text("\n")
    with pytest.raises(ValueError, match=r"train_aug.txt lists no pictures"):
        VOC(voc_root, "train_aug")
    (voc_root / "SegmentationClass" / "2007_000002.png").unlink()
    with pytest.raises(FileNotFoundError, match=r"1 of 3 files .*SegmentationClass, .* 2007_000002.png"):
        VOC(voc_root, "trainval")
    (voc_root / "JPEGImages" / "2007_000001.jpg").unlink()
    with pytest.raises(FileNotFoundError, match=r"JPEGImages, the first is 2007_000001.jpg"):
        VOC(voc_root, "trainval")


def test_label_maps_of_a_picture_on_its_side_are_named(voc_root, cache):
    exif = Image.Exif()
    exif[0x0112] = 6
    for name, size in (("2007_000001", (3, 2)), ("2007_000002", (2, 3))):  # as it lies in the file, and upright
        Image.new("RGB", (3, 2)).save(voc_root / "JPEGImages" / f"{name}.jpg", exif=exif)
        write_labels(voc_root / "SegmentationClass" / f"{name}.png", np.ones(size[::-1]))
    data = VOC(voc_root, "train")
    image, labels = data[1]
    assert image.shape[1:] == labels.shape == (3, 2)
    for read in (data.shown, lambda: data[0]):
        with pytest.raises(ValueError, match=r"1.png has 3×2 pixels, .*1.jpg has 2×3, turned as its EXIF orientation"):
            read()
