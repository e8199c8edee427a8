"""Tests the overlapped protocol: which classes a task has, what it keeps of a data set, and what it hides."""

import pytest
import torch
from torch.utils.data import DataLoader, Dataset

pytest.importorskip("sklearn")
pytest.importorskip("PIL")

from fastcss.data import CLASS_NAMES, SETTINGS, DigitScenes, Overlapped, tasks, training_set

NUMBER_OF_TASKS = {
    ("voc", "19-1"): 2,
    ("voc", "15-5"): 2,
    ("voc", "15-1"): 6,
    ("voc", "10-1"): 11,
    ("voc", "2-2"): 10,
    ("voc", "4-2"): 9,
    ("voc", "4-4"): 5,
    ("ade", "100-50"): 2,
    ("ade", "100-10"): 6,
    ("ade", "100-5"): 11,
    ("digits", "2-2"): 5,
    ("digits", "5-1"): 6,
}


class Maps(Dataset):
    """Has labels made by hand; an image is filled with its number."""

    def __init__(self, *labels):
        self.labels = [torch.tensor(rows) for rows in labels]

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, item):
        return torch.full((3, *self.labels[item].shape), float(item)), self.labels[item]

    def shown(self):
        return [tuple(set(labels.flatten().tolist()) - {0, 255}) for labels in self.labels]


MAPS = Maps([[0, 1], [2, 255]], [[3, 3], [0, 0]], [[2, 3], [4, 0]], [[255, 0], [0, 0]], [[4, 1], [1, 1]])


def test_all_published_settings_are_there():
    assert {(data, setting) for data, settings in SETTINGS.items() for setting in settings} == set(NUMBER_OF_TASKS)


@pytest.mark.parametrize(("data", "setting"), NUMBER_OF_TASKS)
def test_a_setting_has_every_class_once_and_in_order(data, setting):
    classes = tasks(data, setting)
    first, step = map(int, setting.split("-"))
    assert len(classes) == NUMBER_OF_TASKS[data, setting]
    assert [len(task) for task in classes] == [first] + [step] * (len(classes) - 1)
    assert [label for task in classes for label in task] == list(range(1, len(CLASS_NAMES[data])))


def test_any_other_setting_and_number_of_classes():
    assert tasks(7, "3-2") == [(1, 2, 3), (4, 5), (6, 7)]
    assert tasks("digits", "10-1") == [tuple(range(1, 11))]


@pytest.mark.parametrize(
    ("data", "setting", "message"),
    [
        ("coco", "2-2", "data must be one of voc, ade, digits or a number, got 'coco'"),
        (0, "1-1", "at least one class, got 0"),
        ("voc", "15", "setting must be like 15-5, two numbers from 1, got '15'"),
        ("voc", "15-", "setting must be like 15-5"),
        ("voc", "0-5", "setting must be like 15-5"),
        ("voc", "15-0", "setting must be like 15-5"),
        ("voc", "15-5-1", "setting must be like 15-5"),
        ("digits", "11-1", "'11-1' begins with 11 classes, and there are only 10"),
        ("voc", "15-2", "'15-2' does not divide 20 classes: after the first 15 and steps of 2, 1 would be left"),
    ],
)
def test_settings_that_do_not_fit_are_named(data, setting, message):
    with pytest.raises(ValueError, match=message):
        tasks(data, setting)


def test_training_keeps_images_of_the_task_and_hides_older_and_later_classes():
    kept = training_set(MAPS, (2, 3))
    assert kept.indices == [0, 1, 2]
    expected = [[[0, 0], [2, 255]], [[3, 3], [0, 0]], [[2, 3], [0, 0]]]
    for (image, labels), number, expectation in zip(kept, kept.indices, expected, strict=True):
        assert image.unique().tolist() == [number]
        assert labels.dtype == torch.int64
        assert labels.tolist() == expectation


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32])
def test_label_maps_may_be_of_any_integers(dtype):
    """Any integer dtype must work, though torch takes uint8 in an index for a mask."""
    given = Maps(*(labels.tolist() for labels in MAPS.labels))
    given.labels = [labels.to(dtype) for labels in given.labels]
    for (_, got), (_, expected) in zip(Overlapped(given, (1, 2)), Overlapped(MAPS, (1, 2)), strict=True):
        assert torch.equal(got, expected)
        assert got.dtype == torch.int64


@pytest.mark.parametrize(
    ("rows", "error", "message"),
    [
        ([[0, -1]], ValueError, "Overlapped: labels of item 0 must be 0 to 255, got -1"),
        ([[0, 300]], ValueError, "Overlapped: labels of item 0 must be 0 to 255, got 300"),
        ([[0.0, 1.0]], TypeError, r"Overlapped: labels of item 0 must be integers, got torch\.float32"),
        ([[True, False]], TypeError, r"Overlapped: labels of item 0 must be integers, got torch\.bool"),
    ],
)
def test_what_is_no_label_map_is_named(rows, error, message):
    with pytest.raises(error, match=message):
        Overlapped(Maps(rows), (1,))[0]


def test_evaluation_keeps_every_image_and_hides_later_classes():
    kept = Overlapped(MAPS, (1, 2))
    assert len(kept) == len(MAPS)
    expected = [[[0, 1], [2, 255]], [[0, 0], [0, 0]], [[2, 0], [0, 0]], [[255, 0], [0, 0]], [[0, 1], [1, 1]]]
    assert [labels.tolist() for _, labels in kept] == expected
    assert MAPS[2][1].tolist() == [[2, 3], [4, 0]]  # the data set itself is as it was


def test_every_task_sees_an_image_with_classes_of_several_tasks():
    classes = tasks(4, "1-1")
    seen = [training_set(MAPS, task).indices for task in classes]
    assert seen == [[0, 4], [0, 2], [1, 2], [2, 4]]


def test_digits_are_as_the_scenes_own_protocol_has_them():
    everything = DigitScenes("train", 40)
    for task in tasks("digits", "5-1")[:2]:
        kept, expected = training_set(everything, task), DigitScenes("train", 40, classes=task)
        assert kept.indices == list(expected.indices)
        for (image, labels), (other_image, other) in zip(kept, expected, strict=True):
            assert torch.equal(image, other_image)
            assert torch.equal(labels, other)


def test_no_image_of_a_class_is_an_empty_set_and_items_outside_are_an_index_error():
    assert len(training_set(MAPS, (5,))) == 0
    kept = training_set(MAPS, (4,))
    assert torch.equal(kept[-1][1], kept[1][1])
    with pytest.raises(IndexError):
        kept[2]


def test_worker_processes_load_it():
    loaded = DataLoader(Overlapped(MAPS, (1, 4)), num_workers=1, multiprocessing_context="fork")
    assert [labels[0].tolist() for _, labels in loaded] == [labels.tolist() for _, labels in Overlapped(MAPS, (1, 4))]


@pytest.mark.parametrize("classes", [(0, 1), (255,), (-1,), (2, 2)])
def test_bad_classes_are_named(classes):
    with pytest.raises(ValueError, match="classes must be different labels from 1 to 254"):
        Overlapped(MAPS, classes)


def test_what_is_shown_must_be_known_of_every_item():
    with pytest.raises(ValueError, match="shown must be as long as the data set, 5, got 1"):
        Overlapped(MAPS, (1,), shown=[(1,)])
