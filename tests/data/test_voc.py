"""Tests PASCAL VOC's reader, what both readers do with label maps, and the kept index of the classes in them."""

import json
import os
import shutil
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

pytest.importorskip("PIL")

from PIL import Image

from fastcss.data import VOC, _labelled, tasks, training_set, voc

LABELS = {"2007_000001": [[0, 1], [15, 255]], "2007_000002": [[20, 20], [0, 0]], "2007_000003": [[0, 0], [0, 255]]}
PALETTE = [channel for index in range(256) for channel in (index, 255 - index, index // 2)]


def write_labels(path, rows, mode="P"):
    picture = Image.fromarray(np.array(rows, np.uint8))
    if mode == "P":
        picture.putpalette(PALETTE)
    picture.save(path)


@pytest.fixture
def root(tmp_path):
    """Writes VOCdevkit/VOC2012 with three images, the last of which shows nothing."""
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
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "fastcss"


def test_items_are_the_pictures_and_their_palette_indices(root):
    data = VOC(root, "trainval")
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
def test_the_root_may_be_any_of_the_usual(root, up):
    given = [root, root.parent, root.parent.parent][up]
    assert len(VOC(given, "train")) == 2
    assert len(VOC(str(given), "val")) == 1


def test_train_aug_takes_its_own_label_maps_and_list(root):
    (root / "SegmentationClassAug").mkdir()
    write_labels(root / "SegmentationClassAug" / "2007_000002.png", [[7, 7], [7, 7]], mode="L")
    line = "/JPEGImages/2007_000002.jpg /SegmentationClassAug/2007_000002.png\n"
    for text in ("2007_000002\n\n", line):
        (root / "ImageSets" / "Segmentation" / "train_aug.txt").write_text(text)
        ((_, labels),) = VOC(root, "train_aug")
        assert labels.unique().tolist() == [7]
    assert VOC(root, "train")[1][1].unique().tolist() == [0, 20]


def test_augmented_label_maps_serve_where_there_are_no_others(root):
    (root / "SegmentationClass").rename(root / "SegmentationClassAug")
    assert VOC(root, "val")[0][1].tolist() == LABELS["2007_000003"]


def test_the_names_are_the_challenges():
    assert len(voc.CLASSES) == len(set(voc.CLASSES)) == 21
    assert (voc.CLASSES[0], voc.CLASSES[1], voc.CLASSES[15], voc.CLASSES[20]) == (
        *("background", "aeroplane", "person", "tv monitor"),
    )


def test_a_task_trains_on_what_shows_its_classes(root, cache):
    second = training_set(VOC(root, "trainval"), tasks("voc", "15-5")[1])
    assert second.indices == [1]
    first = training_set(VOC(root, "trainval"), tasks("voc", "15-5")[0])
    assert [labels.tolist() for _, labels in first] == [[[0, 1], [15, 255]]]


# ---- what is kept of it


def count_reads(monkeypatch):
    read, reads = _labelled.read_labels, []
    monkeypatch.setattr(_labelled, "read_labels", lambda path, classes: reads.append(path.name) or read(path, classes))
    return reads


def test_what_images_show_is_read_once_and_kept(root, cache, monkeypatch):
    reads = count_reads(monkeypatch)
    expected = [(1, 15), (20,), ()]
    for _ in range(2):
        data = VOC(root, "trainval")
        assert data.shown() == data.shown() == expected
        assert len(reads) == 3
    assert VOC(root, "train").shown() == expected[:2]
    assert len(list(cache.iterdir())) == 2


def test_nothing_is_written_beside_the_data(root, tmp_path, cache):
    files = sorted(root.rglob("*"))
    VOC(root, "train").shown()
    VOC(root, "val", cache=tmp_path / "mine").shown()
    assert sorted(root.rglob("*")) == files
    assert len(list(cache.iterdir())) == len(list((tmp_path / "mine").iterdir())) == 1


def test_a_changed_label_map_is_read_again(root, cache):
    assert VOC(root, "train").shown()[1] == (20,)
    path = root / "SegmentationClass" / "2007_000002.png"
    before = path.stat()
    write_labels(path, [[19, 19], [0, 0]])
    assert path.stat().st_size == before.st_size
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns + 1))
    assert VOC(root, "train").shown()[1] == (19,)
    assert len(list(cache.iterdir())) == 1


def test_another_order_of_the_same_files_is_another_index(root, cache):
    for label, name in enumerate(LABELS, 1):
        write_labels(path := root / "SegmentationClass" / f"{name}.png", [[label] * 2] * 2)
        os.utime(path, ns=(0, 0))
        shutil.copy(root / "JPEGImages" / "2007_000001.jpg", path := root / "JPEGImages" / f"{name}.jpg.new")
        os.utime(path, ns=(0, 0))
        path.rename(path.with_suffix(""))
    assert VOC(root, "trainval").shown() == [(1,), (2,), (3,)]
    (root / "ImageSets" / "Segmentation" / "trainval.txt").write_text("\n".join(reversed(LABELS)))
    assert VOC(root, "trainval").shown() == [(3,), (2,), (1,)]


@pytest.mark.parametrize("content", [b"", b'{"stamp": "', b"[]", b"{}", b'{"stamp": 3}', b"\xff\x00", b"null"])
def test_a_damaged_index_is_made_anew(root, cache, content):
    VOC(root, "train").shown()
    (kept,) = cache.iterdir()
    whole = kept.read_bytes()
    kept.write_bytes(content)
    assert VOC(root, "train").shown() == [(1, 15), (20,)]
    assert kept.read_bytes() == whole


def test_a_kill_while_writing_leaves_the_former_index(root, cache, monkeypatch):
    VOC(root, "train").shown()
    (kept,) = cache.iterdir()
    whole = kept.read_bytes()
    write_labels(root / "SegmentationClass" / "2007_000001.png", [[3, 3], [3, 3]])

    def killed(content, file):
        file.write(json.dumps(content)[:20])
        raise KeyboardInterrupt

    monkeypatch.setattr(_labelled.json, "dump", killed)
    with pytest.raises(KeyboardInterrupt):
        VOC(root, "train").shown()
    assert [path.read_bytes() for path in cache.iterdir()] == [whole]


def test_a_cache_that_cannot_be_written_is_a_warning(root, tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.warns(UserWarning, match="not kept for next time: .*file"):
        assert VOC(root, "train", cache=tmp_path / "file" / "cache").shown() == [(1, 15), (20,)]


def test_a_full_disk_is_a_warning_and_leaves_nothing(root, cache, monkeypatch):
    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(_labelled.os, "fsync", full)
    with pytest.warns(UserWarning, match="No space left on device"):
        assert VOC(root, "train").shown() == [(1, 15), (20,)]
    assert not list(cache.iterdir())


def test_several_may_make_the_index_at_once(root, cache):
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda _: VOC(root, "trainval").shown(), range(8)))
    assert results == [[(1, 15), (20,), ()]] * 8
    assert len(list(cache.iterdir())) == 1


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
def test_bad_label_maps_are_named(root, cache, rows, mode, message):
    write_labels(root / "SegmentationClass" / "2007_000001.png", rows, mode)
    data = VOC(root, "train")
    with pytest.raises(ValueError, match=message):
        data[0]
    data[1]
    with pytest.raises(ValueError, match=message):  # before anything is learned
        data.shown()
    assert not cache.exists()


def test_a_damaged_label_map_is_named(root):
    (root / "SegmentationClass" / "2007_000001.png").write_bytes(b"\x89PNG")
    with pytest.raises(ValueError, match=r"2007_000001.png: no picture that can be read"):
        VOC(root, "train")[0]


def test_what_is_missing_is_named(root, tmp_path):
    with pytest.raises(ValueError, match="split must be one of train, val, trainval, train_aug, got 'test'"):
        VOC(root, "test")
    with pytest.raises(FileNotFoundError, match=r"looked for the folders .*nowhere/JPEGImages, .*VOC2012/JPEGImages"):
        VOC(tmp_path / "nowhere", "train")
    with pytest.raises(FileNotFoundError, match=r"no label maps for 'train_aug': looked for .*SegmentationClassAug"):
        VOC(root, "train_aug")
    (root / "SegmentationClassAug").mkdir()
    with pytest.raises(FileNotFoundError, match=r"looked for .*Segmentation/train_aug.txt or .*/trainaug.txt"):
        VOC(root, "train_aug")
    (root / "ImageSets" / "Segmentation" / "train_aug.txt").write_text("\n")
    with pytest.raises(ValueError, match=r"train_aug.txt lists no pictures"):
        VOC(root, "train_aug")
    (root / "SegmentationClass" / "2007_000002.png").unlink()
    with pytest.raises(FileNotFoundError, match=r"1 of 3 files .*SegmentationClass, .* 2007_000002.png"):
        VOC(root, "trainval")
    (root / "JPEGImages" / "2007_000001.jpg").unlink()
    with pytest.raises(FileNotFoundError, match=r"JPEGImages, the first is 2007_000001.jpg"):
        VOC(root, "trainval")


# ---- lists that others wrote


def listed(root, split: str, text: str | bytes) -> VOC:
    content = text if isinstance(text, bytes) else text.encode()
    (root / "ImageSets" / "Segmentation" / f"{split}.txt").write_bytes(content)
    return VOC(root, "train_aug" if split == "trainaug" else split)


def stems(data: VOC) -> list[str]:
    assert [path.stem for path in data.images] == [path.stem for path in data.masks]
    return [path.stem for path in data.images]


@pytest.fixture
def odd_names(root):
    """Writes files of such names, and of what is left of them before a dot or a space."""
    names = ["frame.1", "frame.2", "frame", "a  photo of mine", "a", "x.jpg y"]
    for name in names:
        shutil.copy(root / "JPEGImages" / "2007_000001.jpg", root / "JPEGImages" / f"{name}.jpg")
        shutil.copy(root / "SegmentationClass" / "2007_000001.png", root / "SegmentationClass" / f"{name}.png")
    return names


@pytest.mark.parametrize(
    "form", ["{}", "{}.jpg", "JPEGImages/{}.jpg", "/JPEGImages/{0}.jpg /SegmentationClassAug/{0}.png"]
)
def test_names_with_dots_and_spaces_are_the_files_listed(root, odd_names, form):
    text = "\r\n".join(form.format(name) for name in odd_names) + "\r\n"
    assert stems(listed(root, "train", text)) == odd_names


def test_a_picture_listed_twice_is_named(root):
    with pytest.raises(ValueError, match=r"train\.txt lists 1 of its pictures more than once, .* 2007_000002$"):
        listed(root, "train", "2007_000002\n2007_000001\nJPEGImages/2007_000002.jpg\n")


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le with a mark", "utf-16-be with a mark"])
def test_lists_of_other_editors_are_read(root, encoding):
    for folder, suffix in (("JPEGImages", "jpg"), ("SegmentationClass", "png")):
        shutil.copy(root / folder / f"2007_000001.{suffix}", root / folder / f"Bär.{suffix}")
    encoding, _, mark = encoding.partition(" ")
    text = "\n".join(["2007_000001", "Bär"])
    assert stems(listed(root, "train", (("\ufeff" if mark else "") + text).encode(encoding))) == ["2007_000001", "Bär"]


@pytest.mark.parametrize("encoding", ["latin-1", "utf-16-le"])
def test_a_list_that_is_no_text_is_named(root, encoding):
    with pytest.raises(ValueError, match=r"train\.txt is no text in UTF-8, save it as such: "):
        listed(root, "train", "2007_000001\nBär".encode(encoding))


def test_the_augmented_list_may_have_either_name(root):
    (root / "SegmentationClass").rename(root / "SegmentationClassAug")
    assert stems(listed(root, "trainaug", "2007_000003")) == ["2007_000003"]
    assert voc.lists(root) == ["train", "val", "trainval", "train_aug"]
    assert stems(listed(root, "train_aug", "2007_000002")) == ["2007_000002"]


def test_label_maps_of_a_picture_on_its_side_are_named(root, cache):
    exif = Image.Exif()
    exif[0x0112] = 6
    for name, size in (("2007_000001", (3, 2)), ("2007_000002", (2, 3))):  # as it lies in the file, and upright
        Image.new("RGB", (3, 2)).save(root / "JPEGImages" / f"{name}.jpg", exif=exif)
        write_labels(root / "SegmentationClass" / f"{name}.png", np.ones(size[::-1]))
    data = VOC(root, "train")
    image, labels = data[1]
    assert image.shape[1:] == labels.shape == (3, 2)
    for read in (data.shown, lambda: data[0]):
        with pytest.raises(ValueError, match=r"1.png has 3×2 pixels, .*1.jpg has 2×3, turned as its EXIF orientation"):
            read()
