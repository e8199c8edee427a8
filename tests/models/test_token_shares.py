"""Tests how much of each token's cell shows a class, against a loop over cells and pixels."""

from __future__ import annotations

import math

import pytest
import torch
from training_scenes import SIDES

from fastcss.models.sam import SamSegmenter
from fastcss.models.task_pictures import Batch, TaskPictures, collate, token_shares

LEVELS = ((8, 8), (4, 4)), ((7, 3), (3, 2), (1, 1)), ((80, 70), (5, 64))  # even, uneven, more cells than pixels


@pytest.fixture(scope="module")
def segmenter() -> SamSegmenter:
    return SamSegmenter.random("tiny")  # masks of 64 × 64


def batch_of(segmenter: SamSegmenter, *labels: torch.Tensor, classes: tuple[int, ...] = (3, 1, 2)) -> Batch:
    dataset = [(torch.rand(3, *of.shape), of) for of in labels]
    pictures = TaskPictures(dataset, classes, segmenter, **SIDES)
    return collate([pictures[i] for i in range(len(labels))])


def blocks(height: int, width: int, seed: int, ignored: bool = True) -> torch.Tensor:
    """Draw labels 0, 1, 2, 4 and, if ``ignored``, 255, in blocks of 16 × 16: no pixel has label 3."""
    values = torch.tensor([0, 0, 0, 1, 2, 4, 255 if ignored else 0])
    generator = torch.Generator().manual_seed(seed)
    drawn = values[torch.randint(0, len(values), (-(-height // 16), -(-width // 16)), generator=generator)]
    return drawn.repeat_interleave(16, 0).repeat_interleave(16, 1)[:height, :width]


def by_hand(classes: torch.Tensor, crop: tuple[int, int], count: int, shape: tuple[int, int]) -> torch.Tensor:
    """Count shares [h·w, count] of one picture and level; ``classes`` are as an ``Example`` has them."""
    (height, width), rows = crop, []
    for i in range(shape[0]):
        for j in range(shape[1]):
            cell = [
                classes[y, x].item()
                for y in range(i * height // shape[0], math.ceil((i + 1) * height / shape[0]))
                for x in range(j * width // shape[1], math.ceil((j + 1) * width / shape[1]))
            ]
            nothing = [math.nan] * count
            rows.append(nothing if 255 in cell else [cell.count(k + 1) / len(cell) for k in range(count)])
    return torch.tensor(rows)


@pytest.mark.parametrize("levels", LEVELS)
@pytest.mark.parametrize("ignored", [False, True])
def test_shares_are_counted_cell_by_cell(segmenter, levels, ignored):
    """The pictures have several sizes, so that most fill SAM's in part; the first shows nothing of the task."""
    sizes = ((96, 96), (96, 96), (64, 128), (128, 30))
    labels = [blocks(*size, seed, ignored) for seed, size in enumerate(sizes)]
    labels[0] = torch.where(labels[0] == 255, 255, 4)
    batch = batch_of(segmenter, *labels)
    assert batch.masks_of[0] == 0 < min(batch.masks_of[1:])
    assert batch.crops == [(64, 64), (64, 64), (32, 64), (64, 15)]
    pictures = TaskPictures([(torch.rand(3, *of.shape), of) for of in labels], (3, 1, 2), segmenter, **SIDES)
    expected = [by_hand(picture.classes, picture.crop, 3, shape) for picture in pictures for shape in levels]
    got = token_shares(batch, [levels] * len(labels))
    torch.testing.assert_close(got, torch.cat(expected), rtol=1e-6, atol=1e-7, equal_nan=True)
    assert got.isnan().any() == ignored
    assert (got[:, 0].nan_to_num() == 0).all()
    assert (got > 0).any()


def test_each_picture_has_levels_of_its_own(segmenter):
    batch = batch_of(segmenter, blocks(96, 96, 1), blocks(64, 128, 2))
    shapes = [((6, 6), (3, 3)), ((5, 9),)]
    got = token_shares(batch, shapes)
    assert got.shape == (36 + 9 + 45, 3)
    alone = [token_shares(batch_of(segmenter, blocks(*size, seed)), [of]) for size, seed, of in (
        ((96, 96), 1, shapes[0]), ((64, 128), 2, shapes[1]),
    )]  # fmt: skip
    assert torch.equal(got.nan_to_num(-1), torch.cat(alone).nan_to_num(-1))


def test_the_padding_of_sams_picture_is_in_no_cell(segmenter):
    labels = torch.zeros(32, 128, dtype=torch.int64)
    labels[:, 64:] = 1
    got = token_shares(batch_of(segmenter, labels), [((2, 4),)])
    assert torch.equal(got[:, 1], torch.tensor([0.0, 0, 1, 1] * 2))
    assert (got[:, [0, 2]] == 0).all()


@pytest.mark.parametrize("shown", [0, 1])
def test_of_a_picture_too_thin_for_any_centre_nothing_is_said(segmenter, shown):
    batch = batch_of(segmenter, torch.full((1, 300), shown), classes=(1,))
    assert batch.crops == [(1, 64)]
    assert batch.present.tolist() == [[bool(shown)]]
    assert token_shares(batch, [((1, 12), (1, 6))]).isnan().all()


def test_a_batch_moves_whole(segmenter):
    batch = batch_of(segmenter, blocks(96, 96, 1)).to(torch.device("meta"))
    tensors = [*batch.pixel_values, *(value for value in batch if isinstance(value, torch.Tensor))]
    assert len(tensors) == 6
    assert all(tensor.device.type == "meta" for tensor in tensors)
