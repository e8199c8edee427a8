"""Modules built on the ops: a part of a segmentation model each."""

from .caa import CAALosses, CAAOutput, ClassAwareAffinity
from .cost_filter import CategoryFilter
from .lsmseg import LSMSegHead

__all__ = ["CAALosses", "CAAOutput", "CategoryFilter", "ClassAwareAffinity", "LSMSegHead"]
