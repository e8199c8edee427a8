"""Holds modules built on the ops; each is a part of a segmentation model."""

from .caa import CAALosses, CAAOutput, ClassAwareAffinity
from .cost_filter import CategoryFilter
from .lsmseg import LSMSegHead

__all__ = ["CAALosses", "CAAOutput", "CategoryFilter", "ClassAwareAffinity", "LSMSegHead"]
