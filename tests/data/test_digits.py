"""Tests the digit scenes: what a scene depends on, what is in it, and that one can read it."""

import sys

import pytest
import torch
from scene_checks import assert_item_form, assert_same_in_worker_processes

pytest.importorskip("sklearn")
pytest.importorskip("PIL")

from fastcss.data import CLASSES, DigitScenes, _scenes, digits


def test_items_have_the_promised_form():
    for split in digits.SPLITS:
        scenes = DigitScenes(split, 20)
        assert len(scenes) == 20
        for image, labels in scenes:
            assert_item_form(image, labels, len(CLASSES))
    assert len(CLASSES) == 11


def test_a_scene_follows_from_seed_split_and_number_alone():
    scenes = DigitScenes("train", 6, seed=3)
    _ = scenes[1]
    later = DigitScenes("train", 50, seed=3)
    for image, other in zip(scenes[4], later[4], strict=True):
        assert torch.equal(image, other)
    others = [scenes[5], DigitScenes("train", 6, seed=4)[4], DigitScenes("val", 6, seed=3)[4]]
    for image, _ in others:
        assert not torch.equal(image, scenes[4][0])


def test_worker_processes_give_the_same_scenes():
    assert_same_in_worker_processes(DigitScenes("train", 7))


def test_torchs_generator_is_left_alone():
    torch.manual_seed(0)
    expected = torch.randn(3)
    torch.manual_seed(0)
    _ = DigitScenes("train", 1)[0]
    assert torch.equal(torch.randn(3), expected)


def test_no_handwriting_is_in_two_splits_and_all_of_it_is_used():
    drawn = {split: [sheet for sheets in digits._handwriting(split) for sheet in sheets] for split in digits.SPLITS}
    assert sum(map(len, drawn.values())) == 1797
    assert len(drawn["train"]) > len(drawn["test"]) > len(drawn["val"]) > 150
    seen = {split: {sheet.numpy().tobytes() for sheet in sheets} for split, sheets in drawn.items()}
    assert not seen["train"] & seen["test"]
    assert not seen["train"] & seen["val"]
    assert not seen["val"] & seen["test"]


def test_every_digit_is_there_to_be_seen_and_stands_out():
    scenes = DigitScenes("val", 100)
    counts, contrasts = set(), []
    brightness = torch.tensor([0.299, 0.587, 0.114])
    for i, (image, labels) in enumerate(scenes):
        drawn = scenes.digits(i)
        counts.add(len(drawn))
        areas = torch.bincount(labels.flatten(), minlength=11)
        assert set(torch.nonzero(areas)[1:, 0].tolist()) == set(drawn)
        assert min(areas[label] for label in drawn) >= 80
        assert areas[0] > 128 * 128 / 3
        gray = torch.einsum("chw,c->hw", image, brightness)
        for label in set(drawn):
            ink = (labels == label).float()[None, None]
            near = torch.nn.functional.max_pool2d(ink, 9, 1, 4)[0, 0].bool() & (labels == 0)
            inside = gray[labels == label].mean()
            contrasts.append((inside - gray[near]).abs().mean().item())
    assert counts == {1, 2, 3, 4}
    contrasts = torch.tensor(contrasts)
    assert contrasts.quantile(0.05) > 0.2
    assert contrasts.mean() > 0.35


def test_all_classes_occur_about_equally_often():
    scenes = DigitScenes("train", 2000)
    frequency = torch.bincount(torch.tensor([label for i in range(2000) for label in scenes.digits(i)]))[1:]
    assert len(frequency) == 10
    assert frequency.min() > 0.8 * frequency.max()


def test_classes_keep_their_scenes_and_the_rest_becomes_background():
    everything, some = DigitScenes("train", 60), DigitScenes("train", 60, classes=(3, 7))
    expected = [i for i, (_, labels) in enumerate(everything) if torch.isin(labels, torch.tensor([3, 7])).any()]
    assert 0 < len(expected) < 60
    assert list(some.indices) == expected
    assert len(some) == len(expected)
    for scene, (image, labels) in zip(some.indices, some, strict=True):
        whole_image, whole = everything[scene]
        assert torch.equal(image, whole_image)
        assert torch.equal(labels, whole.where((whole == 3) | (whole == 7), 0))
    assert len(DigitScenes("train", 60, classes=())) == 0


def test_items_outside_are_an_index_error_and_negative_ones_count_from_the_end():
    scenes = DigitScenes("test", 3)
    assert torch.equal(scenes[-1][0], scenes[2][0])
    with pytest.raises(IndexError):
        scenes[3]
    assert len(DigitScenes("test", 0)) == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"split": "training"}, "split must be one of train, val, test, got 'training'"),
        ({"count": -1}, "count must be at least 0, got -1"),
        ({"seed": -2}, "seed must be at least 0, got -2"),
        ({"classes": (0, 1)}, r"classes must be different labels from 1 to 10, got \(0, 1\)"),
        ({"classes": [11]}, "classes must be different labels"),
        ({"classes": [2, 2]}, "classes must be different labels"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        DigitScenes(**{"split": "train", "count": 2} | arguments)


@pytest.mark.parametrize("missing", ["sklearn", "PIL"])
def test_a_missing_package_names_the_extra(missing, monkeypatch):
    digits._handwriting.cache_clear()
    _scenes.photographs.cache_clear()
    for module in [name for name in sys.modules if name.split(".")[0] == missing]:
        monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(ModuleNotFoundError, match=rf"{missing}.* is not installed: pip install 'fastcss\[data\]'"):
        DigitScenes("train", 1)
