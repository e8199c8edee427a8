"""Prepares a data set for one task: pictures for both models, and what they show of the task's classes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset

from ..data.protocol import label_index
from .decouplecss_loss import IGNORE_INDEX
from .preprocessing import preprocess
from .sam import SamSegmenter


class Example(NamedTuple):
    """Holds one picture of a task.

    Attributes:
        pixel_values: ``[3, h, w]`` for the detector.
        sam_pixel_values: ``[3, S, S]`` for SAM.
        classes: int64 ``[m, m]``, at the resolution of SAM's masks: 0 for background, 1 + k for class k of the task,
            255 on pixels that do not count and on SAM's padding.
        present: bool ``[c]``, says which classes the picture shows, even if in one pixel.
        crop: (rows, columns) of ``classes`` that are picture, at least one each. For a picture so thin that it lies
            under no centre, that one is a row or column of padding.
    """

    pixel_values: Tensor
    sam_pixel_values: Tensor
    classes: Tensor
    present: Tensor
    crop: tuple[int, int]


class Batch(NamedTuple):
    """Holds B pictures, with a row for each of the R masks that they show together.

    Attributes:
        pixel_values: ``[3, h, w]`` for each picture; they may differ in size.
        sam_pixel_values: ``[B, 3, S, S]``.
        present: bool ``[B, c]``.
        index: int64 ``[R]``, the class of each mask, picture after picture.
        masks_of: how many of the R masks each picture has.
        masks: uint8 ``[R, m, m]``: 1 on the object, 0 off it, 255 on pixels that do not count.
        ignored: bool ``[B, m, m]``, True on pixels that do not count: some pictures have no mask to say so.
        crops: (rows, columns) of the masks that are picture, for each picture.
    """

    pixel_values: list[Tensor]
    sam_pixel_values: Tensor
    present: Tensor
    index: Tensor
    masks_of: list[int]
    masks: Tensor
    ignored: Tensor
    crops: list[tuple[int, int]]

    def to(self, device: torch.device) -> Batch:
        tensors = {name: value.to(device) for name, value in self._asdict().items() if isinstance(value, Tensor)}
        return self._replace(pixel_values=[picture.to(device) for picture in self.pixel_values], **tensors)


class TaskPictures(Dataset):
    """Turns each item of a labelled data set into an ``Example`` of one task.

    Labels are brought to the resolution of SAM's masks, not the masks to that of the labels: the later enlargement of a
    mask is bilinear and has nothing to learn, and at the size of SAM's picture there would be sixteen times as many
    pixels. A pixel of a mask has the label under its centre.

    Args:
        dataset: items ``(image, labels)``: floating point ``[3, H, W]`` in 0…1, and integers ``[H, W]`` in 0…254, or
            255 on pixels that do not count.
        labels: label of each class of the task, from 1 to 254, in the order of its names; all others are background.
        segmenter: its sizes are those of the pictures and masks.
        shortest, longest: sides of the detector's pictures, see ``preprocess``.

    Raises:
        ValueError: there are no labels, or one is out of range or given twice, or the data set has no items.
    """

    def __init__(
        self,
        dataset: Dataset,
        labels: Sequence[int],
        segmenter: SamSegmenter,
        shortest: int = 800,
        longest: int = 1333,
    ) -> None:
        labels = tuple(labels)
        if not labels or len(set(labels)) < len(labels) or not set(labels) <= set(range(1, IGNORE_INDEX)):
            raise ValueError(f"TaskPictures: labels must be different ones from 1 to {IGNORE_INDEX - 1}, got {labels}")
        if not len(dataset):
            raise ValueError("TaskPictures: dataset must have at least one item")
        self.dataset, self.labels = dataset, labels
        self._sides = {"sam_side": segmenter.image_size, "shortest": shortest, "longest": longest}
        self._mask_side = segmenter.mask_crop((segmenter.image_size,) * 2)[0] // 4
        self._becomes = torch.zeros(IGNORE_INDEX + 1, dtype=torch.int64)
        self._becomes[list(labels)] = torch.arange(len(labels)) + 1
        self._becomes[IGNORE_INDEX] = IGNORE_INDEX

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, item: int) -> Example:
        image, labels = self.dataset[item]
        picture = preprocess(image, **self._sides)
        classes = self._becomes[label_index(labels, f"TaskPictures: labels of item {item}")]
        sizes = zip(classes.shape, picture.crop, strict=True)
        rows, columns = (self._under_centres(length, part) for length, part in sizes)
        padded = F.pad(classes, (0, 1, 0, 1), value=IGNORE_INDEX)
        present = classes.flatten().bincount(minlength=IGNORE_INDEX)[1 : len(self.labels) + 1] > 0
        pairs = zip((rows, columns), classes.shape, strict=True)
        crop = tuple(max(1, (under < length).sum().item()) for under, length in pairs)
        return Example(picture.pixel_values, picture.sam_pixel_values, padded[rows[:, None], columns], present, crop)

    def _under_centres(self, length: int, part: int) -> Tensor:
        """Return indices [m] into ``length`` labels that fill ``part`` of SAM's side; on the padding, ``length``."""
        centres = (torch.arange(self._mask_side, dtype=torch.float64) + 0.5) * self._sides["sam_side"] / self._mask_side
        return (centres * length / part).long().clamp(max=length)


def collate(examples: Sequence[Example]) -> Batch:
    """Make a batch of examples. Masks are listed here, on the CPU, so that the step need not read them from a GPU."""
    index, masks = [], []
    for example in examples:
        shown = example.classes.unique()  # a class of few pixels may lie under no centre
        shown = shown[(shown > 0) & (shown < IGNORE_INDEX)]
        mask = (example.classes == shown[:, None, None]).to(torch.uint8)
        index.append(shown - 1)
        masks.append(mask.masked_fill(example.classes == IGNORE_INDEX, IGNORE_INDEX))
    return Batch(
        pixel_values=[example.pixel_values for example in examples],
        sam_pixel_values=torch.stack([example.sam_pixel_values for example in examples]),
        present=torch.stack([example.present for example in examples]),
        index=torch.cat(index),
        masks_of=[len(of) for of in index],
        masks=torch.cat(masks),
        ignored=torch.stack([example.classes == IGNORE_INDEX for example in examples]),
        crops=[example.crop for example in examples],
    )


def token_shares(batch: Batch, shapes: Sequence[Sequence[tuple[int, int]]]) -> Tensor:
    """Return the share of each token's cell that shows each class.

    The cells of a level are taken to divide the picture evenly. (A detector pads pictures that its strides do not
    divide, so the last cells reach beyond the picture by less than one cell.) They are counted in whole pixels of the
    masks; neighbouring cells share the pixels between them.

    Args:
        batch: batch of B pictures and c classes.
        shapes: (height, width) of every level of each picture's tokens.

    Returns:
        The shares, float32 ``[n, c]`` in 0…1, for the n tokens of all pictures, level after level; NaN for cells with
        pixels that do not count.
    """
    parts, first = [], 0
    for b, (count, (height, width), levels) in enumerate(zip(batch.masks_of, batch.crops, shapes, strict=True)):
        rows = slice(first, first + count)
        planes = torch.cat([batch.ignored[b, None], batch.masks[rows] == 1])[:, :height, :width].float()
        means = torch.cat([F.adaptive_avg_pool2d(planes, shape).flatten(1) for shape in levels], 1)  # [1 + R of it, N]
        shares = means.new_zeros(means.shape[1], batch.present.shape[1])
        shares[:, batch.index[rows]] = means[1:].T
        parts.append(shares.masked_fill(means[0, :, None] > 0, torch.nan))
        first += count
    return torch.cat(parts)
