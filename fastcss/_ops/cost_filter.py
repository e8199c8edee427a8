"""Top-k cost-map filtering: the cosine maps of the k classes that answer an image best, and of no other."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from .._dispatch import backends
from .._dispatch.autograd import Kernels, kernels, loop_vmap, once_differentiable, register_vmap
from .._dispatch.readable_values import readable
from ..composed import cost_filter as composed
from ..reference import cost_filter as reference
from ._arguments import (
    autocast,
    check_alike,
    check_count,
    check_device,
    check_floating,
    check_number,
    check_shapes,
    check_tensor,
)

PACK = kernels("pack_text")
TOP_CLASSES = kernels("top_classes")


class FilteredCost(NamedTuple):
    """Holds the classes that ``cost_filter`` keeps.

    Attributes:
        cost: ``[B, k, P, H, W]``, the cosine of each pixel with each prompt of the kept classes.
        index: int64 ``[B, k]``, the kept classes, best first; ties by lower class.
        score: ``[B, k]``, the largest cost of each over prompts and pixels; carries no gradient.
    """

    cost: Tensor
    index: Tensor  # type: ignore[assignment]  # hides a tuple's own index()
    score: Tensor


class PackedText(NamedTuple):
    """Text embeddings that do not change between calls, from ``pack_text``; they carry no gradient.

    Attributes:
        text: ``[1, T, P, D]`` shared by the batch, or ``[B, T, P, D]``.
        scale: float32 ``[1 or B, T, P]``, one over the length of each embedding.
        panels: the text as the CPU's kernel reads it, or empty.
    """

    text: Tensor
    scale: Tensor
    panels: Tensor


def cost_filter(image: Tensor, text: Tensor | PackedText, k: int, *, impl: str = "auto") -> FilteredCost:
    """Keep the ``k`` classes of the largest cosine anywhere in the image; the full cost map is never made.

    Args:
        image: ``[B, H, W, D]``, the pixels' features, any strides: a permuted ``[B, D, H, W]`` costs no copy; float32,
            bfloat16 or float16 (float64 runs composed).
        text: ``[T, P, D]``, P prompts of each of T classes for the whole batch, or ``[B, T, P, D]``, dtype of
            ``image``; or either from ``pack_text``.
        k: classes to keep, at least 1; all of them, best first, where there are no more than k.
        impl: "auto", or one of "reference", "composed", "cpu", "triton", "cuda", which runs or raises.

    Returns:
        ``FilteredCost(cost [B, k, P, H, W], index [B, k], score [B, k])``. The cosine with a row of zeros is 0; a NaN
        makes its class the best. Differentiable once in ``image`` and ``text``, through ``cost`` only.

    Raises:
        TypeError, ValueError: an argument of the wrong kind, dtype, device or shape, named in the message.
        RuntimeError: the implementation asked for cannot run here; the message says why.

    Source: LSMSeg (thesis chapter 5) eq. 5.2–5.6; CAT-Seg's aggregator at inference.

    Example:
        >>> cost_filter(torch.randn(1, 24, 24, 512), torch.randn(847, 1, 512), k=32).cost.shape
        torch.Size([1, 32, 1, 24, 24])
    """
    op = "cost_filter"
    packed = text if isinstance(text, PackedText) else None
    text = _text(op, text.text if isinstance(text, PackedText) else text)
    if packed:
        _packed(op, packed, text)
    sizes = check_shapes(op, image=(image, "B H W D"))
    wanted = "T P D" if len(text) == 1 else "B T P D"
    sizes |= check_shapes(op, image=(image, "B H W D"), text=(text[0] if len(text) == 1 else text, wanted))
    if sizes["H"] == 0 or sizes["W"] == 0:
        raise ValueError(f"{op}: image must have at least one pixel, got {list(image.shape)}")
    k = min(check_count(op, "k", k), sizes["T"])
    check_alike(op, image=image, text=text)
    given = text.dtype
    image, text = autocast(image, text)
    impl = backends.choose(op, impl, image)
    if impl == "reference":
        return FilteredCost(*reference.cost_filter(image, text, k))
    if impl == "composed":
        return FilteredCost(*composed.cost_filter(image, text, k))
    # Two empty tensors: torch.compile refuses one given twice to an autograd.Function.
    scale, panels = (image.new_empty(0, dtype=torch.float32) for _ in range(2))
    if packed and text.dtype == given:
        scale, panels = packed.scale, packed.panels if impl == "cpu" else panels
    return FilteredCost(*FORWARD[impl](image, text, scale, panels, k))


class CostFilter(torch.autograd.Function):
    """The compiled implementations with their gradients."""

    @staticmethod
    def forward(ctx, image, text, scale, panels, k, impl):
        cost, index, score = FORWARD.beneath[impl](image, text, scale, panels, k)
        ctx.impl = impl
        ctx.mark_non_differentiable(index, score)
        ctx.save_for_backward(image, text, cost, index)
        return cost, index, score

    @staticmethod
    def backward(ctx, dcost, *_):
        return *BACKWARD[ctx.impl](dcost, *ctx.saved_tensors), None, None, None, None


FORWARD = Kernels("cost_filter", CostFilter, vmap=loop_vmap)
BACKWARD = once_differentiable("cost_filter_backward", vmap=loop_vmap)
register_vmap("pack_text", loop_vmap)
register_vmap("top_classes", loop_vmap)


def pack_text(text: Tensor, *, impl: str = "auto") -> PackedText:
    """Normalise and pack text embeddings once, for many calls of ``cost_filter``.

    Args:
        text: ``[T, P, D]`` for the whole batch, or ``[B, T, P, D]``; float32, bfloat16 or float16.
        impl: the implementation that ``cost_filter`` will run.

    Returns:
        ``PackedText``; a tuple of tensors, so that ``torch.compile`` sees every one of them.

    Raises:
        TypeError, ValueError: not a tensor of such a shape and dtype.

    Example:
        >>> text = pack_text(torch.randn(847, 1, 512))
        >>> cost_filter(torch.randn(1, 24, 24, 512), text, k=32).index.shape
        torch.Size([1, 32])
    """
    text = _text("pack_text", text).detach()
    check_alike("pack_text", text=text)
    impl = backends.choose("cost_filter", impl, text)
    if impl in ("reference", "composed"):
        return PackedText(text, *(text.new_empty(0, dtype=torch.float32) for _ in range(2)))
    return PackedText(text, *PACK[impl](text, impl == "cpu"))


def top_classes(score: Tensor, k: int, *, impl: str = "auto") -> tuple[Tensor, Tensor]:
    """The ``k`` largest of each row and where they are, in order: ``torch.topk`` with its ties settled.

    Args:
        score: ``[B, T]``; float32, bfloat16 or float16 (others run composed).
        k: how many, at least 1; all where a row has no more.
        impl: "auto", or one of "reference", "composed", "cpu", "triton", "cuda", which runs or raises.

    Returns:
        values ``[B, k]`` and index int64 ``[B, k]``, best first, NaN above all numbers, ties by lower index. No
        gradient.

    Source: LSMSeg (thesis chapter 5) eq. 5.4.

    Example:
        >>> top_classes(torch.tensor([[1.0, 3.0, 2.0, 3.0]]), 2)[1]
        tensor([[1, 3]])
    """
    op = "top_classes"
    sizes = check_shapes(op, score=(score, "B T"))
    check_alike(op, score=score)
    k, score = min(check_count(op, "k", k), sizes["T"]), score.detach()
    impl = backends.choose(op, impl, score)
    if impl in ("reference", "composed"):
        return (reference if impl == "reference" else composed).top_classes(score, k)
    return TOP_CLASSES[impl](score, k)


def scatter_cost(filtered: FilteredCost, classes: int, *, fill: float = -100.0) -> Tensor:
    """Put what belongs to the kept classes back among all of them.

    Args:
        filtered: what ``cost_filter`` returned, or ``filtered._replace(cost=logits)`` with logits ``[B, k, …]`` made
            of it.
        classes: T, their number.
        fill: value of the classes that were not kept; -100 is CAT-Seg's.

    Returns:
        ``[B, T, …]``, differentiable in the cost. Where only its argmax is wanted ``filtered_argmax`` takes 1/T of the
        memory.

    Raises:
        TypeError, ValueError: an argument of the wrong kind or shape, fewer classes than were kept, or a ``fill`` that
            the dtype of the cost does not hold.
        IndexError: a kept class that is not below ``classes`` (CPU).

    Example:
        >>> filtered = cost_filter(torch.randn(1, 24, 24, 512), torch.randn(847, 1, 512), k=32)
        >>> scatter_cost(filtered, 847).shape
        torch.Size([1, 847, 1, 24, 24])
    """
    op = "scatter_cost"
    cost, index = _filtered(op, filtered)
    if check_count(op, "classes", classes) < index.shape[1]:
        raise ValueError(f"{op}: classes must be at least the {index.shape[1]} kept ones, got {classes}")
    if readable(index):
        low, high = (int(end) for end in index.aminmax())
        if low < 0 or high >= classes:
            wanted, got = ("at least 0", low) if low < 0 else (f"below classes = {classes}", high)
            raise IndexError(f"{op}: filtered.index must be {wanted}, got {got}")
    fill = check_number(op, "fill", fill)
    if torch.finfo(cost.dtype).max < abs(fill) < math.inf:
        raise ValueError(f"{op}: fill must be a number that {cost.dtype} holds, got {fill}")
    whole = cost.new_full((cost.shape[0], classes, *cost.shape[2:]), fill)
    return whole.scatter(1, _along(cost, index), cost)


def filtered_argmax(filtered: FilteredCost) -> Tensor:
    """The best class of each pixel: ``scatter_cost(filtered, T).argmax(1)`` without the scores of all T classes.

    Args:
        filtered: as in ``scatter_cost``, with the cost or logits ``[B, k, …]``.

    Returns:
        int64 ``[B, …]``, numbers among all T classes; ties go to the lower one. Classes that were not kept never win.

    Example:
        >>> filtered = cost_filter(torch.randn(1, 24, 24, 512), torch.randn(847, 1, 512), k=32)
        >>> filtered_argmax(filtered._replace(cost=filtered.cost.mean(2))).shape
        torch.Size([1, 24, 24])
    """
    cost, index = _filtered("filtered_argmax", filtered)
    by_class, order = index.sort(dim=1)
    place = cost.gather(1, _along(cost, order)).argmax(dim=1)
    return by_class.gather(1, place.flatten(1) if place.dim() > 1 else place[:, None]).view_as(place)


def _text(op: str, text: Tensor) -> Tensor:
    """Check the text and view it as [1 or B, T, P, D]."""
    wanted = "[T, P, D] or [B, T, P, D]"
    check_tensor(op, "text", text, wanted)
    if text.dim() not in (3, 4):
        raise ValueError(f"{op}: text must be {wanted}, got {list(text.shape)}")
    text = text if text.dim() == 4 else text[None]
    if 0 in text.shape[1:3]:
        raise ValueError(f"{op}: text must have at least one class and one prompt, got {list(text.shape)}")
    return text


def _packed(op: str, packed: PackedText, text: Tensor) -> None:
    for name, tensor in (("text.scale", packed.scale), ("text.panels", packed.panels)):
        check_tensor(op, name, tensor, "from pack_text")
        check_device(op, "text.text", text, name, tensor)
        if tensor.dtype != torch.float32:
            raise TypeError(f"{op}: {name} must be float32 from pack_text, got {tensor.dtype}")
    if packed.scale.numel() and packed.scale.shape != text.shape[:3]:
        raise ValueError(
            f"{op}: text.scale must be of text.text, {list(text.shape[:3])}, got {list(packed.scale.shape)}"
        )


def _along(cost: Tensor, index: Tensor) -> Tensor:
    """``index`` [B, k] for every element of ``cost`` [B, k, …]."""
    return index[(..., *(None,) * (cost.dim() - 2))].expand_as(cost)


def _filtered(op: str, filtered: FilteredCost) -> tuple[Tensor, Tensor]:
    if not isinstance(filtered, FilteredCost):
        raise TypeError(f"{op}: filtered must be a FilteredCost, got {type(filtered).__name__}")
    cost, index = filtered.cost, filtered.index
    check_shapes(op, **{"filtered.index": (index, "B k")})
    check_tensor(op, "filtered.cost", cost, "[B, k, …]")
    check_floating(op, "filtered.cost", cost)
    if cost.shape[:2] != index.shape:
        wanted = f"[B, k, …] with [B, k] = {list(index.shape)}"
        raise ValueError(f"{op}: filtered.cost must be {wanted}, got {list(cost.shape)}")
    check_device(op, "filtered.cost", cost, "filtered.index", index)
    if index.dtype != torch.int64:
        raise TypeError(f"{op}: filtered.index must be int64, got {index.dtype}")
    return cost, index
