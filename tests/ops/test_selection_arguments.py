"""Tests bad input that only the cost filter and the selection ops know."""

from __future__ import annotations

import math
import re

import pytest
import torch
from arguments import ARGUMENTS, refused

from fastcss import ops


@pytest.mark.parametrize(
    ("op", "name"),
    [("cost_filter", "k"), ("topk_queries", "k"), ("select_tokens", "length"), ("top_classes", "k"), ("scatter", "k")],
)
def test_counts(op, name):
    calls = {
        "top_classes": lambda k: ops.top_classes(torch.ones(2, 5), k),
        "scatter": lambda k: ops.scatter_cost(KEPT, k),
    }
    call = calls.get(op, lambda value: getattr(ops, op)(**ARGUMENTS[op] | {name: value}))
    for value in (0, -3):
        with pytest.raises(
            ValueError, match=rf"{name if op != 'scatter' else 'classes'} must be at least 1, got {value}"
        ):
            call(value)
    for value in (2.0, "2", True, None):
        with pytest.raises(TypeError, match=f"must be an integer, got {type(value).__name__}"):
            call(value)


def test_text():
    for shape in ((6, 5), (5,), (1, 2, 6, 2, 5)):
        message = f"text must be [T, P, D] or [B, T, P, D], got {[*shape]}"
        refused("cost_filter", ValueError, message, text=torch.ones(shape))
        with pytest.raises(ValueError, match=rf"^pack_text: {re.escape(message)}"):
            ops.pack_text(torch.ones(shape))
    message = "text must be [B, T, P, D] with B = 2, D = 5, got [3, 6, 2, 5]"
    refused("cost_filter", ValueError, message, text=torch.ones(3, 6, 2, 5))
    refused("cost_filter", ValueError, "text must be [T, P, D] with D = 5, got [6, 2, 7]", text=torch.ones(6, 2, 7))
    packed = ops.pack_text(torch.ones(6, 2, 5, dtype=torch.float16))
    refused("cost_filter", TypeError, "text must have the dtype of image", text=packed)
    with pytest.raises(TypeError, match=r"^pack_text: text must be a floating-point tensor, got torch.int64"):
        ops.pack_text(torch.ones(6, 2, 5, dtype=torch.int64))


@pytest.mark.parametrize("shape", [(2, 0, 4, 5), (2, 3, 0, 5)])
def test_an_image_of_no_pixels(shape):
    message = f"image must have at least one pixel, got {[*shape]}"
    refused("cost_filter", ValueError, message, image=torch.ones(shape))


KEPT = ops.FilteredCost(torch.ones(2, 3, 4), torch.tensor([[4, 0, 2], [1, 3, 0]]), torch.ones(2, 3))


def test_filtered():
    for call, name in ((lambda f: ops.scatter_cost(f, 5), "scatter_cost"), (ops.filtered_argmax,) * 2):
        name = getattr(name, "__name__", name)
        with pytest.raises(TypeError, match=f"^{name}: filtered must be a FilteredCost, got tuple"):
            call(tuple(KEPT))
        with pytest.raises(
            ValueError, match=rf"^{name}: filtered.cost must be \[B, k, …\] with .* \[2, 3\], got \[3, 2\]"
        ):
            call(KEPT._replace(cost=torch.ones(3, 2)))
        with pytest.raises(ValueError, match=rf"^{name}: filtered.index must be \[B, k\], got \[6\]"):
            call(KEPT._replace(index=KEPT.index.flatten()))
    with pytest.raises(ValueError, match=r"^scatter_cost: classes must be at least the 3 kept ones, got 2"):
        ops.scatter_cost(KEPT, 2)
    half = KEPT._replace(cost=KEPT.cost.half())
    with pytest.raises(ValueError, match=r"^scatter_cost: fill must be a number that torch.float16 holds"):
        ops.scatter_cost(half, 5, fill=1e5)
    assert ops.scatter_cost(half, 5, fill=-math.inf).isinf().any()
    with pytest.raises(IndexError, match=r"^scatter_cost: filtered.index must be below classes = 4, got 4"):
        ops.scatter_cost(KEPT, 4)


@pytest.mark.parametrize("threshold", [-1.01, 1.5, math.inf, math.nan])
def test_a_cosine_is_between_minus_1_and_1(threshold):
    message = f"threshold must be a cosine in [-1, 1], got {threshold}"
    refused("select_tokens", ValueError, message, threshold=threshold)
    refused("select_tokens", TypeError, "threshold must be a number, got str", threshold="0.3")


@pytest.mark.parametrize("presence", ["mean", "", None, True])
def test_presence_is_of_all_tokens_or_of_the_best(presence):
    refused("select_tokens", ValueError, f"presence must be one of all, best, got {presence!r}", presence=presence)


@pytest.mark.parametrize(("index", "low", "high"), [([2, -2], -2, 2), ([3, 0], 0, 3), ([-1, 2**40], -1, 2**40)])
@pytest.mark.parametrize("impl", ["reference", "composed", "auto"])
def test_classes_of_prompts_in_range(index, low, high, impl):
    message = f"index must be at least -1 and below K = 3, got values from {low} to {high}"
    refused("prompt_mlp", IndexError, message, index=torch.tensor(index), impl=impl)
    for wrong in (torch.ones(2), torch.ones(2, dtype=torch.bool)):
        refused("prompt_mlp", TypeError, f"index must be a tensor of integers, got {wrong.dtype}", index=wrong)


@pytest.mark.parametrize("name", ["size", "crop"])
def test_sizes_of_masks(name):
    for wrong in (7, (7,), (7, 9, 1), "79", None):
        if name == "size" or wrong is not None:
            message = f"{name} must be (height, width), got {wrong!r}"
            refused("merge_masks", TypeError, message, **{name: wrong})
    refused("merge_masks", ValueError, f"{name}[0] must be at least 1, got 0", **{name: (0, 9)})
    refused("merge_masks", ValueError, f"{name}[1] must be at least 1, got -2", **{name: (9, -2)})
    refused("merge_masks", TypeError, f"{name}[1] must be an integer, got float", **{name: (9, 2.0)})
    message = "crop must be within 4 times masks, [16, 20], got [16, 21]"
    refused("merge_masks", ValueError, message, crop=(16, 21))
    message = "masks must have at least one pixel, got [3, 0, 5]"
    refused("merge_masks", ValueError, message, masks=torch.ones(3, 0, 5))
    for threshold in (math.nan, "0", None):
        refused("merge_masks", ValueError, f"threshold must be a number, got {threshold!r}", threshold=threshold)


def test_labels_of_margins():
    refused(
        "top_margin", ValueError, "logits must be [B, C, …] with at least two classes, got [4]", logits=torch.ones(4)
    )
    labels = ARGUMENTS["top_margin"]["labels"]
    for wrong in (labels[:, :3], labels[:1], labels[0], labels.view(2, 2, 2)):
        message = f"labels must be [B, …] = [2, 4], got {[*wrong.shape]}"
        refused("top_margin", ValueError, message, labels=wrong)
    refused("top_margin", TypeError, "labels must be a tensor of integers, got torch.float32", labels=labels.float())
    for wrong, impl in ((3, "composed"), (-1, "auto"), (2**40, "reference")):
        message = f"labels must be at least 0 and below 3, or ignore_index = 255; got values from {min(wrong, 0)}"
        refused("top_margin", IndexError, message, labels=labels.where(labels != 1, wrong), impl=impl)
