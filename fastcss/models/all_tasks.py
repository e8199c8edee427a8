"""Runs every task of a DecoupleCSS model on one batch: side by side in one pass, or one after the other."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .._one_pass.runner import OnePass
from .._ops.fingerprint import Contents
from ..ops import SelectedTokens
from .class_detector import DetectedClasses
from .phrase_features import phrase_features
from .prompt_generator import pack

if TYPE_CHECKING:
    from peft import PeftModel

    from .class_detector import ClassDetector
    from .task import Task


class AllTasks:
    """Packs every task's part of a trained model for one pass; a new one is made when a task is added or changed.

    Args:
        detector: PEFT's model of a ``ClassDetector``, with an adapter of every task's name.
        tasks: the tasks whose classes are searched, in this order.
        select: function of the detected tokens and classes that returns each class's tokens and presence.
    """

    def __init__(
        self, detector: PeftModel, tasks: Iterable[Task], select: Callable[[DetectedClasses], SelectedTokens]
    ) -> None:
        self._detector, self._tasks, self._select = detector, list(tasks), select
        self._contents = Contents(self._packed_tensors())
        self._devices = [tensor.device for tensor in self._contents.tensors]
        self._contents.changed()
        self._stale = False
        self._phrases = phrase_features(detector.get_base_model(), self._tasks)
        self._runner = OnePass(detector)
        widest = max(map(len, self._phrases))
        self._padded = {
            "phrases": torch.stack([_pad(phrases, widest) for phrases in self._phrases]),
            "class_mask": torch.stack([_pad(p.new_zeros(len(p), dtype=torch.bool), widest, 1) for p in self._phrases]),
        }
        self.generator = pack([task.generator for task in self._tasks])
        self.thresholds = torch.cat([task.thresholds for task in self._tasks])

    def is_stale(self, detector: PeftModel) -> bool:
        """Tell whether the packed values have changed since, or belong to another model than ``detector``, the current.

        The runner follows the rest of the detector by itself. Once stale, it stays stale, for other threads and in case
        making it anew fails.
        """
        if detector is not self._detector:
            return True
        now = self._packed_tensors()
        if len(now) != len(self._contents.tensors) or not all(map(operator.is_, now, self._contents.tensors)):
            return True
        if [tensor.device for tensor in now] != self._devices:
            return True
        self._contents.changed(self._spoil)
        return self._stale

    def _spoil(self, place: int) -> None:
        self._stale = True

    def _packed_tensors(self) -> list[Tensor]:
        detector: ClassDetector = self._detector.get_base_model()
        modules = (*self._tasks, detector.text_backbone, detector.text_projection)
        return [t for module in modules for t in (*module.parameters(), *module.buffers())]

    def detect(self, pixel_values: Tensor) -> SelectedTokens:
        """Detect all tasks' classes, with the adapters side by side."""
        names = [task.name for task in self._tasks]
        tokens, classes, shapes = self._runner(pixel_values, adapters=names, per_adapter=self._padded)
        # One call selects for all tasks. A padding row of zeros gets no token: its cosine is below any threshold.
        found = self._select(DetectedClasses(tokens.flatten(0, 1), classes.flatten(0, 1), shapes[0]))
        of_class = ~self._padded["class_mask"].flatten()
        shape = (len(names), len(pixel_values))
        return SelectedTokens(*(x.unflatten(0, shape).transpose(0, 1).flatten(1, 2)[:, of_class] for x in found))

    def detect_in_turn(self, pixel_values: Tensor) -> SelectedTokens:
        """Detect all tasks' classes, with the adapters switched one after the other."""
        found = []
        for task, phrases in zip(self._tasks, self._phrases, strict=True):
            self._detector.set_adapter(task.name)
            found.append(self._select(self._detector(pixel_values, phrases=phrases)))
        return SelectedTokens(*(torch.cat(parts, 1) for parts in zip(*found, strict=True)))


def _pad(rows: Tensor, count: int, value: float = 0) -> Tensor:
    return torch.cat([rows, rows.new_full((count - len(rows), *rows.shape[1:]), value)])
