"""Measures how well a continual model segments what it has learned, and how much it has forgotten."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from .protocol import IGNORE

if TYPE_CHECKING:
    from torchmetrics import Metric


def class_iou(labels: int) -> Metric:
    """Make a metric of torchmetrics that gathers every label's intersection over union over a data set.

    ``update(predicted, labels)`` takes two label maps of integers, of any shape, the same for both; pixels labelled 255
    do not count. ``compute()`` gives float32 ``[labels]``, with NaN for a label that occurs in neither. ``.to(device)``
    and ``.reset()`` are those of torchmetrics. ``update`` raises ValueError, before it counts anything, if a pixel that
    counts has no valid label in one of the maps; 255 is not valid in predictions.

    Args:
        labels: the number of labels, including the background.

    Raises:
        ModuleNotFoundError: torchmetrics is not installed.
    """
    try:
        from ._class_iou import ClassIoU
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"IoU is measured with torchmetrics, and {error.name} is not installed: pip install 'fastcss[data]'",
            name=error.name,
        ) from error
    return ClassIoU(labels, average=None, ignore_index=IGNORE, zero_division=math.nan)


class ContinualMetrics:
    """Computes mIoU after every task, and Last-, Avg- and FF-IoU, from one IoU vector per task. All are in 0…1.

    Args:
        tasks: labels of every task's classes, as ``protocol.tasks`` gives them.
        images: n_k of eq. 8, how many test images show a class of task k: ``len(training_set(test, classes))``.

    Attributes:
        rows: for each task added ``{"task", "iou", "old", "new", "all"}``, ready for JSON: the number t from 1, the IoU
            of every label (None if it is not learned, or neither in labels nor predictions), and the mIoU of background
            and the tasks before t (None for the first), of task t, and of background and the tasks up to t. A label
            whose IoU is None is left out of every mean.

    Raises:
        ValueError: there are no tasks, or ``images`` has another length.

    Example:
        >>> metrics = ContinualMetrics([(1, 2), (3,)], images=(60, 40))
        >>> metrics.add([0.9, 0.8, 0.7, None])["all"]
        0.8
    """

    def __init__(self, tasks: Sequence[Sequence[int]], images: Sequence[int]) -> None:
        if not tasks or len(images) != len(tasks):
            raise ValueError(
                f"ContinualMetrics: images must be one number for each task, got {len(images)} for {len(tasks)} tasks"
            )
        self.tasks, self.images = [tuple(task) for task in tasks], list(images)
        self.rows: list[dict] = []

    def add(self, iou: Tensor | Sequence[float | None]) -> dict:
        """Add the result of the next task, and return its row.

        Args:
            iou: IoU of each label after this task, ``[1 + classes of all tasks]``, label 0 being the background; NaN or
                None if there is none. The values of labels not learned yet do not matter. To resume, pass a row's
                ``iou``.

        Raises:
            ValueError: all tasks have been added, or the vector has another length.
        """
        learned = len(self.rows)
        if learned == len(self.tasks):
            raise ValueError(f"ContinualMetrics: all {learned} tasks have been added")
        labels = 1 + max(max(task) for task in self.tasks)
        values = iou.tolist() if isinstance(iou, Tensor) else list(iou)
        if len(values) != labels:
            raise ValueError(
                f"ContinualMetrics: iou must have one value for each of {labels} labels, got {len(values)}"
            )
        old = [0, *(label for task in self.tasks[:learned] for label in task)]
        new = self.tasks[learned]
        counts = {*old, *new}
        values = [value if label in counts and _is_number(value) else None for label, value in enumerate(values)]
        row = {
            "task": learned + 1,
            "iou": values,
            "old": _mean(values[label] for label in old) if learned else None,
            "new": _mean(values[label] for label in new),
            "all": _mean(values[label] for label in counts),
        }
        self.rows.append(row)
        return row

    def summary(self) -> dict:
        """Summarise the tasks added so far, ready for JSON; an entry with nothing to average is None.

        - ``"first"``, ``"later"``, ``"all"``: mIoU, after the last task added, of background and the first task, of all
          further tasks, and of everything: the columns of the published tables, "0-15", "16-20" and "all".
        - ``"last_iou"``, ``"avg_iou"``, ``"ff_iou"``: the metrics of CA-SAM, eq. 8 to 12, where IoU_{k,t} is the mean
          over the classes of task k after task t, and N the number of tasks added. The background belongs to no task.
          In eq. 11 the earlier best is searched from task k on: before that its classes are unknown and count 0, which
          is never better. A negative FF-IoU says that later tasks helped.

        Source: Continual Alignment for SAM, appendix B, eq. 8 to 12; DecoupleCSS, tables 1 to 3.
        """
        if not self.rows:
            return dict.fromkeys(("first", "later", "all", "last_iou", "avg_iou", "ff_iou"))
        count, iou = len(self.rows), self.rows[-1]["iou"]
        averages = [self._average(t) for t in range(count)]
        return {
            "first": _mean(iou[label] for label in (0, *self.tasks[0])),
            "later": _mean(iou[label] for task in self.tasks[1:count] for label in task),
            "all": self.rows[-1]["all"],
            "last_iou": averages[-1],  # eq. 9
            "avg_iou": _mean(averages),  # eq. 10
            "ff_iou": _mean(self._forgotten(k) for k in range(count - 1)),  # eq. 12
        }

    def _task_iou(self, k: int, t: int) -> float | None:
        """Return IoU_{k,t}, with k and t from 0."""
        return _mean(self.rows[t]["iou"][label] for label in self.tasks[k])

    def _average(self, t: int) -> float | None:
        """Return IoU_t = Σ_k n_k IoU_{k,t} / Σ_k n_k, over tasks up to t: eq. 8."""
        weighted = [(self.images[k], iou) for k in range(t + 1) if (iou := self._task_iou(k, t)) is not None]
        total = sum(images for images, _ in weighted)
        return sum(images * iou for images, iou in weighted) / total if total else None

    def _forgotten(self, k: int) -> float | None:
        """Return f_{k,N} = max_j (IoU_{k,j} − IoU_{k,N}), j < N: eq. 11."""
        now = self._task_iou(k, len(self.rows) - 1)
        before = [iou for j in range(k, len(self.rows) - 1) if (iou := self._task_iou(k, j)) is not None]
        return max(before) - now if before and now is not None else None


def _is_number(value: float | None) -> bool:
    return value is not None and not math.isnan(value)


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return math.fsum(known) / len(known) if known else None
