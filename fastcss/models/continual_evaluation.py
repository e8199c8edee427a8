"""Measures how well a model segments a labelled data set, in one pass or with its adapters switched."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ..data import class_iou
from .decouplecss import DecoupleCSS
from .preprocessing import Picture, preprocess


class Evaluation(NamedTuple):
    """Holds the results of each mode.

    Attributes:
        iou: for each mode float32 ``[labels]`` on the CPU, NaN for a label in neither the labels nor the predictions.
        seconds: for each mode the time of ``segment`` for all pictures, without reading them.
        equal: share of the pixels to which all modes gave the same label.
    """

    iou: dict[str, Tensor]
    seconds: dict[str, float]
    equal: float


def evaluate(
    model: DecoupleCSS,
    dataset: Dataset,
    labels: Sequence[str],
    shortest: int,
    longest: int,
    *,
    mode: str = "one_pass",
    batch_size: int = 8,
    workers: int = 0,
    report: Callable[[int], None] | None = None,
) -> Tensor:
    """Return the IoU of every label over a data set, ``[len(labels)]``; the arguments are those of ``compare``."""
    found = compare(
        model, dataset, labels, shortest, longest, modes=(mode,), batch_size=batch_size, workers=workers, report=report
    )
    return found.iou[mode]


@torch.no_grad()
def compare(
    model: DecoupleCSS,
    dataset: Dataset,
    labels: Sequence[str],
    shortest: int,
    longest: int,
    *,
    modes: Sequence[str] = ("one_pass", "shared"),
    batch_size: int = 8,
    workers: int = 0,
    report: Callable[[int], None] | None = None,
) -> Evaluation:
    """Segment a data set in several modes, batch by batch in turn.

    Args:
        model: model with at least one task, in eval mode.
        dataset: items ``(image, labels)`` of ``fastcss.data``.
        labels: name of each label of the data set, the background first; the model's classes are among them.
        shortest, longest: sides of the detector's pictures, see ``preprocess``.
        modes: modes of ``DecoupleCSS.segment``.
        batch_size: how many pictures are read together; those of the same size are segmented together.
        workers: how many processes read pictures; 0 reads them in this one.
        report: is called with the number of further pictures that are done.

    Raises:
        ValueError: the model has no task, or a class that is not among ``labels``.
    """
    device = next(model.parameters()).device
    label_of = _labels_of(model, labels).to(device)  # [1 + C]
    metrics = {mode: class_iou(len(labels)).to(device) for mode in modes}
    seconds, pixels, equal = dict.fromkeys(modes, 0.0), 0, 0
    for batch in _batches(model, dataset, shortest, longest, batch_size, workers):
        pictures, truths = zip(*batch, strict=True)
        given = _inputs(pictures, device)
        if not pixels and len(modes) > 1:  # warms up, so that packing counts to no mode's time
            for mode in modes:
                model.segment(**given, mode=mode)
        found = {}
        for mode in modes:
            start = _now(device)
            found[mode] = [label_of[of] for of in model.segment(**given, mode=mode).labels]
            seconds[mode] += _now(device) - start
            for predicted, truth in zip(found[mode], truths, strict=True):
                metrics[mode].update(predicted, truth.to(device))
        for maps in map(torch.stack, zip(*found.values(), strict=True)):  # [modes, H, W]
            equal += int((maps == maps[0]).all(0).sum())
            pixels += maps[0].numel()
        if report is not None:
            report(len(batch))
    return Evaluation({mode: metric.compute().cpu() for mode, metric in metrics.items()}, seconds, equal / pixels)


class _Prepared(Dataset):
    """Prepares the items of a data set as ``(Picture, labels)``."""

    def __init__(self, dataset: Dataset, **sides: int) -> None:
        self._dataset, self._sides = dataset, sides

    def __len__(self) -> int:
        return len(self._dataset)  # type: ignore[arg-type]  # torch's Dataset names no length

    def __getitem__(self, item: int) -> tuple[Picture, Tensor]:
        image, labels = self._dataset[item]
        return preprocess(image, **self._sides), labels


def _batches(
    model: DecoupleCSS, dataset: Dataset, shortest: int, longest: int, batch_size: int, workers: int
) -> Iterator[list[tuple[Picture, Tensor]]]:
    """Yield batches of pictures of the same size: padding would make tokens, which could be selected."""
    prepared = _Prepared(dataset, sam_side=model.segmenter.image_size, shortest=shortest, longest=longest)
    # The loader gets its own generator, since it draws a seed for its workers, which would move the global one.
    generator = torch.Generator()
    for read in DataLoader(prepared, batch_size, num_workers=workers, collate_fn=list, generator=generator):
        groups: dict[torch.Size, list[tuple[Picture, Tensor]]] = {}
        for picture, labels in read:
            groups.setdefault(picture.pixel_values.shape, []).append((picture, labels))
        yield from groups.values()


def _inputs(pictures: Sequence[Picture], device: torch.device) -> dict:
    return {
        "pixel_values": torch.stack([picture.pixel_values for picture in pictures]).to(device),
        "sam_pixel_values": torch.stack([picture.sam_pixel_values for picture in pictures]).to(device),
        "sizes": [picture.size for picture in pictures],
        "crops": [picture.crop for picture in pictures],
    }


def _labels_of(model: DecoupleCSS, labels: Sequence[str]) -> Tensor:
    """Return the data set's label for each of the model's labels, the background first."""
    if not model.tasks:
        raise ValueError("evaluate: the model has no task yet")
    for name in model.classes:
        if name not in labels:
            raise ValueError(f"evaluate: the model's class {name!r} is none of the data set's: {', '.join(labels)}")
    return torch.tensor([0, *(labels.index(name) for name in model.classes)])


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
