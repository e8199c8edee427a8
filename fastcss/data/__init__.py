"""Data sets and the order in which a continual model sees them."""

from .digits import CLASSES, DigitScenes

__all__ = ["CLASSES", "DigitScenes"]
