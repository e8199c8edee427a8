"""Modules built on the ops: a part of a segmentation model each."""

from .caa import CAALosses, CAAOutput, ClassAwareAffinity

__all__ = ["CAALosses", "CAAOutput", "ClassAwareAffinity"]
