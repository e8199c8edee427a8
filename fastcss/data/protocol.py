"""Defines which classes a continual model learns when, and what each task sees: the overlapped protocol."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
from torch import Tensor
from torch.utils.data import Dataset

from . import ade, digits, voc
from .digits import DigitScenes

#: The name of each label of a data set, the background first.
CLASS_NAMES = {"voc": voc.CLASSES, "ade": ade.CLASSES, "digits": digits.CLASSES}
#: The settings that are published for a data set, or that this project reports.
SETTINGS = {
    "voc": ("19-1", "15-5", "15-1", "10-1", "2-2", "4-2", "4-4"),
    "ade": ("100-50", "100-10", "100-5"),
    "digits": ("2-2", "5-1"),
}
IGNORE = 255


def tasks(data: str | int, setting: str) -> list[tuple[int, ...]]:
    """Return the classes of every task of a setting, in the order of their labels.

    Args:
        data: a name of ``CLASS_NAMES``, or the number of classes without the background.
        setting: "first-step": the number of classes in the first task, and in each further one. ``SETTINGS`` has the
            usual settings; any other will do. With all classes in the first task it is joint training.

    Returns:
        The labels of each task's classes, from 1; 0 is the background and belongs to no task.

    Raises:
        ValueError: the data set is unknown, or the setting has another form, a task without classes, more classes than
            there are, or a last task smaller than the step.

    Source: DecoupleCSS, section 4.1; the overlapped settings of MiB (Cermelli et al., 2020) and PLOP (Douillard et al.,
    2021).

    Example:
        >>> tasks("digits", "5-1")
        [(1, 2, 3, 4, 5), (6,), (7,), (8,), (9,), (10,)]
    """
    if isinstance(data, str):
        if data not in CLASS_NAMES:
            raise ValueError(f"tasks: data must be one of {', '.join(CLASS_NAMES)} or a number, got {data!r}")
        total = len(CLASS_NAMES[data]) - 1
    else:
        total = data
    if total < 1:
        raise ValueError(f"tasks: data must have at least one class, got {total}")
    begin, dash, end = setting.partition("-")
    if not (dash and begin.isdecimal() and end.isdecimal() and int(begin) > 0 and int(end) > 0):
        raise ValueError(f"tasks: setting must be like 15-5, two numbers from 1, got {setting!r}")
    first, step = int(begin), int(end)
    if first > total:
        raise ValueError(f"tasks: setting {setting!r} begins with {first} classes, and there are only {total}")
    if rest := (total - first) % step:
        raise ValueError(
            f"tasks: setting {setting!r} does not divide {total} classes: after the first {first} and steps of {step}, "
            f"{rest} would be left"
        )
    starts = range(first + 1, total + 1, step)
    return [tuple(range(1, first + 1)), *(tuple(range(start, start + step)) for start in starts)]


def label_index(labels: Tensor, name: str) -> Tensor:
    """Convert labels 0…255 of any integer type to int64, which can index a table.

    Torch would take uint8 for a mask, and would count negative numbers from the end. Errors call the labels ``name``.
    """
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise TypeError(f"{name} must be integers, got {labels.dtype}")
    labels = labels.long()
    if labels.numel():
        least, most = (value.item() for value in labels.aminmax())
        if least < 0 or most > IGNORE:
            raise ValueError(f"{name} must be 0 to {IGNORE}, got {least if least < 0 else most}")
    return labels


class Overlapped(Dataset):
    """Shows a labelled data set by the overlapped protocol: all classes except those wanted are background.

    For evaluation, which looks at every image, give the classes of all tasks so far. ``training_set`` returns what one
    task learns from.

    Args:
        dataset: items ``(image, labels)``, with labels ``[H, W]`` of any integer type, in 0…254, or 255 on pixels that
            do not count. The labels returned are int64.
        classes: labels from 1 to 254 that stay. All others, of earlier or later tasks, become 0; 255 stays.
        shown: for each item the labels that occur in it; keeps the items that show at least one of ``classes``. None
            keeps every item.

    Attributes:
        indices: number, in ``dataset``, of each item kept.

    Raises:
        ValueError: a class does not exist or is given twice, ``shown`` is not as long as ``dataset``, or an item has
            labels outside 0…255.
        TypeError: an item's labels are not integers.

    Source: DecoupleCSS, section 4.1; MiB (Cermelli et al., 2020), section 3.

    Example:
        >>> test = Overlapped(DigitScenes("test", 100), classes=(1, 2, 3, 4))
    """

    def __init__(
        self, dataset: Dataset, classes: Sequence[int], *, shown: Sequence[Collection[int]] | None = None
    ) -> None:
        classes = tuple(classes)
        if len(set(classes)) < len(classes) or not set(classes) <= set(range(1, IGNORE)):
            raise ValueError(f"Overlapped: classes must be different labels from 1 to {IGNORE - 1}, got {classes}")
        count = len(dataset)  # type: ignore[arg-type]  # torch's Dataset names no length
        if shown is not None and len(shown) != count:
            raise ValueError(f"Overlapped: shown must be as long as the data set, {count}, got {len(shown)}")
        self.dataset, self.classes = dataset, classes
        self.indices: Sequence[int] = range(count)
        if shown is not None:
            wanted = set(classes)
            self.indices = [i for i in self.indices if not wanted.isdisjoint(shown[i])]
        self._becomes = torch.zeros(IGNORE + 1, dtype=torch.int64)
        kept = torch.tensor([*classes, IGNORE])
        self._becomes[kept] = kept

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, item: int) -> tuple[Tensor, Tensor]:
        index = self.indices[item]
        image, labels = self.dataset[index]
        return image, self._becomes[label_index(labels, f"Overlapped: labels of item {index}")]


def training_set(dataset: Dataset, classes: Sequence[int]) -> Overlapped:
    """Return what a task learns from: every image that shows one of its classes; all other classes are background.

    Args:
        dataset: ``DigitScenes`` of all classes, or a data set that can tell what its images show: ``VOC``, ``ADE20K``.
            These read every label map for that, once: see their ``shown``.
        classes: labels of the task.

    Raises:
        ValueError: as for ``Overlapped``.

    Example:
        >>> second = training_set(DigitScenes("train", 100), tasks("digits", "2-2")[1])
    """
    if isinstance(dataset, DigitScenes):
        return Overlapped(dataset, classes, shown=[dataset.digits(scene) for scene in dataset.indices])
    return Overlapped(dataset, classes, shown=dataset.shown())  # type: ignore[attr-defined]
