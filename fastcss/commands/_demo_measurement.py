"""Measures for the demo how well and how fast each mode of ``DecoupleCSS.segment`` finds the digits."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

from torch import Tensor

from .segment import MODES

if TYPE_CHECKING:
    from rich.progress import Progress
    from torch.utils.data import Dataset

    from ..data import DigitScenes
    from ..models.continual_evaluation import Evaluation
    from ..models.continual_plan import Plan
    from ..models.decouplecss import DecoupleCSS

#: These names of the modes of ``DecoupleCSS.segment`` are for people.
WAYS = dict(zip(MODES, ("one pass", "adapters switched", "everything once a task"), strict=True))
TIMED, ROUNDS = 8, 5  # how many scenes are timed, and how often
SHOWN = 4


class Times(NamedTuple):
    """Holds the seconds that one picture took, over the rounds."""

    median: float
    least: float
    most: float


class Learned(NamedTuple):
    """Holds a task's classes and their mIoU, None if there is none."""

    classes: list[str]
    iou: float | None


class Figures(NamedTuple):
    """Holds what the demo measures.

    Attributes:
        tasks: the tasks, in their order.
        iou: IoU of every label of the data set, None if there is none.
        miou: for each mode the mIoU of background and all classes.
        equal: share of the pixels to which all modes gave the same label.
        times: for each mode the times of a picture.
    """

    tasks: list[Learned]
    iou: list[float | None]
    miou: dict[str, float | None]
    equal: float
    times: dict[str, Times]


class Scene(NamedTuple):
    """Holds a picture, float32 ``[3, H, W]`` in 0…1, and int64 ``[H, W]`` of the data set's labels: true and found."""

    image: Tensor
    labels: Tensor
    found: Tensor


def measure(model: DecoupleCSS, plan: Plan, scenes: DigitScenes, progress: Progress) -> Figures:
    """Measure how well each mode segments ``scenes``, and how fast it segments the first of them one by one."""
    from torch.utils.data import Subset

    bar = progress.add_task("segmenting", total=len(scenes))
    found = _compare(model, plan, scenes, 8, lambda count: progress.advance(bar, count))
    few = Subset(scenes, range(min(TIMED, len(scenes))))
    timing = progress.add_task("timing", total=ROUNDS * len(few))
    rounds = [_compare(model, plan, few, 1, lambda count: progress.advance(timing, count)) for _ in range(ROUNDS)]
    times = {}
    for mode in MODES:
        seconds = [of.seconds[mode] / len(few) for of in rounds]
        times[mode] = Times(statistics.median(seconds), min(seconds), max(seconds))
    rows = {mode: _rows(model, plan, found.iou[mode]) for mode in MODES}
    one_pass = rows["one_pass"]
    tasks = [Learned(plan.classes(t), row["new"]) for t, row in enumerate(one_pass)]
    miou = {mode: of[-1]["all"] for mode, of in rows.items()}
    return Figures(tasks, one_pass[-1]["iou"], miou, found.equal, times)


def scenes_of(plan: Plan, count: int) -> DigitScenes:
    """Return ``count`` of the scenes that a run is evaluated on."""
    import dataclasses

    return dataclasses.replace(plan, test_scenes=count).test_data()


def learned_labels(model: DecoupleCSS, plan: Plan) -> list[int]:
    """Return the data set's labels of the classes that the model has learned."""
    return [label for labels in plan.tasks[: len(model.tasks)] for label in labels]


def to_show(scenes: DigitScenes, labels: Sequence[int]) -> list[tuple[Tensor, Tensor]]:
    """Choose a few scenes that together show many of the classes, without a look at what the model finds in them."""
    from ..data import Overlapped

    shows = {i: set(labels).intersection(scenes.digits(i)) for i in range(len(scenes))}
    chosen, seen = [], set()
    while shows and len(chosen) < SHOWN:
        best = max(shows, key=lambda i: (len(shows[i] - seen), len(shows[i])))
        seen |= shows.pop(best)
        chosen.append(best)
    overlapped = Overlapped(scenes, labels)
    return [overlapped[i] for i in chosen]


def find(model: DecoupleCSS, plan: Plan, image: Tensor, labels: Tensor) -> Scene:
    """Return a scene with what the model finds in it in one pass."""
    import torch

    from ..models.preprocessing import preprocess

    like = next(model.parameters())
    picture = preprocess(image, sam_side=model.segmenter.image_size, shortest=plan.shortest, longest=plan.longest)
    given = (picture.pixel_values[None].to(like), picture.sam_pixel_values[None].to(like))
    found = model.segment(*given, [picture.size], crops=[picture.crop]).labels[0].cpu()
    return Scene(image, labels, torch.tensor([0, *map(plan.labels.index, model.classes)])[found])


def _compare(
    model: DecoupleCSS, plan: Plan, scenes: Dataset, batch_size: int, report: Callable[[int], None]
) -> Evaluation:
    from ..data import Overlapped
    from ..models.continual_evaluation import compare

    test = Overlapped(scenes, learned_labels(model, plan))
    sides = (plan.shortest, plan.longest)
    return compare(model, test, plan.labels, *sides, modes=MODES, batch_size=batch_size, report=report)


def _rows(model: DecoupleCSS, plan: Plan, iou: Tensor) -> list[dict]:
    """Return the rows that ``ContinualMetrics`` makes of ``iou``, task by task."""
    from ..data import ContinualMetrics

    metrics = ContinualMetrics(plan.tasks, [1] * len(plan.tasks))
    return [metrics.add(iou) for _ in model.tasks]
