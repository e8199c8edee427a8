"""Tests the index of which classes an image shows: it must be kept, follow the data, and be whole or made anew."""

import json
import os
import shutil
from concurrent.futures import ThreadPoolExecutor

import pytest

pytest.importorskip("PIL")

from voc_folder import LABELS, write_labels

from fastcss.data import VOC, _labelled


def count_reads(monkeypatch):
    read, reads = _labelled.read_labels, []
    monkeypatch.setattr(_labelled, "read_labels", lambda path, classes: reads.append(path.name) or read(path, classes))
    return reads


def test_what_images_show_is_read_once_and_kept(voc_root, cache, monkeypatch):
    reads = count_reads(monkeypatch)
    expected = [(1, 15), (20,), ()]
    for _ in range(2):
        data = VOC(voc_root, "trainval")
        assert data.shown() == data.shown() == expected
        assert len(reads) == 3
    assert VOC(voc_root, "train").shown() == expected[:2]
    assert len(list(cache.iterdir())) == 2


def test_nothing_is_written_beside_the_data(voc_root, tmp_path, cache):
    files = sorted(voc_root.rglob("*"))
    VOC(voc_root, "train").shown()
    VOC(voc_root, "val", cache=tmp_path / "mine").shown()
    assert sorted(voc_root.rglob("*")) == files
    assert len(list(cache.iterdir())) == len(list((tmp_path / "mine").iterdir())) == 1


def test_a_changed_label_map_is_read_again(voc_root, cache):
    assert VOC(voc_root, "train").shown()[1] == (20,)
    path = voc_root / "SegmentationClass" / "2007_000002.png"
    before = path.stat()
    write_labels(path, [[19, 19], [0, 0]])
    assert path.stat().st_size == before.st_size
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns + 1))
    assert VOC(voc_root, "train").shown()[1] == (19,)
    assert len(list(cache.iterdir())) == 1


def test_another_order_of_the_same_files_is_another_index(voc_root, cache):
    for label, name in enumerate(LABELS, 1):
        write_labels(path := voc_root / "SegmentationClass" / f"{name}.png", [[label] * 2] * 2)
        os.utime(path, ns=(0, 0))
        shutil.copy(voc_root / "JPEGImages" / "2007_000001.jpg", path := voc_root / "JPEGImages" / f"{name}.jpg.new")
        os.utime(path, ns=(0, 0))
        path.rename(path.with_suffix(""))
    assert VOC(voc_root, "trainval").shown() == [(1,), (2,), (3,)]
    (voc_root / "ImageSets" / "Segmentation" / "trainval.txt").write_text("\n".join(reversed(LABELS)))
    assert VOC(voc_root, "trainval").shown() == [(3,), (2,), (1,)]


@pytest.mark.parametrize("content", [b"", b'{"stamp": "', b"[]", b"{}", b'{"stamp": 3}', b"\xff\x00", b"null"])
def test_a_damaged_index_is_made_anew(voc_root, cache, content):
    VOC(voc_root, "train").shown()
    (kept,) = cache.iterdir()
    whole = kept.read_bytes()
    kept.write_bytes(content)
    assert VOC(voc_root, "train").shown() == [(1, 15), (20,)]
    assert kept.read_bytes() == whole


def test_a_kill_while_writing_leaves_the_former_index(voc_root, cache, monkeypatch):
    VOC(voc_root, "train").shown()
    (kept,) = cache.iterdir()
    whole = kept.read_bytes()
    write_labels(voc_root / "SegmentationClass" / "2007_000001.png", [[3, 3], [3, 3]])

    def killed(content, file):
        file.write(json.dumps(content)[:20])
        raise KeyboardInterrupt

    monkeypatch.setattr(_labelled.json, "dump", killed)
    with pytest.raises(KeyboardInterrupt):
        VOC(voc_root, "train").shown()
    assert [path.read_bytes() for path in cache.iterdir()] == [whole]


def test_a_cache_that_cannot_be_written_is_a_warning(voc_root, tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.warns(UserWarning, match="not kept for next time: .*file"):
        assert VOC(voc_root, "train", cache=tmp_path / "file" / "cache").shown() == [(1, 15), (20,)]


def test_a_full_disk_is_a_warning_and_leaves_nothing(voc_root, cache, monkeypatch):
    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(_labelled.os, "fsync", full)
    with pytest.warns(UserWarning, match="No space left on device"):
        assert VOC(voc_root, "train").shown() == [(1, 15), (20,)]
    assert not list(cache.iterdir())


def test_several_may_make_the_index_at_once(voc_root, cache):
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda _: VOC(voc_root, "trainval").shown(), range(8)))
    assert results == [[(1, 15), (20,), ()]] * 8
    assert len(list(cache.iterdir())) == 1
