"""Holds data sets, the order in which a continual model sees them, and the metrics that measure it."""

from ._pictures import read_image
from .ade import ADE20K
from .digits import CLASSES, DigitScenes
from .glyphs import GlyphScenes
from .metrics import ContinualMetrics, class_iou
from .protocol import CLASS_NAMES, SETTINGS, Overlapped, tasks, training_set
from .voc import VOC

__all__ = [
    "ADE20K",
    "CLASSES",
    "CLASS_NAMES",
    "SETTINGS",
    "VOC",
    "ContinualMetrics",
    "DigitScenes",
    "GlyphScenes",
    "Overlapped",
    "class_iou",
    "read_image",
    "tasks",
    "training_set",
]
