"""Measures every class's IoU with torchmetrics, and says what is wrong with a bad label map."""

from __future__ import annotations

import torch
from torch import Tensor
from torchmetrics.classification import MulticlassJaccardIndex


class ClassIoU(MulticlassJaccardIndex):
    """Measures the IoU; see ``metrics.class_iou``. It has its own file so that only its users import torchmetrics."""

    def update(self, predicted: Tensor, labels: Tensor) -> None:
        if predicted.shape != labels.shape:
            raise ValueError(
                f"class_iou: predicted and labels must be of one shape, got {list(predicted.shape)} and "
                f"{list(labels.shape)}"
            )
        counts, classes = labels != self.ignore_index, f"0 to {self.num_classes - 1}"
        _check("predicted", predicted[counts], classes, self.num_classes)
        _check("labels", labels[counts], f"{classes}, or {self.ignore_index}", self.num_classes)
        super().update(predicted.masked_fill(~counts, 0), labels)


def _check(name: str, values: Tensor, wanted: str, count: int) -> None:
    """Check ``values``, which are those that count."""
    if values.is_floating_point() or values.dtype == torch.bool:
        raise ValueError(f"class_iou: {name} must be integers, got {values.dtype}")
    if values.numel():
        least, most = (value.item() for value in values.aminmax())
        if least < 0 or most >= count:
            raise ValueError(f"class_iou: {name} must be {wanted}, got {least if least < 0 else most}")
