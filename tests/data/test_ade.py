"""Tests ADE20K's reader."""

import numpy as np
import pytest

pytest.importorskip("PIL")

from PIL import Image

from fastcss.data import ADE20K, Overlapped, ade, tasks, training_set

LABELS = {"ADE_train_00000001": [[0, 1, 150]], "ADE_train_00000002": [[101, 5, 5]]}


@pytest.fixture
def root(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = tmp_path / "ADEChallengeData2016"
    for part in ("images", "annotations"):
        for split in ("training", "validation"):
            (folder / part / split).mkdir(parents=True)
    for name, rows in LABELS.items():
        Image.new("L", (3, 1), 255).save(folder / "images" / "training" / f"{name}.jpg")
        Image.fromarray(np.uint8(rows)).save(folder / "annotations" / "training" / f"{name}.png")
    return folder


def test_items_come_in_the_order_of_names_and_zero_stays_background(root):
    for given in (root, root.parent):
        data = ADE20K(given, "train")
        assert len(data) == 2
        assert [labels.tolist() for _, labels in data] == list(LABELS.values())
        for image, _ in data:
            assert image.shape == (3, 1, 3)  # grey pictures, of which ADE20K has some, are made RGB
            assert image.unique().tolist() == [1]


def test_the_names_are_the_challenges():
    assert len(ade.CLASSES) == len(set(ade.CLASSES)) == 151
    at = {1: "wall", 2: "building", 13: "person", 21: "car", 67: "flower", 100: "buffet", 101: "poster", 150: "flag"}
    assert {label: ade.CLASSES[label] for label in at} == at
    assert all(name == name.strip().lower() for name in ade.CLASSES)


def test_tasks_of_ade(root):
    data, (first, second) = ADE20K(root, "train"), tasks("ade", "100-50")
    assert data.shown() == [(1, 150), (5, 101)]
    assert [labels.tolist() for _, labels in training_set(data, first)] == [[[0, 1, 0]], [[0, 5, 5]]]
    assert [labels.tolist() for _, labels in training_set(data, second)] == [[[0, 0, 150]], [[101, 0, 0]]]
    assert [labels.tolist() for _, labels in Overlapped(data, first + second)] == list(LABELS.values())


def test_a_label_outside_and_a_size_apart_are_named(root):
    path = root / "annotations" / "training" / "ADE_train_00000002.png"
    for rows, message in (
        ([[0, 151, 0]], r"00000002.png: labels must be 0 to 150, or 255, got 151"),
        ([[0, 1]], r"00000002.png has 2×1 pixels, and its picture .*00000002.jpg has 3×1"),
    ):
        Image.fromarray(np.uint8(rows)).save(path)
        with pytest.raises(ValueError, match=message):
            ADE20K(root, "train")[1]


def test_what_is_missing_is_named(root, tmp_path):
    with pytest.raises(ValueError, match="split must be one of train, val, got 'training'"):
        ADE20K(root, "training")
    looked = r"nowhere/images/training and .*nowhere/annotations/training or .*ADEChallengeData2016/images/training"
    with pytest.raises(FileNotFoundError, match=looked):
        ADE20K(tmp_path / "nowhere", "train")
    with pytest.raises(FileNotFoundError, match=r"looked for \*.jpg in .*validation"):
        ADE20K(root, "val")
    picture = root / "images" / "training" / "ADE_train_00000001.jpg"
    picture.rename(root / "other.jpg")
    with pytest.raises(FileNotFoundError, match=r"1 of 2 files .*images.training, the first is ADE_train_00000001.jpg"):
        ADE20K(root, "train")
    (root / "other.jpg").rename(picture)
    (root / "annotations" / "training" / "ADE_train_00000002.png").unlink()
    with pytest.raises(FileNotFoundError, match=r"annotations.training, the first is ADE_train_00000002.png"):
        ADE20K(root, "train")


def test_hidden_files_are_none_of_the_data_set(root):
    for part, name in (("images", "._ADE_train_00000001.jpg"), ("annotations", ".hidden.png")):
        (root / part / "training" / name).write_bytes(b"\0\x05\x16\x07")
    data = ADE20K(root, "train")
    assert [path.stem for path in data.images] == list(LABELS)
    assert data.shown() == [(1, 150), (5, 101)]
