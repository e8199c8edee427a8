"""Tests labels at the resolution of SAM's masks, and batches of them."""

from __future__ import annotations

import pytest
import torch
from training_scenes import LABELS, SIDES, Squares

from fastcss.models.sam import SamSegmenter
from fastcss.models.task_pictures import TaskPictures, collate
from fastcss.ops import merge_masks


@pytest.fixture(scope="module")
def segmenter() -> SamSegmenter:
    return SamSegmenter.random("tiny")  # pictures of 128 × 128, masks of 64 × 64


def of(labels: torch.Tensor, segmenter: SamSegmenter, classes: tuple[int, ...] = LABELS):
    return TaskPictures([(torch.rand(3, *labels.shape), labels)], classes, segmenter, **SIDES)[0]


def test_the_tasks_classes_are_numbered_in_its_order(segmenter):
    labels = torch.zeros(64, 64, dtype=torch.int64)
    for column, label in enumerate((1, 2, 4, 254, 255)):
        labels[:, 10 * column : 10 * column + 10] = label
    example = of(labels, segmenter)
    expected = torch.zeros(64, 64, dtype=torch.int64)
    expected[:, 10:20], expected[:, 20:30], expected[:, 40:50] = 2, 1, 255
    assert torch.equal(example.classes, expected)
    assert example.present.tolist() == [True, True]
    assert of(labels, segmenter, (3, 254)).present.tolist() == [False, True]


@pytest.mark.parametrize("size", [(100, 37), (37, 100), (300, 300), (5, 9)])
def test_a_pixel_has_the_label_under_its_centre(segmenter, size):
    labels = torch.randint(0, 5, size, generator=torch.Generator().manual_seed(0))
    example = of(labels, segmenter, (1, 2, 3, 4))
    crop = [int(side * 128 / max(size) + 0.5) for side in size]
    for i in range(64):
        for j in range(64):
            y, x = 2 * i + 1, 2 * j + 1  # in SAM's picture
            inside = y < crop[0] and x < crop[1]
            expected = labels[y * size[0] // crop[0], x * size[1] // crop[1]] if inside else 255
            assert example.classes[i, j] == expected


@pytest.mark.parametrize("item", range(3))
def test_masks_as_learnt_are_labels_when_merged(segmenter, item):
    """A mask is trained towards exactly what ``segment`` enlarges: nothing may be shifted."""
    dataset = Squares(3, sizes=((90, 120), (120, 90)))
    labels = dataset[item][1]
    example = TaskPictures(dataset, LABELS, segmenter, **SIDES)[item]
    batch = collate([example])
    logits = torch.where(batch.masks == 1, 1.0, -1.0)
    crop = tuple(int(side * 128 / 120 + 0.5) for side in labels.shape)
    merged = merge_masks(logits, torch.ones(len(logits)), tuple(labels.shape), crop=segmenter.mask_crop(crop))
    got = torch.tensor([0, *(LABELS[k] for k in batch.index)])[merged]
    wrong = got != torch.where(torch.isin(labels, torch.tensor(LABELS)), labels, 0)
    assert wrong.double().mean() < 0.01
    for shift in (-3, 3):
        for dim in (0, 1):
            assert (got.roll(shift, dim) != labels)[labels != 1].double().mean() > wrong.double().mean()


def test_a_class_of_few_pixels_is_present_and_has_no_mask(segmenter):
    labels = torch.zeros(640, 640, dtype=torch.int64)
    labels[0, 0] = 2
    example = of(labels, segmenter)
    assert example.present.tolist() == [False, True]
    batch = collate([example])
    assert batch.masks_of == [0]
    assert batch.masks.shape == (0, 64, 64)


def test_a_batch_has_a_row_for_each_mask(segmenter):
    examples = TaskPictures(Squares(6), LABELS, segmenter, **SIDES)
    batch = collate([examples[i] for i in range(6)])
    assert batch.masks_of == [1, 1, 2, 1, 1, 2]
    assert batch.index.tolist() == [0, 1, 0, 1, 0, 1, 0, 1]
    pictures = [b for b, count in enumerate(batch.masks_of) for _ in range(count)]
    for mask, b, k in zip(batch.masks, pictures, batch.index.tolist(), strict=True):
        classes = examples[b].classes
        assert torch.equal(mask == 1, classes == k + 1)
        assert torch.equal(mask == 255, classes == 255)
        assert (mask <= 1).logical_or(mask == 255).all()
    assert [tuple(picture.shape[1:]) for picture in batch.pixel_values] == [(48, 64), (64, 48)] * 3


def test_what_is_no_task_is_refused(segmenter):
    for labels in ((), (0, 1), (3, 3), (255,)):
        with pytest.raises(ValueError, match="TaskPictures: labels must be different ones from 1 to 254"):
            TaskPictures(Squares(1), labels, segmenter)
    with pytest.raises(ValueError, match="TaskPictures: dataset must have at least one item"):
        TaskPictures(Squares(0), LABELS, segmenter)
