"""Lists which classes are replaced by which fused modules, and why similar classes are not."""

from __future__ import annotations

import functools
import inspect

from torch import nn

from .bi_attention import BiMultiHeadAttention
from .deformable_attention import DeformableAttention, PixelDecoderAttention
from .fused_module import Fused, full_name
from .linear import Linear
from .sam import SamBlock, SamLayer, SegGptAttention, VitDetLayer
from .swin import DonutSwinLayer, MaskFormerSwinLayer, SwinLayer

_FORMS = (
    DeformableAttention,
    PixelDecoderAttention,
    BiMultiHeadAttention,
    SwinLayer,
    MaskFormerSwinLayer,
    DonutSwinLayer,
    SamLayer,
    SamBlock,
    VitDetLayer,
    SegGptAttention,
    Linear,
)
_FUSED: dict[str, type[Fused]] = {name: form for form in _FORMS for name in form.classes}
_MODULES = {name.rpartition(".")[0] for name in _FUSED}

_COSINE = "its attention is a cosine with a learned scale, and its bias comes from a network"
_POINTS = "it has points of its own number in each level, and scales their offsets"
_KNOWN = {
    "Swinv2Layer": _COSINE,
    "Swin2SRLayer": _COSINE,
    "RTDetrV2MultiscaleDeformableAttention": _POINTS,
    "DFineMultiscaleDeformableAttention": _POINTS,
    "Deimv2MultiscaleDeformableAttention": _POINTS,
}
_NAMES = {"MultiscaleDeformableAttention": "deformable_attention", "BiMultiHeadAttention": "bi_attention"}


def fused_form(cls: type[nn.Module]) -> type[Fused] | None:
    """Return the fused class for modules of exactly ``cls``, or None; a subclass of a known class has none."""
    return _FUSED.get(full_name(cls))


@functools.cache
def why_not_known(cls: type[nn.Module]) -> str | None:
    """Return why modules of ``cls``, which has no fused form, stay as they are; None if nobody would expect one."""
    if issubclass(cls, Fused):
        return "it is fused already"
    if cls.__name__ in _KNOWN:
        return _KNOWN[cls.__name__]
    base = next((base for base in cls.__mro__ if full_name(base) in _FUSED), None)
    if base:
        return f"it is a subclass of {base.__name__}, and may compute something else"
    op = next((op for name, op in _NAMES.items() if name in cls.__name__), None) or _called(cls)
    return op and f"it is not known to compute what {op} does"


def _called(cls: type[nn.Module]) -> str | None:
    """Return the op that the forward of ``cls`` may compute, by the names of the functions that it calls."""
    code = getattr(inspect.unwrap(inspect.getattr_static(cls, "forward")), "__code__", None)
    names = code.co_names if code else ()
    if "window_partition" in names:  # it cuts a map into windows
        return "window_attention"
    if any("decomposed_rel" in name for name in names) and cls.__module__ not in _MODULES:  # else its layer is fused
        return "relative_attention"
    return None
